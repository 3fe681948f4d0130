"""What MLflow learns of a job. Only the driver speaks to it, with explicit run ids; a job never fails because of it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import TrackingConfig
from scviaduct.errors import ConfigError

log = logging.getLogger(__name__)

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


class Tracker:
    """One MLflow run. Every call that fails is logged as a warning, once per kind, and the job goes on."""

    def __init__(self, config: TrackingConfig) -> None:
        self.uri = _uri(config)
        self.run_id: str | None = None
        self._warned: set[str] = set()
        self._client: Any = None
        self._experiment = ""
        if self.uri:
            self._attempt("open the MLflow store", lambda: self._open(config.experiment))

    def _open(self, experiment: str) -> None:
        from mlflow import MlflowClient

        _quiet()
        client = MlflowClient(self.uri)
        found = client.get_experiment_by_name(experiment)
        self._experiment = (
            found.experiment_id if found else client.create_experiment(experiment, _artifacts(str(self.uri)))
        )
        self._client = client

    def _attempt(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - tracking must not end a training run
            if what not in self._warned:
                self._warned.add(what)
                log.warning("Could not %s at %s: %s. The job goes on without it.", what, self.uri, error)
            return None

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None) -> None:
        """Open the run, a child of `parent` when given."""
        if not self._client:
            return
        lineage = {"mlflow.parentRunId": parent} if parent else {}
        run = self._attempt(
            "create a run",
            lambda: self._client.create_run(self._experiment, tags={**tags, **lineage}, run_name=name),
        )
        if run:
            self.run_id = run.info.run_id
            self._log_params(params)

    def resume(self, run_id: str | None) -> None:
        """Go on in a run that exists."""
        if self._client and run_id:
            self.run_id = run_id
            self._attempt("resume a run", lambda: self._client.update_run(run_id, status="RUNNING"))

    def _log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(k, str(v)[:6000]) for k, v in params.items()]
        self._attempt("log parameters", lambda: self._client.log_batch(self.run_id, params=entries))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One record of numbers."""
        if not self.run_id:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._attempt("log metrics", lambda: self._client.log_batch(self.run_id, metrics=entries))

    def dataset(self, name: str, source: str, digest: str, facts: Mapping[str, Any]) -> None:
        """The data the run used, by content hash."""
        if not self.run_id:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(
            name, digest[:36], "zarr", json.dumps({"path": source}), profile=json.dumps(facts)[:16_000_000]
        )
        entry = DatasetInput(entity, [InputTag("mlflow.data.context", "training")])
        self._attempt("log the data set", lambda: self._client.log_inputs(self.run_id, datasets=[entry]))

    def artifacts(self, folder: Path, under: str) -> None:
        """Copy a file, or a folder's files, into the run."""
        if not self.run_id:
            return
        log_into = self._client.log_artifacts if folder.is_dir() else self._client.log_artifact
        self._attempt("log artifacts", lambda: log_into(self.run_id, str(folder), under))

    def register(self, name: str, tags: Mapping[str, str], alias: str = "current") -> str | None:
        """A registry version of the run's bundle, with an alias; its number."""
        if not self.run_id:
            return None
        return self._attempt("register the model", lambda: self._register(name, dict(tags), alias))

    def _register(self, name: str, tags: dict[str, str], alias: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_registered_model(name)
        except MlflowException:
            self._client.create_registered_model(name)
        run = self._client.get_run(self.run_id)
        version = self._client.create_model_version(name, f"{run.info.artifact_uri}/bundle", self.run_id, tags)
        self._client.set_registered_model_alias(name, alias, version.version)
        return str(version.version)

    def end(self, status: str) -> None:
        """Close the run: FINISHED or FAILED."""
        if self.run_id:
            self._attempt("end a run", lambda: self._client.set_terminated(self.run_id, status))

    @contextmanager
    def closing(self) -> Iterator[Tracker]:
        """End the run as FINISHED, or as FAILED when the block raises."""
        try:
            yield self
        except BaseException:
            self.end("FAILED")
            raise
        self.end("FINISHED")


def _uri(config: TrackingConfig) -> str | None:
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    return None if uri == "none" else uri


def _quiet() -> None:
    """MLflow tells of every table it makes in a new SQLite store."""
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _artifacts(uri: str) -> str | None:
    """Beside a SQLite file lie its artifacts; a server knows its own place."""
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None


def open_bundle(model: str | Path, config: TrackingConfig) -> Bundle:
    """The bundle of a model by its path, its run's path, or its registered name (models:/NAME@ALIAS).

    Raises as `Bundle.open` and `fetch_model` do.
    """
    return Bundle.open(fetch_model(str(model), config) if str(model).startswith("models:/") else model)


def fetch_model(uri: str, config: TrackingConfig) -> Path:
    """The local folder of a registered model: models:/kang@current or models:/kang/3.

    Raises:
        ConfigError: the registry has no such model.
    """
    where = _uri(config)
    if where is None:
        raise ConfigError(f'{uri} is looked up in MLflow\'s registry; name it with --tracking-uri, now "none".')
    store = Path(where.removeprefix("sqlite:///"))
    if where.startswith("sqlite:///") and not store.exists():
        raise ConfigError(f"{uri} is not in the registry: there is no {store}. Name another with --tracking-uri.")
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    _quiet()
    client = MlflowClient(where)
    name, separator, alias = uri.removeprefix("models:/").partition("@")
    try:
        if separator:
            source = client.get_model_version_by_alias(name, alias).source
        else:
            source = client.get_model_version(*name.split("/", 1)).source
        return Path(download_artifacts(artifact_uri=source, tracking_uri=where))
    except (MlflowException, TypeError) as error:
        raise ConfigError(f"{uri} is not in the registry at {where}: {error}") from error


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one level of dotted names."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
