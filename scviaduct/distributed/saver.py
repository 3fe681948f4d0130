"""Writes checkpoints beside the training: a step pays for a copy in memory, a thread does the rest.

Of a model of 22 million parameters that copy is 264 MB.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from scviaduct.distributed.cadence import Every
from scviaduct.distributed.checkpoint import Checkpoint, Checkpoints, Progress, Tensors, state_of
from scviaduct.distributed.optimizer import Adam
from scviaduct.errors import IncompleteError
from scviaduct.storage.manifest import disk_is_full
from scviaduct.storage.places import Place

_STEPS_BETWEEN_QUESTIONS = 16
"""Whether a checkpoint is due by the clock is rank 0's to say, and an answer for all is a collective."""


class Saver:
    """The checkpoints of a run that goes on: when one is due, and its way to the disk.

    One is written at a time. While it is, none is due: a disk that cannot keep up makes checkpoints rarer, and no step
    waits for it. Only the last one is waited for, at the end of the block.
    """

    def __init__(self, store: Checkpoints, every: Every | None = None, keep: int = 2) -> None:
        self.store, self.every, self.keep = store, every or Every(seconds=60.0), keep
        self._buffers: Tensors = {}
        self._thread = ThreadPoolExecutor(1, "scviaduct-checkpoint")
        self._writing: Future[None] | None = None
        self._last = self._last_best = (time.monotonic(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown()
        if error is None:
            self.check()

    def restored(self, model: nn.Module, optimizer: Adam, position: int, rank: int) -> Progress:
        """Go on at a checkpoint of the store, or at the start; the rank that writes also cleans up."""
        if rank == 0:
            self.store.remove_unfinished()
        self._last = self._last_best = (time.monotonic(), position)
        return self.store.restore(model, optimizer, position, rank)

    def check(self) -> None:
        """Raise what the thread ran into.

        Raises:
            IncompleteError: a checkpoint could not be written.
        """
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def wait(self) -> None:
        """Wait for the one that is being written; raises as `check`."""
        if self._writing is not None:
            self._writing.result()

    def asked(self, position: int, *, epoch_ends: bool) -> bool:
        """Whether now is a time to ask if one is due; the same on all ranks, without a word between them."""
        return epoch_ends or position % (self.every.steps or _STEPS_BETWEEN_QUESTIONS) == 0

    def due(self, position: int, *, improved: bool) -> bool:
        """Whether one is due. The end of an epoch that is the best so far counts from the last such checkpoint."""
        if self._writing is not None and not self._writing.done():
            return False
        if self.every.steps:
            return position % self.every.steps == 0 or (improved and position - self._last_best[1] >= self.every.steps)
        since = self._last_best if improved else self._last
        return time.monotonic() - since[0] >= (self.every.seconds or 0.0)

    def save(self, model: nn.Module, optimizer: Adam, progress: Progress, sums: Tensor, position: int) -> None:
        """Copy the state after `position` global steps, and have it written; `sums` are those of all ranks.

        Raises:
            IncompleteError: the one before could not be written.
        """
        self.wait()
        checkpoint = Checkpoint(
            self._copied("model", model.state_dict()),
            self._copied("optimizer", optimizer.tensors()),
            {name: t.cpu() for name, t in progress.best_weights.items()},  # a new dict at each improvement: no copy
            state_of(optimizer, progress, sums, position),
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._last = (time.monotonic(), position)
        if progress.improved:
            self._last_best = self._last
        self._writing = self._thread.submit(self._write, checkpoint)

    def _copied(self, part: str, tensors: Tensors) -> Tensors:
        """The tensors in memory that is used again for the next checkpoint."""
        copies = {}
        for name, tensor in tensors.items():
            held = self._buffers.get(f"{part}.{name}")
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[f"{part}.{name}"] = copies[name] = held
            held.copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            self.store.write(checkpoint, self.keep)
        except Exception as error:
            raise IncompleteError(_refusal(self.store, checkpoint, error)) from error


def _refusal(store: Checkpoints, checkpoint: Checkpoint, error: Exception) -> str:
    place, newest = store.folder, _newest(store)
    why = f"{type(error).__name__}: {error}"
    if disk_is_full(error):
        why = f"it needs {checkpoint.nbytes / 1e6:,.0f} MB, and the disk is full{_free(place)}"
    kept = f"The one after step {newest:,} is intact" if newest else "There is none before it"
    return (
        f"The checkpoint after step {checkpoint.state['position']:,} could not be written to {place}: {why}. {kept}; "
        "mend that and continue with --resume."
    )


def _newest(store: Checkpoints) -> int:
    try:
        return store.newest()
    except Exception:  # noqa: BLE001 - the store that failed may not answer
        return 0


def _free(place: Place) -> str:
    return f" ({shutil.disk_usage(place).free / 1e6:,.0f} MB free)" if isinstance(place, Path) else ""
