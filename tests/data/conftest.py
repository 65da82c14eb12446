from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmscale.data.config import OnCorrupt
from llmscale.data.convert import converted
from llmscale.data.records import Malformed, Record
from llmscale.data.report import NUM_OUTCOMES, Report
from llmscale.data.tokenizer import train_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
CORPUS = ["the cat sat on the mat, the dog sat on the log", "what is it? it is the cat and the dog"] * 4


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real data, ../shared/data beside the repository, are not there")
    return SHARED


@pytest.fixture
def tokenizer():
    """Fresh for each test, because some set another chat template."""
    return train_tokenizer(iter(CORPUS), vocab_size=280, model_max_length=64)


def examples_of(tokenizer, draft, records) -> tuple[list[Any], Report]:
    """What `draft` and the tokenizer make of the records f:1, f:2, ...: the examples, and a report without tokens."""
    items = [Record(fields, f"f:{line}") for line, fields in enumerate(records, 1)]
    made = list(converted(Malformed(OnCorrupt.error).left_out(items, draft), tokenizer))
    counts = np.bincount([outcome for _, outcome in made], minlength=NUM_OUTCOMES)
    return [example for example, _ in made if example is not None], Report.of(counts, tokens=0)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path):
    """write(name, records or text) -> path as text; .jsonl one object a line, .json one list."""

    def write_file(name: str, content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(item) + "\n" for item in content), encoding="utf-8")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return str(path)

    return write_file
