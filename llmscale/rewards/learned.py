"""Rewards from models that `llmscale reward` trained: one, or an ensemble whose disagreement says where not to trust it
(Coste et al. 2024, arXiv:2310.02743)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llmscale import distributed
from llmscale.batch import APART, Layout, Rows, Trajectory, branches_of, token_tensors
from llmscale.errors import ModelError
from llmscale.models.attention import attend_by_document
from llmscale.models.loading import ScalarModel, has_scalar_head, load_scalar_model, load_tokenizer
from llmscale.protocols import Score
from llmscale.rewards.config import Combine, LearnedConfig

BATCH_SIZE = 32  # sequences of one forward
ONE_ROW = Rows(1 << 30, branching=True)


class LearnedReward:
    """The scalar at the last token. Each member's is standardised by its own mean and deviation (see `ScalarModel`), so that
    those of an ensemble are on one scale."""

    def __init__(self, config: LearnedConfig, tokenizer: PreTrainedTokenizerFast):
        self.config = config
        self.members = [load_reward_model(path, where, tokenizer, of="completions") for where, path in config.members()]
        on_cpu = distributed.device().type == "cpu"
        together = on_cpu and all([attend_by_document(member) for member in self.members])
        self.rows = ONE_ROW if together else APART

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        scores = self.by_member(trajectories)
        rewards = self.combined(scores).tolist()
        unfinished = self.config.unfinished
        if unfinished is not None:
            rewards = [r if t.finished else unfinished for r, t in zip(rewards, trajectories, strict=True)]
        if len(self.members) == 1:
            return [Score(reward) for reward in rewards]
        spread = disagreement(scores).tolist()
        return [Score(reward, {"disagreement": d}) for reward, d in zip(rewards, spread, strict=True)]

    @torch.no_grad()
    def by_member(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        """float64 [members, trajectories]."""
        scores = np.zeros((len(self.members), len(trajectories)))
        for start in range(0, len(trajectories), BATCH_SIZE):
            own = trajectories[start : start + BATCH_SIZE]
            sequences = [t.token_ids for t in own]
            lengths = [len(ids) for ids in sequences]
            prompts = [t.prompt.token_ids.tobytes() for t in own]
            layout = Layout(lengths, self.rows, branches_of(sequences, prompts, wanted=[n - 1 for n in lengths]))
            tensors = {k: v.to(distributed.device()) for k, v in layout.tensors(sequences).items()}
            for member, model in enumerate(self.members):
                scalars = model(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"])
                scores[member, start : start + len(own)] = scalars.flatten()[layout.ends].float().cpu().numpy()
        return scores

    def combined(self, scores: np.ndarray) -> np.ndarray:
        """[members, N] -> [N]."""
        match self.config.combine:
            case Combine.mean:
                return scores.mean(0)
            case Combine.minimum:
                return scores.min(0)
            case Combine.lower_bound:
                return scores.mean(0) - self.config.std_coef * disagreement(scores)


def disagreement(scores: np.ndarray) -> np.ndarray:
    """[members, N] -> [N]: standard deviation over the members (ddof 0), in units of the reward."""
    return scores.std(0)


def load_reward_model(path: str, where: str, tokenizer: PreTrainedTokenizerFast, of: str) -> ScalarModel:
    """`of`: completions or steps, what it has to be a judge of.

    Raises: ModelError where it is no such model, or not one for the policy's tokens.
    """
    if not has_scalar_head(path):
        raise ModelError("this is not a reward model", where=where, fix="Name a run of llmscale reward.")
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise ModelError("the reward model's tokens are not the policy's", where=where)
    model = load_scalar_model(path).to(distributed.device()).eval()
    judged = getattr(model.hf.config, "judges", "completions")  # noted where it was trained
    if judged != of:
        fix = "Use reward=process." if judged == "steps" else "Train one with objective=process, or use reward=learned."
        raise ModelError(f"this reward model judges {judged}, not {of}", where=where, fix=fix)
    return model


def batches(rows: Sequence[np.ndarray]) -> list[tuple[int, dict[str, Tensor]]]:
    """(index of the first row, tensors on the device) of each forward."""
    return [
        (start, {k: v.to(distributed.device()) for k, v in token_tensors(rows[start : start + BATCH_SIZE]).items()})
        for start in range(0, len(rows), BATCH_SIZE)
    ]
