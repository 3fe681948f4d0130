"""Tensors of another program's model, by their names: copied into ours, or ours into a new state dict.

A correspondence of names is written once and walked in either direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from scviaduct.errors import DataError


class StateReader:
    """Copies by the other program's names, checking shapes.

    With `writing` the state starts empty, and what a model holds is copied out of it into new tensors.
    """

    origin: ClassVar[str]
    """What the weights should have been saved from, for messages."""
    options: ClassVar[str]
    """What must agree for the shapes to agree, for messages."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Beginnings of names of tensors that the other program has whether it uses them or not."""

    def __init__(self, state: Mapping[str, Tensor] | None = None) -> None:
        self.writing = state is None
        self.state = dict(state or {})
        self.unread = {name for name in self.state if not name.endswith("num_batches_tracked")}

    def get(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """A tensor; DataError when there is none of that name. Writing, a new one of that shape."""
        self.unread.discard(name)
        if self.writing:
            self.state[name] = torch.zeros(tuple(shape))
        if name not in self.state:
            raise DataError(f"The weights have no tensor {name!r}; were they saved from {self.origin}?")
        return self.state[name]

    def put(self, target: Tensor, value: Tensor, name: str) -> None:
        """Copy `value`, a part of the tensor `name`, or copy into it; DataError when its shape is another."""
        if target.shape != value.shape:
            raise DataError(
                f"{name!r}: the file's part is {tuple(value.shape)}, the model's {tuple(target.shape)}; "
                f"{self.options} must be the file's"
            )
        if self.writing:
            value.copy_(target)
        else:
            target.copy_(value)

    def copy(self, target: Tensor, name: str, *, flatten: bool = False) -> None:
        """Copy a whole tensor; with `flatten` the other program's has one row."""
        value = self.get(name, (1, len(target)) if flatten else target.shape)
        self.put(target, value.flatten() if flatten else value, name)

    def transposed(self, target: Tensor, name: str) -> None:
        """Copy a whole tensor whose rows are our columns; of one dimension, as it is."""
        self.put(target, self.get(name, target.t().shape if target.dim() > 1 else target.shape).t(), name)

    def linear(self, module: nn.Linear, name: str) -> None:
        """Weight and bias."""
        self.copy(module.weight, f"{name}.weight")
        self.copy(module.bias, f"{name}.bias")

    def stacked(self, module: nn.Linear, names: Sequence[str]) -> None:
        """Several linear maps of one size as one, their outputs one below the other."""
        for part in ("weight", "bias"):
            for rows, name in zip(getattr(module, part).chunk(len(names)), names, strict=True):
                self.copy(rows, f"{name}.{part}")

    def batch_norm(self, module: nn.Module, name: str) -> None:
        """Weights and running statistics."""
        for part in ("weight", "bias", "running_mean", "running_var"):
            self.copy(getattr(module, part), f"{name}.{part}")
        if self.writing:
            self.state[f"{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)

    def refuse_unread(self) -> None:
        """DataError when the state has tensors without a place in the model."""
        left = sorted(name for name in self.unread if not name.startswith(self.unused))
        if left:
            raise DataError(
                f"{len(left)} tensors of the weights have no place in the model, e.g. {left[0]!r}; "
                f"{self.options} must be the file's"
            )
