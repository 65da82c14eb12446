"""LoRA on the command line: the policy is an adapter, its base the reference, and both leave as one model or apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmscale.stages  # noqa: F401  registers what a config can name
from llmscale.config import build, load, to_yaml
from llmscale.data.chat import ChatRenderer
from llmscale.models.loading import load_language_model, load_tokenizer
from llmscale.protocols import SamplingRequest
from llmscale.stages.rlhf_config import Publish
from llmscale.stages.roles import PolicyRole, ReferenceRole, RolloutRole
from tests.stages.runs import arguments, kill_when, records, run, succeed, weights, without_times
from tests.tiny import prompt

LORA = [
    *("experiment=lora", "run.name=demo", "model.adapter.rank=4", "model.adapter.alpha=8", "optim.lr=0.01"),
    *("rollout.group_size=4", "training.prompts_per_step=8", "training.num_steps=4", "optim.warmup_steps=0"),
]
NUM_TRAINED = 4 * (4 * (32 + 32) + 3 * (32 + 64))  # rank x inputs and outputs of every linear layer of the tiny model
REQUESTS = [SamplingRequest(prompt([5, 6, 7 + i]), draw_id=i, sample_index=0) for i in range(6)]


def rlhf(run_dir: Path, chain: Path, *overrides: str) -> list[str]:
    """With the learned reward: so small a model never sorts a word, and the rule would teach it nothing."""
    paths = [f"model.path={chain}/demo/sft", f"reward.path={chain}/demo/reward"]
    return arguments("rlhf", run_dir, *LORA, "reward=learned", *paths, *overrides)


@pytest.fixture(scope="module")
def finished(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a finished run."""
    tmp_path = tmp_path_factory.mktemp("lora")
    succeed(rlhf(tmp_path, chain), tmp_path / "log")
    return tmp_path / "demo" / "rlhf"


def test_the_plan_says_what_is_trained_and_no_reference_is_loaded(finished: Path) -> None:
    events = {e["kind"]: e for e in records(finished / "events.jsonl")}
    assert events["plan"]["trained_parameters"] == NUM_TRAINED < events["plan"]["parameters"] / 4
    assert events["plan"]["reference"] == "the policy without its adapter"
    assert events["pools_up"]["workers"].keys() == {"policy", "reward", "rollout"}
    first, *later = records(finished / "metrics.jsonl")[1:]
    assert abs(first["kl/ref"]) < 1e-6 < 1e-4 < min(step["kl/ref"] for step in later)
    assert all(step["rollout/logprob_diff"] < 1e-4 for step in [first, *later])


def test_sampling_is_the_same_whichever_way_the_weights_are_published(
    finished: Path, chain: Path, tmp_path: Path
) -> None:
    succeed(rlhf(tmp_path, chain, "publish=adapter"), tmp_path / "log")
    own = tmp_path / "demo" / "rlhf"
    sampled, expected = ([s["token_ids"] for s in records(d / "samples.jsonl")] for d in (own, finished))
    assert sampled == expected
    assert all(step["rollout/logprob_diff"] < 1e-4 for step in records(own / "metrics.jsonl")[1:])


