"""Checkpoints: folders of safetensors and one readable JSON, whole or absent, no pickle.

checkpoints/step-000001200/model.safetensors      every tensor of the model
                           optimizer.safetensors  Adam's moments
                           best.safetensors       the best epoch's weights, under early stopping
                           state.json             position, history, counters; written last
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from scviaduct.distributed.files import remove_folder, whole_folder
from scviaduct.distributed.optimizer import Adam
from scviaduct.storage.manifest import read_json, write_json_atomic
from scviaduct.storage.places import Place

_PLAIN = ("epoch", "step", "history", "best", "best_epoch", "plateau_epochs", "finished")
_STATE = "state.json"
Tensors = dict[str, Tensor]


def _no_sums() -> Tensor:
    return torch.zeros(4, dtype=torch.float64)


@dataclass
class Progress:
    """Where a run stands. All but the weights is readable in state.json."""

    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    sums: Tensor = field(default_factory=_no_sums)
    """This rank's loss, reconstruction, kl and cells of the epoch so far."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One record per finished epoch."""
    best: float | None = None
    """Lowest monitored elbo so far."""
    best_epoch: int = -1
    plateau_epochs: int = 0
    """Epochs without improvement since the learning rate changed."""
    finished: bool = False
    best_weights: Tensors = field(default_factory=dict)
    """Weights of the best epoch, under early stopping."""

    def close_epoch(self, record: dict[str, float]) -> None:
        """Append the epoch's record and stand at the start of the next."""
        self.history.append(record)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, _no_sums()

    @property
    def improved(self) -> bool:
        """Whether it stands at the end of the best epoch so far."""
        return self.step == 0 and 0 <= self.best_epoch == self.epoch - 1


@dataclass(frozen=True)
class Checkpoint:
    """What one holds, in memory of its own."""

    model: Tensors
    optimizer: Tensors
    best: Tensors
    state: dict[str, Any]
    """The content of state.json."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.nbytes for part in (self.model, self.optimizer, self.best) for t in part.values())


def state_of(optimizer: Adam, progress: Progress, sums: Tensor, position: int) -> dict[str, Any]:
    """What state.json holds after `position` global steps; `sums` are those of all ranks."""
    plain = {name: getattr(progress, name) for name in _PLAIN} | {"history": list(progress.history)}
    return plain | {
        "sums": sums.tolist(),
        "lr": optimizer.groups[0].lr,
        "position": position,
        "best_so_far": progress.improved,
    }


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in a folder or under the address of an object store."""

    folder: Place

    def names(self) -> list[Place]:
        """Whole checkpoints, oldest first; one without its state.json was not written to the end."""
        return sorted((state.parent for state in self.folder.glob(f"step-*/{_STATE}")), key=lambda place: place.name)

    def newest(self) -> int:
        """Global steps that the newest one holds; 0 without any."""
        names = self.names()
        return _position(names[-1]) if names else 0

    def write(self, checkpoint: Checkpoint, keep: int) -> None:
        """Write one; of the others the `keep` newest remain, and the last that stood at the end of a best epoch."""
        final = self.folder / f"step-{checkpoint.state['position']:09d}"
        remove_folder(final, marker=_STATE)  # left by an attempt that was killed right after
        with whole_folder(final, marker=_STATE) as temporary:
            save_file(checkpoint.model, temporary / "model.safetensors")
            save_file(checkpoint.optimizer, temporary / "optimizer.safetensors")
            if checkpoint.best:
                save_file(checkpoint.best, temporary / "best.safetensors")
            write_json_atomic(temporary / _STATE, checkpoint.state)
        names = self.names()
        best = next((n for n in reversed(names) if read_json(n / _STATE)["best_so_far"]), None)
        for name in names[:-keep]:
            if name != best:
                remove_folder(name, marker=_STATE)

    def remove_unfinished(self) -> None:
        """Remove what a writer left that was killed; there must be none at work."""
        whole = {name.name for name in self.names()}
        for left in [*self.folder.glob(".step-*.tmp"), *self.folder.glob("step-*")]:
            if left.name not in whole:
                remove_folder(left, marker=_STATE)

    def finished(self, model: nn.Module) -> Progress:
        """Load a finished run's weights, under early stopping those of the best epoch, into the model."""
        progress = self.restore(model, None, self.newest(), rank=0)
        if progress.best_weights:
            model.load_state_dict(progress.best_weights)
        return progress

    def restore(self, model: nn.Module, optimizer: Adam | None, position: int, rank: int) -> Progress:
        """Load the checkpoint after `position` steps into the model and the optimizer, if any; position 0 is a fresh start."""
        if not position:
            return Progress()
        folder = self.folder / f"step-{position:09d}"
        state = read_json(folder / _STATE)
        model.load_state_dict(_tensors(folder / "model.safetensors"))
        if optimizer is not None:
            optimizer.load(_tensors(folder / "optimizer.safetensors"))
            optimizer.groups[0].lr = state["lr"]
        best = folder / "best.safetensors"
        return Progress(
            **{name: state[name] for name in _PLAIN},
            # the saved sums are everybody's: one rank carries them on, the others start at zero
            sums=torch.tensor(state["sums"], dtype=torch.float64) if rank == 0 else _no_sums(),
            best_weights=_tensors(best) if best.exists() else {},
        )


def _position(folder: Place) -> int:
    return int(folder.name.removeprefix("step-"))


def _tensors(file: Place) -> Tensors:
    return load_file(file) if isinstance(file, Path) else load(file.read_bytes())
