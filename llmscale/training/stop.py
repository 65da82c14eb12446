"""Being asked to stop. A scheduler sends SIGTERM, or SIGUSR1 where it is told to, some time before it ends a job.

While a run trains, the first such signal is noted and acted on at the next step boundary: save, then exit with code 75,
which says "start the same command again". Elsewhere (loading, pools coming up, exporting) there is nothing to save beyond
the last checkpoint, and the run ends at once, also with 75. A second signal ends it at once anywhere. Ctrl-C is another
matter: it ends the run at once with 130.

Ranks that live in other processes are told by a file `stop` in the run directory, which rank 0 looks for; a person may
make it too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FILE = "stop"
SAME_S = 2.0  # a scheduler that signals a whole job, and torchrun that passes the signal on, are one request
LOOK_EVERY_S = 0.5  # for the file; it may be on a network


class StopSignals:
    """The signals of this process."""

    def __init__(self) -> None:
        self.received: str | None = None  # the first one's name
        self._first_s = 0.0
        self._deferred = False
        self._file: Path | None = None

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._receive)

    @contextmanager
    def deferred(self, file: Path | None = None) -> Iterator[None]:
        """Inside, the first signal sets `received` and makes `file`, and nothing more: whoever trains looks at either.

        Raises: KeyboardInterrupt at once, when a signal has come before.
        """
        self._file, self._deferred = file, True
        try:
            if self.received:
                raise KeyboardInterrupt
            yield
        finally:
            self._file, self._deferred = None, False

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received and self._deferred and now - self._first_s < SAME_S:
            return
        again, self._first_s = self.received, now
        self.received = self.received or signal.Signals(number).name
        if again or not self._deferred:
            raise KeyboardInterrupt
        # Not print: a handler may run in the midst of another write to the same stream.
        os.write(2, f"{self.received}: saving after this step; send it again to leave at once\n".encode())
        if self._file is not None:
            self._file.touch()


signals = StopSignals()  # a process has one set of them


class StopRequest:
    """Whether this rank knows that its run is to stop. Ranks may know it at different steps: they have to agree."""

    def __init__(self, run_dir: Path, is_main: bool):
        self._file = run_dir / FILE if is_main else None
        self._looked_s = -LOOK_EVERY_S
        self._asked = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if self._file is not None and not self._asked and now - self._looked_s >= LOOK_EVERY_S:
            self._looked_s, self._asked = now, self._file.exists()
        return self._asked or signals.received is not None
