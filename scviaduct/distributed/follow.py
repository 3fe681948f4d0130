"""The driver's ear: follows the history that rank 0 writes, wherever rank 0 runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_POLL_SECONDS = 0.3


def records(path: Path) -> Iterator[dict[str, float]]:
    """The records in a JSON-lines file; a last line that was torn by a kill is none."""
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            yield json.loads(line)


class Follower:
    """Calls every listener once with each new line of a JSON-lines file, until the block ends."""

    def __init__(self, path: Path, listeners: Sequence[Callable[[dict[str, float]], None]]) -> None:
        self._path, self._listeners = path, listeners
        self._offset = path.stat().st_size if path.exists() else 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scviaduct-follow", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._read()

    def _run(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            whole, _, _ = stream.read().rpartition(b"\n")
        if not whole:
            return
        self._offset += len(whole) + 1
        for line in whole.splitlines():
            record = json.loads(line)
            for listener in self._listeners:
                listener(record)
