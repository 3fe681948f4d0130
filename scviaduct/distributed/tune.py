"""`tune`: many trainings with other options each; the best one is registered and can be repeated with `train`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.cluster import ray_cluster
from scviaduct.distributed.config import FitConfig, TrainConfig
from scviaduct.distributed.desk import Desk, OnProgress
from scviaduct.distributed.lineage import data_of, tags_of_training
from scviaduct.distributed.nodes import require_shared_files
from scviaduct.distributed.recipe import Recipe, read_recipe, require_options
from scviaduct.distributed.study import Study
from scviaduct.distributed.tracking import Tracker, flat
from scviaduct.distributed.train import FREE_ON_RESUME, checked, clashes, require_view
from scviaduct.distributed.trialrun import Goal
from scviaduct.distributed.trials import Trial, folder_of, read_trials, table_of
from scviaduct.distributed.tuneconfig import TuneConfig
from scviaduct.errors import ConfigError, ScviaductError
from scviaduct.models import model_class
from scviaduct.schema import Schema
from scviaduct.storage.locks import locked
from scviaduct.storage.manifest import (
    ATLAS_MARKER,
    VIEW_MARKER,
    read_json,
    refuse_existing,
    write_atomic,
    write_json_atomic,
)
from scviaduct.storage.places import Place, absolute, local
from scviaduct.storage.view import View

_KEPT = {"search", "n_trials", "parallel", "name"}
"""Options that a resumed search keeps unless they are given again."""
_FREE = (FREE_ON_RESUME - {"workers"}) | _KEPT
_N_TRIALS = 20
_RAY_SWITCHES = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the search here and now
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # Ray's own logs of each trial, which nobody reads
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no number
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints in spite of verbose=0
}


@dataclass(frozen=True)
class Search:
    """A finished search."""

    out: Path
    best: Trial
    goal: Goal
    table: pd.DataFrame
    """trials.csv: one row a trial, best first."""
    bundle: Bundle
    """The best trial's model."""


def tune(atlas: str | Place, config: TuneConfig, *, on_progress: OnProgress = lambda trials, best, n: None) -> Search:
    """Search for the options with which a model of a view of `atlas` is best, and register the best trial's model.

    Optuna (TPE) suggests the options of each trial, Ray Tune runs each in a process of its own, ASHA stops those that are
    worse than others after as many epochs.

    Raises:
        OutputExistsError: `config.out` exists and this is no resume.
        UnreadableFileError, ConfigError: the recipe, or other options, make no sense; nothing was written.
        ScviaductError: not one trial came to its end.
        All that `train` raises before it begins.
    """
    atlas, config = absolute(atlas), _absolute(config)
    if not config.resume:
        refuse_existing(config.out)
        config = dataclasses.replace(config, n_trials=config.n_trials or _N_TRIALS)
    else:
        config = _as_started(config)
    view, recipe = View.open(atlas, config.view), read_recipe(Path(str(config.search)))
    goal, rungs, schema = _checked(atlas, view, config, recipe)
    tracker = _open(str(atlas), view, schema, config, recipe, goal)
    busy = f"Another search runs in {config.out}."
    with tracker.closing(), _nothing_left(config.out), locked(config.out / ".lock", busy=busy):
        known = read_trials(config.out)
        study = Study(
            config.out,
            recipe,
            seed=config.fit.seed,
            n_trials=config.n_trials or _N_TRIALS,
            highest=goal.scib,
            curve=None if goal.scib else goal.curve,
            known=known,
        )
        desk = Desk(config, goal, study, tracker, on_progress)
        if study.left:
            _run(str(atlas), config, desk, rungs)
        return _finish(config, desk)


def _absolute(config: TuneConfig) -> TuneConfig:
    paths = {name: value.absolute() for name in ("init_from", "search") if (value := getattr(config, name))}
    return dataclasses.replace(config, out=local(config.out, "The folder of a search").absolute(), **paths)


