"""`train`: a view of an atlas becomes a model bundle, in this process or on many, tracked and resumable.

out/run.json        configuration, identity of the data, MLflow run; decides what --resume continues
    history.jsonl   one line an epoch, written by rank 0 and followed by the driver
    checkpoints/    see checkpoint.py
    cells/          which cells each step saw, on request
    plots/          losses over the epochs, with MLflow
    mlflow-spool/   what MLflow has not been told yet (journal.py)
    bundle/         the finished model; present = the run is done
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.cadence import Every
from scviaduct.distributed.celllog import CellLog
from scviaduct.distributed.checkpoint import Checkpoints
from scviaduct.distributed.config import FitConfig, TrainConfig
from scviaduct.distributed.curves import draw_losses
from scviaduct.distributed.datafacts import tell_data
from scviaduct.distributed.embedding import PARTIAL, joined, write_part
from scviaduct.distributed.files import remove_folder, write_json
from scviaduct.distributed.follow import Follower, read_history
from scviaduct.distributed.launch import run_on_workers
from scviaduct.distributed.lineage import data_of, tags_of_training
from scviaduct.distributed.loop import Hooks, fit, samplers
from scviaduct.distributed.options import model_config
from scviaduct.distributed.saver import Saver
from scviaduct.distributed.scratch import kept_while_it_runs, scratch_of
from scviaduct.distributed.start import options_of, start_from
from scviaduct.distributed.tracking import Tracker, flat
from scviaduct.distributed.watch import Watch
from scviaduct.distributed.workers import Workers, device, use_precision
from scviaduct.errors import ConfigError
from scviaduct.models import model_class
from scviaduct.schema import Schema
from scviaduct.storage.manifest import read_json, refuse_existing
from scviaduct.storage.places import Place, absolute, is_remote, place
from scviaduct.storage.view import View

OnEpoch = Callable[[dict[str, float]], None]
Options = TypeVar("Options", TrainConfig, FitConfig)

FREE_ON_RESUME = {
    *("out", "workers", "address", "gpus_per_worker", "resume"),
    *("checkpoint_every", "keep_checkpoints", "max_failures", "hang_seconds", "resize_seconds", "tracking"),
    "log_cells",
}


@dataclass(frozen=True)
class Job:
    """What every worker needs to know, small and picklable: paths and options, no arrays."""

    atlas: str
    config: TrainConfig
    schema: Schema
    model_options: dict[str, Any]

    @property
    def out(self) -> Place:
        """The run's folder, or its address."""
        return place(self.config.out)

    @property
    def scratch(self) -> Path:
        """Where files lie that need a disk: the run's folder, or one of this machine that all processes find."""
        return scratch_of(self.out)


def train(atlas: str | Place, config: TrainConfig, *, on_epoch: OnEpoch = lambda record: None) -> Bundle:
    """Train a model on a view of `atlas` and return its bundle; `on_epoch` receives one record of numbers an epoch.

    With one worker the loop waits for it, and ends with what it raises; with more it is called beside the training.

    Raises:
        OutputExistsError: `config.out` exists and this is no resume.
        ConfigError: options that are unknown, make no sense together, or differ from the run that is resumed.
        MissingColumnError, DataError: a covariate is not in the view, or has missing values.
        IncompleteError: the atlas or its view is not whole.
    """
    atlas, config = absolute(atlas), _absolute(config)
    if not config.resume:
        refuse_existing(place(config.out))
    else:
        config = _as_started(config)
        if (place(config.out) / "bundle" / "model.json").exists():
            return Bundle.open(config.out)
    job, view = checked(atlas, config)
    with kept_while_it_runs(job.out):
        return _run(job, view, on_epoch)


def _run(job: Job, view: View, on_epoch: OnEpoch) -> Bundle:
    config, tracker = job.config, _open_run(job, view)
    alone = config.most_workers == 1 and not config.address
    with (
        tracker.closing(),
        _nothing_left(job),
        Follower(job.out / "history.jsonl", [*([] if alone else [on_epoch]), *_listeners(tracker)]),
    ):
        run_on_workers(partial(work, on_epoch=on_epoch) if alone else work, job, config)
        bundle = _bundle(job, view, tracker)
    return bundle


