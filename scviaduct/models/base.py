"""What every model is: a Module with a Schema, a Config, a training path and an embedding path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from scviaduct.errors import ConfigError, nearest
from scviaduct.models.adversary import Adversary
from scviaduct.models.counts import Cells
from scviaduct.models.nets import BatchNorm, Columns, Gaussian
from scviaduct.models.noise import Noise
from scviaduct.models.training import TrainingPlan
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


class Scores(NamedTuple):
    """How well a model explains each cell at one draw of its latent variables z: (cells,) each, in nats."""

    log_likelihood: Tensor
    """log p(x | z)."""
    kl: Tensor
    """KL(q(z | x) || p(z)), unweighted, with what else the model counts as KL; log_likelihood - kl is the ELBO."""
    log_weight: Tensor
    """log p(x, z) - log q(z | x): the mean of its exponential over draws is p(x). NaN where the model defines no p(x)."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Something a trained model says of cells and their features, and on which scale."""

    name: str
    """One of the model's `quantities`."""
    library_size: float | None = 1.0
    """Total that a cell's values are scaled to; None for the cell's own."""
    normalize_cells: bool = False
    """Scale accessibility by the cell's depth, which brings it closer to what is observed."""
    normalize_regions: bool = False
    """Scale accessibility by the region's factor, which brings it closer to what is observed."""
    include_background: bool = False
    """Count a protein's background as well."""
    features: tuple[int, ...] | None = None
    """Positions of the genes or proteins wanted; None for all."""

    @property
    def chosen(self) -> slice | list[int]:
        """`features` as an index."""
        return slice(None) if self.features is None else list(self.features)


class Offer(NamedTuple):
    """What a model says of a quantity."""

    axis: str
    """Its features are the schema's "genes" or "proteins"."""
    options: tuple[str, ...] = ()
    """Fields of Quantity that change it."""
    drawn: bool = False
    """Made of random draws: it has no value at the posterior's mean."""


GENES = Offer("genes", ("library_size",))
COUNTS = Offer("genes", drawn=True)


def require(value: object, allowed: tuple[str, ...], name: str) -> None:
    """Raise ConfigError unless an option has one of its values."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}; {nearest(str(value), allowed)}")


def require_range(value: float, low: float, high: float, name: str) -> None:
    """Raise ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"{name}={value!r} is outside {low} … {high}; choose a value inside")


@dataclass(frozen=True)
class LabelledStream:
    """What a semi-supervised model wants beside each batch: `Batch.labelled`."""

    n_samples_per_label: int | None = None
    """Cells of each label that an epoch draws; None for all cells with a label."""


class Model(nn.Module, ABC):
    """Base of all models: single-device code that knows nothing of files, processes or training loops."""

    Config: ClassVar[type[Any]]
    """Frozen, JSON-able dataclass of the options."""
    obsm_key: ClassVar[str]
    """Where AnnData users look for the embedding, e.g. "X_scVI"."""
    plan: ClassVar[TrainingPlan] = TrainingPlan()
    """How it is trained unless the user says otherwise."""
    uses_proteins: ClassVar[bool] = False
    """Whether it models protein counts: its Schema then has the data's proteins."""
    quantities: ClassVar[Mapping[str, Offer]]
    """What `decode` gives, by name; the first is what groups of cells are compared by."""

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

    @abstractmethod
    def inference(self, cells: Cells, noise: Noise | None) -> Any:
        """The posterior of the cells' latent variables, for `decode` and `score`; noise None means no dropout."""

    @abstractmethod
    def decode(self, quantity: Quantity, q: Any, cells: Cells, noise: Noise | None) -> Tensor:
        """(cells, features) what the model says, at a draw from the posterior q, or at its mean without noise.

        `cells` may be in another batch (`Cells.in_batch`) than those that q was inferred from. The quantity is checked
        by `offer`; call it while `evaluating`.
        """

    @abstractmethod
    def score(self, q: Any, cells: Cells, noise: Noise) -> Scores:
        """How well a draw from the posterior q explains the cells; call it while `evaluating`."""

    def offer(self, quantity: Quantity) -> Offer:
        """What `decode` makes of a quantity.

        Raises:
            ConfigError: the model has no such quantity, or an option does not concern it.
        """
        name, kind = quantity.name, type(self).__name__
        if name not in self.quantities:
            raise ConfigError(f"{kind} does not give {name!r}; {nearest(name, self.quantities)}")
        offer = self.quantities[name]
        for option in fields(quantity):
            changed = getattr(quantity, option.name) != option.default
            if changed and option.name not in ("name", "features", *offer.options):
                raise ConfigError(f"{option.name} does not concern {name!r} of {kind}; leave it out")
        return offer

    def decoded(
        self, batch: Batch, quantity: Quantity, noise: Noise | None = None, *, transform_batch: int | None = None
    ) -> Tensor:
        """(cells, features) `decode` of a batch, as if its cells came from the batch with code `transform_batch`.

        Raises:
            ConfigError: as `offer`; or the quantity is drawn, and there is no noise to draw it with.
        """
        if self.offer(quantity).drawn and noise is None:
            raise ConfigError(f"{quantity.name!r} is drawn at random; give the noise")
        with self.evaluating():
            cells = Cells.of(batch, self.schema, self.device)
            return self.decode(quantity, self.inference(cells, None), cells.in_batch(transform_batch), noise)

    def of_cells(self, batch: Batch) -> dict[str, Tensor]:
        """What the model says of each cell beside its latent state, by name: (cells,) each."""
        return {}

    def of_genes(self) -> dict[str, Tensor]:
        """What the model says of each gene or region, whatever the cell, by name: (genes,) each."""
        return {}

    def labelled_stream(self) -> LabelledStream | None:
        """The cells with a label that training batches shall bring; None for a model that needs none."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(chain(self.parameters(), self.buffers())).device

    @property
    def couples_cells(self) -> bool:
        """Whether a cell's training loss depends on the others of its batch (batch normalisation)."""
        return any(isinstance(m, BatchNorm) and not m.frozen for m in self.modules())

    @property
    def opponent(self) -> Adversary | None:
        """A part that is trained against the rest, at a learning rate of its own; None for most models."""
        return None

    @property
    def training_plan(self) -> TrainingPlan:
        """`plan`; against an opponent a warm-up by steps is half as long, as scvi-tools counts the opponent's steps too."""
        per_cell = self.plan.kl_warmup_steps_per_cell
        if self.opponent is None or per_cell is None:
            return self.plan
        return replace(self.plan, kl_warmup_steps_per_cell=per_cell / 2)

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