def _as_started(config: TuneConfig) -> TuneConfig:
    """The configuration of the search in `out`, refusing options that contradict it."""
    file = config.out / "tune.json"
    if not file.is_file():
        raise ConfigError(f"There is no search to resume in {config.out}; leave --resume out to start one.")
    started = TuneConfig.from_dict(read_json(file)["config"])
    clash = clashes(config, started, TuneConfig(out=config.out, resume=True), _FREE | {"fit"})
    clash += clashes(config.fit, started.fit, FitConfig(), set())
    if config.search and not _same(read_recipe(config.search), read_recipe(config.out / "search.toml")):
        clash.append(f"{config.search} is not the recipe it began with, {config.out / 'search.toml'}")
    if clash:
        raise ConfigError(f"The search in {config.out} was started with other options: {'; '.join(clash)}.")
    free = {name: getattr(config, name) for name in _FREE - _KEPT}
    free |= {name: value for name in _KEPT - {"search"} if (value := getattr(config, name)) is not None}
    return dataclasses.replace(started, search=config.out / "search.toml", **free)


def _same(one: Recipe, other: Recipe) -> bool:
    options = [[dataclasses.replace(option, line=0) for option in recipe.options] for recipe in (one, other)]
    return options[0] == options[1]


def _checked(atlas: Place, view: View, config: TuneConfig, recipe: Recipe) -> tuple[Goal, dict[str, int], Schema]:
    """What trials are compared by, ASHA's rungs, and the data's schema; whatever cannot work is refused."""
    kind = model_class(config.model)
    require_options(recipe, config, kind, view.n_rows)
    if config.objective == "scib" and importlib.util.find_spec("scib_metrics") is None:
        raise ConfigError('The scib objective needs scib-metrics: pip install "scviaduct[scib]".')
    job, _ = checked(atlas, config.fixed(recipe.first()))
    plan = config.fit.plan(kind.plan, view.n_rows, refines=config.init_from is not None)
    searched = next((option.extremes for option in recipe.options if option.name == "max_epochs"), (plan.max_epochs,))
    most = int(max(searched))
    part = "validation" if config.fit.validation_size else "train"
    goal = Goal(f"{plan.early_stopping_monitor}_{part}", scib=config.objective == "scib")
    grace = config.grace_epochs or max(1, most // 10)
    return goal, {"grace": grace, "factor": config.reduction_factor, "most": most}, job.schema


def _open(atlas: str, view: View, schema: Schema, config: TuneConfig, recipe: Recipe, goal: Goal) -> Tracker:
    """Make the search's folder and its MLflow run, or find them again."""
    tracker = Tracker(config.tracking, config.out)
    record = {"atlas": atlas, "view_digest": view.digest, "goal": dataclasses.asdict(goal)}
    if config.resume:
        begun = read_json(config.out / "tune.json")
        require_view(view, begun["view_digest"], atlas, f"the search in {config.out}")
        tracker.resume(begun["mlflow_run"])
        write_json_atomic(config.out / "tune.json", begun | {"atlas": atlas, "config": config.to_dict()})
        return tracker
    tags = tags_of_training(view, schema) | {"objective": config.objective}
    tracker.start(f"tune {config.out.name}", flat(config.to_dict()) | {"n_cells": view.n_rows}, tags)
    tracker.datasets(data_of(view))
    (config.out / "trials").mkdir(parents=True)
    shutil.copyfile(recipe.path, config.out / "search.toml")
    config = dataclasses.replace(config, search=config.out / "search.toml")
    write_json_atomic(config.out / "tune.json", record | {"config": config.to_dict(), "mlflow_run": tracker.run_id})
    return tracker


def _run(atlas: str, config: TuneConfig, desk: Desk, rungs: dict[str, int]) -> None:
    """All trials that are left, under Ray."""
    threads = float(config.fit.threads or 1)
    # a trial of several processes needs one more, which drives them
    cores = threads if config.workers == 1 else 1.0 + config.workers
    for name, value in _RAY_SWITCHES.items():
        os.environ.setdefault(name, value)
    with ray_cluster(config.address, int(cores) * (config.parallel or 1)):
        from scviaduct.distributed.raytune import Rungs, run_trials

        if config.address:
            view = f"{atlas}/views/{config.view}/{VIEW_MARKER}"
            require_shared_files([f"{atlas}/{ATLAS_MARKER}", view], config.out)
        parallel, gpus = _room(config, cores)
        resources = {"CPU": threads if config.workers == 1 else 1.0} | (
            {"GPU": gpus} if gpus and config.workers == 1 else {}
        )
        scheduler = Rungs(**rungs).scheduler(desk.curves())
        run_trials(desk, config.out, desk.study.left, scheduler, parallel=parallel, resources=resources)


def _room(config: TuneConfig, cores: float) -> tuple[int, float]:
    """How many trials at a time, so that none waits for ever for what others hold; GPUs of each process."""
    import ray

    there = ray.cluster_resources()
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = float(there.get("GPU", 0) >= config.workers)
    fit = int(there.get("CPU", 0) // cores)
    if gpus:
        fit = min(fit, int(there.get("GPU", 0) // (gpus * config.workers)))
    if fit < 1:
        raise ConfigError(
            f"A trial needs {cores:g} cores and {gpus * config.workers:g} GPUs, but the cluster has "
            f"{there.get('CPU', 0):g} and {there.get('GPU', 0):g}: use fewer --workers-per-trial or --threads, or "
            "--gpus-per-worker 0."
        )
    return min(config.parallel or fit, fit), gpus


@contextmanager
def _nothing_left(out: Path) -> Iterator[None]:
    """A search that the cluster refused before any trial began leaves no folder, so that its name is free."""
    try:
        yield
    except ConfigError:
        if not read_trials(out):
            shutil.rmtree(out)
        raise


def _finish(config: TuneConfig, desk: Desk) -> Search:
    """The tables, and the best trial's model in the registry."""
    out, best, trials = config.out, desk.best, list(desk.study.trials.values())
    table = table_of(trials, highest=desk.goal.scib)
    write_atomic(out / "trials.csv", table.to_csv(index=False).encode())
    for lock in (out / "trials").glob(".*.lock"):
        lock.unlink()
    for trial in trials:
        shutil.rmtree(folder_of(out, trial.number) / "checkpoints", ignore_errors=True)
    desk.tracker.artifacts(out / "trials.csv", "")
    if best is None:
        messages = [f"  trial {t.number}: {t.message}" for t in trials if t.state == "failed"]
        raise ScviaductError("\n".join([f"Not one of {len(trials)} trials came to its end:", *messages[:5]]))
    told = f"# trial {best.number} of {out.name}, {desk.goal.name} {best.value:.6g}\n"
    write_atomic(out / "best.toml", (told + as_toml(config.fixed(best.params))).encode())
    desk.tracker.artifacts(out / "best.toml", "")
    bundle = Bundle.open(folder_of(out, best.number))
    _register(config, desk, best, bundle)
    return Search(out, best, desk.goal, table, bundle)


def _register(config: TuneConfig, desk: Desk, best: Trial, bundle: Bundle) -> None:
    """A version of the best trial's model, unless it has one already."""
    settings = read_json(config.out / "tune.json")
    if settings.get("registered") == best.number:
        return
    child = desk.tracker.child(best.mlflow_key)
    child.artifacts(bundle.path, "bundle")
    digests = {
        "view_digest": settings["view_digest"],
        "schema_digest": bundle.schema.digest,
        "bundle_digest": bundle.digest,
    }
    tags = digests | {"model": config.model, "trial": str(best.number)}
    child.register(config.name or config.out.name, tags, config.alias)
    child.end("FINISHED")
    write_json_atomic(config.out / "tune.json", settings | {"registered": best.number})


def as_toml(config: TrainConfig) -> str:
    """The [train] table that `train --config` takes: what differs from the defaults, but not where and how it runs."""
    left_out = {
        "out",
        "resume",
        "address",
        "checkpoint_seconds",
        "max_failures",
        "log_cells",
        "tracking",
        "fit",
        "name",
    }
    default, fit = TrainConfig(out=config.out), FitConfig()
    given = {f.name: getattr(config, f.name) for f in fields(TrainConfig) if f.name not in left_out}
    given = {name: v for name, v in given.items() if name == "model" or v != getattr(default, name)}
    given |= {f.name: v for f in fields(fit) if (v := getattr(config.fit, f.name)) != getattr(fit, f.name)}
    return "[train]\n" + "".join(f"{name} = {_toml(value)}\n" for name, value in given.items())


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, Path)):
        # TOML's basic strings are JSON's, but for DEL
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