def checked(atlas: Place, config: TrainConfig) -> tuple[Job, View]:
    """The job of a configuration, and its data; what does not fit these, or each other, is refused."""
    view = View.open(atlas, config.view)
    schema = _schema(view, config)
    kind = model_class(config.model)
    start = Bundle.open(config.init_from) if config.init_from else None
    options = model_config(kind, config.preset, config.set, options_of(start, kind) if start else None)
    model = kind(schema, options)
    plan = config.fit.plan(model.training_plan, view.n_rows, refines=start is not None)
    config = dataclasses.replace(config, fit=config.fit.decided(plan))
    samplers(model, view.source(schema), config.fit, plan.batch_size, Workers(0, config.most_workers))
    if start:
        start_from(model, start)
    return Job(str(atlas), config, schema, asdict(options)), view


@contextmanager
def _nothing_left(job: Job) -> Iterator[None]:
    """A run that the cluster refused before any worker began leaves no folder, so that its name is free."""
    try:
        yield
    except ConfigError:
        if not (job.out / "attempts.json").exists():
            remove_folder(job.out)
        raise


def _absolute(config: TrainConfig) -> TrainConfig:
    """Paths that mean the same in the workers, whose working directory is another."""
    start = config.init_from and Path(str(absolute(config.init_from)))
    if config.log_cells and is_remote(config.out):
        raise ConfigError(f"--log-cells writes at each step, which {place(config.out)} cannot take: use a local --out.")
    return dataclasses.replace(config, out=Path(str(absolute(config.out))), init_from=start)


def work(job: Job, on_epoch: OnEpoch = lambda record: None) -> None:
    """One worker's part of the run: train, then embed its share of the reference."""
    config, workers = job.config, Workers.current()
    source = View.open(job.atlas, config.view).source(job.schema)
    kind = model_class(config.model)
    cells = config.fit.batch_size or 1  # a number, since `checked`
    torch.set_num_threads(config.fit.threads_for(cells, workers.world_size, torch.multiprocessing.cpu_count()))
    use_precision(config.fit.precision)
    torch.manual_seed(config.fit.seed)
    model = kind(job.schema, kind.Config(**job.model_options)).to(device())
    if config.init_from:
        start_from(model, Bundle.open(config.init_from))
    tell_data(model, source)
    attempt = _next_attempt(job.out, workers)
    store, every = Checkpoints(job.out / "checkpoints"), Every.parse(config.checkpoint_every)
    watch = Watch(job.scratch / "stacks", config.hang_seconds, attempt, workers)
    model.register_forward_pre_hook(watch.beat)
    with watch, Saver(store, every, config.keep_checkpoints) as saver:
        hooks = Hooks(
            saver=saver,
            cells=CellLog(job.scratch / "cells", workers.rank, attempt) if config.log_cells else None,
            on_epoch=partial(_tell, job.out / "history.jsonl", on_epoch),
        )
        fit(model, source, config.fit, workers, hooks)
    write_part(model, source, job.out / PARTIAL, job.scratch / PARTIAL, workers)


def _schema(view: View, config: TrainConfig) -> Schema:
    return view.schema(
        batch_key=config.batch_key,
        labels_key=config.labels_key,
        unlabeled_category=config.unlabeled_category,
        categorical_covariate_keys=config.categorical_covariate_keys,
        continuous_covariate_keys=config.continuous_covariate_keys,
        size_factor_key=config.size_factor_key,
        proteins=model_class(config.model).uses_proteins,
    )


def _as_started(config: TrainConfig) -> TrainConfig:
    """The configuration of the run in `out`, refusing options that contradict it."""
    out = place(config.out)
    file = out / "run.json"
    if not file.exists():
        raise ConfigError(f"There is no run to resume in {out}; leave --resume out to start one.")
    started = TrainConfig.from_dict(read_json(file)["config"])
    clash = clashes(config, started, TrainConfig(out=config.out), FREE_ON_RESUME | {"fit"})
    clash += clashes(config.fit, started.fit, FitConfig(), set())
    if clash:
        raise ConfigError(f"The run in {out} was started with other options: {'; '.join(clash)}.")
    return dataclasses.replace(started, **{name: getattr(config, name) for name in FREE_ON_RESUME})


