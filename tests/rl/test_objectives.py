"""Policy and critic objectives on a real model: the right gradient at ratio 1, whatever the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmscale.batch import Batch, Rows
from llmscale.engine.accounting import StepTotals
from llmscale.functional import token_entropy, token_logprobs
from llmscale.models.attention import attend_by_document
from llmscale.models.forward import ModelForward
from llmscale.rl.config import PolicyGradientConfig
from llmscale.rl.experience import Experience
from llmscale.rl.objectives import FIELDS, PolicyObjective, ValueObjective, state_values
from llmscale.rl.policy_gradient import PolicyGradient
from tests.rl.settings import ALGORITHMS, algorithm, experiences, setting
from tests.tiny import language_model, scalar_model

TEMPERATURE = 0.7
Objective = PolicyObjective | ValueObjective


def with_observations(examples: Sequence[Experience], dirt: float) -> list[Experience]:
    """Every third token was said by somebody else, and `dirt` stands there wherever a number of the policy's might."""
    made = []
    for e in examples:
        own = e.loss_mask & (np.arange(len(e.token_ids)) % 3 > 0)
        numbers = {name: np.where(own, getattr(e, name), np.float32(dirt)) for name in FIELDS}
        made.append(replace(e, loss_mask=own, **numbers))
    return made


def policy_objective(entropy_coef: float = 0.0, **config: float) -> PolicyObjective:
    return PolicyObjective(PolicyGradient(PolicyGradientConfig(**config), 8), TEMPERATURE, entropy_coef)


def forward_of(model: nn.Module):
    return ModelForward(model)


def step(model: nn.Module, objective: Objective, batches: Sequence[Batch]) -> tuple[dict[str, float], Tensor]:
    """Metrics and the whole gradient as one vector."""
    model.zero_grad()
    totals = StepTotals(batches)
    for batch in batches:
        totals.add(objective.loss(forward_of(model), batch)).backward()
    return totals.metrics(), torch.cat([p.grad.flatten() for p in model.parameters()])


def with_own_logprobs(model: nn.Module, examples: Sequence[Experience]) -> Batch:
    """The batch whose old log-probabilities are the model's own."""
    batch = policy_objective().prepare(examples)
    with torch.no_grad():
        batch.tensors["old_logprobs"] = token_logprobs(forward_of(model)(batch), batch["input_ids"], TEMPERATURE)
    return batch


