"""What every engine is put through. Each scenario writes its numbers to a folder, one file a rank, and the tests
compare them: so the same code runs in the tests' own process and in the ranks of `ranks.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmscale import distributed
from llmscale.batch import Batch, RankedExample, TokenExample, token_tensors
from llmscale.config import build
from llmscale.engine import scatter
from llmscale.engine.config import EngineConfig, Precision
from llmscale.errors import LlmscaleError
from llmscale.functional import token_logprobs
from llmscale.models.loading import Model
from llmscale.models.weights import load_buckets, pack
from llmscale.objectives.causal_lm import CausalLM
from llmscale.objectives.config import CausalLMConfig, RankingConfig
from llmscale.objectives.ranking import Ranking
from llmscale.optim.config import OptimConfig, Optimizer, Schedule
from llmscale.protocols import Forward, LossSums, TrainEngine
from llmscale.rl.objectives import PolicyObjective
from tests.rl.settings import ALGORITHMS, algorithm, experiences
from tests.tiny import adapted_model, language_model, packed, scalar_model, token_examples, tokenizer

BUCKET_BYTES = 5000
scatter.BUCKET_BYTES = BUCKET_BYTES  # so that models as small as these come in several
LANGUAGE, RANKING = CausalLM(CausalLMConfig()), Ranking(RankingConfig())
LENGTHS = [9, 4, 12, 7, 3, 15, 8]
NUM_STEPS, SAVED_AT = 20, 8
SHORT = 4, 2  # the same of engines that are put through less
NUM_RESHARDED = 3  # steps of another engine than that which wrote the checkpoint
NUM_SAID = 6  # tokens

# One step of it moves a weight by g / (|g| + 1): what AdamW does to a gradient near zero would blow up rounding.
PROBE = OptimConfig(lr=1.0, eps=1.0, weight_decay=0.0, grad_clip=1e6, schedule=Schedule.constant, warmup_steps=0)
# Everything that a real run has: clipping that bites, decay, a schedule, an average of the weights.
TRAIN = OptimConfig(lr=2e-3, grad_clip=0.5, warmup_steps=3, ema_decay=0.9)
# Lion turns a gradient of rounding errors into a whole step: a small one keeps that below the tolerances.
LION = replace(TRAIN, optimizer=Optimizer.lion, lr=2e-4)

Shard = tuple[int, int]  # which, and of how many
Split = Callable[[Sequence[Any], Shard], list[list[Any]]]


def own(examples: Sequence[Any], shard: Shard) -> list[Any]:
    return list(examples[shard[0] :: shard[1]])


def chunks(examples: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(examples[i : i + size]) for i in range(0, len(examples), size)]


def one_rank_has_all(examples: Sequence[Any], shard: Shard) -> list[list[Any]]:
    return chunks(examples, 2) if shard[0] == 0 else []


def the_last_rank_has_most(examples: Sequence[Any], shard: Shard) -> list[list[Any]]:
    index, last = shard[0], shard[1] - 1
    return chunks(examples[last:], 1) if index == last else [[examples[index]]]


SPLITS: dict[str, Split] = {
    "whole": lambda examples, shard: [own(examples, shard)],
    "ones": lambda examples, shard: chunks(own(examples, shard), 1),
    "threes": lambda examples, shard: chunks(own(examples, shard), 3),
    "packed": lambda examples, shard: [[packed(own(examples, shard))]],
    "one_rank_has_all": one_rank_has_all,
    "the_last_rank_has_most": the_last_rank_has_most,
}


ADAPTER_SPLITS = ("whole", "packed", "the_last_rank_has_most")


class Bench:
    """Builds engines of one kind and keeps what they say."""

    def __init__(self, config: EngineConfig, folder: Path):
        self.config, self.folder = config, folder
        self.shard = config.data_shard(distributed.rank(), distributed.world_size())
        folder.mkdir(parents=True, exist_ok=True)

    def engine(self, model: Model | None = None, optim: OptimConfig = PROBE, **settings: Any) -> TrainEngine:
        config = replace(self.config, **settings)
        with nullcontext() if config.needs_weights(distributed.rank()) else torch.device("meta"):
            model = model or language_model()
        return build(config, model, optim, NUM_STEPS)

    def keep(self, name: str, numbers: Any, engine: TrainEngine | None = None) -> None:
        (self.folder / f"{name}.{distributed.rank()}.json").write_text(json.dumps(numbers))
        if engine is not None:
            weights = all_weights(engine)
            if distributed.rank() == 0:
                save_file(weights, self.folder / f"{name}.safetensors")


def all_weights(engine: TrainEngine) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for bucket in engine.full_parameters(BUCKET_BYTES):
        weights |= {name: value.cpu().clone() for name, value in bucket.items()}
    return weights


def language_batches(bench: Bench, split: str, examples: Sequence[TokenExample]) -> list[Batch]:
    return [LANGUAGE.prepare(part) for part in SPLITS[split](examples, bench.shard)]


def one_step(bench: Bench) -> None:
    """The same seven documents, split in every way."""
    for name in SPLITS:
        engine = bench.engine()
        bench.keep(name, engine.step(language_batches(bench, name, token_examples(LENGTHS)), LANGUAGE), engine)
    batches = language_batches(bench, "threes", token_examples(LENGTHS))
    variants = {
        "recomputed": bench.engine(activation_checkpointing=True),
        "unclipped": bench.engine(optim=replace(PROBE, grad_clip=0.0)),
    }
    for name, engine in variants.items():
        bench.keep(name, engine.step(batches, LANGUAGE), engine)


def training(bench: Bench) -> None:
    """Twenty steps in fp32 and eight in bf16; then again from a checkpoint, by an engine built with other weights."""
    train_and_resume(bench, "fp32", NUM_STEPS, SAVED_AT, optim=TRAIN)
    train_in_bf16(bench)
    train_and_resume(bench, "lion", 8, 4, optim=LION)


def train_in_bf16(bench: Bench) -> None:
    train_and_resume(bench, "bf16", 8, 4, optim=replace(TRAIN, lr=1e-2), precision=Precision.bf16)


def batches_of(bench: Bench, step: int) -> list[Batch]:
    return language_batches(bench, "threes", token_examples(LENGTHS, seed=step % 4))


def train_and_resume(
    bench: Bench,
    name: str,
    num_steps: int,
    saved_at: int,
    model: Callable[..., Model] = language_model,
    **settings: Any,
) -> None:
    checkpoint = bench.folder / f"checkpoint_{name}"
    checkpoint.mkdir(exist_ok=True)
    engine, metrics = bench.engine(model(), **settings), []
    for step in range(num_steps):
        metrics.append(engine.step(batches_of(bench, step), LANGUAGE))
        if engine.num_steps == saved_at:
            writing = Thread(target=engine.snapshot(), args=(checkpoint,))
            if name == "bf16":
                writing.start()  # while training goes on; in the others when it is over
    if name != "bf16":
        writing.start()
    writing.join()
    bench.keep(name, metrics, engine)
    look_at_average(bench, f"{name}_average", engine, batches_of(bench, 0))
    distributed.barrier()
    resumed = bench.engine(model(seed=9), **settings)
    resumed.load(checkpoint)
    start = resumed.num_steps
    again = []
    for step in range(start, num_steps):
        if bench.config.sleeps:
            resumed.sleep()
            resumed.wake()
        again.append(resumed.step(batches_of(bench, step), LANGUAGE))
    bench.keep(f"{name}_resumed", {"start": start, "metrics": again}, resumed)
    look_at_average(bench, f"{name}_resumed_average", resumed, batches_of(bench, 0))


def look_at_average(bench: Bench, name: str, engine: TrainEngine, batches: list[Batch]) -> None:
    """The average as it is evaluated, exported and seen inside `averaged`; then the weights, which it must leave alone."""
    numbers = engine.evaluate(batches, LANGUAGE)
    engine.export(bench.folder / f"hf_{name}", tokenizer())
    with engine.averaged():
        numbers["inside"] = engine.evaluate(batches, LANGUAGE)["loss"]
        bench.keep(name, numbers, engine)
    bench.keep(f"{name}_left", {}, engine)


def reshard(bench: Bench, sources: Sequence[Path]) -> None:
    """Take up what other engines wrote, write it again, and train on."""
    for source in sources:
        engine, again = bench.engine(language_model(seed=9), TRAIN), bench.folder / f"from_{source.name}"
        engine.load(source / "checkpoint_fp32")
        again.mkdir(exist_ok=True)
        engine.snapshot()(again)
        start = engine.num_steps
        metrics = [engine.step(batches_of(bench, step), LANGUAGE) for step in range(start, start + NUM_RESHARDED)]
        bench.keep(again.name, {"start": start, "metrics": metrics}, engine)


def learning_from_samples(bench: Bench) -> None:
    """One step of every algorithm on the same seven samples."""
    for name in ALGORITHMS:
        engine, objective = bench.engine(), PolicyObjective(algorithm(name), 1.0, 0.0)
        parts = SPLITS["the_last_rank_has_most"](experiences(LENGTHS), bench.shard)
        bench.keep(name, engine.step([objective.prepare(part) for part in parts], objective), engine)


def looking(bench: Bench) -> None:
    """`evaluate` and `forward` (another number of micro-batches on each rank); neither changes a weight."""
    engine = bench.engine(optim=TRAIN)
    examples = token_examples(LENGTHS)
    evaluated = [
        engine.evaluate(language_batches(bench, name, examples), LANGUAGE) for name in ("whole", "one_rank_has_all")
    ]
    shard = bench.shard[0]
    indexes = list(range(0 if shard == 0 else 1, 1 + 3 * shard))
    parts = [Batch(token_tensors([examples[i].token_ids])) for i in indexes]
    outputs = engine.forward(parts, lambda f, b: {"out": token_logprobs(f(b), b["input_ids"])})
    logprobs = {i: output["out"][0].tolist() for i, output in zip(indexes, outputs, strict=True)}
    nothing = engine.forward(parts if shard == 0 else [], lambda f, b: {"out": f(b)})
    bench.keep("looking", {"evaluated": evaluated, "logprobs": logprobs, "num_outputs": len(nothing)}, engine)


def two_at_once(bench: Bench) -> None:
    """A policy and a critic in one process, step by step; one rank has all the rankings."""
    ranked = [
        RankedExample(tuple(e.token_ids for e in token_examples([6, 9, 4], seed=seed)), (1, 2, 2)) for seed in range(5)
    ]
    policy, critic = bench.engine(), bench.engine(scalar_model())
    for _ in range(2):
        said = policy.step(language_batches(bench, "whole", token_examples(LENGTHS)), LANGUAGE)
        judged = critic.step([RANKING.prepare(part) for part in one_rank_has_all(ranked, bench.shard)], RANKING)
    bench.keep("policy", said, policy)
    bench.keep("critic", judged, critic)


def leaving(bench: Bench) -> None:
    """Weights as they leave an engine: packed for rollouts, and as a Hugging Face folder."""
    for tie in (True, False):
        engine = bench.engine(language_model(tie=tie))
        engine.step(language_batches(bench, "whole", token_examples(LENGTHS)), LANGUAGE)
        publish(bench, engine, tie)
        ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
        for _ in range(NUM_SAID):
            batch = Batch(token_tensors(list(ids.numpy())))
            (output,) = engine.forward([batch], lambda f, b: {"next": f(b)[:, -1:].argmax(-1)})
            ids = torch.cat([ids, output["next"]], 1)
        engine.export(bench.folder / f"hf_{tie}", tokenizer())
        bench.keep(f"said_{tie}", ids.tolist())


def adapting(bench: Bench) -> None:
    """An adapter alone is trained: the same seven documents split in some ways, and some steps with a checkpoint."""
    for name in ADAPTER_SPLITS:
        engine = bench.engine(adapted_model())
        batches = language_batches(bench, name, token_examples(LENGTHS))
        bench.keep(f"adapter_{name}", engine.step(batches, LANGUAGE), engine)
    for precision in Precision:
        settings = {"model": adapted_model, "optim": TRAIN, "precision": precision}
        train_and_resume(bench, f"adapter_{precision.name}", *SHORT, **settings)
    without_the_adapter(bench)


def without_the_adapter(bench: Bench) -> None:
    """What the engine says with the adapter off; then it trains on, against one that never was without; and what leaves."""
    model, optim = adapted_model(), replace(TRAIN, ema_decay=0.0)  # else the average is exported
    engine, straight = bench.engine(model, optim), bench.engine(adapted_model(), optim)
    metrics = [engine.step(batches_of(bench, 0), LANGUAGE)]
    batch = Batch(token_tensors([token_examples(LENGTHS)[0].token_ids]))
    said = []
    for switched in (model.adapter.off(), nullcontext()):
        with switched:
            (output,) = engine.forward([batch], lambda f, b: {"out": token_logprobs(f(b), b["input_ids"])})
        said.append(output["out"][0].tolist())
    metrics.append(engine.step(batches_of(bench, 1), LANGUAGE))
    bench.keep("adapter_was_off", {"metrics": metrics, "off": said[0], "on": said[1]}, engine)
    never = [straight.step(batches_of(bench, step), LANGUAGE) for step in range(2)]
    bench.keep("adapter_never_off", {"metrics": never}, straight)
    engine.export(bench.folder / "hf_adapter", tokenizer())
    engine.export_adapter(bench.folder / "adapter")
    packets = [pack(b, torch.float32) for b in engine.full_parameters(BUCKET_BYTES, trained_only=True) if b]
    if distributed.rank() == 0:
        receiver = adapted_model(seed=9)
        load_buckets(receiver, packets, "the receiver")
        save_file(dict(receiver.named_parameters()), bench.folder / "received_adapter.safetensors")


def publish(bench: Bench, engine: TrainEngine, tie: bool) -> None:
    """Pack the weights bucket by bucket; another model takes them afterwards."""
    packets, sizes, total = [], [], 0
    for bucket in engine.full_parameters(BUCKET_BYTES):
        total += 1
        if bucket:
            packets.append(pack(bucket, torch.float32))
            sizes.append([[name, value.numel()] for name, value in bucket.items()])
    if packets:
        receiver = language_model(seed=9, tie=tie)
        load_buckets(receiver, packets, "the receiver")
        received = {name: parameter.detach() for name, parameter in receiver.named_parameters()}
        save_file(received, bench.folder / f"received_{tie}.safetensors")
    bench.keep(f"published_{tie}", {"buckets": sizes, "total": total}, engine)


class Broken(CausalLM):
    """Its loss is not a number on the last rank."""

    def loss(self, forward: Forward, batch: Batch) -> LossSums:
        sums = super().loss(forward, batch)
        factor = math.nan if distributed.rank() == distributed.world_size() - 1 else 1.0
        return LossSums({name: term * factor for name, term in sums.terms.items()})


def failing(bench: Bench) -> None:
    """What each rank is told when the loss is not a number."""
    broken = bench.engine()
    batches = language_batches(bench, "whole", token_examples(LENGTHS))
    told = {}
    try:
        broken.step(batches, Broken(CausalLMConfig()))
    except LlmscaleError as error:
        told["nan"] = [type(error).__name__, str(error)]
    bench.keep("failing", told)


def refusing(bench: Bench) -> None:
    """Steps that are not taken, and a rollback in the midst of training, against engines that never saw them."""
    for precision in ("fp32", "bf16"):
        settings: dict[str, Any] = {"optim": TRAIN, "precision": Precision[precision]}
        for name, objective in {"spike": LANGUAGE, "nan": Broken(CausalLMConfig())}.items():
            engine, asked = bench.engine(**settings), []
            metrics = [engine.step(refusal_batches(bench, 0), LANGUAGE)]
            engine.step(refusal_batches(bench, 1), objective, lambda m, asked=asked: bool(asked.append(dict(m))))
            metrics.append(engine.step(refusal_batches(bench, 2), LANGUAGE))
            bench.keep(f"{precision}_{name}", {"metrics": metrics, "asked": asked}, engine)
        passed_over = bench.engine(**settings)
        metrics = [passed_over.step(refusal_batches(bench, 0), LANGUAGE)]
        passed_over.num_steps += 1
        metrics.append(passed_over.step(refusal_batches(bench, 2), LANGUAGE))
        bench.keep(f"{precision}_passed_over", {"metrics": metrics}, passed_over)
        roll_back(bench, precision, settings)


def roll_back(bench: Bench, precision: str, settings: dict[str, Any]) -> None:
    """Step 3 goes on from the weights after step 0: in one engine after steps 1 and 2, in the other at once."""
    checkpoint = bench.folder / f"before_{precision}"
    checkpoint.mkdir(exist_ok=True)
    for name in ("rolled_back", "straight"):
        engine = bench.engine(**settings)
        engine.step(refusal_batches(bench, 0), LANGUAGE)
        if name == "rolled_back":
            engine.snapshot()(checkpoint)
            distributed.barrier()
            engine.step(refusal_batches(bench, 1), LANGUAGE)
            engine.step(refusal_batches(bench, 2), Broken(CausalLMConfig()), lambda metrics: False)
            engine.load(checkpoint)
        engine.num_steps = 3
        bench.keep(f"{precision}_{name}", engine.step(refusal_batches(bench, 3), LANGUAGE), engine)


def refusal_batches(bench: Bench, step: int) -> list[Batch]:
    return language_batches(bench, "threes", token_examples(LENGTHS, seed=step))


def run_all(config: EngineConfig, folder: Path) -> None:
    bench = Bench(config, folder)
    for scenario in (one_step, training, looking, two_at_once, leaving, refusing, failing):
        scenario(bench)
    if config.data_shard(1, 2) == (1, 2):  # no ranks share examples
        adapting(bench)


def run_some(config: EngineConfig, folder: Path) -> None:
    """One step, and some more with a checkpoint between them."""
    bench = Bench(config, folder)
    engine = bench.engine()
    bench.keep("threes", engine.step(language_batches(bench, "threes", token_examples(LENGTHS)), LANGUAGE), engine)
    train_and_resume(bench, "fp32", *SHORT, optim=TRAIN)
