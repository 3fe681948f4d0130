"""Options of a hyper-parameter search: those of training, which all trials share, and how trials are chosen and judged.

Importing this module loads neither torch nor ray, so that the command line answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cyclopts import Parameter

from scviaduct.distributed.config import FitConfig, TrackingConfig, TrainConfig
from scviaduct.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """TrainConfig for many trials. What the recipe searches for must not be given here as well."""

    out: Path
    """Folder of the search: trials.csv, best.toml, and a run folder for each trial."""
    search: Path | None = None
    """Recipe: a TOML file whose table [search] names options and their values, e.g. n_latent = {int = [10, 50]}."""
    n_trials: int | None = None
    """Trials in all, those of a search that is resumed included. Default: 20."""
    objective: Literal["monitored", "scib"] = "monitored"
    """What the best trial is best in: the number that early stopping watches, of the held-out cells (scvi: the ELBO); or
    the total score of scib-metrics, which needs labels_key and pip install "scviaduct[scib]"."""
    scib_cells: int = 5000
    """Cells that scib-metrics scores, the same of every trial."""
    grace_epochs: int | None = None
    """Epochs before a trial may be stopped for being worse than others (ASHA). Default: a tenth of them; as many as
    max_epochs: none is stopped."""
    reduction_factor: int = 3
    """One in so many trials goes on from each rung; the next rung is so many times as many epochs away."""
    parallel: int | None = None
    """Trials at the same time. Default: as many as there are cores for."""
    workers: Annotated[int, Parameter(name="--workers-per-trial")] = 1
    """Processes of each trial, for models that are large; more than 1 train with DistributedDataParallel."""
    gpus_per_worker: float | None = None
    """GPUs of each process. Default: one, where there are any."""
    resume: bool = False
    """Go on with the search in `out`: trials that ended count, those under way go on from their checkpoints."""
    name: str | None = None
    """Name in MLflow's registry of the best trial's model. Default: the name of `out`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_trials", "scib_cells", "grace_epochs", "parallel"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}.")
        if self.reduction_factor < 2:
            raise ConfigError(f"reduction_factor must be at least 2, not {self.reduction_factor}.")
        if not self.resume and self.search is None:
            raise ConfigError("Which options are to be searched? Name a recipe with --search recipe.toml.")
        if self.objective == "scib" and not self.resume and not self.labels_key:
            raise ConfigError("The scib objective compares clusters with cell types: name their column, --labels-key.")
        if self.objective == "monitored" and not self.fit.validation_size:
            raise ConfigError("Trials are compared by held-out cells: validation_size must be above 0.")

    def fixed(self, params: dict[str, Any]) -> TrainConfig:
        """The training of a trial with these options, as one would give it to `train`."""
        own = {f.name for f in fields(FitConfig)}
        fit = replace(self.fit, **{name: value for name, value in params.items() if name in own})
        options = tuple(f"{name}={_text(value)}" for name, value in params.items() if name not in own)
        shared = {f.name: getattr(self, f.name) for f in fields(TrainConfig)}
        return TrainConfig(**shared | {"fit": fit, "set": (*self.set, *options)})

    def trial(self, folder: Path, params: dict[str, Any]) -> TrainConfig:
        """The training of a trial as it is run in its own process: on one thread and unknown to MLflow."""
        made = self.fixed(params)
        return replace(
            made,
            out=folder,
            resume=(folder / "run.json").is_file(),
            fit=replace(made.fit, threads=made.fit.threads or 1),
            tracking=TrackingConfig(tracking_uri="none"),
            address=None,
            name=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record; `from_dict` is its inverse."""
        paths = {
            name: value and str(value) for name in ("out", "init_from", "search") for value in [getattr(self, name)]
        }
        return asdict(self) | paths

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """Rebuild from `to_dict`."""
        return super().from_dict(record | {"search": record["search"] and Path(record["search"])})


def _text(value: Any) -> str:
    """A model option's value as --set takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
