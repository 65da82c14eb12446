from __future__ import annotations

import subprocess
import sys

import pytest

from llmscale.config import check, from_dict, to_dict
from llmscale.data.config import DataConfig, TooLong
from llmscale.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"max_seq_len": 1}, "max_seq_len"),
        ({"max_records": 0}, "max_records"),
        ({"validation_fraction": 0.6}, "validation_fraction"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"validation_fraction": float("nan")}, "validation_fraction"),
        ({"validation_fraction": 0.1, "validation": "b.jsonl"}, "validation_fraction"),
        ({"train": "hub:"}, "train"),
        ({"validation": ""}, "validation"),
        ({"columns": {"prompt": ""}}, "columns"),
    ],
)
def test_impossible_values_are_refused_by_name(values, where):
    with pytest.raises(ConfigError) as caught:
        check(DataConfig(**{"train": "a.jsonl", **values}))
    assert caught.value.where == where and caught.value.fix


def test_good_configs_pass_and_survive_freezing():
    config = DataConfig(train="a.jsonl", validation_fraction=0.5, columns={"prompt": "q"}, too_long=TooLong.drop)
    check(config)
    assert from_dict(DataConfig, to_dict(config)) == config
    assert from_dict(DataConfig, to_dict(DataConfig(train="a"))) == DataConfig(train="a")


def test_config_sources_and_loader_need_no_torch():
    code = (
        "import sys, llmscale.data.config, llmscale.data.sources, llmscale.data.loader; "
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
