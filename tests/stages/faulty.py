"""A plugin with an objective that blows up on what holds a tilde or a caret: `--plugin tests.stages.faulty`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmscale.batch import Batch
from llmscale.config import option
from llmscale.objectives.causal_lm import CausalLM
from llmscale.objectives.config import CausalLMConfig
from llmscale.protocols import Forward, LossSums
from tests.tiny import tokenizer

NOT_A_NUMBER = "~"


@option("objective", "faulty", builds="tests.stages.faulty:Faulty")
@dataclass
class FaultyConfig(CausalLMConfig):
    name: str = "faulty"


class Faulty(CausalLM):
    def loss(self, forward: Forward, batch: Batch) -> LossSums:
        sums = super().loss(forward, batch)
        (token,) = tokenizer().encode(NOT_A_NUMBER, add_special_tokens=False)
        factor = math.nan if (batch["input_ids"] == token).any() else 1.0
        return LossSums({name: term * factor for name, term in sums.terms.items()})
