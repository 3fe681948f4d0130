"""`inspect`: what a path holds and whether it can be used, for files, atlases, runs and bundles alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scviaduct.distributed.bundle import Bundle
from scviaduct.errors import UnreadableFileError
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.genes import id_type
from scviaduct.storage.h5ad import open_counts
from scviaduct.storage.manifest import ATLAS_MARKER, VIEW_MARKER
from scviaduct.storage.view import View


@dataclass(frozen=True)
class Inspection:
    """What was found: a kind, and facts in the order they are told."""

    kind: str
    """"h5ad", "atlas", "run" or "bundle"."""
    path: Path
    facts: dict[str, Any]

    def lines(self) -> Iterator[str]:
        """The facts as text, one line each."""
        yield f"{self.path}: {self.kind}"
        width = max(map(len, self.facts), default=0)
        for name, value in self.facts.items():
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            yield f"  {name:<{width}}  {shown}"


def inspect(path: str | Path) -> Inspection:
    """Look at an h5ad file (every count is checked), an atlas, a run or a bundle.

    Raises:
        UnreadableFileError, NotCountsError, DataError: the file cannot be used, and why.
        IncompleteError: the atlas or the run is not whole.
    """
    path = Path(path)
    if not path.exists():
        raise UnreadableFileError(f"{path} does not exist; name an h5ad file, an atlas, a run or a bundle.")
    if path.is_file():
        return _h5ad(path)
    if (path / ATLAS_MARKER).exists() or path.suffix == ".zarr":
        return _atlas(path)
    if not any((path / name).exists() for name in ("run.json", "model.json", "bundle")):
        raise UnreadableFileError(
            f"{path} is a folder, but no atlas, run or bundle: it has no atlas.json or model.json."
        )
    return _bundle(path)


def _h5ad(path: Path) -> Inspection:
    with open_counts(path) as file:
        audit = file.audit()
        facts = {
            "cells": audit.n_obs,
            "genes": f"{audit.n_vars:,} ({id_type(list(file.var.index))})",
            "counts in": f"{audit.matrix} ({audit.dtype})",
            "counts": f"{audit.total:,} in {audit.nnz:,} non-zeros, the largest {audit.largest:,}",
            "cells without counts": audit.zero_count_cells,
            "obs": ", ".join(f"{name} ({_column(file.obs[name])})" for name in file.obs.columns) or "no columns",
        }
        unusual = {
            "explicit zeros (dropped)": audit.explicit_zeros,
            "repeated entries (summed)": audit.duplicate_entries,
            "repeated cell names": audit.duplicate_obs_names,
        }
    verdict = {"verdict": "raw counts; ready to convert or map"}
    return Inspection("h5ad", path, facts | {name: n for name, n in unusual.items() if n} | verdict)


def _column(values: Any) -> str:
    missing = int(values.isna().sum())
    return f"{values.nunique():,} values" + (f", {missing:,} missing" if missing else "")


def _atlas(path: Path) -> Inspection:
    atlas = Atlas.open(path)
    facts: dict[str, Any] = {"cells": atlas.n_obs, "data sets": len(atlas.datasets)}
    for d in atlas.datasets:
        facts[f"  {d.id}"] = f"{d.n_obs:,} cells x {d.n_vars:,} genes, {d.nnz:,} non-zeros, from {d.source}"
    facts["genes in all data sets"] = len(atlas.genes("intersection"))
    facts["categorical obs"] = ", ".join(f"{k} ({len(v)})" for k, v in atlas.vocabulary.items())
    for marker in sorted(path.glob(f"views/[!.]*/{VIEW_MARKER}")):
        view = View.open(path, marker.parent.name)
        facts[f"view {view.name}"] = (
            f"{view.n_rows:,} cells x {len(view.genes):,} genes, {view.excluded:,} cells left out"
        )
    return Inspection("atlas", path, facts)


def _bundle(path: Path) -> Inspection:
    bundle = Bundle.open(path)
    schema, training = bundle.schema, bundle.facts["training"]
    last = training["history"][-1] if training["history"] else {}
    facts = {
        "model": bundle.name,
        "reference": f"{training['cells']:,} cells, {len(schema.genes):,} genes",
        "batches": f"{schema.batch.key} ({len(schema.batch)})",
        "labels": f"{schema.labels.key} ({len(schema.labels)})" if schema.labels else "none",
        "epochs": training["epochs"],
        "elbo": ", ".join(f"{k[5:]} {v:.2f}" for k, v in last.items() if k.startswith("elbo_")),
        "options": ", ".join(f"{k}={v}" for k, v in bundle.facts["config"].items()),
        "MLflow run": training["mlflow_run"] or "none",
    }
    return Inspection("bundle" if bundle.path == path else "run", path, facts)
