"""How a model is trained unless the user says otherwise: each model states its upstream's numbers as one record.

Nothing here needs torch, so that the command line can import it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from scviaduct.errors import ConfigError, nearest

Optimizer = Literal["Adam", "AdamW"]
Monitor = Literal["elbo", "reconstruction", "kl", "loss"]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Optimiser and schedule. The defaults are those of scvi-tools' TrainingPlan, Trainer and SCVI.train.

    Raises:
        ConfigError: a value that makes no sense.
    """

    max_epochs: int | None = None
    """None: 400 up to 20,000 cells, fewer in proportion beyond."""
    refining_epochs: tuple[int, int] | None = None
    """Where the model starts with another's weights: a third of the epochs, but within these bounds."""
    batch_size: int = 128
    optimizer: Optimizer = "Adam"
    lr: float = 1e-3
    eps: float = 0.01
    weight_decay: float = 1e-6
    n_epochs_kl_warmup: int = 400
    """0: none."""
    n_steps_kl_warmup: int | None = None
    """Used instead where set."""
    kl_warmup_steps_per_cell: float | None = None
    """Sets n_steps_kl_warmup once the number of cells is known."""
    min_kl_weight: float = 0.0
    max_kl_weight: float = 1.0
    early_stopping: bool = False
    early_stopping_monitor: Monitor = "elbo"
    early_stopping_patience: int = 45
    early_stopping_min_delta: float = 0.0
    reduce_lr_on_plateau: bool = False
    lr_factor: float = 0.6
    lr_patience: int = 30

    def __post_init__(self) -> None:
        if not 0 <= self.min_kl_weight <= self.max_kl_weight:
            raise ConfigError(
                f"min_kl_weight={self.min_kl_weight} and max_kl_weight={self.max_kl_weight}: needed is "
                "0 <= min_kl_weight <= max_kl_weight."
            )
        if not 0 < self.lr_factor < 1:
            raise ConfigError(f"lr_factor must lie between 0 and 1, not {self.lr_factor}.")
        for name, allowed in (("optimizer", get_args(Optimizer)), ("early_stopping_monitor", get_args(Monitor))):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}; {nearest(value, allowed)}")

    def settled(self, n_cells: int, *, refines: bool = False) -> Self:
        """The plan for so many cells: what depends on their number is a number. `refines`: with another's weights."""
        epochs, steps = self.max_epochs, self.n_steps_kl_warmup
        if epochs is None:
            epochs = max(1, min(round(20_000 / n_cells * 400), 400))
            if refines and self.refining_epochs:
                least, most = self.refining_epochs
                epochs = min(most, max(least, round(epochs / 3)))
        if steps is None and self.kl_warmup_steps_per_cell is not None:
            steps = int(self.kl_warmup_steps_per_cell * n_cells)
        return replace(self, max_epochs=epochs, n_steps_kl_warmup=steps)

    def kl_weight(self, epoch: int, step: int) -> float:
        """Weight of the KL term at an epoch (from 0) and a global step."""
        done = 1.0
        if self.n_steps_kl_warmup:
            done = min(1.0, step / self.n_steps_kl_warmup)
        elif self.n_epochs_kl_warmup:
            done = min(1.0, epoch / self.n_epochs_kl_warmup)
        return self.min_kl_weight + (self.max_kl_weight - self.min_kl_weight) * done
