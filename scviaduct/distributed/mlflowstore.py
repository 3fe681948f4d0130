"""MLflow's side of an event: each kind is one function that can be called again without telling anything twice."""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import scviaduct
from scviaduct.distributed.journal import Event
from scviaduct.errors import ScviaductError

log = logging.getLogger(__name__)
# no telemetry; and lines and bars that MLflow prints would tear our progress
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}.items():
    os.environ.setdefault(_name, _value)

KEY_TAG = "scviaduct.key"
"""Our own name of a run, by which a run is found whose creation was never answered."""
BUNDLE = "bundle"
"""Where a run keeps its model."""
_SECONDS, _SECONDS_FOR_FILES = 10, 300
_REFUSALS = {
    *("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"),
    *("INVALID_STATE", "RESOURCE_ALREADY_EXISTS"),
}
_OF_TRAININGS = {"mlflow.experimentKind": "custom_model_development"}
"""Without it MLflow's pages take an experiment for one on language models."""
_DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Servers that MLflow speaks to without one of its own, and their ports."""
_PARAMS, _METRICS, _DATASETS = 100, 1000, 500
"""Of each, what one call of MLflow takes, or half of it."""

T = TypeVar("T")


class Refused(Exception):
    """MLflow is there and will not have this event, now or later."""


class MlflowStore:
    """An experiment in an MLflow store, opened when the first event is delivered."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri, self._name = uri, experiment
        self._client: Any = None
        self._experiment = ""

    def deliver(self, event: Event, ids: dict[str, str]) -> Any:
        """Tell MLflow of one event; `ids` are its runs' ids there, and a new run's is added.

        Raises Refused when that is of no use now or later, anything else when the store is away.
        """
        kind = event["kind"]
        require_database(self.uri)
        with impatient(_SECONDS_FOR_FILES if kind in ("artifacts", "register") else _SECONDS):
            if not self._client:
                self._open()
            try:
                return getattr(self, f"_{kind}")(event, ids)
            except Exception as error:
                # without its run nothing could be told at all: the run is asked for again
                if kind != "create" and _is_refusal(error):
                    raise Refused(str(error)) from error
                raise

    def _open(self) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        quiet()
        client = MlflowClient(self.uri)
        found = client.get_experiment_by_name(self._name)
        try:
            self._experiment = (
                found.experiment_id if found else client.create_experiment(self._name, beside(self.uri), _OF_TRAININGS)
            )
        except MlflowException:
            found = client.get_experiment_by_name(self._name)
            if not found:
                raise
            self._experiment = found.experiment_id  # somebody else made it at this moment
        self._client = client

    def _create(self, event: Event, ids: dict[str, str]) -> str:
        parent = event["parent"] and ids.get(event["parent"], event["parent"])
        found = []
        if event.get("tried"):
            where = f"tags.`{KEY_TAG}` = '{event['run']}'"
            found = self._client.search_runs([self._experiment], where, max_results=1)
        if not found:
            tags = {k: v[:8000] for k, v in event["tags"].items()} | {KEY_TAG: event["run"]}
            tags |= {"mlflow.user": _user(), "mlflow.source.name": f"scviaduct {scviaduct.__version__}"}
            tags |= {"mlflow.parentRunId": parent} if parent else {}
            found = [self._client.create_run(self._experiment, event["time"], tags, event["name"])]
        ids[event["run"]] = found[0].info.run_id
        return found[0].info.run_id

    def _resume(self, event: Event, ids: dict[str, str]) -> None:
        ids.setdefault(event["run"], event["id"])
        self._client.update_run(ids[event["run"]], status="RUNNING")

    def _params(self, event: Event, ids: dict[str, str]) -> None:
        from mlflow.entities import Param

        for part in _parts([Param(k, str(v)[:6000]) for k, v in event["values"].items()], _PARAMS):
            self._client.log_batch(ids[event["run"]], params=part)

    def _metrics(self, event: Event, ids: dict[str, str]) -> None:
        from mlflow.entities import Metric

        entries = [
            Metric(name, float(value), record["time"], record["step"])
            for record in event["records"]
            for name, value in record["values"].items()
        ]
        for part in _parts(entries, _METRICS):
            self._client.log_batch(ids[event["run"]], metrics=part)

    def _datasets(self, event: Event, ids: dict[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        def entry(d: dict[str, Any]) -> DatasetInput:
            profile = json.dumps(d["facts"])[:16_000_000]
            # MLflow cuts no digest and takes 36 characters; the whole one is in the facts
            entity = Dataset(d["name"][:500], d["digest"][:36], d["type"], json.dumps(d["source"]), profile=profile)
            return DatasetInput(entity, [InputTag("mlflow.data.context", d["context"])])

        for part in _parts([entry(d) for d in event["datasets"]], _DATASETS):
            self._client.log_inputs(ids[event["run"]], datasets=part)

    def _artifacts(self, event: Event, ids: dict[str, str]) -> None:
        path = Path(event["path"])
        log_into = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log_into(ids[event["run"]], str(path), event["under"] or None)

    def _register(self, event: Event, ids: dict[str, str]) -> str:
        """A version of the run's bundle: with MLflow's flavour added, loaded back, and only then given its alias."""
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        from scviaduct.distributed.pyfunc import proven, write_flavour

        name, run_id = event["name"], ids[event["run"]]
        source = f"{self._client.get_run(run_id).info.artifact_uri}/{BUNDLE}"
        with tempfile.TemporaryDirectory() as folder:
            write_flavour(Path(event["path"]), Path(folder))
            self._client.log_artifacts(run_id, folder, BUNDLE)
        try:
            self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._client.create_registered_model(name)
        made = [v for v in self._client.search_model_versions(f"name = '{name}'") if v.run_id == run_id]
        tags = event["tags"] | {"run": run_id}
        version = made[0] if made else self._client.create_model_version(name, source, run_id, tags)
        with tempfile.TemporaryDirectory() as folder:
            proven(Path(download_artifacts(artifact_uri=source, tracking_uri=self.uri, dst_path=folder)))
        self._client.set_registered_model_alias(name, event["alias"], version.version)
        return str(version.version)

    def _end(self, event: Event, ids: dict[str, str]) -> None:
        self._client.set_terminated(ids[event["run"]], event["status"], event["time"])


def _is_refusal(error: Exception) -> bool:
    """What would be refused again. The store being away shows as OSError or as another MlflowException."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, FileNotFoundError | ScviaductError):
        return True
    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS
    return not isinstance(error, OSError | SQLAlchemyError)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def _parts(entries: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def shown(uri: str) -> str:
    """A store's address for messages: without the password that it may hold."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:…@", uri)


def require_database(uri: str) -> None:
    """Raise OSError within seconds when `uri` is that of a database whose server does not take connections.

    MLflow itself would try ten times, for two minutes or more, and each of its calls would wait.
    """
    parts = urlsplit(uri)
    port = _DATABASES.get(parts.scheme.partition("+")[0])
    if port and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or port), timeout=_SECONDS).close()


@contextmanager
def impatient(seconds: int) -> Iterator[None]:
    """Calls of MLflow that give up after some seconds and do not try again, where the user has not said otherwise.

    By default they wait 120 seconds, 8 times.
    """
    ours = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    ours = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def quiet() -> None:
    """MLflow tells of every table it makes in a new SQLite store."""
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


def beside(uri: str) -> str | None:
    """Beside a SQLite file lie its artifacts; a server knows its own place."""
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
