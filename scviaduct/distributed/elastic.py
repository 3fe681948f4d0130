"""A range of workers: Ray Train ends the group and starts a larger one when there is room, here just after a checkpoint.

A group begins at the newest checkpoint, so a step done since would be done twice: the controller waits for one before
it ends the group. What is lost with a worker is lost.
"""

from __future__ import annotations

import time
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback  # a developers' API, without another address

from scviaduct.distributed.checkpoint import Checkpoints

_PATIENCE = 90.0
"""Seconds; a group that writes no checkpoint in that time is ended without. Lost workers go unnoticed meanwhile."""


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
