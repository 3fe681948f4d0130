"""The driver's ear: follows the history that rank 0 writes, wherever rank 0 runs, or reads what there is of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from scviaduct.distributed.files import read_from
from scviaduct.storage.places import Place

_POLL_SECONDS = 0.3
_POLL_SECONDS_REMOTE = 2.0


class Follower:
    """Calls every listener once with each new line of a JSON-lines file, until the block ends."""

    def __init__(self, path: Place, listeners: Sequence[Callable[[dict[str, float]], None]]) -> None:
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
        pause = _POLL_SECONDS if isinstance(self._path, Path) else _POLL_SECONDS_REMOTE
        while not self._ended.wait(pause):
            self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        whole, _, _ = read_from(self._path, self._offset).rpartition(b"\n")
        if not whole:
            return
        self._offset += len(whole) + 1
        for line in whole.splitlines():
            record = json.loads(line)
            for listener in self._listeners:
                listener(record)


def read_history(run: Place) -> list[dict[str, float]]:
    """A run's epochs in their order; an epoch repeated after a kill counts once, a line that a kill tore not."""
    path, by_epoch = run / "history.jsonl", dict[int, dict[str, float]]()
    for line in read_from(path).splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        by_epoch[int(record["epoch"])] = record
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]