def test_at_the_old_policy_the_gradient_is_the_plain_policy_gradient():
    model, examples = language_model(), experiences([9, 6, 12])
    examples = [replace(e, importance=np.ones_like(e.importance)) for e in examples]
    batch = with_own_logprobs(model, examples)
    metrics, gradient = step(model, policy_objective(), [batch])
    assert metrics["approx_kl"] == 0 and metrics["clipfrac"] == 0

    model.zero_grad()  # -1/N sum_t A_t grad log p(x_t)
    logprobs = token_logprobs(forward_of(model)(batch), batch["input_ids"], TEMPERATURE)
    mask = batch["loss_mask"]
    (-(batch["advantages"] * logprobs)[mask].sum() / mask.sum()).backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - plain).norm() < 1e-5 * plain.norm()
    assert metrics["loss"] == pytest.approx(-batch["advantages"][mask].mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_update_that_says_itself_what_the_old_policy_said(name: str):
    """The gradient is that of known log-probabilities; the metrics compare what the rollout said with what the trainer says."""
    model, examples = language_model(), experiences([9, 6, 12])
    objective = PolicyObjective(algorithm(name), TEMPERATURE, 0.0, old_is_rollout=True)
    metrics, gradient = step(model, objective, [objective.prepare(examples[:2]), objective.prepare(examples[2:])])
    before, known = PolicyObjective(algorithm(name), TEMPERATURE, 0.0), with_own_logprobs(model, examples)
    batch = before.prepare(examples)
    difference = (known["old_logprobs"] - batch["old_logprobs"])[known["loss_mask"]]
    batch.tensors["old_logprobs"] = known["old_logprobs"]
    _, expected = step(model, before, [batch])
    assert expected.norm() > 0 and (gradient - expected).norm() < 1e-5 * expected.norm()
    assert metrics["logprob_diff"] == pytest.approx(difference.abs().max().item(), rel=1e-5)
    assert metrics["approx_kl"] == pytest.approx((difference.exp() - 1 - difference).mean().item(), rel=1e-4)


def test_metrics_of_a_policy_that_moved():
    model, examples = language_model(), experiences([9, 6, 12])
    objective = policy_objective()
    batch = objective.prepare(examples)
    metrics, _ = step(model, objective, [batch])
    logits, mask = forward_of(model)(batch), batch["loss_mask"]
    difference = (token_logprobs(logits, batch["input_ids"], TEMPERATURE) - batch["old_logprobs"])[mask]
    ratio, advantages = difference.exp(), batch["advantages"][mask]
    clipped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    assert 0 < metrics["clipfrac"] == pytest.approx(clipped.float().mean().item())
    assert metrics["approx_kl"] == pytest.approx((ratio - 1 - difference).mean().item(), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(token_entropy(logits, TEMPERATURE)[mask].mean().item(), rel=1e-5)
    assert metrics["num_tokens"] == 27


def test_the_entropy_bonus_is_part_of_loss_and_gradient():
    model, examples = language_model(), experiences([9, 6])
    plain, without = step(model, policy_objective(), [policy_objective().prepare(examples)])
    bonus, gradient = step(model, policy_objective(0.5), [policy_objective().prepare(examples)])
    assert bonus["loss"] == pytest.approx(plain["loss"] - 0.5 * plain["entropy"], rel=1e-5)
    batch = policy_objective().prepare(examples)
    model.zero_grad()
    mask = batch["loss_mask"]
    (-0.5 * token_entropy(forward_of(model)(batch), TEMPERATURE)[mask].mean()).backward()
    own = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - without - own).norm() < 1e-5 * gradient.norm()


def wide(name: str) -> PolicyObjective:
    """A shipped algorithm with room between its clips, so that all tokens have a gradient."""
    method = algorithm(name, "algorithm.clip_low=0.9", "algorithm.clip_high=9")
    return PolicyObjective(method, TEMPERATURE, 0.01)


KINDS = {name: (language_model, partial(wide, name)) for name in ALGORITHMS} | {
    "value": (scalar_model, lambda: ValueObjective(PolicyGradient(PolicyGradientConfig(), 8))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_that_share_rows_change_nothing(kind: str):
    model, objective = (make() for make in KINDS[kind])
    examples = experiences([9, 6, 12, 4])
    padded, gradient = step(model, objective, [objective.prepare(examples)])
    packed, same = step(model, objective, [objective.prepare(examples, Rows(16))])
    assert packed == pytest.approx(padded, rel=1e-5, abs=1e-6)
    assert (gradient - same).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_share_their_prompt_change_nothing(kind: str):
    """Two prompts of four and three samples in one row; a third prompt of one."""
    model, objective = (make() for make in KINDS[kind])
    examples = experiences([15, 15, 15, 15, 9, 9, 9, 12])
    for first, others in ((0, (1, 2, 3)), (4, (5, 6))):
        for other in others:
            prompt = ~examples[first].loss_mask
            examples[other].token_ids[prompt] = examples[first].token_ids[prompt]
    padded, gradient = step(model, objective, [objective.prepare(examples)])
    assert attend_by_document(model)
    batch = objective.prepare(examples, Rows(1000, branching=True))
    assert batch.num_tokens == 99 - 3 * (15 // 3 - 1) - 2 * (9 // 3 - 1)
    shared, same = step(model, objective, [batch])
    assert shared == pytest.approx(padded | {"num_tokens": float(batch.num_tokens)}, rel=1e-5, abs=1e-6)
    assert (gradient - same).norm() < 1e-5 * gradient.norm()


def test_values_stand_before_their_token():
    assert state_values(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[0.0, 1.0, 2.0]]


def test_the_critics_loss_equals_a_loop():
    model, examples = scalar_model(), experiences([9, 6, 12])
    objective = ValueObjective(PolicyGradient(PolicyGradientConfig(value_clip=0.3), 8))
    metrics, _ = step(model, objective, [objective.prepare(examples)])
    losses = []
    for e in examples:
        ids = torch.from_numpy(e.token_ids)[None]
        said = model(ids, torch.arange(len(e.token_ids))[None])[0].tolist()
        for t in np.flatnonzero(e.loss_mask):
            v, old, target = said[t - 1], float(e.old_values[t]), float(e.returns[t])
            clipped = old + min(max(v - old, -0.3), 0.3)
            losses.append(max((v - target) ** 2, (clipped - target) ** 2) / 2)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dirt", [float("nan"), float("inf"), 1e9])
def test_what_stands_on_the_tokens_of_others_changes_nothing(kind: str, dirt: float):
    """Loss, gradient and every metric (entropy, KL, clipping) of trajectories with observations between the turns."""
    model, objective = (make() for make in KINDS[kind])
    examples = experiences([9, 6, 12])
    clean, gradient = step(model, objective, [objective.prepare(with_observations(examples, 0.0))])
    dirty, same = step(model, objective, [objective.prepare(with_observations(examples, dirt))])
    assert dirty == clean and torch.equal(same, gradient) and gradient.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 3, 1], [2, 5], [7, 0]])
def test_the_split_into_micro_batches_changes_nothing(kind: str, sizes: list[int]):
    model, objective = (make() for make in KINDS[kind])
    examples = experiences([9, 4, 12, 7, 3, 15, 8])
    whole, gradient = step(model, objective, [objective.prepare(examples)])
    starts = np.cumsum([0, *sizes])
    parts = [examples[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    split, same = step(model, objective, [objective.prepare(part) for part in parts])
    assert (gradient - same).norm() < 1e-5 * gradient.norm()
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_more_padding_changes_nothing(kind: str):
    model, objective = (make() for make in KINDS[kind])
    batch = objective.prepare(experiences([9, 4]))
    padded = {n: nn.functional.pad(v, (0, 6)) if v.ndim == 2 else v for n, v in batch.tensors.items()}
    padded["position_ids"] = torch.arange(15).repeat(2, 1)
    metrics, gradient = step(model, objective, [batch])
    same_metrics, same = step(model, objective, [Batch(padded, batch.counts)])
    assert same_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    assert (gradient - same).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_samples_changes_nothing(kind: str):
    model, objective = (make() for make in KINDS[kind])
    examples = experiences([9, 4, 12])
    metrics, gradient = step(model, objective, [objective.prepare(examples)])
    permuted, same = step(model, objective, [objective.prepare(examples[::-1])])
    assert permuted == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    assert (gradient - same).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_no_examples_give_no_loss_and_a_backward_that_works(kind: str):
    model, objective = (make() for make in KINDS[kind])
    metrics, gradient = step(model, objective, [objective.prepare([])])
    assert metrics["loss"] == 0 and not gradient.any()


@pytest.mark.parametrize("name", ["dapo", "dr_grpo", "grpo", "gspo", "cispo", "rloo"])
def test_leaving_out_what_teaches_nothing_changes_no_gradient(name: str):
    """Every third sample comes from a group with equal rewards, and is the longest where the divisor is one of tokens."""
    config = setting(name, "algorithm.kl_coef=0")
    assert config.needs_advantages and not setting(name, "algorithm.entropy_coef=0.1").needs_advantages
    lengths = [12 if i % 3 == 0 else 6 + i for i in range(7)]
    examples = [
        replace(e, advantages=np.zeros_like(e.advantages)) if i % 3 == 0 else e
        for i, e in enumerate(experiences(lengths))
    ]
    model = language_model()
    plain = PolicyObjective(algorithm(name, "algorithm.kl_coef=0"), TEMPERATURE, 0.0)
    lean = PolicyObjective(plain.algorithm, TEMPERATURE, 0.0, needs_advantages=True)
    whole, wanted = step(model, plain, [plain.prepare(examples)])
    batches = [lean.prepare(examples[:4]), lean.prepare(examples[4:6]), lean.prepare(examples[6:])]
    assert [int(b["loss_mask"].any(1).sum()) for b in batches] == [2, 2, 0]
    found, gradient = step(model, lean, batches)
    assert found["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert torch.linalg.vector_norm(gradient - wanted) < 1e-5 * torch.linalg.vector_norm(wanted)


def test_a_kl_in_the_loss_or_a_loss_of_your_own_learns_from_every_sample():
    assert not setting("grpo", "algorithm.kl_coef=0.1").needs_advantages

    class Own(PolicyGradientConfig):
        pass

    assert not Own(kl_coef=0).needs_advantages and PolicyGradientConfig(kl_coef=0).needs_advantages
