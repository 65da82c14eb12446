from __future__ import annotations

import subprocess
import sys

import pytest

from llmscale.config import check, from_dict, to_dict
from llmscale.data.config import DataConfig, OnCorrupt, Packing, TooLong
from llmscale.errors import ConfigError

MIXED = {"train": None, "mixture": {"a": "a.jsonl", "b": "b.jsonl"}}


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
        ({"train": None}, "train"),
        ({"mixture": {"a": "a.jsonl"}}, "mixture"),
        ({"train": None, "mixture": {"a": "a.jsonl", "b": ""}}, "mixture.b"),
        ({"mixture_weights": {"a": 1}}, "mixture"),
        ({"mixture_temperature": 2.0}, "mixture"),
        ({"mixture_cap": 10}, "mixture"),
        ({**MIXED, "mixture_weights": {"a": 1}}, "mixture_weights"),
        ({**MIXED, "mixture_weights": {"a": 1, "b": 1, "c": 1}}, "mixture_weights"),
        ({**MIXED, "mixture_weights": {"a": 1, "b": 0}}, "mixture_weights.b"),
        ({**MIXED, "mixture_weights": {"a": 1, "b": float("nan")}}, "mixture_weights.b"),
        ({**MIXED, "mixture_weights": {"a": 1, "b": 2}, "mixture_temperature": 2.0}, "mixture_weights"),
        ({**MIXED, "mixture_weights": {"a": 1, "b": 2}, "mixture_cap": 5}, "mixture_weights"),
        ({**MIXED, "mixture_temperature": 0.0}, "mixture_temperature"),
        ({**MIXED, "mixture_temperature": -1.0}, "mixture_temperature"),
        ({**MIXED, "mixture_cap": 0}, "mixture_cap"),
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
    config = DataConfig(**MIXED, mixture_cap=9, packing=Packing.best_fit, on_corrupt=OnCorrupt.skip, cache_dir="c")
    check(config)
    check(DataConfig(**MIXED, mixture_weights={"a": 0.1, "b": 3}))
    assert from_dict(DataConfig, to_dict(config)) == config


def test_a_plain_source_is_a_mixture_of_one():
    assert DataConfig(train="a.jsonl").sources == {"train": "a.jsonl"}
    assert DataConfig(**MIXED).sources == MIXED["mixture"]


def test_a_missing_source_is_asked_for():
    with pytest.raises(ConfigError, match="needed and has no default") as caught:
        check(DataConfig())
    assert "data.train=" in str(caught.value) and "data.mixture" in str(caught.value)


def test_config_sources_and_loader_need_no_torch():
    code = (
        "import sys, llmscale.data.config, llmscale.data.sources, llmscale.data.loader; "
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
