"""A plugin that gives rank 1 a disk that hardly writes: `--plugin tests.stages.slow_disk`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from llmscale.checkpoint import commit

WRITE_S = 30.0
fsync_tree = commit.fsync_tree


def slow_fsync_tree(tree: Path) -> None:
    time.sleep(WRITE_S)
    fsync_tree(tree)


if os.environ.get("RANK") == "1":
    commit.fsync_tree = slow_fsync_tree
