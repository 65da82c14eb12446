"""Composing, checking, freezing and explaining configs. No torch is needed for any of it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

import llmscale.data.config
import llmscale.data.tokenizer
import llmscale.launch.config
import llmscale.models.config
import llmscale.stages
from llmscale.cluster.config import Transport
from llmscale.compose import choices, comments, compose, known_paths, nearest
from llmscale.config import STAGE, build, difference, from_dict, load, option, options, to_dict, to_yaml
from llmscale.engine.config import OWNED, DeepSpeedConfig, Precision
from llmscale.errors import ConfigError
from llmscale.rewards.config import AnswerConfig, LearnedConfig

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((p.parent.name, p.stem) for p in ROOT.glob("conf/experiment/*/*.yaml"))
NEEDED = {
    "pretrain": ["data.train=x"],
    "sft": ["data.train=x", "model.path=m"],
    "reward": ["data.train=x", "model.path=m"],
    "rlhf": ["data.train=x", "model.path=m"],
    "collect": ["data.train=x", "model.path=m"],
    "rollout": ["data.train=x", "model.path=m"],
    "pipeline": [],
    "generate": ["model.path=m"],
    "chat": ["model.path=m"],
    "submit": [],
}

REWARD_NEEDS = {
    "learned": ["reward.path=r"],
    "function": ["reward.path=r.py:f"],
    "regex": ["reward.pattern=x"],
    "http": ["reward.url=http://h/score"],
    "safety": ["reward.words=[w]"],
    "sum": ["reward.parts.brief=length"],
    "environment": ["environment=calculator", "data.max_seq_len=512"],
}
ENVIRONMENT_NEEDS = {"calculator": [], "class": ["environment.path=e.py:E"]}


def composed(stage: str, *overrides: str, config_dir: Path | None = None) -> Any:
    return compose(stage, [*NEEDED[stage], *overrides], str(config_dir) if config_dir else None)


def refused(stage: str, *overrides: str, config_dir: Path | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        composed(stage, *overrides, config_dir=config_dir)
    error = caught.value
    assert error.exit_code == 2
    assert error.where and error.what and error.fix, "an error says where, what, and what to do"
    assert "\n" not in error.what
    return error


# ---------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("stage", sorted(NEEDED))
def test_every_stage_composes_and_survives_freezing(stage: str, tmp_path: Path):
    config = composed(stage)
    frozen = tmp_path / "config.yaml"
    frozen.write_text(to_yaml(config))
    assert load(frozen) == config
    assert from_dict(type(config), yaml.safe_load(to_yaml(config))) == config


def test_the_stages_are_all_here():
    assert set(options(STAGE)) == set(NEEDED) == {p.stem for p in ROOT.glob("conf/*.yaml")}


@pytest.mark.parametrize(("experiment", "stage"), EXPERIMENTS)
def test_every_experiment_composes_and_survives_freezing(experiment: str, stage: str, tmp_path: Path):
    needed = [n for n in NEEDED[stage] if not n.startswith("reward.path")]  # an experiment says what its reward is
    config = compose(stage, [*needed, f"experiment={experiment}"])
    frozen = tmp_path / "config.yaml"
    frozen.write_text(to_yaml(config))
    assert load(frozen) == config
    assert config.run.name == experiment


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        (stage, f"{group}={name}")
        for stage in ("pretrain", "rlhf")
        for group in ("model", "engine", "cluster", "algorithm", "reward", "rollout", "environment", "chaos")
        for name in choices(group)
        if stage == "rlhf" or group in ("model", "engine", "cluster")
    ],
)
def test_every_choice_composes(stage: str, override: str, request: pytest.FixtureRequest):
    of_reward = override.partition("=")[2] if override.startswith("reward=") else "learned"
    needed = [n for n in NEEDED[stage] if not n.startswith("reward.path")]
    more = [*(REWARD_NEEDS.get(of_reward, []) if stage == "rlhf" else [])]
    group, _, name = override.partition("=")
    more += [*ENVIRONMENT_NEEDS[name], "data.max_seq_len=512"] if group == "environment" else []
    more += ["rollout.path=r"] if override == "rollout=replay" else []
    more += ["engine=deepspeed"] if override.startswith("cluster=") else []  # some have several ranks
    more += ["cluster=ray"] if group == "chaos" else []
    if override == "rollout=vllm":
        request.getfixturevalue("vllm_installed")
        more.append("cluster=ray")
    assert compose(stage, [*needed, override, *more]).stage == stage


def test_composing_leaves_no_state_behind():
    first = composed("pretrain", "optim.lr=0.5")
    assert not GlobalHydra.instance().is_initialized()
    refused("pretrain", "nonsense=1")
    assert not GlobalHydra.instance().is_initialized()
    assert composed("rlhf").optim.lr == 1e-4
    assert composed("pretrain").optim.lr == 1e-3
    assert composed("pretrain", "optim.lr=0.5") == first


# ---------------------------------------------------------------- values reach the config unchanged

TEXTS = [
    "a,b",
    "a=b",
    "a\\b",
    "a\\\\b",
    "ends in \\",
    'say "hi"',
    '"hi" he said "yo"',
    "it's",
    "'a\\'",
    'a\\"b',
    "\\\\server\\share\\",
    "[1,2]",
    "{a:1}",
    "x: y",
    " room around ",
    "two\nlines",
    "tab\t",
    "$HOME 50% a#b (c",
    "5",
    "true",
    "é \u2028 🎈",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is(text: str):
    assert composed("generate", f"prompt={text}").prompt == text


def test_quoting_in_the_manner_of_hydra_still_works():
    assert composed("generate", 'prompt="a, b"').prompt == "a, b"
    assert composed("generate", "prompt='a, b'").prompt == "a, b"
    assert composed("generate", "prompt=null").prompt is None
    assert composed("rlhf", "reward.path=${model.path}").reward.path == "m"
    assert composed("generate", r"prompt=a \${b}").prompt == "a ${b}"


def test_lists_and_open_mappings_need_no_plus():
    config = composed(
        "pretrain",
        "optim.betas=[0.8,0.9]",
        "data.columns.text=body, or so",
        "model.overrides.rope_theta=5",
        "cluster.trainer.resources={tpu: 1.5}",
        "+model.overrides.a.b=c",
    )
    assert config.optim.betas == [0.8, 0.9]
    assert config.data.columns == {"text": "body, or so"}
    assert config.model.overrides == {"rope_theta": 5, "a": {"b": "c"}}
    assert config.cluster.trainer.resources == {"tpu": 1.5}
    assert composed("pipeline", "stages=[sft,rlhf]").stages == ["sft", "rlhf"]


def test_a_choice_can_be_taken_back():
    assert isinstance(composed("rlhf", "experiment=demo").true_reward, AnswerConfig)
    assert composed("rlhf", "experiment=demo", "true_reward=null").true_reward is None
    assert composed("rlhf", "experiment=demo", "experiment=null") == composed("rlhf")


def test_a_field_is_chosen_by_its_own_name():
    config = composed("rlhf", "true_reward=learned", "true_reward.path=p")
    assert config.true_reward == LearnedConfig(path="p")
    assert config == composed("rlhf", "reward@true_reward=learned", "true_reward.path=p")


# ---------------------------------------------------------------- unknown names


@pytest.mark.parametrize(
    ("stage", "override", "where", "hint"),
    [
        ("pretrain", "data.max_seq_lenn=3", "data.max_seq_lenn", "Did you mean data.max_seq_len?"),
        ("pretrain", "optm.lr=3", "optm", "Did you mean optim?"),
        ("pretrain", "lr=3", "lr", "Did you mean optim.lr?"),
        ("pretrain", "optim.learning_rate=3", "optim.learning_rate", "optim has: optimizer, lr, betas"),
        ("pretrain", "cluster.rolout.num_gpus=1", "cluster.rolout", "Did you mean cluster.rollout?"),
        ("rlhf", "critic.optim.lrr=3", "critic.optim.lrr", "Did you mean critic.optim.lr?"),
        ("pretrain", "enginee=single", "enginee", "Did you mean engine?"),
        ("pretrain", "+key=1", "key", "llmscale pretrain --help"),
        ("pretrain", "++optim.lrr=1", "optim.lrr", "Did you mean optim.lr?"),
        ("pretrain", "engine.zero_stage=2", "engine.zero_stage", "Choose engine=deepspeed"),
        ("rlhf", "true_reward.match=exact", "true_reward.match", "Choose true_reward=answer"),
        ("pretrain", "algorithm=ppo", "algorithm", "rlhf.algorithm"),
        ("rlhf", "training.num_epochs=2", "training.num_epochs", "pretrain.training.num_epochs"),
    ],
)
def test_an_unknown_key_gets_the_nearest_right_one(stage: str, override: str, where: str, hint: str):
    error = refused(stage, override)
    assert error.where == where
    assert "key" in error.what or "belongs to" in error.what
    assert hint in str(error)
    assert f"Did you mean {where}?" not in str(error)


def test_no_far_fetched_guess():
    assert "Did you mean" not in str(refused("pretrain", "optim.learning_rate=3"))


@pytest.mark.parametrize(
    ("override", "where", "hints"),
    [
        ("engine=deepsped", "engine", ["Did you mean deepspeed?", "deepspeed, single"]),
        ("engine=fsdp", "engine", ["deepspeed, single"]),
        ("model=tny", "model", ["Did you mean tiny?", "pretrained, small, tiny"]),
        ("experiment=dmo", "experiment", ["Did you mean demo?", "demo, real"]),
        ("experiment=", "experiment", ["demo, real"]),
        ("experiment=[demo,real]", "experiment", ["demo, real"]),
    ],
)
def test_an_unknown_choice_lists_those_there_are(override: str, where: str, hints: list[str]):
    error = refused("pretrain", override)
    assert error.where == where
    assert all(hint in str(error) for hint in hints)
    assert "_schema" not in str(error)


def test_an_experiment_that_has_nothing_for_this_stage():
    assert "generate" in str(refused("generate", "experiment=demo"))


@pytest.mark.parametrize("override", ["~optim", "~optim.lr", "~nothing", "~engine", "foo", "optim.lr", "=3", "1"])
def test_what_is_no_assignment_is_refused(override: str):
    assert refused("pretrain", override).where == override


# ---------------------------------------------------------------- wrong types


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=abc", "a number, is abc"),
        ("optim.lr=", "a number, is empty"),
        ("optim.lr=null", "a number, is null"),
        ("training.global_batch_size=1.5", "a whole number, is 1.5"),
        ("training.num_steps=10k", "a whole number or null, is 10k"),
        ("engine.activation_checkpointing=maybe", "true or false, is maybe"),
        ("engine.precision=fp16", "one of fp32, bf16, is fp16"),
        ("tracking.wandb=no", "one of auto, offline, online, disabled, is no"),
        ("optim.schedule=step", "one of constant, linear, cosine, wsd, is step"),
        ("optim.optimizer=adam", "one of adamw, lion, muon, is adam"),
        ("optim.betas=0.9", "a list"),
        ("optim.betas=[0.9,a]", "a number"),
        ("data.columns=3", "a mapping"),
        ("optim=3", "holds keys of its own"),
        ("optim=null", "holds keys of its own"),
    ],
)
def test_a_wrong_type_says_which_is_right(override: str, expected: str):
    error = refused("pretrain", override)
    assert str(error.where).split("[")[0] == override.partition("=")[0]
    assert expected in error.what


@pytest.mark.parametrize("value", ["1,2", "choice(1,2)", "[", "=3", "range(1,3)"])
def test_a_sweep_or_half_a_value_is_no_value(value: str):
    error = refused("pretrain", f"optim.lr={value}")
    assert error.where == "optim.lr"


@pytest.mark.parametrize(("value", "named"), [("${nothing}", "nothing"), ("${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH")])
def test_an_interpolation_of_nothing(value: str, named: str):
    error = refused("pretrain", f"data.validation={value}")
    assert error.where == "data.validation"
    assert named in error.what


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_are_finite(number: str):
    for path in ("optim.lr", "cluster.collective_timeout_s", "optim.grad_clip"):
        assert refused("pretrain", f"{path}={number}").where == path


# ---------------------------------------------------------------- missing and impossible


@pytest.mark.parametrize(
    ("stage", "overrides", "where"),
    [
        ("pretrain", [], "data.train"),
        ("sft", ["data.train=x"], "model.path"),
        ("reward", ["data.train=x"], "model.path"),
        ("rlhf", ["data.train=x", "reward.path=r"], "model.path"),
        ("rlhf", ["data.train=x", "model.path=m", "reward=null"], "reward"),
        ("rlhf", ["data.train=x", "model.path=m", "reward=function"], "reward.path"),
        ("generate", [], "model.path"),
        ("pretrain", ["data.train=x", "engine=null"], "engine"),
        ("pretrain", ["data.train=x", "optim.lr=???"], "optim.lr"),
    ],
)
def test_a_missing_value_is_named(stage: str, overrides: list[str], where: str):
    with pytest.raises(ConfigError) as caught:
        compose(stage, overrides)
    assert caught.value.where == where
    assert caught.value.fix


@pytest.mark.parametrize(
    ("stage", "overrides", "where"),
    [
        ("pretrain", ["cluster.trainer.num_workers=2"], "cluster.trainer.num_workers"),
        ("rlhf", ["cluster=ray", "cluster.critic.num_workers=2"], "cluster.critic.num_workers"),
        ("rlhf", ["cluster.rollout.num_workers=2"], "cluster.rollout.num_workers"),
        ("rlhf", ["cluster.transport=object_store"], "cluster.transport"),
        ("rlhf", ["cluster.transport=broadcast"], "cluster.transport"),
        ("rlhf", ["cluster=ray", "cluster.transport=direct"], "cluster.transport"),
        ("rlhf", ["cluster=ray", "cluster.transport=cuda_ipc"], "cluster.transport"),
        ("rlhf", ["cluster=colocated", "cluster.transport=broadcast"], "cluster.transport"),
        ("rlhf", ["cluster=ray", "cluster.colocated=[policy]"], "cluster.colocated"),
        ("rlhf", ["cluster=ray", "cluster.colocated=[policy,critic]"], "cluster.colocated"),
        ("rlhf", ["cluster=ray", "cluster.colocated=[policy,reward,rollout]"], "cluster.colocated"),
        ("rlhf", ["cluster=ray", "cluster.colocated=[policy,rollout,rollout]"], "cluster.colocated"),
        ("rlhf", ["cluster=colocated", "cluster.rollout.num_workers=2"], "cluster.rollout.num_workers"),
        (
            "rlhf",
            ["cluster=colocated", *(f"cluster.rollout.{m}_workers=3" for m in ("min", "max"))],
            "cluster.rollout.max_workers",
        ),
        ("rlhf", ["cluster=colocated", "cluster.rollout.num_gpus=1"], "cluster.rollout.num_gpus"),
        ("rlhf", ["cluster=colocated", "cluster.policy.num_gpus=0.5"], "cluster.policy.num_gpus"),
        ("rlhf", ["cluster=colocated", "engine=deepspeed", "engine.zero_stage=3"], "engine.zero_stage"),
        ("pretrain", ["data.max_seq_len=5000"], "data.max_seq_len"),
        ("rlhf", ["rollout.max_new_tokens=256"], "rollout.max_new_tokens"),
        ("rlhf", ["algorithm.global_batch_size=65"], "algorithm.global_batch_size"),
        ("rlhf", ["rollout.temperature=0"], "rollout.temperature"),
        ("rlhf", ["chaos=all"], "chaos"),
        ("rlhf", ["cluster=ray", "chaos=faults", "chaos.kill=[polcy]"], "chaos.kill"),
        ("rlhf", ["cluster=ray", "chaos=faults", "chaos.every_s=0"], "chaos.every_s"),
        ("rlhf", ["cluster=ray", "chaos=faults", "chaos.cut=[rollout]"], "chaos.cut"),
        ("rlhf", ["cluster=ray", "chaos=faults", "chaos.fill=true", "run.dir=/dev/shm"], "chaos.fill"),
        ("rlhf", ["rollout.top_p=0.9"], "rollout"),
        ("rlhf", ["rollout.top_k=5"], "rollout"),
        ("rlhf", ["training.keep_checkpoints=0"], "training.keep_checkpoints"),
        ("pretrain", ["engine=deepspeed", "engine.zero_stage=0"], "engine.zero_stage"),
        ("pretrain", ["engine=deepspeed", "engine.zero_stage=4"], "engine.zero_stage"),
        ("pretrain", ["data.validation=v", "data.validation_fraction=0.1"], "data.validation_fraction"),
        ("pretrain", ["objective=ranking"], "objective"),
        ("reward", ["objective=causal_lm"], "objective"),
        ("pretrain", ["stage=sft"], "stage"),
        ("pretrain", ["engine.name=deepspeed"], "engine.name"),
        ("pretrain", ["run.name="], "run.name"),
        ("pretrain", ["run.name=../other"], "run.name"),
        ("pretrain", ["run.name=/tmp/other"], "run.name"),
        ("pretrain", ["run.seed=-1"], "run.seed"),
        ("pretrain", ["model.dropout=1.5"], "model.dropout"),
        ("pretrain", ["model.num_heads=3"], "model.num_heads"),
        ("pretrain", ["model.num_kv_heads=3"], "model.num_kv_heads"),
        ("pretrain", ["model.num_kv_heads=0"], "model.num_kv_heads"),
        ("pretrain", ["model.intermediate_size=0"], "model.intermediate_size"),
        ("pretrain", ["model.vocab_size=260"], "model.vocab_size"),
        ("pretrain", ["optim.betas=[0.9]"], "optim.betas"),
        ("pretrain", ["engine=deepspeed", "optim.optimizer=muon"], "optim.optimizer"),
        ("rlhf", ["engine=deepspeed", "optim.optimizer=muon"], "optim.optimizer"),
        ("rlhf", ["engine=deepspeed", "critic.optim.optimizer=muon"], "critic.optim.optimizer"),
        ("pretrain", ["plugins=[no_such_module]"], "plugins"),
        ("pipeline", ["stages=[]"], "stages"),
    ],
)
def test_the_impossible_is_refused(stage: str, overrides: list[str], where: str):
    assert refused(stage, *overrides).where == where


@pytest.mark.parametrize(
    ("stage", "overrides", "where", "fix"),
    [
        ("rlhf", ["cluster=local"], "rollout", "cluster=ray"),
        ("collect", ["cluster=local", "method=best_of_n"], "rollout", "cluster=ray"),
        ("collect", ["cluster=ray", "method=beam"], "rollout", "Choose it"),
        ("rlhf", ["cluster=ray", "rollout.gpu_memory_share=1.5"], "rollout.gpu_memory_share", "0.9"),
        ("generate", [], "rollout", "hf"),
        ("chat", [], "rollout", "hf"),
    ],
)
def test_where_vllm_cannot_be_used(vllm_installed: None, stage: str, overrides: list[str], where: str, fix: str):
    error = refused(stage, "rollout=vllm", *overrides)
    assert error.where == where and fix in str(error.fix)


def test_vllm_that_is_not_installed_is_found_before_work_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llmscale.rollout.config.find_spec", lambda name: None)
    error = refused("rlhf", "rollout=vllm", "cluster=ray")
    assert error.where == "rollout.name" and "make vllm" in str(error.fix)


def test_the_transport_is_chosen_by_where_the_workers_are():
    carried = {
        "local": Transport.direct,
        "ray": Transport.object_store,
        "colocated": Transport.object_store,
        "gpus": Transport.broadcast,
    }
    for name, transport in carried.items():
        assert composed("rlhf", f"cluster={name}", "engine=deepspeed").cluster.carried_by is transport
    assert composed("rlhf", "cluster=ray", "cluster.transport=file").cluster.carried_by is Transport.file
    composed("collect", "cluster=colocated", "method=best_of_n")  # whose rollouts share with nobody


def test_an_optimizer_that_zero_breaks_names_those_that_it_does_not():
    error = refused("pretrain", "engine=deepspeed", "optim.optimizer=muon")
    assert "flat pieces" in error.what and "optim.optimizer=adamw or lion" in str(error.fix)
    for overrides in (["optim.optimizer=muon"], ["engine=deepspeed", "optim.optimizer=lion"]):
        composed("pretrain", *overrides)


@pytest.mark.parametrize("path", sorted(OWNED))
def test_deepspeed_overrides_cannot_contradict_typed_values(path: str):
    error = refused("pretrain", "engine=deepspeed", f"engine.overrides.{path}=1")
    assert error.where == f"engine.overrides.{path}"
    assert OWNED[path] in str(error.fix)


def test_other_deepspeed_overrides_pass():
    engine = composed("pretrain", "engine=deepspeed", "engine.overrides.zero_optimization.overlap_comm=true").engine
    assert engine == DeepSpeedConfig(overrides={"zero_optimization": {"overlap_comm": True}})


def test_the_smallest_vocabulary_is_that_of_our_tokenizer():
    assert llmscale.models.config.MIN_VOCAB_SIZE == llmscale.data.tokenizer.MIN_VOCAB_SIZE


# ---------------------------------------------------------------- a user's own folder


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def test_own_options_and_experiments(tmp_path: Path):
    folder = tmp_path / "a folder, with = and [signs]"
    write(folder, "engine/careful.yaml", "defaults: [single_schema]\nprecision: bf16\n")
    write(folder, "experiment/mine/pretrain.yaml", "# @package _global_\noptim: {lr: 0.5}\n")
    config = composed("pretrain", "engine=careful", "experiment=mine", config_dir=folder)
    assert (config.engine.name, config.engine.precision, config.optim.lr) == ("single", Precision.bf16, 0.5)
    error = refused("pretrain", "experiment=min", config_dir=folder)
    assert "demo, mine, real" in str(error)
    error = refused("sft", "experiment=mine", config_dir=folder)
    assert "demo, real" in str(error), "an experiment without this stage is not offered"
    assert "careful, deepspeed, single" in str(refused("pretrain", "engine=x", config_dir=folder))


@pytest.mark.parametrize(
    ("yaml_text", "where"),
    [
        ("optim: {lrr: 0.5}", "optim.lrr"),
        ("key: 1", "key"),
        ("optim: {lr: abc}", "optim.lr"),
        ("optim: {lr: -1}", "optim.lr"),
        ("defaults: [override /engine: nothing]", "engine"),
        ("engine: {zero_stage: 1}", "engine.zero_stage"),
        ("optim: 3", "experiment/mine/pretrain.yaml"),
    ],
)
def test_own_yaml_is_checked_as_strictly(tmp_path: Path, yaml_text: str, where: str):
    write(tmp_path, "experiment/mine/pretrain.yaml", f"# @package _global_\n{yaml_text}\n")
    assert refused("pretrain", "experiment=mine", config_dir=tmp_path).where == where


def test_own_yaml_that_is_none(tmp_path: Path):
    write(tmp_path, "experiment/mine/pretrain.yaml", "# @package _global_\noptim: {lr: [\n")
    assert str(refused("pretrain", "experiment=mine", config_dir=tmp_path).where).endswith("mine/pretrain.yaml:3")


def test_an_option_without_schema_says_what_it_lacks(tmp_path: Path):
    write(tmp_path, "engine/mine.yaml", "precision: bf16\n")
    error = refused("pretrain", "engine=mine", config_dir=tmp_path)
    assert error.where == "engine.name"
    assert "_schema" in str(error.fix)


def test_no_class_of_a_yaml_is_instantiated(tmp_path: Path):
    write(tmp_path, "engine/evil.yaml", f"_target_: pathlib.Path.touch\nself: {tmp_path / 'made'}\n")
    refused("pretrain", "engine=evil", config_dir=tmp_path)
    assert not (tmp_path / "made").exists()


# ---------------------------------------------------------------- freezing and comparing


@dataclass
class Inner:
    api_key: str | None = "abc"
    hub_token: str = "abc"
    tokenizer: str = "plain"
    keys: list[str] = field(default_factory=lambda: ["a"])


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    open: dict[str, Any] = field(default_factory=lambda: {"password": "abc", "max_tokens": 3})
    precision: Precision = Precision.bf16


def test_secrets_do_not_reach_the_frozen_file():
    assert to_dict(Outer()) == {
        "inner": {"api_key": "<redacted>", "hub_token": "<redacted>", "tokenizer": "plain", "keys": ["a"]},
        "open": {"password": "<redacted>", "max_tokens": 3},
        "precision": "bf16",
    }
    assert "abc" not in to_yaml(Outer())
    assert to_dict(Inner(api_key=None))["api_key"] is None


def test_difference_names_every_leaf():
    old = {"a": {"b": 1, "c": {}, "gone": 2}, "same": [1]}
    new = {"a": {"b": 2, "c": {"d": 3}}, "same": [1], "fresh": None}
    assert difference(old, new) == [
        "a.b: 1 -> 2",
        "a.c: {} -> (absent)",
        "a.gone: 2 -> (absent)",
        "a.c.d: (absent) -> 3",
        "fresh: (absent) -> None",
    ]
    assert difference(old, old) == []


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("optim.l", None),
        ("optim.lrs", "optim.lr"),
        ("lr", "optim.lr"),
        ("optim.warmup_step", "optim.warmup_steps"),
        ("traning.num_step", "training.num_steps"),
        ("training.lr", "optim.lr"),
        ("zzzz", None),
    ],
)
def test_nearest(path: str, found: str | None):
    assert nearest(path, ["optim.lr", "optim.warmup_steps", "training.num_steps"]) == found


# ---------------------------------------------------------------- the registry


def test_two_classes_cannot_have_one_name():
    with pytest.raises(ConfigError, match="registered twice"):

        @option("engine", "single")
        class Another:
            pass

    assert options("engine")["single"].config.__name__ == "SingleConfig"


def test_what_is_not_registered_cannot_be_built():
    with pytest.raises(ConfigError, match="Outer"):
        build(Outer())


def test_every_path_of_a_config_is_known():
    for stage in NEEDED:
        paths = known_paths(stage)
        for path, _ in _leaves_of(composed(stage)):
            assert path in paths


def _leaves_of(config: Any, prefix: str = ""):
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves_of(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def test_comments_stand_behind_or_above_a_field():
    texts = comments(DeepSpeedConfig)
    assert texts["zero_stage"].startswith("1 shards optimizer state")
    assert texts["micro_batch_size"].startswith("Full-length sequences"), "inherited, and over several lines"
    above = comments(llmscale.data.config.DataConfig)["train"]
    assert re.match(r"\.txt, \.jsonl", above)


def test_an_experiment_decides_over_the_stage():
    assert (composed("rlhf").optim.lr, composed("rlhf", "experiment=demo").optim.lr) == (1e-4, 3e-4)
