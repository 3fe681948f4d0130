"""What MLflow is to be told, in order, on disk until it has been told.

events.jsonl   one line an event, as it happened
sent.json      how many of them MLflow has, and its ids of the runs they made
lock           held while events are sent, so that a job and `scviaduct sync` take turns
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scviaduct.errors import OutputExistsError
from scviaduct.storage.locks import locked
from scviaduct.storage.manifest import read_json
from scviaduct.storage.places import Place

FOLDER = "mlflow-spool"
"""In the folder of a run or of mapped queries."""
_EVENTS, _SENT, _LOCK = "events.jsonl", "sent.json", "lock"

Event = dict[str, Any]


class Journal:
    """Events in the order they happened, and which of them still wait; without a folder they are in memory alone."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.ids: dict[str, str] = {}
        """{key of a run: its id in MLflow}."""
        self.waiting: deque[Event] = deque()
        self.told: set[tuple[str, int, tuple[str, ...]]] = set()
        """(run, step, names) of all numbers that were ever written down."""
        self.root: str | None = None
        """Key of the first run."""
        self.store: dict[str, str] = {}
        """Where the first run was to be told: uri and experiment."""
        self.finished = False
        """The first run has ended well: nothing will follow."""
        self._written = self._sent = 0
        self._made = False
        if folder and (folder / _EVENTS).exists():
            self._read()

    def _read(self) -> None:
        assert self.folder
        self._made = True
        path = self.folder / _EVENTS
        whole = path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):  # the last line of a process that was killed
            path.write_bytes(kept)
        for line in kept.splitlines():
            event = json.loads(line)
            self._note(event)
            self.waiting.append(event | {"tried": True})
        self._catch_up()

    def append(self, event: Event) -> None:
        """Write an event down."""
        self._note(event)
        self.waiting.append(event)
        folder = self._place()
        if folder:
            with (folder / _EVENTS).open("a") as file:
                file.write(json.dumps(event) + "\n")

    def noted(self, path: Path) -> str:
        """A file's path for an event: relative to the job's folder where it lies in it, so that this may be moved."""
        path, home = path.absolute(), self.folder and self.folder.absolute().parent
        return str(path.relative_to(home)) if home and path.is_relative_to(home) else str(path)

    def first(self) -> Event:
        """The event that is to be sent next, with the path it means here."""
        event = self.waiting[0]
        if "path" in event and self.folder:
            return event | {"path": str(self.folder.absolute().parent / event["path"])}
        return event

    def _place(self) -> Path | None:
        """The folder, made when it is first needed; one that was removed meanwhile, with its run, is not made again."""
        if self.folder and not self._made:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made = True
        if self.folder and not self.folder.exists():
            self.folder = None
        return self.folder

    def _note(self, event: Event) -> None:
        self._written += 1
        self.root = self.root or event["run"]
        self.store = self.store or event.get("store", {})
        self.finished = event["kind"] == "end" and event["run"] == self.root and event["status"] == "FINISHED"
        if event["kind"] == "metrics":
            self.told |= {(event["run"], r["step"], tuple(r["values"])) for r in event["records"]}

    def _catch_up(self) -> None:
        """Drop the events that another process has sent."""
        if not self.folder or not (self.folder / _SENT).exists():
            return
        record = read_json(self.folder / _SENT)
        self.ids |= record["ids"]
        while self._sent < record["events"]:
            self.waiting.popleft()
            self._sent += 1

    @contextmanager
    def sending(self) -> Iterator[bool]:
        """The right to send what waits; False while another process is at it."""
        if not self._place():
            yield True
            return
        assert self.folder
        try:
            with locked(self.folder / _LOCK, busy="another process sends"):
                self._catch_up()
                yield True
        except OutputExistsError:
            yield False

    def sent(self) -> None:
        """The first event that waited has been sent, or is given up."""
        self.waiting.popleft()
        self._sent += 1
        if not self.folder:
            return
        temporary = self.folder / f".{_SENT}.tmp"
        temporary.write_text(json.dumps({"events": self._sent, "ids": self.ids}))
        temporary.replace(self.folder / _SENT)

    def remove(self) -> None:
        """Take the folder away: all is told and nothing will follow."""
        if self.folder and self._made and not self.waiting:
            for name in (_EVENTS, _SENT, _LOCK):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()
            self._made = False


def unsent(folder: Place) -> int:
    """Events that wait in the folder of a run or of mapped queries."""
    path = folder / FOLDER
    if not (path / _EVENTS).exists():
        return 0
    written = (path / _EVENTS).read_bytes().count(b"\n")
    return written - (read_json(path / _SENT)["events"] if (path / _SENT).exists() else 0)
