"""The reference engine against a loop of bare PyTorch: no difference at all."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmscale.batch import Batch
from llmscale.engine.config import SingleConfig
from llmscale.engine.single import SingleEngine
from llmscale.errors import NumericsError
from llmscale.objectives.causal_lm import CausalLM
from llmscale.objectives.config import CausalLMConfig
from llmscale.optim.config import OptimConfig
from llmscale.optim.schedule import learning_rate
from tests.tiny import language_model, scalar_model, token_examples

OBJECTIVE = CausalLM(CausalLMConfig())
OPTIM = OptimConfig(lr=2e-3, grad_clip=0.5, warmup_steps=3)
NUM_STEPS = 12


def batch(step: int) -> Batch:
    return OBJECTIVE.prepare(token_examples([9, 4, 12], seed=step))


def engine(optim: OptimConfig = OPTIM) -> SingleEngine:
    return SingleEngine(SingleConfig(), language_model(), optim, NUM_STEPS)


def test_equals_a_bare_loop():
    model = language_model()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(OPTIM, step, NUM_STEPS) / OPTIM.lr
    )
    ours = engine()
    for step in range(NUM_STEPS):
        b = batch(step)
        logits = model(b["input_ids"], b["position_ids"])[:, :-1][b["loss_mask"][:, 1:]]
        targets = b["input_ids"][:, 1:][b["loss_mask"][:, 1:]]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / len(targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        metrics = ours.step([b], OBJECTIVE)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)  # ours is divided in float64
        assert metrics["grad_norm"] == norm.item()
    for (name, bare), own in zip(model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(bare, own), name


def test_no_clipping_at_zero():
    """As DeepSpeed has it; taken literally, nothing would ever move."""
    unclipped, wide = engine(replace(OPTIM, grad_clip=0.0)), engine(replace(OPTIM, grad_clip=math.inf))
    for step in range(3):
        assert unclipped.step([batch(step)], OBJECTIVE) == wide.step([batch(step)], OBJECTIVE)
    for one, other in zip(unclipped.model.parameters(), wide.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_broken_loss_leaves_the_weights_alone():
    ours = engine()
    with torch.no_grad():
        ours.model.hf.model.norm.weight.fill_(math.nan)
    before = [p.clone() for p in ours.model.parameters()]
    with pytest.raises(NumericsError, match="loss is nan"):
        ours.step([batch(0)], OBJECTIVE)
    assert ours.num_steps == 0
    for old, new in zip(before, ours.model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


def test_a_broken_gradient_leaves_the_weights_alone():
    """A finite loss whose derivative is not."""

    class Kinked(CausalLM):
        def loss(self, forward, batch):
            sums = super().loss(forward, batch)
            value = sums.terms["tokens"]
            sums.terms["tokens"] = value + (value - value.detach()).sqrt()
            return sums

    ours = engine()
    before = [p.clone() for p in ours.model.parameters()]
    with pytest.raises(NumericsError, match="gradient norm"):
        ours.step([batch(0)], Kinked(CausalLMConfig()))
    for old, new in zip(before, ours.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_step_of_no_examples_is_a_step():
    ours = engine(replace(OPTIM, weight_decay=0.0))
    metrics = ours.step([], OBJECTIVE)
    assert (metrics["loss"], metrics["grad_norm"], metrics["num_tokens"]) == (0, 0, 0) and ours.num_steps == 1
    for old, new in zip(language_model().parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_scalar_model_is_saved_and_loaded(tmp_path: Path):
    one = SingleEngine(SingleConfig(), scalar_model(seed=1), OPTIM, NUM_STEPS)
    one.snapshot()(tmp_path)
    other = SingleEngine(SingleConfig(), scalar_model(seed=2), OPTIM, NUM_STEPS)
    other.load(tmp_path)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow  # half a minute of compiling
def test_compiled_as_not_compiled():
    compiled = SingleEngine(SingleConfig(compile=True), language_model(), OPTIM, NUM_STEPS)
    plain = engine()
    for step in range(3):
        own, other = compiled.step([batch(step)], OBJECTIVE), plain.step([batch(step)], OBJECTIVE)
        assert own == pytest.approx(other, rel=1e-5)
    names = [name for name, _ in compiled.model.named_parameters()]
    assert names == [name for name, _ in plain.model.named_parameters()]
