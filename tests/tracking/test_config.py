from __future__ import annotations

import subprocess
import sys

import pytest

from llmscale.config import check, from_dict, to_dict
from llmscale.errors import ConfigError
from llmscale.tracking.config import TrackingConfig, WandbMode


def test_importing_the_config_is_light():
    code = "import sys, llmscale.tracking.config; print({'wandb', 'rich', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_survives_freezing():
    config = TrackingConfig(wandb=WandbMode.disabled, wandb_entity="team")
    assert from_dict(TrackingConfig, to_dict(config)) == config


def test_defaults_are_valid():
    check(TrackingConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("wandb_finish_timeout_s", 0),
        ("wandb_init_timeout_s", 0),
        ("console_every_s", -1),
        ("wandb_project", ""),
        ("wandb_group", ""),
    ],
)
def test_impossible_values_are_refused_by_name(name, value):
    with pytest.raises(ConfigError) as caught:
        check(TrackingConfig(**{name: value}))
    assert caught.value.where == name
