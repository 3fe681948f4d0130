"""What every model is: a Module with a Schema, a Config, a training path and an embedding path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scviaduct.errors import ConfigError, nearest
from scviaduct.models.nets import BatchNorm, Columns, Gaussian
from scviaduct.models.noise import Noise
from scviaduct.schema import Batch, Schema


@dataclass(frozen=True)
class Losses:
    """What a training step returns; `loss` is the mean over the batch's cells, the rest is for reports."""

    loss: Tensor
    """Scalar to differentiate: reconstruction + kl_weight * kl per cell (+ what the model adds)."""
    reconstruction: Tensor
    """Sum over cells of -log p(x | z), detached."""
    kl: Tensor
    """Sum over cells of the unweighted KL divergences, detached; reconstruction + kl is the negative ELBO."""
    n_cells: int
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What the model adds to the loss, by name: sums over cells, weighted as in the loss, detached."""


def require(value: object, allowed: tuple[str, ...], name: str) -> None:
    """Raise ConfigError unless an option has one of its values."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}; {nearest(str(value), allowed)}")


def require_range(value: float, low: float, high: float, name: str) -> None:
    """Raise ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"{name}={value!r} is outside {low} … {high}; choose a value inside")


class Model(nn.Module, ABC):
    """Base of all models: single-device code that knows nothing of files, processes or training loops."""

    Config: ClassVar[type[Any]]
    """Frozen, JSON-able dataclass of the options."""
    obsm_key: ClassVar[str]
    """Where AnnData users look for the embedding, e.g. "X_scVI"."""

    def __init__(self, schema: Schema, config: Any) -> None:
        super().__init__()
        self.schema = schema
        self.config = config

    def adopt(self, schema: Schema) -> None:
        """Take an extension of the schema (surgery); models whose tensors depend on it override this."""
        self.schema = schema

    @abstractmethod
    def forward(self, batch: Batch, kl_weight: float = 1.0, noise: Noise | None = None) -> Losses:
        """The training path: the loss of a batch, with noise drawn from its cells' seeds unless given."""

    @abstractmethod
    def encode(self, batch: Batch) -> Gaussian:
        """q(z | x) of each cell, (cells, latent), without dropout, batch statistics or gradients."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(chain(self.parameters(), self.buffers())).device

    @property
    def couples_cells(self) -> bool:
        """Whether a cell's training loss depends on the others of its batch (batch normalisation)."""
        return any(isinstance(m, BatchNorm) and not m.frozen for m in self.modules())

    def query_parameters(self) -> list[nn.Parameter]:
        """What surgery added and a query may train; empty before surgery."""
        return [m.new for m in self.modules() if isinstance(m, Columns) and m.new is not None]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, and back to the mode before."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)
