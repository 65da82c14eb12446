"""Training from what another run recorded, on the command line: the same bits, other algorithms, and what does not fit."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from llmscale.compose import compose
from llmscale.errors import ConfigError, LlmscaleError
from llmscale.stages.pipeline import compose_stages
from llmscale.stages.rlhf_run import run as run_in_process
from llmscale.stages.rollout import run as roll_out
from tests.stages.runs import arguments, kill_when, records, weights, without_times

VARIETY = """
def variety(prompt, completion, fields):
    return len(set(completion)) / 10
"""
GROUPS = [
    "algorithm=grpo",
    "rollout.group_size=4",
    "training.prompts_per_step=8",
    "training.num_steps=4",
    "optim.lr=1e-3",
]
CORRECTED = ["algorithm.correction=truncated"]
CALCULATOR = [
    "environment=calculator",
    "environment.max_turns=2",
    "environment.max_observation_tokens=8",
    "data.max_seq_len=96",
]


def rlhf(run_dir: Path, chain: Path, *overrides: str) -> list[str]:
    (run_dir / "rewards.py").write_text(VARIETY)
    reward = ["reward=function", f"reward.path={run_dir}/rewards.py:variety", "true_reward=null"]
    return arguments("rlhf", run_dir, f"model.path={chain}/demo/sft", *reward, *GROUPS, *overrides)


def replayed(run_dir: Path, recording: Path, chain: Path, *overrides: str) -> list[str]:
    """The same command as made the recording, in another folder."""
    argv = rlhf(recording.parents[1], chain, "rollout=replay", f"rollout.path={recording}", *overrides)
    return [f"run.dir={run_dir}" if a.startswith("run.dir=") else a for a in argv]


def found(run_dir: Path) -> Path:
    return run_dir / "demo" / "rlhf"


def trained(argv: list[str]) -> None:
    run_in_process(compose("rlhf", argv[1:]))


def of_training(run_dir: Path) -> list[dict]:
    """The metrics of each step, without those of an evaluation, which a replay has none of."""
    metrics = without_times(records(found(run_dir) / "metrics.jsonl"))
    return [{k: v for k, v in m.items() if not k.startswith("eval/")} for m in metrics if m["step"]]


@pytest.fixture(scope="module")
def recorded(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("recorded")
    trained(rlhf(run_dir, chain, "record=true"))
    return run_dir


@pytest.fixture(scope="module")
def completions(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `llmscale rollout` recorded: four answers to each of the prompts that the others train on."""
    run_dir = tmp_path_factory.mktemp("completions")
    common = ["experiment=demo", "cluster=local", "tracking.wandb=disabled", f"run.dir={run_dir}", "reward=null"]
    own = [f"model.path={chain}/demo/sft", "num_samples=4", "data.max_records=40", "record_logprobs=true"]
    roll_out(compose("rollout", [*common, *own]))
    return run_dir / "demo" / "rollout"


def test_the_same_config_gives_the_same_bits(chain: Path, recorded: Path, tmp_path: Path) -> None:
    trained(replayed(tmp_path, found(recorded), chain))
    assert of_training(tmp_path) == of_training(recorded)
    assert weights(found(tmp_path)) == weights(found(recorded)) != weights(chain / "demo" / "sft")
    own, other = (
        [{k: v for k, v in s.items() if k != "time_s"} for s in records(found(d) / "samples.jsonl")]
        for d in (tmp_path, recorded)
    )
    assert own == other
    events = {e["kind"]: e for e in records(found(tmp_path) / "events.jsonl")}
    assert "rollout" not in events["pools_up"]["workers"]
    assert events["replay"]["policy"] == "the one that sampled" and events["replay"]["samples"] == 4 * 8 * 4
    assert not (found(tmp_path) / "weight_version").exists(), "nothing is published"
    assert not any(k.startswith("eval/") for m in records(found(tmp_path) / "metrics.jsonl") for k in m)