def trained_policy(finished: Path, publish: Publish, tmp_path: Path) -> tuple[PolicyRole, str]:
    """The policy of the last checkpoint, and the config that it was built from."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(replace(load(finished / "config.yaml"), publish=publish)))
    policy = PolicyRole(str(file))
    policy.load(str(finished / "checkpoints" / "step-000004" / "policy"))
    return policy, str(file)


@pytest.mark.parametrize("publish", Publish)
def test_a_rollout_worker_samples_what_one_with_the_exported_model_samples(
    finished: Path, tmp_path: Path, publish: Publish
) -> None:
    policy, config_file = trained_policy(finished, publish, tmp_path)
    worker = RolloutRole(config_file)
    before = worker.generate(REQUESTS)
    worker.load_weights(1, policy.publish(1, None))
    tokenizer, config = load_tokenizer(str(finished)), load(Path(config_file))
    stop_ids = ChatRenderer(tokenizer).stop_ids
    fresh = build(config.rollout, load_language_model(str(finished)), tokenizer, config.run.seed, stop_ids)
    sampled, expected = worker.generate(REQUESTS), fresh.generate(REQUESTS)
    for one, other in zip(sampled, expected, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.abs(one.rollout_logprobs - other.rollout_logprobs).max() <= (
            1e-5 if publish is Publish.adapter else 0
        )
    assert any(not np.array_equal(a.rollout_logprobs, b.rollout_logprobs) for a, b in zip(before, sampled, strict=True))


def test_the_policy_without_its_adapter_says_what_a_reference_says(finished: Path, tmp_path: Path) -> None:
    policy, config_file = trained_policy(finished, Publish.merged, tmp_path)
    trajectories = RolloutRole(config_file).generate(REQUESTS)
    own, reference = policy.ref_logprobs(trajectories), ReferenceRole(config_file).logprobs(trajectories)
    assert all(np.array_equal(a, b) for a, b in zip(own, reference, strict=True))
    now = policy.logprobs(trajectories)
    assert max(np.abs(a - b).max() for a, b in zip(own, now, strict=True)) > 1e-3


def test_a_killed_run_continues_as_if_nothing_had_happened(finished: Path, chain: Path, tmp_path: Path) -> None:
    argv = rlhf(tmp_path, chain)
    run_dir = tmp_path / "demo" / "rlhf"
    kill_when((run_dir / "checkpoints" / "step-000002").exists, argv, tmp_path / "log")
    assert not (run_dir / "result.json").exists()
    succeed(argv, tmp_path / "log")
    assert weights(run_dir) == weights(finished)
    one, other = (without_times(records(d / "metrics.jsonl")) for d in (run_dir, finished))
    assert one == other
    first, second = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (run_dir, finished))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_sft_leaves_one_model_and_an_adapter_that_peft_loads(chain: Path, tmp_path: Path) -> None:
    base = chain / "demo" / "pretrain"
    overrides = ["model.adapter=lora", f"model.path={base}", "optim.lr=0.01", "optim.ema_decay=0.9"]
    succeed(arguments("sft", tmp_path, *overrides), tmp_path / "log")
    run_dir, ids = tmp_path / "demo" / "sft", torch.arange(3, 40)[None]
    start, merged = (AutoModelForCausalLM.from_pretrained(d / "hf") for d in (base, run_dir))
    before = start(ids).logits
    both = peft.PeftModel.from_pretrained(start, run_dir / "adapter")(ids).logits
    assert (both - merged(ids).logits).abs().max() < 1e-4 < 1e-2 < (both - before).abs().max()
    argv = ["generate", f"model.path={run_dir}", "prompt=sort jabba", "rollout.max_new_tokens=4"]
    assert succeed(argv, tmp_path / "said")


def test_a_checkpoint_holds_the_adapter_alone_and_is_exported_as_the_run_wrote_it(
    finished: Path, tmp_path: Path
) -> None:
    (state,) = (finished / "checkpoints" / "step-000004" / "policy").iterdir()
    names = {name.rpartition("|")[0] for name in load_file(state)}
    assert names and all(".lora_" in name for name in names)
    out = tmp_path / "out"
    succeed(["checkpoint", "export", str(finished), str(out)], tmp_path / "log")
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (finished / "hf").iterdir())
    for file in out.iterdir():
        assert file.read_bytes() == (finished / "hf" / file.name).read_bytes(), file.name


def test_another_base_under_the_same_path_is_noticed(chain: Path, finished: Path, tmp_path: Path) -> None:
    base = copytree(chain / "demo" / "sft", tmp_path / "base", symlinks=True)
    argv = rlhf(tmp_path, chain, f"model.path={base}")
    run_dir = tmp_path / "demo" / "rlhf"
    kill_when((run_dir / "checkpoints" / "step-000002").exists, argv, tmp_path / "log")
    file = base / "hf" / "model.safetensors"
    changed = {name: value + 1 if name == "model.norm.weight" else value for name, value in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    commands = {"resume": argv, "export": ["checkpoint", "export", str(run_dir), str(tmp_path / "out")]}
    for name, command in commands.items():
        assert run(command, tmp_path / name) == 1
        said = (tmp_path / name).read_text()
        assert "the model there is not the one that this run's adapter was trained on" in said
        assert str(base) in said and "another run.name" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("stage", "overrides", "says"),
    [
        (
            "rlhf",
            ["model.adapter.target_modules=[q_prj]"],
            "model.adapter.target_modules: the blocks of a LlamaForCausal",
        ),
        ("rlhf", ["model.adapter.rank=0"], "model.adapter.rank: must be at least 1"),
        ("rlhf", ["model.adapter=null", "publish=adapter"], "publish: there is no adapter to publish"),
        ("sft", ["engine=deepspeed", "engine.tensor_parallel_size=2"], "engine.tensor_parallel_size: AutoTP cuts no"),
        ("reward", [], "model.adapter: reward trains a new scalar head"),
        ("collect", [], "model.adapter: collect trains nothing"),
        ("pretrain", ["model.path=null"], "model.adapter: a new model has learned nothing yet"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(
    chain: Path, tmp_path: Path, stage: str, overrides: list[str], says: str
) -> None:
    common = ["experiment=demo", f"run.dir={tmp_path}", f"model.path={chain}/demo/sft", "tracking.wandb=disabled"]
    adapter = [] if "model.adapter=null" in overrides else ["model.adapter=lora"]
    overrides = [o for o in overrides if o != "model.adapter=null"]
    more = ["reward=answer", "algorithm=grpo"] if stage == "rlhf" else []
    assert run([stage, *common, *adapter, *more, *overrides], tmp_path / "log") == 2
    said = (tmp_path / "log").read_text()
    assert says in said and "Traceback" not in said and "pools_up" not in said
