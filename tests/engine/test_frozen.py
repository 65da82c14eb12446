"""The reference policy: the model's own numbers, and no gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmscale.batch import Batch, token_tensors
from llmscale.engine.config import Precision, SingleConfig
from llmscale.engine.frozen import FrozenEngine
from tests.tiny import language_model

BATCHES = [Batch(token_tensors([np.arange(n), np.arange(3)])) for n in (5, 9)]


@pytest.mark.parametrize(("precision", "tolerance"), [(Precision.fp32, 0.0), (Precision.bf16, 0.1)])
def test_forward_is_the_models(precision: Precision, tolerance: float):
    model = language_model()
    engine = FrozenEngine(SingleConfig(precision=precision), model)
    outputs = engine.forward(BATCHES, lambda f, b: {"logits": f(b)})
    assert len(outputs) == 2 and not engine.model.training
    for batch, output in zip(BATCHES, outputs, strict=True):
        expected = model(batch["input_ids"], batch["position_ids"])
        assert output["logits"].dtype is torch.float32 and not output["logits"].requires_grad
        assert (output["logits"] - expected).abs().max() <= tolerance


def test_no_micro_batches_give_nothing():
    assert FrozenEngine(SingleConfig(), language_model()).forward([], lambda f, b: {"logits": f(b)}) == []
