"""Every error that llmscale raises on purpose. The command line prints one of these as one message:
what is wrong, where it is, and what to do; its class gives the exit code of the process.
"""

from __future__ import annotations


class LlmscaleError(Exception):
    """A failure that the user can act on.

    `where` is a dotted config path, a `file:line`, or a role and rank; `fix` says what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        # All three reach Exception.args, so that the error survives pickling between processes.
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.where, self.fix)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  {self.fix}" if self.fix else text


def _rebuild(kind: type[LlmscaleError], what: str, where: str | None, fix: str | None) -> LlmscaleError:
    return kind(what, where=where, fix=fix)


class UsageError(LlmscaleError):
    """The command line itself is wrong."""

    exit_code = 2


class ConfigError(LlmscaleError):
    """The config is wrong: an unknown key, a wrong type, an impossible combination. `where` is the dotted path."""

    exit_code = 2


class DataError(LlmscaleError):
    """An input file is missing, empty or malformed. `where` is `file:line` as far as it is known."""

    exit_code = 2


class ModelError(LlmscaleError):
    """A model or tokenizer cannot be loaded or does not fit its use."""

    exit_code = 2


class RunError(LlmscaleError):
    """A run directory cannot be used: another config under the same name, a lock, no space, not writable."""

    exit_code = 2


class CheckpointError(LlmscaleError):
    """No checkpoint could be written or read."""


class DiskFullError(CheckpointError):
    """No space is left on the disk of a run."""


class NumericsError(LlmscaleError):
    """A number that must be finite, or two numbers that must agree, are not."""


class WeightMismatchError(LlmscaleError):
    """The weights that a rollout worker holds are not those that the policy published."""


class DamagedWeightsError(WeightMismatchError):
    """They changed on their way: nobody's fault, so they may be fetched or published again."""

    cause = "damaged"


class ClusterError(LlmscaleError):
    """The cluster cannot give what the config asks for."""

    exit_code = 3


class WorkerError(LlmscaleError):
    """A worker failed or died. `where` names its role and rank."""


class WorkerLostError(WorkerError):
    """A worker died, gave up, or lost contact with its peers: nothing that the user did, so it may be started again."""

    cause = "lost"  # or as the driver saw it: died, hung, node lost


class SetAsideError(WorkerError):
    """Every worker that was given a unit of work was lost over it: the fault is likely in the unit."""


class Requeue(LlmscaleError):
    """Not a failure: the run was asked to stop, has saved, and goes on where it was when it is started again."""

    exit_code = 75
