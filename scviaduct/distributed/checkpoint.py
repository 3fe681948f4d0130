"""Checkpoints: folders of safetensors and one readable JSON, whole or absent, no pickle.

checkpoints/step-000001200/model.safetensors      every tensor of the model
                           optimizer.safetensors  Adam's moments
                           best.safetensors       the best epoch's weights, under early stopping
                           state.json             position, history, counters
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scviaduct.distributed.files import whole_folder
from scviaduct.storage.manifest import read_json, write_json_atomic

_PLAIN = ("epoch", "step", "history", "best", "best_epoch", "plateau_epochs", "finished")


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
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best epoch, under early stopping."""

    def close_epoch(self, record: dict[str, float]) -> None:
        """Append the epoch's record and stand at the start of the next."""
        self.history.append(record)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, _no_sums()


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, of which the newest are kept."""

    folder: Path
    seconds: float = 60.0
    """Time between two of them."""
    keep: int = 2

    def names(self) -> list[Path]:
        """Whole checkpoints, oldest first; a folder takes its name only when it is whole."""
        return sorted(self.folder.glob("step-*"))

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, sums: Tensor, position: int
    ) -> None:
        """Write the state after `position` global steps; `sums` are those of all ranks. Older checkpoints go."""
        final = self.folder / f"step-{position:09d}"
        if final.exists():  # left by an attempt that was killed right after
            shutil.rmtree(final)
        with whole_folder(final) as temporary:
            _write(model.state_dict(), temporary / "model.safetensors")
            _write(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
            if progress.best_weights:
                _write(progress.best_weights, temporary / "best.safetensors")
            plain = {name: getattr(progress, name) for name in _PLAIN}
            lr = optimizer.param_groups[0]["lr"]
            write_json_atomic(temporary / "state.json", plain | {"sums": sums.tolist(), "lr": lr, "position": position})
        for old in self.names()[: -self.keep]:
            shutil.rmtree(old)

    def finished(self, model: nn.Module) -> Progress:
        """Load a finished run's weights, under early stopping those of the best epoch, into the model."""
        progress = self.restore(model, torch.optim.Adam(model.parameters()), rank=0)
        if progress.best_weights:
            model.load_state_dict(progress.best_weights)
        return progress

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> Progress:
        """Load the newest checkpoint into the model and the optimizer; a fresh Progress when there is none."""
        if not self.names():
            return Progress()
        newest = self.names()[-1]
        state = read_json(newest / "state.json")
        model.load_state_dict(load_file(newest / "model.safetensors"))
        _restore_optimizer(optimizer, load_file(newest / "optimizer.safetensors"))
        optimizer.param_groups[0]["lr"] = state["lr"]
        best = newest / "best.safetensors"
        return Progress(
            **{name: state[name] for name in _PLAIN},
            # the saved sums are everybody's: one rank carries them on, the others start at zero
            sums=torch.tensor(state["sums"], dtype=torch.float64) if rank == 0 else _no_sums(),
            best_weights=load_file(best) if best.exists() else {},
        )


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    # clone: safetensors refuses tensors that share memory
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, slot in state.items() for name, value in slot.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
