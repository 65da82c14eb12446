"""On a CUDA device. Not run yet: no machine with one has been at hand (see the README, "GPUs")."""

from __future__ import annotations

import copy

import pytest
import torch

from llmscale.data.chat import ChatRenderer
from llmscale.engine.config import DeepSpeedConfig, EngineConfig, Precision, SingleConfig
from llmscale.models.forward import ModelForward
from llmscale.objectives.causal_lm import CausalLM
from llmscale.objectives.config import CausalLMConfig
from llmscale.optim.config import OptimConfig
from llmscale.protocols import SamplingRequest
from llmscale.rollout.config import HFRolloutConfig
from llmscale.rollout.hf import HFRollout
from tests.tiny import language_model, prompt, token_examples, tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OBJECTIVE = CausalLM(CausalLMConfig())


def engine_of(config: EngineConfig, model):
    if isinstance(config, DeepSpeedConfig):
        from llmscale.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, model, OptimConfig(), total_steps=20)
    from llmscale.engine.single import SingleEngine

    return SingleEngine(config, model, OptimConfig(), total_steps=20)


@pytest.mark.parametrize("config", [SingleConfig(), DeepSpeedConfig(zero_stage=2), DeepSpeedConfig(zero_stage=3)])
def test_the_loss_of_a_step_is_that_of_the_cpu(config: EngineConfig) -> None:
    model = language_model()
    batch = OBJECTIVE.prepare(token_examples([9, 14, 5]))
    on_cpu = OBJECTIVE.loss(ModelForward(copy.deepcopy(model)), batch)
    expected = float(on_cpu.terms["tokens"]) / batch.counts["tokens"]
    engine = engine_of(config, model)
    assert engine.device.type == "cuda"
    assert engine.step([batch], OBJECTIVE)["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", [SingleConfig, DeepSpeedConfig])
def test_bf16_learns(kind: type[EngineConfig]) -> None:
    engine = engine_of(kind(precision=Precision.bf16), language_model())
    batch = OBJECTIVE.prepare(token_examples([9, 14, 5]))
    losses = [engine.step([batch], OBJECTIVE)["loss"] for _ in range(20)]
    assert losses[-1] < losses[0]


def test_rollouts_sample_on_the_device() -> None:
    names = tokenizer()
    config = HFRolloutConfig(max_new_tokens=8)
    engine = HFRollout(config, language_model(vocab_size=len(names)), names, 0, ChatRenderer(names).stop_ids)
    requests = [SamplingRequest(prompt([1, 2, 3]), draw_id, 0) for draw_id in range(4)]
    once, again = engine.generate(requests), engine.generate(requests)
    assert [t.token_ids.tolist() for t in once] == [t.token_ids.tolist() for t in again]


@pytest.mark.parametrize("config", [SingleConfig(), DeepSpeedConfig(), DeepSpeedConfig(precision=Precision.bf16)])
def test_what_sleeps_leaves_the_device_and_trains_on_as_if_awake(config: EngineConfig) -> None:
    batch = OBJECTIVE.prepare(token_examples([9, 14, 5]))
    straight = engine_of(config, language_model(hidden_size=1024))
    expected = [straight.step([batch], OBJECTIVE)["loss"] for _ in range(3)]
    before = torch.cuda.memory_allocated()
    engine, losses = engine_of(config, language_model(hidden_size=1024)), []
    for _ in range(3):
        awake = torch.cuda.memory_allocated() - before
        engine.sleep()
        assert torch.cuda.memory_allocated() - before < 0.2 * awake
        engine.wake()
        losses.append(engine.step([batch], OBJECTIVE)["loss"])
    assert losses == pytest.approx(expected, abs=1e-4)


def test_rollouts_sleep_and_the_trainer_has_the_memory() -> None:
    names = tokenizer()
    model = language_model(vocab_size=len(names), hidden_size=1024)
    engine = HFRollout(HFRolloutConfig(max_new_tokens=8), model, names, 0, ChatRenderer(names).stop_ids)
    requests = [SamplingRequest(prompt([1, 2, 3]), draw_id, 0) for draw_id in range(4)]
    once, awake = engine.generate(requests), torch.cuda.memory_allocated()
    engine.sleep()
    assert torch.cuda.memory_allocated() < 0.2 * awake
    engine.wake()
    assert [t.token_ids.tolist() for t in engine.generate(requests)] == [t.token_ids.tolist() for t in once]
