"""Settings of tracking: what is shown while a run works, and whether it is followed in Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from llmscale.config import Problem, at_least


class WandbMode(Enum):
    auto = "auto"  # online where WANDB_API_KEY is set, else offline
    offline = "offline"  # write to <run_dir>/wandb, to be uploaded later by `wandb sync`
    online = "online"  # upload while running, with the key of WANDB_API_KEY or of `wandb login`
    disabled = "disabled"  # no W&B run at all


@dataclass
class TrackingConfig:
    # Whether and how the run is followed in W&B. Its key comes from the environment, never from here.
    wandb: WandbMode = WandbMode.auto
    # W&B project that the run belongs to.
    wandb_project: str = "llmscale"
    # W&B user or team that owns the project; None: the default of the key's owner.
    wandb_entity: str | None = None
    # W&B group that the run is shown in, named there by the last part of its run.name; None: none. A sweep sets its own name.
    wandb_group: str | None = None
    # Longest wait for the W&B service at start before the run goes on offline, in seconds, >= 1.
    wandb_init_timeout_s: float = 30.0
    # Longest wait for uploads at the end, in seconds, >= 1; what is missing then is still on disk.
    wandb_finish_timeout_s: float = 60.0
    # Shortest time between two progress lines where there is no terminal, in seconds, >= 0.
    console_every_s: float = 10.0

    def problems(self) -> Iterator[Problem]:
        # W&B takes a finish timeout of 0 for "wait for ever".
        yield from at_least(self, wandb_init_timeout_s=1, wandb_finish_timeout_s=1, console_every_s=0)
        if not self.wandb_project:
            yield "wandb_project", "is empty", "Name the W&B project, or set tracking.wandb=disabled."
        if self.wandb_group == "":
            yield "wandb_group", "is empty", "Name the W&B group, or set it to null."
