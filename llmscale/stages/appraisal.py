"""What the reward stage finds out about the model it has trained, before it is exported: the scale of its scores, and how far
its probabilities can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from llmscale import distributed
from llmscale.batch import Batch
from llmscale.checkpoint.durable import atomic_write_text
from llmscale.data.examples import Examples
from llmscale.errors import ConfigError
from llmscale.objectives.calibration import calibration
from llmscale.objectives.config import JUDGES, RankingConfig
from llmscale.protocols import Forward

if TYPE_CHECKING:
    from llmscale.stages.supervised import SupervisedRun

REPORT = "calibration.md"
SOME = 256  # training examples that say the scale where there are none for validation


def check_objective(run: SupervisedRun) -> None:
    """Before anything is trained.

    Raises: ConfigError for an objective that cannot be appraised, DataError when margins are asked for and a ranking has no
    ratings.
    """
    config = run.config.objective
    if lacking := [name for name in ("scores", "evidence") if not hasattr(run.objective, name)]:
        what = f"{type(run.objective).__name__} has no {' and no '.join(lacking)}, which the reward stage ends with"
        raise ConfigError(what, where="objective", fix="See RewardObjective in llmscale/protocols.py.")
    if isinstance(config, RankingConfig) and config.margin > 0:
        for examples in (run.split.train, run.split.validation):
            for example in examples:
                run.objective.ratings(example)


def appraise(run: SupervisedRun) -> None:
    """Collective. Notes what the model judges and the scale of its scores in its config (see `ScalarModel`); on validation
    data, logs and writes down its calibration."""
    judges = JUDGES[run.config.objective.reads]
    held_out: Examples = run.split.validation
    examples = held_out or run.split.train
    scores, evidence = _measured(run, examples, len(held_out) or min(SOME, len(examples)))
    config = run.engine.model.hf.config
    config.judges = judges
    if held_out and len(evidence):
        found = calibration(evidence)
        run.tracker.log(run.engine.num_steps, found.metrics())
        run.tracker.event("calibration", num=found.num, bins=[vars(b) for b in found.bins], **found.metrics())
        if run.world.is_main:
            what = "pairs" if judges == "completions" else "steps"
            atomic_write_text(run.run_dir / REPORT, found.table(what))
    if judges == "completions":  # a step's score is the log-odds that it is right, and has to stay that
        mean, std = (getattr(config, "score_mean", 0.0), getattr(config, "score_std", 1.0))  # of what it started from
        config.score_mean = mean + std * float(scores.mean())
        config.score_std = std * float(max(scores.std(), 1e-6))


def _measured(run: SupervisedRun, examples: Examples, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and evidence for what people said, of the first `num` examples; the same on every rank."""

    def both(forward: Forward, batch: Batch) -> dict[str, Tensor]:
        output = forward(batch)
        return {"scores": run.objective.scores(output, batch), "evidence": run.objective.evidence(output, batch)}

    outputs = run.engine.forward(run.prepare(examples, range(num)), both)
    _, num_shards = run.config.engine.data_shard(run.world.rank, run.world.size)
    copies = run.world.size // num_shards  # ranks that share an example all report it

    def gathered(name: str) -> np.ndarray:
        own = distributed.gather([x for output in outputs for x in output[name].tolist()])
        return np.sort(np.array(own, dtype=np.float64))[::copies]

    return gathered("scores"), gathered("evidence")
