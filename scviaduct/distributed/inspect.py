"""`inspect`: what a path holds and whether it can be used, for files, atlases, runs and bundles alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scviaduct.distributed.bundle import Bundle
from scviaduct.errors import UnreadableFileError
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.formats import ZARR_MARKERS
from scviaduct.storage.genes import id_type
from scviaduct.storage.h5ad import open_counts
from scviaduct.storage.manifest import ATLAS_MARKER, VIEW_MARKER, read_json
from scviaduct.storage.places import Place, exists, place
from scviaduct.storage.plan import manifests
from scviaduct.storage.request import REQUEST
from scviaduct.storage.view import View


@dataclass(frozen=True)
class Inspection:
    """What was found: a kind, and facts in the order they are told."""

    kind: str
    """"h5ad", "AnnData Zarr", "10x Genomics h5", "atlas", "run" or "bundle"."""
    path: Place
    facts: dict[str, Any]

    def lines(self) -> Iterator[str]:
        """The facts as text, one line each."""
        yield f"{self.path}: {self.kind}"
        width = max(map(len, self.facts), default=0)
        for name, value in self.facts.items():
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            yield f"  {name:<{width}}  {shown}"


def inspect(path: str | Place, *, counts: str | None = None, sum_duplicates: bool = False) -> Inspection:
    """Look at a file of counts (every count is checked), an atlas, a run or a bundle.

    `counts` and `sum_duplicates` are those of `convert`, for a file only; so is the answer.

    Raises:
        UnreadableFileError, NotCountsError, DataError: the file cannot be used, and why.
        IncompleteError: the atlas or the run is not whole.
    """
    path = place(path)
    if not exists(path):
        raise UnreadableFileError(
            f"{path} does not exist; name an h5ad or another file of counts, an atlas, a run or a bundle."
        )
    if isinstance(path, Path) and path.is_file():
        return _counts(path, counts, sum_duplicates=sum_duplicates)
    if not isinstance(path, Path):
        return _bundle(path)
    if (path / ATLAS_MARKER).exists() or (path / "datasets").exists():
        return _atlas(path)
    if any((path / name).exists() for name in ZARR_MARKERS):
        return _counts(path, counts, sum_duplicates=sum_duplicates)
    if not any((path / name).exists() for name in ("run.json", "model.json", "bundle")):
        raise UnreadableFileError(
            f"{path} is a folder, but no atlas, run or bundle: it has no atlas.json or model.json."
        )
    return _bundle(path)


def _counts(path: Path, counts: str | None, *, sum_duplicates: bool) -> Inspection:
    with open_counts(path, counts=counts, sum_duplicates=sum_duplicates) as file:
        audit, others = file.audit(), file.alternatives()
        facts = {
            "cells": audit.n_obs,
            "genes": f"{audit.n_vars:,} ({id_type(list(file.var.index))})",
            "counts in": f"{audit.matrix} ({audit.dtype}): {file.why}",
            "other counts": ", ".join(f"--counts {name}" for name in others),
            "features that are no genes (left out)": ", ".join(f"{n:,} {t}" for t, n in file.other_features.items()),
            "counts": f"{audit.total:,} in {audit.nnz:,} non-zeros, the largest {audit.largest:,}",
            "cells without counts": audit.zero_count_cells,
            "obs": ", ".join(f"{name} ({_column(file.obs[name])})" for name in file.obs.columns) or "no columns",
            "obsm": ", ".join(file.obsm_names()) or "nothing",
            "layers": ", ".join(file.layer_names()) or "none",
        }
        unusual = {
            "features added to a gene of the same name": file.summed_features,
            "explicit zeros (dropped)": audit.explicit_zeros,
            "repeated entries (summed)": audit.duplicate_entries,
            "repeated cell names": int(file.obs.index.duplicated().sum()),
            "chunks that are not stored (read as zeros)": file.unwritten_chunks,
        }
        wanted = {name: fact for name, fact in facts.items() if fact != ""}
    verdict = {"verdict": "raw counts; ready to convert or map"}
    return Inspection(file.kind, path, wanted | {name: n for name, n in unusual.items() if n} | verdict)


def _column(values: Any) -> str:
    distinct, missing = values.nunique(), int(values.isna().sum())
    return f"{distinct:,} value{'' if distinct == 1 else 's'}" + (f", {missing:,} missing" if missing else "")


def _atlas(path: Path) -> Inspection:
    atlas = Atlas.open(path)
    facts: dict[str, Any] = {"cells": atlas.n_obs, "data sets": len(atlas.datasets)}
    for d in atlas.datasets:
        facts[f"  {d.id}"] = f"{d.n_obs:,} cells x {d.n_vars:,} genes, {d.nnz:,} non-zeros, from {d.source}"
    facts["genes in all data sets"] = len(atlas.genes("intersection"))
    facts["categorical obs"] = ", ".join(f"{k} ({len(v)})" for k, v in atlas.vocabulary.items())
    if atlas.identifiers:
        facts["obs that names cells"] = ", ".join(atlas.identifiers)
    made_of = manifests(atlas)
    for marker in sorted(path.glob(f"views/[!.]*/{VIEW_MARKER}")):
        view = View.open(path, marker.parent.name)
        facts[f"view {view.name}"] = (
            f"{view.n_rows:,} cells x {len(view.genes):,} genes, {view.excluded:,} cells left out{_age(view, made_of)}"
        )
        if view.panels:
            facts[f"proteins of {view.name}"] = f"{len(view.panels.names):,} ({view.panels.key})"
    return Inspection("atlas", path, facts | _unfinished(path))


def _age(view: View, made_of: dict[str, str]) -> str:
    """What happened to the data sets since a view was made of them."""
    of = view.manifest["datasets"]
    if any(made_of.get(id_) != digest for id_, digest in of.items()):
        return "; stale: data sets were changed or removed since"
    new = len(made_of) - len(of)
    return f"; {new:,} data set{'s' if new > 1 else ''} appended since: prepare again takes them in" if new else ""


def _unfinished(path: Path) -> dict[str, str]:
    """Work that was begun and not ended."""
    facts = {}
    if (path / REQUEST).is_file():
        facts["unfinished"] = f"a conversion of {len(read_json(path / REQUEST)['files']):,} files; the same one goes on"
    for folder in sorted(path.glob("views/.*.partial")):
        facts[f"unfinished view {folder.name[1:].removesuffix('.partial')}"] = "the same prepare goes on"
    return facts


def _bundle(path: Place) -> Inspection:
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
    if imported := bundle.facts.get("imported"):
        without = "" if imported["reference"] else "; without the reference's cells, so labels cannot be transferred"
        facts |= {"imported": f"{imported['from']}{without}"}
    return Inspection("bundle" if (path / "model.json").exists() else "run", path, facts)
