"""Only one process at a time: a lock that a killed holder leaves open."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from scviaduct.errors import OutputExistsError


@contextmanager
def locked(path: Path, *, busy: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, and remove it; OutputExistsError(`busy`) if another holds it for `patience` seconds."""
    until = time.monotonic() + patience
    while (lock := _lock(path)) is None:
        if time.monotonic() >= until:
            raise OutputExistsError(busy)
        time.sleep(0.05)
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(path: Path) -> TextIO | None:
    """The lock, taken; None when another process has it, or removed its folder at this moment."""
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its holder removed it after this process opened it
