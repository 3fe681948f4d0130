"""Options of training and mapping: one dataclass each. The sentence under a field is its --help and its documentation.

Importing this module loads neither torch nor ray, so that the command line answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cyclopts import Parameter

from scviaduct.errors import ConfigError


def _positive(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be above 0, not {value}.")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How parameters are fitted, for references and for surgery; defaults are scvi-tools' unless said otherwise."""

    max_epochs: int | None = None
    """Epochs at most. Default: 400 up to 20,000 cells, fewer in proportion beyond."""
    batch_size: int = 128
    """Cells of a global batch, whatever the number of workers."""
    lr: float = 1e-3
    """Learning rate of Adam (eps 0.01)."""
    weight_decay: float = 1e-6
    """L2 penalty inside Adam."""
    n_epochs_kl_warmup: int | None = 400
    """Epochs over which the weight of the KL term rises from 0 to 1; 0 starts at 1."""
    n_steps_kl_warmup: int | None = None
    """Steps of the KL warm-up, used instead when set."""
    gradient_clip: float | None = None
    """Largest norm of the gradient."""
    validation_size: float = 0.1
    """Share of the cells held out from training, chosen by a hash of row and seed."""
    validation_stratify_by: str | None = None
    """obs column; the same share of each of its values is held out, to the cell. Default: of all cells as they come."""
    early_stopping: bool = False
    """Stop when the monitored elbo has not improved for a while, and keep the best epoch's weights."""
    early_stopping_patience: int = 45
    """Epochs without improvement before stopping."""
    early_stopping_min_delta: float = 0.0
    """Smallest change of the elbo (nats per cell) that counts as an improvement."""
    reduce_lr_on_plateau: bool = False
    """Multiply the learning rate by 0.6 after 30 epochs without improvement."""
    seed: int = 0
    """Decides initial weights, order of cells, split and noise."""
    n_lanes: int = 16
    """Lanes of the sampler: the most workers this run may ever have."""
    deterministic: bool = False
    """The same bits for every number of workers: gradients are added lane by lane, in lane order (slower)."""
    threads: int | None = None
    """Threads of each worker. Default: 1; from 1,024 cells a worker and step on, the cores divided by the workers."""

    def __post_init__(self) -> None:
        _positive(self, "max_epochs", "batch_size", "lr", "n_lanes", "threads", "gradient_clip")
        _positive(self, "early_stopping_patience")
        if not 0 <= self.validation_size < 1:
            raise ConfigError(f"validation_size must lie in [0, 1), not {self.validation_size}.")
        if self.validation_stratify_by and not self.validation_size:
            raise ConfigError("validation_stratify_by needs a validation_size above 0.")

    def epochs_for(self, n_cells: int) -> int:
        """max_epochs, or scvi-tools' rule for this many cells."""
        return self.max_epochs or max(1, min(round(20_000 / n_cells * 400), 400))

    def threads_for(self, workers: int, cores: int) -> int:
        """`threads`, or as many as pay: below about 1,024 cells a step threads wait for each other more than they help."""
        if self.threads or self.deterministic or self.batch_size // workers < 1024:
            return self.threads or 1
        return max(1, cores // workers)

    def kl_weight(self, epoch: int, step: int) -> float:
        """Weight of the KL term at an epoch (from 0) and a global step."""
        if self.n_steps_kl_warmup:
            return min(1.0, step / self.n_steps_kl_warmup)
        return min(1.0, epoch / self.n_epochs_kl_warmup) if self.n_epochs_kl_warmup else 1.0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps the record."""

    tracking_uri: str | None = None
    """MLflow store. Default: $MLFLOW_TRACKING_URI, else SQLite in ./mlflow.db; "none" for no tracking."""
    experiment: str = "scviaduct"
    """MLflow experiment that holds the runs."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run."""

    out: Path
    """Folder of the run: checkpoints, history and the model bundle."""
    model: str = "scvi"
    """Which model to train: scvi, scanvi, trvae, peakvi or poissonvi."""
    init_from: Path | None = None
    """Run or bundle whose weights and options this model starts with, e.g. of scvi for scanvi."""
    view: str = "default"
    """Training view of the atlas, made by `prepare`."""
    batch_key: str = "dataset"
    """obs column whose categories the model corrects for; "dataset" is the file a cell came from."""
    labels_key: str | None = None
    """obs column with cell types: kept with the bundle for label transfer, and used by models that need labels."""
    unlabeled_category: str = "Unknown"
    """Value of labels_key that means unlabelled."""
    categorical_covariate_keys: tuple[str, ...] = ()
    """Further categorical obs columns to correct for."""
    continuous_covariate_keys: tuple[str, ...] = ()
    """Numeric obs columns to correct for."""
    size_factor_key: str | None = None
    """Numeric obs column that replaces the library size."""
    preset: Literal["default", "scarches"] = "default"
    """"scarches": two layers, covariates in the encoder, layer norm; what references to be mapped onto want."""
    set: tuple[str, ...] = ()
    """Model option as name=value, e.g. --set n_latent=20; may be repeated."""
    workers: int = 1
    """Processes. 1 trains in this process, more train under Ray with DistributedDataParallel."""
    address: str | None = None
    """Address of a running Ray cluster. Default: Ray is started on this machine when it is needed."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint; the number of workers may differ."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints: what a kill can cost at most."""
    max_failures: int = 3
    """Lost workers to recover from before giving up."""
    log_cells: bool = False
    """Record which cells each step saw, under `out`/cells."""
    name: str | None = None
    """Name in MLflow's registry. Default: the name of `out`."""
    fit: Annotated[FitConfig, Parameter(name="*")] = field(default_factory=FitConfig)
    """How parameters are fitted."""
    tracking: Annotated[TrackingConfig, Parameter(name="*")] = field(default_factory=TrackingConfig)
    """Where MLflow keeps the record."""

    def __post_init__(self) -> None:
        _positive(self, "workers", "checkpoint_seconds")
        if self.workers > self.fit.n_lanes:
            raise ConfigError(f"{self.workers} workers need --n-lanes {self.workers} or more (now {self.fit.n_lanes}).")
        if self.workers > 1 and self.fit.batch_size < 4 * self.workers:
            raise ConfigError(
                f"batch_size {self.fit.batch_size} is too small for {self.workers} workers: 4 cells each."
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record; `from_dict` is its inverse."""
        return asdict(self) | {"out": str(self.out), "init_from": self.init_from and str(self.init_from)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """Rebuild from `to_dict`."""
        tuples = {f.name: tuple(record[f.name]) for f in fields(cls) if isinstance(record[f.name], (list, tuple))}
        nested = {"fit": FitConfig(**record["fit"]), "tracking": TrackingConfig(**record["tracking"])}
        start = record["init_from"] and Path(record["init_from"])
        return cls(**record | tuples | nested | {"out": Path(record["out"]), "init_from": start})


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SurgeryConfig(FitConfig):
    """FitConfig with surgery's defaults: early stopping on the training elbo as in HLCA's mapping."""

    max_epochs: int | None = 200
    """Epochs at most."""
    weight_decay: float = 0.0
    """L2 penalty inside Adam, on the query's own columns."""
    n_epochs_kl_warmup: int | None = 0
    """Epochs over which the weight of the KL term rises from 0 to 1; 0 starts at 1."""
    validation_size: float = 0.0
    """Share of the cells held out from training, chosen by a hash of row and seed."""
    validation_stratify_by: Annotated[str | None, Parameter(parse=False)] = None
    """Only for views: a query has codes, no columns."""
    early_stopping: bool = True
    """Stop when the monitored elbo has not improved for a while, and keep the best epoch's weights."""
    early_stopping_patience: int = 10
    """Epochs without improvement before stopping."""
    early_stopping_min_delta: float = 1e-3
    """Smallest change of the elbo (nats per cell) that counts as an improvement."""


@dataclass(frozen=True, kw_only=True)
class MapConfig:
    """Everything that decides how queries are mapped."""

    out: Path
    """Folder of the results: one h5ad a query and summary.csv."""
    workers: int = 1
    """Queries mapped at the same time; more than 1 uses Ray."""
    address: str | None = None
    """Address of a running Ray cluster. Default: Ray is started on this machine when it is needed."""
    batch_key: str | None = None
    """obs column with the queries' batches. Default: the reference's."""
    one_batch: bool = False
    """Take each query as one batch, named after its file."""
    reuse_batches: bool = False
    """A query's batch that is named as one of the reference's is the same batch. Default: a new one."""
    counts: str | None = None
    """Matrix with the counts: "X", "raw" or a layer. Default: found by looking."""
    sum_duplicates: bool = False
    """Add up the counts of genes that are named twice. Default: refuse such a query."""
    min_genes: float = 0.2
    """Smallest share of the reference's genes a query must have."""
    n_neighbors: int = 50
    """Reference neighbours that vote for a label."""
    max_uncertainty: float = 1.0
    """Cells with a larger uncertainty are labelled "Unknown"."""
    fit: Annotated[SurgeryConfig, Parameter(name="*")] = field(default_factory=SurgeryConfig)
    """How the query's parameters are fitted."""
    tracking: Annotated[TrackingConfig, Parameter(name="*")] = field(default_factory=TrackingConfig)
    """Where MLflow keeps the record."""

    def __post_init__(self) -> None:
        _positive(self, "workers", "n_neighbors")
        if not 0 <= self.min_genes <= 1 or not 0 <= self.max_uncertainty <= 1:
            raise ConfigError(
                f"min_genes and max_uncertainty must lie in [0, 1], not {self.min_genes} and {self.max_uncertainty}."
            )
