"""Options of training and mapping: one dataclass each. The sentence under a field is its --help and its documentation.

Importing this module loads neither torch nor ray, so that the command line answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cyclopts import Parameter

from scviaduct.distributed.cadence import Every
from scviaduct.errors import ConfigError
from scviaduct.models.training import Monitor, Optimizer, TrainingPlan

Precision = Literal["32", "tf32", "bf16"]


def _positive(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be above 0, not {value}.")


def _not_negative(record: object, name: str) -> None:
    value = getattr(record, name)
    if value is not None and value < 0:
        raise ConfigError(f"{name} must not be negative, not {value}.")


def _range(workers: int | str) -> tuple[int, int]:
    """Fewest and most of "4" or "1..4"."""
    fewest, dots, most = str(workers).partition("..")
    try:
        both = int(fewest), int(most if dots else fewest)
    except ValueError:
        both = (0, 0)
    if not 1 <= both[0] <= both[1]:
        raise ConfigError(f"workers must be a number above 0, or a range like 1..4, not {workers!r}.")
    return both


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How parameters are fitted, for references and for surgery.

    A field that is None takes the model's default, which is that of its original implementation (docs/training.md has
    the table). `plan` puts both together.
    """

    max_epochs: int | None = None
    """Epochs at most. Default: the model's; for scvi 400 up to 20,000 cells, fewer in proportion beyond."""
    batch_size: int | None = None
    """Cells of a global batch, whatever the number of workers. Default: the model's; for scvi 128."""
    optimizer: Optimizer | None = None
    """Adam, or AdamW, whose weight decay is decoupled. Default: the model's; for scvi Adam."""
    lr: float | None = None
    """Learning rate. Default: the model's; for scvi 0.001."""
    eps: float | None = None
    """Term of the optimizer's denominator. Default: the model's; for scvi 0.01."""
    weight_decay: float | None = None
    """L2 penalty inside Adam, or AdamW's decay. Default: the model's; for scvi 1e-6."""
    n_epochs_kl_warmup: int | None = None
    """Epochs over which the weight of the KL term rises; 0 starts at the top. Default: the model's; for scvi 400."""
    n_steps_kl_warmup: int | None = None
    """Steps of the KL warm-up, used instead when set."""
    min_kl_weight: float | None = None
    """Weight of the KL term at the start of its warm-up. Default: the model's; for scvi 0."""
    max_kl_weight: float | None = None
    """Weight of the KL term after its warm-up. Default: the model's; for scvi 1."""
    gradient_clip: float | None = None
    """Largest norm of the gradient."""
    validation_size: float = 0.1
    """Share of the cells held out from training, chosen by a hash of row and seed."""
    validation_stratify_by: str | None = None
    """obs column; the same share of each of its values is held out, to the cell. Default: of all cells as they come."""
    early_stopping: bool | None = None
    """Stop when the monitored number has not improved for a while, and keep the best epoch's weights. Default: the
    model's; for scvi no."""
    early_stopping_monitor: Monitor | None = None
    """What early stopping and the learning rate's plateau watch, of the held-out cells or else of the training cells:
    elbo, reconstruction, kl or loss. Default: the model's; for scvi elbo."""
    early_stopping_patience: int | None = None
    """Epochs without improvement before stopping. Default: the model's; for scvi 45."""
    early_stopping_min_delta: float | None = None
    """Smallest change (nats per cell) that counts as an improvement. Default: the model's; for scvi 0."""
    reduce_lr_on_plateau: bool | None = None
    """Lower the learning rate when the monitored number stops improving. Default: the model's; for scvi no."""
    lr_factor: float | None = None
    """What the learning rate is multiplied by on a plateau. Default: the model's; for scvi 0.6."""
    lr_patience: int | None = None
    """Epochs without improvement that are tolerated before the rate is lowered. Default: the model's; for scvi 30."""
    seed: int = 0
    """Decides initial weights, order of cells, split and noise."""
    n_lanes: int = 16
    """Lanes of the sampler: the most workers this run may ever have."""
    deterministic: bool = False
    """The same bits for every number of workers: gradients are added lane by lane, in lane order (slower)."""
    max_cells_per_pass: int | None = None
    """Cells that a worker computes at once; more are computed one part after the other, and their gradients added up.
    For batches that are too large for a GPU's memory, or when there are fewer workers than planned. Default: all."""
    precision: Precision = "32"
    """Of matrix products: 32; tf32 (on NVIDIA GPUs: 10 bits of mantissa); bf16 (bfloat16). All else, such as norms,
    likelihoods, gradients and the optimizer, is float32 in any case."""
    threads: int | None = None
    """Threads of each worker. Default: 1; from 1,024 cells a worker and step on, the cores divided by the workers."""

    def __post_init__(self) -> None:
        _positive(self, "max_epochs", "batch_size", "lr", "eps", "n_lanes", "threads", "gradient_clip")
        _positive(self, "early_stopping_patience", "max_cells_per_pass")
        if not 0 <= self.validation_size < 1:
            raise ConfigError(f"validation_size must lie in [0, 1), not {self.validation_size}.")
        if self.validation_stratify_by and not self.validation_size:
            raise ConfigError("validation_stratify_by needs a validation_size above 0.")

    def plan(self, defaults: TrainingPlan, n_cells: int, *, refines: bool = False) -> TrainingPlan:
        """The options that are set, and a model's defaults for the others; `refines`: it starts with another's weights.

        Raises:
            ConfigError: together they make no sense.
        """
        own = {f.name for f in fields(TrainingPlan)}
        given: dict[str, Any] = {name: v for name, v in vars(self).items() if name in own and v is not None}
        if "n_epochs_kl_warmup" in given and "n_steps_kl_warmup" not in given:  # the default that counts steps goes
            given |= {"n_steps_kl_warmup": None, "kl_warmup_steps_per_cell": None}
        return replace(defaults, **given).settled(n_cells, refines=refines)

    def decided(self, plan: TrainingPlan) -> Self:
        """The same with what the plan says in every field that both have."""
        both = {f.name for f in fields(self)} & {f.name for f in fields(plan)}
        return replace(self, **{name: getattr(plan, name) for name in both})

    def threads_for(self, batch_size: int, workers: int, cores: int) -> int:
        """`threads`, or as many as pay: below about 1,024 cells a step threads wait for each other more than they help."""
        if self.threads or self.deterministic or batch_size // workers < 1024:
            return self.threads or 1
        return max(1, cores // workers)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps the record."""

    tracking_uri: str | None = None
    """MLflow store. Default: $MLFLOW_TRACKING_URI, else SQLite in ./mlflow.db; "none" for no tracking."""
    experiment: str = "scviaduct"
    """MLflow experiment that holds the runs."""
    system_metrics: bool = False
    """Record what the driver's machine is busy with (CPU, memory, disk, network, GPUs) every 10 seconds."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run."""

    out: Path
    """Folder of the run: checkpoints, history and the model bundle."""
    model: str = "scvi"
    """Which model to train: scvi, scanvi, totalvi, trvae, peakvi or poissonvi."""
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
    workers: int | str = 1
    """Processes. 1 trains in this process, more train under Ray with DistributedDataParallel. A range, 1..4, goes on with
    fewer when some are lost, and with more when there is room again."""
    address: str | None = None
    """Address of a running Ray cluster. Default: Ray is started on this machine when it is needed."""
    gpus_per_worker: float | None = None
    """GPUs of each worker under Ray. Default: one, where the cluster has one for each."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint; the number of workers may differ."""
    checkpoint_every: str = "1min"
    """Time or steps between checkpoints: 30s, 5min, 2h or 500steps. What a kill can cost at most."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the last one at the end of a best epoch stays besides."""
    max_failures: int = 3
    """Lost workers, and errors that may pass, to recover from before giving up."""
    hang_seconds: float = 600.0
    """A worker that begins no step for so long hangs; the others go on without it, from the newest checkpoint."""
    resize_seconds: float = 60.0
    """Time between two looks for room to grow, with a range of workers."""
    log_cells: bool = False
    """Record which cells each step saw, under `out`/cells. Only on a file system: an object store has no files that grow
    at each step, and what a kill left would be lost."""
    name: str | None = None
    """Name in MLflow's registry. Default: the name of `out`."""
    alias: str = "current"
    """Alias in MLflow's registry that moves to the new version, once it has been loaded back."""
    fit: Annotated[FitConfig, Parameter(name="*")] = field(default_factory=FitConfig)
    """How parameters are fitted."""
    tracking: Annotated[TrackingConfig, Parameter(name="*")] = field(default_factory=TrackingConfig)
    """Where MLflow keeps the record."""

    def __post_init__(self) -> None:
        _positive(self, "keep_checkpoints", "hang_seconds", "resize_seconds")
        Every.parse(self.checkpoint_every)
        _not_negative(self, "gpus_per_worker")
        _not_negative(self, "max_failures")
        most = self.most_workers
        if most > self.fit.n_lanes:
            raise ConfigError(f"{most} workers need --n-lanes {most} or more (now {self.fit.n_lanes}).")

    @property
    def fewest_workers(self) -> int:
        """Below so many nothing runs."""
        return _range(self.workers)[0]

    @property
    def most_workers(self) -> int:
        """So many where there is room."""
        return _range(self.workers)[1]

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
    """FitConfig with surgery's defaults: early stopping on the training elbo as in HLCA's mapping.

    What is None here is the reference model's default, as in FitConfig.
    """

    max_epochs: int | None = 200
    """Epochs at most."""
    weight_decay: float | None = 0.0
    """Weight decay of the query's own columns."""
    n_epochs_kl_warmup: int | None = 0
    """Epochs over which the weight of the KL term rises from 0 to 1; 0 starts at 1."""
    validation_size: float = 0.0
    """Share of the cells held out from training, chosen by a hash of row and seed."""
    validation_stratify_by: Annotated[str | None, Parameter(parse=False)] = None
    """Only for views: a query has codes, no columns."""
    max_cells_per_pass: Annotated[int | None, Parameter(parse=False)] = None
    """Only for train: a query trains few parameters."""
    precision: Annotated[Precision, Parameter(parse=False)] = "32"
    """Only for train: most of a query's products are computed once."""
    early_stopping: bool | None = True
    """Stop when the monitored number has not improved for a while, and keep the best epoch's weights."""
    early_stopping_monitor: Monitor | None = "elbo"
    """What early stopping and the learning rate's plateau watch: elbo, reconstruction, kl or loss."""
    early_stopping_patience: int | None = 10
    """Epochs without improvement before stopping."""
    early_stopping_min_delta: float | None = 1e-3
    """Smallest change (nats per cell) that counts as an improvement."""


@dataclass(frozen=True, kw_only=True)
class MapConfig:
    """Everything that decides how queries are mapped."""

    out: Path
    """Folder of the results: one h5ad a query and summary.csv."""
    workers: int = 1
    """Queries mapped at the same time; more than 1 uses Ray."""
    address: str | None = None
    """Address of a running Ray cluster. Default: Ray is started on this machine when it is needed."""
    gpus_per_worker: float = 0.0
    """GPUs of each query under Ray, e.g. 0.25: four queries then share one, and its memory."""
    batch_key: str | None = None
    """obs column with the queries' batches. Default: the reference's."""
    one_batch: bool = False
    """Take each query as one batch, named after its file."""
    reuse_batches: bool = False
    """A query's batch that is named as one of the reference's is the same batch. Default: a new one."""
    labels_key: str | None = None
    """obs column with labels of some of the queries' cells, which a scanvi model then learns from; labels that it does
    not know count as unlabelled. Default: none."""
    train_classifier: bool = False
    """Let each query train scanvi's classifier too. Default: it is the reference's."""
    counts: str | None = None
    """Matrix with the counts: "X", "raw" or a layer. Default: found by looking."""
    sum_duplicates: bool = False
    """Add up the counts of genes that are named twice. Default: refuse such a query."""
    proteins: str | None = None
    """obsm element of the queries with protein counts; "none" maps by RNA alone. Default: the reference's, where a query
    has it."""
    min_genes: float = 0.2
    """Smallest share of the reference's genes a query must have."""
    n_neighbors: int = 50
    """Reference neighbours that vote for a label."""
    exact_neighbors: bool = False
    """Compare with every reference cell, whatever it costs. Default: beyond 200,000 labelled cells, with as many as 0.999
    of the neighbours need."""
    max_uncertainty: float = 1.0
    """Cells with a larger uncertainty are labelled "Unknown"."""
    fit: Annotated[SurgeryConfig, Parameter(name="*")] = field(default_factory=SurgeryConfig)
    """How the query's parameters are fitted."""
    tracking: Annotated[TrackingConfig, Parameter(name="*")] = field(default_factory=TrackingConfig)
    """Where MLflow keeps the record."""

    def __post_init__(self) -> None:
        _positive(self, "workers", "n_neighbors")
        _not_negative(self, "gpus_per_worker")
        if not 0 <= self.min_genes <= 1 or not 0 <= self.max_uncertainty <= 1:
            raise ConfigError(
                f"min_genes and max_uncertainty must lie in [0, 1], not {self.min_genes} and {self.max_uncertainty}."
            )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Reading:
    """Where a trained model is looked up, and how the cells it is asked about are read."""

    tracking_uri: str | None = None
    """MLflow store of a registered model. Default: $MLFLOW_TRACKING_URI, else SQLite in ./mlflow.db."""
    view: str | None = None
    """View of the atlas. Default: "default"."""
    batch_key: str | None = None
    """A file's obs column with the batches. Default: the model's."""
    counts: str | None = None
    """A file's matrix with the counts: "X", "raw" or a layer. Default: found by looking."""
    proteins: str | None = None
    """A file's obsm element with protein counts. Default: the model's name for it."""
    sum_duplicates: bool = False
    """Add up the counts of genes that a file names twice. Default: refuse it."""
    min_genes: float = 0.2
    """Smallest share of the model's genes that a file must have."""
