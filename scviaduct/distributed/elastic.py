"""What Ray Train's controller is asked to do besides: grow a group just after a checkpoint, and say that it waits.

A group begins at the newest checkpoint, so a step done since would be done twice: the controller waits for one before
it ends the group. What is lost with a worker is lost.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback  # a developers' API, without another address

from scviaduct.distributed.checkpoint import Checkpoints
from scviaduct.distributed.waiting import EVERY, Waiting
from scviaduct.storage.places import Place

_PATIENCE = 90.0
"""Seconds; a group that writes no checkpoint in that time is ended without. Lost workers go unnoticed meanwhile."""
_NO_GROUP = {"InitializingState", "SchedulingState", "ReschedulingState", "RestartingState"}
"""The controller's states while no group runs and the next one is looked for."""


class GrowAtCheckpoints(ControllerCallback):
    """Called in Ray Train's controller whenever it changes its state."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Before a running group is ended to become larger, let it write a checkpoint."""
        if type(current_state).__name__ != "ResizingState":
            return
        before, end = self._checkpoints.names()[-1:], time.monotonic() + _PATIENCE
        while self._checkpoints.names()[-1:] == before and time.monotonic() < end:
            time.sleep(0.1)


def _resources() -> tuple[dict[str, float], dict[str, float]]:
    """Of the cluster: all, and free ones."""
    return ray.cluster_resources(), ray.available_resources()


class SayWaiting(ControllerCallback):
    """Keeps the record of a run that waits for workers (waiting.py), from a thread of the controller."""

    def __init__(self, out: Place, fewest: int, most: int, gpus_per_worker: float) -> None:
        self._out, self._workers = out, (fewest, most)
        self._needed = {"CPU": float(fewest)} | ({"GPU": fewest * gpus_per_worker} if gpus_per_worker else {})
        self._running: threading.Event | None = None
        self._sure = True

    def after_controller_start(self, train_run_context: Any) -> None:
        """The first group is looked for."""
        self._begin()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """A group is looked for, is being started, runs, or none will be."""
        state, before = type(current_state).__name__, type(previous_state).__name__
        # Ray saw room when it began to start a group; if there is none it finds out when its start-up time is over
        self._sure = state != "SchedulingState" or before == "ReschedulingState"
        if state in _NO_GROUP:
            self._begin()
        elif self._running:
            self._running.set()
            self._running = None

    def _begin(self) -> None:
        if not self._running:
            self._running = threading.Event()
            threading.Thread(target=self._say, args=(self._running, time.time()), daemon=True).start()

    def _say(self, running: threading.Event, since: float) -> None:
        while not running.wait(EVERY):
            there, free = ({name: has.get(name, 0.0) for name in self._needed} for has in _resources())
            found = Waiting(*self._workers, since, time.time(), self._needed, there, free)
            if found.lacks or (self._sure and found.lacks_now):
                with suppress(Exception):  # each object store's driver has errors of its own; the next one may arrive
                    found.write(self._out)
        (self._out / "waiting.json").unlink(missing_ok=True)
