"""Where data and models came from, as MLflow's runs, versions and a result's own record tell it.

source files (sha256) -> view (digest) -> training run -> model version -> mapping run -> query's run and result file
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import scviaduct
from scviaduct.distributed.registered import Found
from scviaduct.distributed.tracking import Data, Tracker
from scviaduct.schema import Schema
from scviaduct.storage.view import View


def data_of(view: View) -> Iterator[Data]:
    """The view, and the source files whose cells are in it."""
    from scviaduct.storage.atlas import Atlas  # only the driver tells: workers need neither anndata nor dask

    atlas, made_of = Atlas.open(view.atlas_path), view.manifest["datasets"]
    where = str(view.atlas_path)
    sources = [info for info in atlas.datasets if info.id in made_of]
    facts = {"cells": view.n_rows, "genes": len(view.genes), "manifests": made_of}
    facts |= {"sources": {info.id: info.sha256 for info in sources}}
    yield Data(Path(where).name, view.digest, {"path": where, "view": view.name}, facts)
    for info in sources:
        facts = {"cells": info.n_obs, "genes": info.n_vars, "matrix": info.matrix, "manifest": made_of[info.id]}
        yield Data(info.id, info.sha256, {"file": info.source}, facts, context="source", type="file")


def tags_of_training(view: View, schema: Schema) -> dict[str, str]:
    """What a training run is found by."""
    place = {"atlas": str(view.atlas_path), "view": view.name}
    return place | {"view_digest": view.digest, "schema_digest": schema.digest}


def tags_of_mapping(found: Found) -> dict[str, str]:
    """The model that queries are mapped with."""
    training = found.bundle.facts["training"]
    tags = {
        "model": found.name or str(found.bundle.path),
        "model_version": found.version,
        "bundle_digest": found.bundle.digest,
        "view_digest": str(training.get("view_digest") or ""),
        "trained_by": str(training.get("mlflow_run") or ""),
    }
    return {name: value for name, value in tags.items() if value}


def record_of_result(tags: dict[str, str], tracker: Tracker) -> dict[str, str]:
    """What every result of a mapping says of itself, in uns["scviaduct"]."""
    run = {"mlflow_run": tracker.run_id or "", "mlflow_key": tracker.key or ""}
    return tags | {name: value for name, value in run.items() if value} | {"version": scviaduct.__version__}
