"""Workers that hang: each writes down where it stands when it begins no step for too long.

The others then sit in a collective, which times out and says nothing of who is late. So every worker arms a timer at
each step that dumps its stack to the run's folder, from a thread that needs no interpreter lock, and whoever times
out reads there which of them does not wait for others.
"""

from __future__ import annotations

import faulthandler
import re
import time
from pathlib import Path
from typing import IO, Any

from scviaduct.distributed.workers import Workers

_WAITING = ("/torch/distributed/", "/torch/autograd/")
"""Where a worker is that waits: in a collective, or in a backward pass that averages gradients."""
_GUARD = r"/scviaduct/distributed/failures\.py\", line \d+ in attempt"
"""The thread that trains; Ray's workers have others."""


class Watch:
    """A timer that `beat` sets back; when it runs out, the stacks of all threads go to a file of this worker.

    A process of its own keeps nobody waiting and has no timer.
    """

    def __init__(self, folder: Path, seconds: float, attempt: int, workers: Workers) -> None:
        self._path, self._seconds = folder / f"attempt-{attempt:04d}.rank-{workers.rank:04d}.txt", seconds
        self._alone = workers.world_size == 1
        self._file: IO[str] | None = None
        self._next = 0.0

    def beat(self, *_: Any) -> None:
        """A step begins. Can be a forward hook of a model."""
        now = time.monotonic()
        if self._alone or now < self._next:  # arming starts a thread: not at every step
            return
        self._next = now + min(1.0, self._seconds / 10)
        if not self._file:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w")
        faulthandler.dump_traceback_later(self._seconds, file=self._file)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()


def hanging(folder: Path, attempt: int) -> list[str]:
    """Of each worker that hung in this attempt without waiting for others: which it is, where it stood, and the file."""
    found = []
    for path in sorted(folder.glob(f"attempt-{attempt:04d}.rank-*.txt")):
        place = _innermost(path.read_text())
        if place and not any(part in place for part in _WAITING):
            found.append(f"worker {int(path.stem[-4:])} hangs in {place} (its stacks: {path})")
    return found


def _innermost(dump: str) -> str | None:
    """Where the training thread of a dump stood: 'FILE, line N, in FUNCTION'; None where there is no such thread."""
    for thread in dump.split("\n\n"):
        if re.search(_GUARD, thread):
            first = re.search(r'File "(.+)", line (\d+) in (\S+)', thread)
            return f"{first[1]}, line {first[2]}, in {first[3]}" if first else None
    return None
