"""What a training run leaves behind when it is done: the model as a Hugging Face folder and, where an adapter was trained, that
alone in PEFT's format beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llmscale import distributed
from llmscale.checkpoint.durable import commit_directory
from llmscale.protocols import TrainEngine
from llmscale.stages.config import StageConfig


def write_model(engine: TrainEngine, config: StageConfig, run_dir: Path, tokenizer: Any) -> None:
    """Collective: `hf/` and `adapter/` of a run, each there as a whole or not at all."""
    if config.model.adapter is not None:
        _write(run_dir / "adapter", engine.export_adapter)
    _write(run_dir / "hf", partial(engine.export, tokenizer=tokenizer))


def _write(directory: Path, export: Callable[[Path], None]) -> None:
    if distributed.rank() == 0:
        commit_directory(directory, export)
    else:
        export(directory)