def clashes(now: Options, started: Options, default: Options, free: set[str]) -> list[str]:
    """The options that were given, are not free, and are not those of the run."""
    pairs = [(f.name, getattr(now, f.name), getattr(started, f.name)) for f in dataclasses.fields(now)]
    given = [p for p in pairs if p[0] not in free and p[1] != getattr(default, p[0])]
    return [f"{name}: the run has {then}, now {new}" for name, new, then in given if new != then]


def require_view(view: View, digest: str, atlas: str, begun: str) -> None:
    """Refuse to go on with a view whose content is another than at the start."""
    if view.digest != digest:
        raise ConfigError(f"The view {view.name!r} of {atlas} is not the one {begun} was started on.")


def _open_run(job: Job, view: View) -> Tracker:
    """Make the run's folder and its MLflow run, or find them again."""
    config, here = job.config, isinstance(job.out, Path)
    tracker = Tracker(config.tracking, job.scratch, kept=job.out)
    if config.resume:
        record = read_json(job.out / "run.json")
        require_view(view, record["view_digest"], job.atlas, f"the run in {job.out}")
        tracker.resume(record["mlflow_run"])
        tracker.history((int(r["epoch"]), r) for r in read_history(job.out))
        return tracker
    if here:
        job.scratch.mkdir(parents=True)
    tags = tags_of_training(view, job.schema)
    tracker.start(f"train {job.out.name}", flat(config.to_dict()) | {"n_cells": view.n_rows}, tags)
    tracker.datasets(data_of(view))
    options = config.to_dict() | {"out": str(job.out)}
    facts = {"config": options, "atlas": job.atlas, "view_digest": view.digest, "mlflow_run": tracker.run_id}
    write_json(job.out / "run.json", facts)
    return tracker


def _listeners(tracker: Tracker) -> list[OnEpoch]:
    return [lambda record: tracker.metrics(int(record["epoch"]), record)]


def _tell(history: Place, on_epoch: OnEpoch, record: dict[str, float]) -> None:
    line = json.dumps(record) + "\n"
    if isinstance(history, Path):
        with history.open("a") as stream:
            stream.write(line)
    else:  # an object is only written as a whole
        history.write_text((history.read_text() if history.exists() else "") + line)
    on_epoch(record)


def _next_attempt(out: Place, workers: Workers) -> int:
    """How often this run has been started, this time included, by the record of it; the same on every rank."""
    count = torch.zeros(1)
    if workers.rank == 0:
        file = out / "attempts.json"
        starts = [*(read_json(file) if file.exists() else []), {"workers": workers.world_size, "at": time.time()}]
        write_json(file, starts)
        count += len(starts)
    return int(workers.total(count))


def _named(bundle: Bundle, job: Job) -> Path:
    """The bundle's folder by a name relative to the run's, which means the same wherever what MLflow lacks is sent from."""
    if isinstance(job.out, Path):
        return bundle.path
    link = job.scratch / "bundle"
    link.unlink(missing_ok=True)
    link.symlink_to(bundle.path)
    return link


def _bundle(job: Job, view: View, tracker: Tracker) -> Bundle:
    """The finished run's bundle, recorded in MLflow."""
    config = job.config
    kind = model_class(config.model)
    model = kind(job.schema, kind.Config(**job.model_options))
    progress = Checkpoints(job.out / "checkpoints").finished(model)
    reference = joined(job.out / PARTIAL, job.scratch / PARTIAL, model.config.n_latent)
    facts = {
        "model": config.model,
        "name": config.name or job.out.name,
        "training": {
            "cells": view.n_rows,
            "epochs": progress.epoch,
            "best_epoch": progress.best_epoch,
            "history": progress.history,
            "config": config.to_dict(),
            "view_digest": view.digest,
            "mlflow_run": tracker.run_id,
        },
    }
    bundle = Bundle.save(job.out / "bundle", model, facts, reference)
    remove_folder(job.out / PARTIAL)
    remove_folder(job.scratch / PARTIAL)
    if tracker.key:
        tracker.artifacts(draw_losses(progress.history, job.scratch / "plots" / "losses.png"), "plots")
        tracker.artifacts(_named(bundle, job), "bundle")
        digests = {"view_digest": view.digest, "schema_digest": job.schema.digest, "bundle_digest": bundle.digest}
        tracker.register(str(facts["name"]), digests | {"model": config.model}, config.alias)
    return bundle
