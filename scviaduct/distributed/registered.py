"""Models by the names that MLflow's registry knows them by."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import TrackingConfig
from scviaduct.distributed.mlflowstore import impatient, quiet, require_database, shown
from scviaduct.errors import ConfigError

_SECONDS = 60
_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Found:
    """A model, and what the registry calls it."""

    bundle: Bundle
    name: str = ""
    """Empty when it was given by its path."""
    version: str = ""


def store_uri(config: TrackingConfig) -> str | None:
    """Where MLflow keeps the record; None for no tracking."""
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}mlflow.db"
    if uri.startswith(_SQLITE):  # a path that means the same from another folder
        uri = f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}"
    return None if uri == "none" else uri


def open_bundle(model: str | Path, config: TrackingConfig) -> Bundle:
    """The bundle of a model by its path, its run's path, or its registered name (models:/NAME@ALIAS).

    Raises as `Bundle.open` and `find_model` do.
    """
    return find_model(model, config).bundle


def find_model(model: str | Path, config: TrackingConfig) -> Found:
    """A model by its path, its run's path, or its registered name: models:/kang@current or models:/kang/3.

    Raises:
        UnreadableFileError, IncompleteError: as `Bundle.open`.
        ConfigError: the registry has no such model, or does not answer.
    """
    if not str(model).startswith("models:/"):
        return Found(Bundle.open(model))
    uri, where = str(model), store_uri(config)
    if where is None:
        raise ConfigError(f'{uri} is looked up in MLflow\'s registry; name it with --tracking-uri, now "none".')
    store = Path(where.removeprefix(_SQLITE))
    if where.startswith(_SQLITE) and not store.exists():
        raise ConfigError(f"{uri} is not in the registry: there is no {store}. Name another with --tracking-uri.")
    try:
        require_database(where)
    except OSError as error:
        raise ConfigError(
            f"{uri} cannot be looked up: the database of --tracking-uri does not answer ({error})."
        ) from error
    with impatient(_SECONDS):
        return _fetched(uri, where)


def _fetched(uri: str, where: str) -> Found:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    quiet()
    client = MlflowClient(where)
    name, separator, alias = uri.removeprefix("models:/").partition("@")
    try:
        if separator:
            version = client.get_model_version_by_alias(name, alias)
        else:
            version = client.get_model_version(*name.split("/", 1))
        folder = download_artifacts(artifact_uri=version.source, tracking_uri=where)
    except (MlflowException, TypeError) as error:
        away = isinstance(error, MlflowException) and error.error_code == "INTERNAL_ERROR"
        what = "cannot be looked up" if away else "is not in the registry"
        raise ConfigError(f"{uri} {what} at {shown(where)}: {error}") from error
    return Found(Bundle.open(folder), version.name, str(version.version))
