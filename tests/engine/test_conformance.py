"""What every engine does: DeepSpeed's stages, alone and over two ranks, give the reference engine's numbers, and the
reference gives those of plain autograd."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmscale.functional import token_logprobs
from tests.engine.conftest import RESHARDED, UNSHARDED, VARIANTS, Results
from tests.engine.scenarios import (
    ADAPTER_SPLITS,
    BUCKET_BYTES,
    LENGTHS,
    NUM_RESHARDED,
    NUM_SAID,
    NUM_STEPS,
    PROBE,
    SAVED_AT,
    SHORT,
    SPLITS,
)
from tests.rl.settings import ALGORITHMS
from tests.tiny import adapted_model, language_model, scalar_model, token_examples, tokenizer

STEPS = [*SPLITS, "recomputed", "unclipped"]
TRAININGS = ["fp32", "bf16", "lion"]


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].float().flatten() for name in sorted(weights)])


def moved(weights: dict[str, Tensor], start: torch.nn.Module) -> Tensor:
    """How far the weights are from where they started, as one vector."""
    return flat(weights) - flat({name: p.detach() for name, p in start.named_parameters()})


def assert_close(one: Tensor, other: Tensor, tolerance: float) -> None:
    assert (one - other).norm() < tolerance * one.norm()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name].to(value.dtype)), name


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("variant", STEPS)
def test_one_step_is_the_same_however_it_is_split(results: Results, single: Results, variant: str):
    expected, metrics = single.numbers("whole"), results.numbers(variant)
    assert metrics.keys() == expected.keys()
    for name in ("loss", "grad_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5)
    assert metrics["num_tokens"] == sum(LENGTHS) and metrics["lr"] == PROBE.lr
    # A move of g / (|g| + 1) a weight shows the whole gradient.
    start = language_model()
    assert_close(moved(single.weights("whole"), start), moved(results.weights(variant), start), 1e-5)


@pytest.mark.parametrize("variant", STEPS)
def test_every_rank_is_told_the_same(results: Results, variant: str):
    for rank in range(results.num_ranks):
        assert results.numbers(variant, rank) == results.numbers(variant)


def test_a_step_follows_the_gradient(single: Results):
    """The reference itself, against plain autograd."""
    model, losses = language_model(), []
    for e in token_examples(LENGTHS):
        ids = torch.from_numpy(e.token_ids)[None]
        logprobs = token_logprobs(model(ids, torch.arange(ids.shape[1])[None]), ids)[0]
        losses += [-logprobs[t] for t in range(1, ids.shape[1]) if e.loss_mask[t]]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert single.numbers("whole")["loss"] == pytest.approx(loss.item(), rel=1e-6)
    gradient = flat({name: p.grad for name, p in model.named_parameters()})
    assert single.numbers("whole")["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert_close(-gradient / (gradient.abs() + 1), moved(single.weights("whole"), language_model()), 1e-5)


def test_two_engines_in_one_process_do_not_mix(results: Results, single: Results):
    for role, start in (("policy", language_model()), ("critic", scalar_model())):
        for name, value in single.numbers(role).items():
            assert results.numbers(role)[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert_close(moved(single.weights(role), start), moved(results.weights(role), start), 1e-4)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_learns_the_same_over_two_ranks(two_ranks: Path, single: Results, name: str):
    other, start = Results(two_ranks / "zero2x2"), language_model()
    expected, metrics = single.numbers(name), other.numbers(name)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert_close(moved(single.weights(name), start), moved(other.weights(name), start), 1e-5)


# ---------------------------------------------------------------- many steps


def test_twenty_steps_equal_the_references(results: Results, single: Results):
    expected, metrics = single.numbers("fp32"), results.numbers("fp32")
    assert len(metrics) == NUM_STEPS
    for one, other in zip(expected, metrics, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert other["lr"] == one["lr"]
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert metrics[-1]["loss"] != pytest.approx(metrics[0]["loss"], abs=1e-2)  # something was learned
    assert max(m["grad_norm"] for m in metrics) > 0.5  # and clipping had something to do


@pytest.mark.parametrize("training", TRAININGS)
def test_interrupted_and_resumed_equals_uninterrupted(results: Results, training: str):
    """Bit for bit, the average too, by an engine that was built with other weights, and sleeps before each step if it can."""
    resumed, saved_at = results.numbers(f"{training}_resumed"), SAVED_AT if training == "fp32" else 4
    assert resumed["start"] == saved_at
    assert resumed["metrics"] == results.numbers(training)[saved_at:]
    assert_same(results.weights(training), results.weights(f"{training}_resumed"))
    assert results.numbers(f"{training}_average") == results.numbers(f"{training}_resumed_average")
    assert_same(results.weights(f"{training}_average"), results.weights(f"{training}_resumed_average"))


@pytest.mark.parametrize(("target", "source"), [(t, s) for t in RESHARDED for s in RESHARDED if s != t])
def test_another_engine_takes_up_the_whole_state(two_ranks: Path, target: str, source: str):
    """Weights, moments and step counts of any engine come out of any other bit for bit, and it trains on alike."""
    origin, results = Results(two_ranks / source), Results(two_ranks / target)
    expected = whole_state(origin.folder / "checkpoint_fp32")
    taken = whole_state(results.folder / f"from_{source}")
    assert taken.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, taken[name]), name
    for rank in range(results.num_ranks):
        resumed = results.numbers(f"from_{source}", rank)
        assert resumed["start"] == SAVED_AT and len(resumed["metrics"]) == NUM_RESHARDED
        for one, other in zip(origin.numbers("fp32")[SAVED_AT:], resumed["metrics"], strict=False):
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def whole_state(checkpoint: Path) -> dict[str, Tensor]:
    """Every parameter's pieces put together, and its step counts; each element comes exactly once."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for path in checkpoint.glob("state-*"):
        with safe_open(path, "pt") as file:
            entries = json.loads(file.metadata()["parameters"])
            for tensor in file.offset_keys():
                entry = entries[tensor.rpartition("|")[0]]
                pieces.setdefault(tensor, {})[entry["start"]] = file.get_tensor(tensor)
            for name, entry in entries.items():
                pieces[f"{name}|numbers"] = {0: torch.tensor(sorted(entry["numbers"].items())[0][1])}
    for name, parts in pieces.items():
        ends = {start + len(part) for start, part in parts.items() if part.ndim}
        assert len(ends | {0}) == len(set(parts) | ends | {0}), name
    return {name: torch.cat([parts[k].view(-1) for k in sorted(parts)]) for name, parts in pieces.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_offload_and_sharing_change_no_number(two_ranks: Path, single: Results, variant: str):
    """One step, and some more from a checkpoint, at every ZeRO stage."""
    results, start = Results(two_ranks / variant), language_model()
    for rank in range(2):
        metrics = results.numbers("threes", rank)
        for name, value in single.numbers("threes").items():
            assert metrics[name] == pytest.approx(value, rel=1e-5), name
        for one, other in zip(single.numbers("fp32"), results.numbers("fp32", rank), strict=False):
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
        resumed = results.numbers("fp32_resumed", rank)
        assert resumed["metrics"] == results.numbers("fp32", rank)[SHORT[1] :] and len(resumed["metrics"]) > 0
    assert_close(moved(single.weights("threes"), start), moved(results.weights("threes"), start), 1e-5)
    for name, value in results.weights("fp32").items():
        assert torch.equal(value, results.weights("fp32_resumed")[name]), name


def test_bf16_learns(results: Results, single: Results):
    losses, expected = ([m["loss"] for m in r.numbers("bf16")] for r in (results, single))
    assert losses[4] < losses[0] - 0.2 and losses[-1] < losses[3]  # the same four batches come round
    assert losses[0] == pytest.approx(expected[0], abs=0.05)


def test_lion_equals_the_references(results: Results, single: Results):
    """An elementwise optimizer sees no difference between whole weights and ZeRO's flat pieces of them."""
    for one, other in zip(single.numbers("lion"), results.numbers("lion"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
    start = language_model()
    assert_close(moved(single.weights("lion"), start), moved(results.weights("lion"), start), 1e-2)
    assert single.numbers("lion")[4]["loss"] < single.numbers("lion")[0]["loss"]  # the same four batches come round


# ---------------------------------------------------------------- the average of the weights


@pytest.mark.parametrize("training", TRAININGS)
def test_the_average_is_evaluated_and_exported_and_leaves_the_weights_alone(results: Results, training: str):
    numbers, average = results.numbers(f"{training}_average"), results.weights(f"{training}_average")
    exported = AutoModelForCausalLM.from_pretrained(results.folder / f"hf_{training}_average")
    assert_same(average, {f"hf.{name}": p for name, p in exported.named_parameters()})
    assert numbers["inside"] == numbers["loss"]
    assert_same(results.weights(training), results.weights(f"{training}_average_left"))
    distance = (flat(average) - flat(results.weights(training))).norm()
    assert distance > 0.01 * moved(results.weights(training), language_model()).norm()


@pytest.mark.parametrize(("training", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05), ("lion", 1e-4)])
def test_the_average_equals_the_references(results: Results, single: Results, training: str, tolerance: float):
    name = f"{training}_average"
    assert results.numbers(name)["loss"] == pytest.approx(single.numbers(name)["loss"], abs=tolerance)
    if training != "bf16":
        start = language_model()
        assert_close(moved(single.weights(name), start), moved(results.weights(name), start), 1e-2)


def test_weights_that_stage_3_keeps_whole_are_averaged_too(two_ranks: Path):
    sharded, whole = Results(two_ranks / "zero3x2"), Results(two_ranks / UNSHARDED)
    for name in ("bf16_average", "bf16_average_left"):
        assert whole.numbers(name) == sharded.numbers(name)
        assert_same(whole.weights(name), sharded.weights(name))


# ---------------------------------------------------------------- steps that are not taken


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("why", ["spike", "nan"])
def test_a_refused_step_only_counts(results: Results, precision: str, why: str):
    """Weights and what follows are, bit for bit, those of an engine that never saw it; also where it is made of NaN."""
    for rank in range(results.num_ranks):
        told = results.numbers(f"{precision}_{why}", rank)
        assert told["metrics"] == results.numbers(f"{precision}_passed_over", rank)["metrics"]
        (asked,) = told["asked"]  # once, on every rank, with the numbers of all
        assert asked == pytest.approx(results.numbers(f"{precision}_{why}")["asked"][0], abs=0, nan_ok=True)
        assert asked.keys() == told["metrics"][0].keys()
        assert math.isfinite(asked["loss"]) == math.isfinite(asked["grad_norm"]) == (why == "spike")
    for name, value in results.weights(f"{precision}_passed_over").items():
        assert torch.equal(value, results.weights(f"{precision}_{why}")[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rollback_forgets_what_came_after_the_checkpoint(results: Results, precision: str):
    assert results.numbers(f"{precision}_rolled_back") == results.numbers(f"{precision}_straight")
    for name, value in results.weights(f"{precision}_straight").items():
        assert torch.equal(value, results.weights(f"{precision}_rolled_back")[name]), name


# ---------------------------------------------------------------- looking


def test_evaluate_gives_the_loss_and_changes_nothing(results: Results, single: Results):
    for metrics in results.numbers("looking")["evaluated"]:
        assert metrics["loss"] == pytest.approx(single.numbers("whole")["loss"], rel=1e-5)
        assert metrics["num_tokens"] == sum(LENGTHS)
    for name, parameter in language_model().named_parameters():
        assert torch.equal(results.weights("looking")[name], parameter)


def test_forward_takes_another_number_of_micro_batches_on_each_rank(results: Results):
    model, examples, seen = language_model(), token_examples(LENGTHS), []
    for rank in range(results.num_ranks):
        looked = results.numbers("looking", rank)
        assert looked["num_outputs"] == (1 if rank == 0 or results.num_shards == 1 else 0)
        for index, logprobs in looked["logprobs"].items():
            ids = torch.from_numpy(examples[int(index)].token_ids)[None]
            expected = token_logprobs(model(ids, torch.arange(ids.shape[1])[None]), ids)[0]
            assert logprobs == pytest.approx(expected.tolist(), abs=1e-5)
            seen.append(index)
    assert set(seen) == ({"0"} if results.num_shards == 1 else {"0", "1", "2", "3"})


# ---------------------------------------------------------------- weights that leave


@pytest.mark.parametrize("tie", [True, False])
def test_full_parameters_gives_each_weight_once_in_buckets(results: Results, single: Results, tie: bool):
    numbers = results.numbers(f"published_{tie}")
    names = [name for bucket in numbers["buckets"] for name, _ in bucket]
    assert names == [name for name, _ in language_model(tie=tie).named_parameters()]
    assert ("hf.lm_head.weight" in names) == (not tie)
    for bucket in numbers["buckets"]:
        assert len(bucket) == 1 or sum(numel for _, numel in bucket) * 4 <= BUCKET_BYTES
    assert 1 < numbers["total"] == len(numbers["buckets"]) < len(names)
    start = language_model(tie=tie)
    name = f"published_{tie}"
    assert_close(moved(single.weights(name), start), moved(results.weights(name), start), 1e-5)


@pytest.mark.parametrize("tie", [True, False])
def test_what_was_published_is_what_the_engine_holds(results: Results, tie: bool):
    """Packed bucket by bucket and taken after the last one: nothing may point into memory that was freed meanwhile."""
    received, held = results.weights(f"received_{tie}"), results.weights(f"published_{tie}")
    assert received.keys() == held.keys()
    for name, value in held.items():
        assert torch.equal(value, received[name]), name


def test_only_rank_0_receives(two_ranks: Path, results: Results):
    for rank in range(1, results.num_ranks):
        numbers = results.numbers("published_True", rank)
        assert numbers["buckets"] == [] and numbers["total"] > 1


@pytest.mark.parametrize("tie", [True, False])
def test_an_export_loads_in_transformers_and_says_the_same(results: Results, tie: bool):
    folder = results.folder / f"hf_{tie}"
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = torch.tensor(results.numbers(f"said_{tie}"))
    said = model.generate(expected[:, :3], max_new_tokens=NUM_SAID, do_sample=False, eos_token_id=[], pad_token_id=0)
    assert torch.equal(said, expected)
    assert len(set(expected[:, 3:].flatten().tolist())) > 2  # not one token for ever, which would prove little
    for name, value in results.weights(f"published_{tie}").items():
        assert torch.equal(model.get_parameter(name.removeprefix("hf.")), value), name
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer().get_vocab()


# ---------------------------------------------------------------- an adapter


def split_up(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter's and the base's."""
    own = {name: value for name, value in weights.items() if ".lora_" in name}
    return own, {name: value for name, value in weights.items() if name not in own}


@pytest.mark.parametrize("split", ADAPTER_SPLITS)
def test_one_step_of_an_adapter_is_the_references_however_it_is_split(adapting: Results, single: Results, split: str):
    expected = single.numbers("adapter_whole")
    for rank in range(adapting.num_ranks):
        for name, value in expected.items():
            assert adapting.numbers(f"adapter_{split}", rank)[name] == pytest.approx(value, rel=1e-5), name
    start = dict(adapted_model().named_parameters())
    moves = []
    for results, name in ((single, "adapter_whole"), (adapting, f"adapter_{split}")):
        own, base = split_up(results.weights(name))
        moves.append(flat({n: value - start[n].detach() for n, value in own.items()}))
        assert_same(base, {n: start[n] for n in base})
    assert_close(*moves, 1e-5)
    assert moves[0].norm() > 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_resumes_from_a_checkpoint_without_the_base(adapting: Results, single: Results, precision: str):
    name = f"adapter_{precision}"
    resumed, metrics = adapting.numbers(f"{name}_resumed"), adapting.numbers(name)
    assert resumed == {"start": SHORT[1], "metrics": metrics[SHORT[1] :]} and len(metrics) == SHORT[0]
    assert_same(adapting.weights(name), adapting.weights(f"{name}_resumed"))
    saved = {key.rpartition("|")[0] for key in whole_state(adapting.folder / f"checkpoint_{name}")}
    assert saved == set(split_up(adapting.weights(name))[0])
    for one, other in zip(single.numbers(name), metrics, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4 if precision == "fp32" else 0.05)
    assert metrics[-1]["loss"] != pytest.approx(metrics[0]["loss"], abs=1e-2)


def test_without_its_adapter_the_model_is_the_base_and_then_trains_on(adapting: Results):
    ids = torch.from_numpy(token_examples(LENGTHS)[0].token_ids)[None]
    base = token_logprobs(language_model()(ids, torch.arange(ids.shape[1])[None]), ids)[0].tolist()
    for rank in range(adapting.num_ranks):
        told = adapting.numbers("adapter_was_off", rank)
        assert told["off"] == pytest.approx(base, abs=1e-5) and told["on"] != pytest.approx(base, abs=1e-2)
        assert told["metrics"] == adapting.numbers("adapter_never_off", rank)["metrics"]
    assert_same(adapting.weights("adapter_was_off"), adapting.weights("adapter_never_off"))


def test_what_leaves_is_the_adapter_alone_or_one_model_with_its_base(adapting: Results):
    held = adapting.weights("adapter_was_off")
    own, _ = split_up(held)
    assert_same(adapting.weights("received_adapter"), held)
    exported = load_file(adapting.folder / "adapter" / "adapter_model.safetensors")
    inside = {n.replace("base_model.model.", "hf.").replace("weight", "default.weight"): v for n, v in exported.items()}
    assert_same(inside, own)
    whole, model = AutoModelForCausalLM.from_pretrained(adapting.folder / "hf_adapter"), adapted_model()
    ids = torch.from_numpy(token_examples(LENGTHS)[2].token_ids)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(held[name])
        assert (whole(ids).logits - model(ids, torch.arange(ids.shape[1])[None])).abs().max() < 1e-5


# ---------------------------------------------------------------- faults


def test_a_loss_that_is_not_finite_stops_every_rank(results: Results):
    for rank in range(results.num_ranks):
        kind, message = results.numbers("failing", rank)["nan"]
        assert kind == "NumericsError" and "loss is nan" in message
