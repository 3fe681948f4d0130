"""Sends a journal's events to MLflow: in order, each until it arrives, and never in the job's way.

A server that is away is tried again after 5 seconds, then after twice as long each time, up to 5 minutes; calls give up
after 10 seconds. In between an event costs a line in a file.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from scviaduct.distributed.journal import Event, Journal
from scviaduct.distributed.mlflowstore import MlflowStore, Refused, shown
from scviaduct.storage.places import Place

log = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 5.0, 300.0


class Outbox:
    """The events of a job's runs on their way to MLflow; may be used from any thread.

    `kept` is the folder of the job whose `folder` this is, where that is not the one it lies in.
    """

    def __init__(self, uri: str, experiment: str, folder: Path | None, kept: Place | None = None) -> None:
        self.uri, self.experiment, self._kept = uri, experiment, kept
        self.journal = Journal(folder)
        self._store = MlflowStore(uri, experiment)
        self._lock = threading.RLock()
        self._wait, self._not_before = _FIRST_WAIT, 0.0
        self._warned: set[str] = set()

    def put(self, event: Event) -> Any:
        """Write an event down and send what waits; what MLflow answered, None when the event has to wait."""
        with self._lock:
            self.journal.append(event)
            return self.send() if time.monotonic() >= self._not_before else None

    def send(self) -> Any:
        """Send what waits, now; the answer to the last event, None when something still waits."""
        with self._lock, self.journal.sending() as mine:
            answer = None
            while mine and self.journal.waiting:
                event = self.journal.first()
                try:
                    answer = self._store.deliver(event, self.journal.ids)
                except Refused as error:
                    answer = None
                    self._warn(
                        event["kind"], "MLflow at %s does not take %s: %s", shown(self.uri), event["kind"], error
                    )
                except Exception as error:  # noqa: BLE001 - tracking must not end a training run
                    self.journal.waiting[0]["tried"] = True
                    self._put_off(error)
                    return None
                self.journal.sent()
            if not self.journal.waiting:
                self._wait, self._not_before = _FIRST_WAIT, 0.0
                self._warned.discard("away")
            return answer

    def _put_off(self, error: Exception) -> None:
        kept = f"kept in {self.journal.folder}" if self.journal.folder else "kept in memory"
        self._warn(
            "away",
            "MLflow at %s cannot be told (%s). The job goes on without it; its record is %s and sent later.",
            *(shown(self.uri), _first_line(error), kept),
        )
        self._not_before = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, _LONGEST_WAIT)

    def _warn(self, about: str, message: str, *values: Any) -> None:
        """Once per kind, or per time that the server is away."""
        if about not in self._warned:
            self._warned.add(about)
            log.warning(message, *values)

    def close(self) -> None:
        """A last attempt to send what waits, whatever the time since the one before."""
        self.send()
        waiting = len(self.journal.waiting)
        if not waiting:
            return
        if self.journal.folder:
            where = self._kept or self.journal.folder.parent
            log.warning(
                "%d records wait for MLflow at %s. Send them with: scviaduct sync %s", waiting, shown(self.uri), where
            )
        else:
            log.warning("%d records did not reach MLflow at %s and are lost.", waiting, shown(self.uri))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