def test_a_replay_resumes_exactly(chain: Path, recorded: Path, tmp_path: Path) -> None:
    """As if it had been killed after its second step."""
    argv = replayed(tmp_path, found(recorded), chain)
    trained(argv)
    for name in ("hf", "checkpoints/step-000004"):
        shutil.rmtree(found(tmp_path) / name)
    (found(tmp_path) / "result.json").unlink()
    trained(argv)
    assert any(e["kind"] == "resumed" and e["step"] == 2 for e in records(found(tmp_path) / "events.jsonl"))
    assert weights(found(tmp_path)) == weights(found(recorded))


def test_a_recording_survives_a_kill(chain: Path, recorded: Path, tmp_path: Path) -> None:
    argv = rlhf(tmp_path, chain, "record=true")
    latest = found(tmp_path) / "checkpoints" / "step-000002"
    assert kill_when(latest.exists, argv, tmp_path / "log") == -signal.SIGKILL
    trained(argv)

    def timeless(run_dir: Path) -> list[dict]:
        """Versions never repeat, over restarts either."""
        samples = records(found(run_dir) / "completions.jsonl")
        return [{k: v for k, v in sample.items() if k != "weight_versions"} for sample in samples]

    assert timeless(tmp_path) == timeless(recorded)


def test_another_algorithm_weighs_what_it_did_not_sample(chain: Path, recorded: Path, tmp_path: Path) -> None:
    other = ["algorithm=rloo", "optim.lr=1e-2", *CORRECTED]
    trained(replayed(tmp_path, found(recorded), chain, *other))
    first, *later = of_training(tmp_path)
    assert first["rollout/logprob_diff"] < 1e-4 and first["policy/importance"] == pytest.approx(1, abs=1e-4)
    assert all(step["rollout/logprob_diff"] > 1e-2 and step["policy/importance"] != 1 for step in later)
    (said,) = (e for e in records(found(tmp_path) / "events.jsonl") if e["kind"] == "replay")
    assert (
        said["policy"].startswith("another: optim.lr was 0.001 and is 0.01") and said["max_logprob_diff"] == "no bound"
    )


def test_completions_of_llmscale_rollout_are_trained_on_by_prompt(
    chain: Path, completions: Path, tmp_path: Path
) -> None:
    """Over two epochs of the data, in this run's own order and with its seed."""
    own = ["data.max_records=16", "data.train=task:sorting/prompts?seed=0", "run.seed=5", *CORRECTED]
    trained(rlhf(tmp_path, chain, "rollout=replay", f"rollout.path={completions}", *own))
    recorded = {(r["draw_id"], r["sample_index"]): r for r in records(completions / "completions.jsonl")}
    texts = [recorded[place, 0]["prompt"] for place in range(16)]
    samples = records(found(tmp_path) / "samples.jsonl")
    assert [s["draw_id"] for s in samples[::4]] == list(range(32))
    for epoch in (samples[:64], samples[64:]):
        assert sorted(s["prompt"] for s in epoch[::4]) == sorted(texts)
    for sample in samples:
        source = recorded[texts.index(sample["prompt"]), sample["sample_index"]]
        assert sample["token_ids"] == source["token_ids"] and sample["rollout_logprobs"] == source["rollout_logprobs"]
    steps = of_training(tmp_path)
    assert steps[0]["rollout/logprob_diff"] < 1e-4 < steps[-1]["rollout/logprob_diff"]


@pytest.mark.parametrize(
    ("overrides", "where", "hint"),
    [
        (["algorithm=rloo"], "algorithm.correction", "algorithm.method was grpo and is rloo"),
        (["optim.lr=2e-3"], "algorithm.correction", "optim.lr was 0.001 and is 0.002"),
        (["rollout.group_size=3"], "algorithm.correction", "rollout.group_size was 4 and is 3"),
        (["rollout.temperature=0.7"], "rollout.temperature", "is 0.7 here, and was 1.0"),
        (["rollout.max_new_tokens=9"], "rollout.max_new_tokens", "is 9 here, and was 10"),
        (["run.seed=1"], "run.seed", "is 1 here, and was 0"),
        (CALCULATOR, "environment.name", "is calculator here, and was None"),
        (["data.max_records=100", *CORRECTED], "completions.jsonl", "draw 0 was recorded of 'sort"),
        (["data.system_prompt=Sort.", *CORRECTED], "completions.jsonl", "was recorded of"),
        (["training.num_steps=6"], "demo/rlhf", "no sample of draw 32"),
        (["rollout.group_size=5", *CORRECTED], "rollout.group_size", "no sample 4 of draw 0"),
        (["rollout.path=nowhere"], "nowhere", "there is no run in this directory"),
        (["record=true"], "record", "nothing new"),
        (["training.max_staleness=1"], "training.max_staleness", "nothing is sampled that could be ahead"),
    ],
)
def test_a_recording_that_does_not_fit_is_refused(
    chain: Path, recorded: Path, tmp_path: Path, overrides: list[str], where: str, hint: str
) -> None:
    with pytest.raises(LlmscaleError) as caught:
        trained(replayed(tmp_path, found(recorded), chain, *overrides))
    assert str(caught.value.where).endswith(where) and hint in caught.value.what and caught.value.fix
    assert not any(found(tmp_path).glob("hf"))


def test_a_recording_of_a_run_that_has_not_ended_says_so(chain: Path, recorded: Path, tmp_path: Path) -> None:
    """It ended early, in the midst of a line; as many steps as it has can be trained."""
    copy = tmp_path / "recorded" / "demo" / "rlhf"
    shutil.copytree(found(recorded), copy)
    (copy / "result.json").unlink()
    data = (copy / "completions.jsonl").read_bytes()
    (copy / "completions.jsonl").write_bytes(data[: len(data) * 5 // 8])
    (tmp_path / "recorded" / "rewards.py").write_text(VARIETY)
    argv = [
        a.replace(f"{tmp_path}/recorded/rewards.py", f"{recorded}/rewards.py") for a in replayed(tmp_path, copy, chain)
    ]
    with pytest.raises(LlmscaleError, match="and its run has not ended") as caught:
        trained(argv)
    assert caught.value.fix == "Set training.num_steps=2, or record more."
    trained([*argv, "training.num_steps=2"])
    assert of_training(tmp_path) == of_training(recorded)[:2]


def test_another_tokenizer_is_refused(chain: Path, recorded: Path, tmp_path: Path) -> None:
    """Of the same texts it makes other tokens."""
    copy = tmp_path / "recorded" / "demo" / "rlhf"
    shutil.copytree(found(recorded), copy)
    lines = records(copy / "completions.jsonl")
    lines[0]["token_ids"][2] += 1
    (copy / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = [
        a.replace(f"{tmp_path}/recorded/rewards.py", f"{recorded}/rewards.py") for a in replayed(tmp_path, copy, chain)
    ]
    with pytest.raises(LlmscaleError, match="was recorded with other tokens than this run's tokenizer gives it"):
        trained(argv)


def test_a_run_that_recorded_nothing_is_refused(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmscaleError, match="this run recorded nothing to train from"):
        trained(rlhf(tmp_path, chain, "rollout=replay", f"rollout.path={chain}/demo/sft"))


@pytest.mark.parametrize("stage", ["rollout", "collect", "generate", "chat"])
def test_only_rlhf_replays(stage: str) -> None:
    needed = ["data.train=x"] if stage in ("rollout", "collect") else []
    with pytest.raises(ConfigError, match="only rlhf can do without an engine"):
        compose(stage, [*needed, "model.path=m", "rollout=replay", "rollout.path=p"])


def test_the_experiment_replays_what_it_rolled_out() -> None:
    rollout, rlhf = compose_stages(["experiment=offline", "stages=[rollout,rlhf]"], None).values()
    assert rlhf.rollout.path == str(rollout.run_dir)  # type: ignore[attr-defined]
    assert rlhf.roles == ["policy", "reference", "reward"]  # type: ignore[attr-defined]
