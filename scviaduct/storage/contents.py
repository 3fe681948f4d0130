"""Does what is stored agree with what is said of it: manifests, vocabulary, columns and sources of a view."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from numpy.typing import NDArray

from scviaduct.errors import IncompleteError
from scviaduct.schema import MISSING
from scviaduct.storage.arrays import open_array, open_group
from scviaduct.storage.columns import DATASET, Column, Tally
from scviaduct.storage.manifest import ATLAS_MARKER, DATASET_MARKER, VIEW_MARKER, file_digest, read_json
from scviaduct.storage.panels import Panels
from scviaduct.storage.recount import VALUES, Recount, intact
from scviaduct.storage.report import Finding, Part
from scviaduct.storage.view import PROTEINS, array_name
from scviaduct.storage.vocabulary import vocabulary

_SHARD_FILE = re.compile(r"(?P<array>.+)/c/(?P<shard>\d+)")


def affected(part: Part, file: str, numbers: Recount | None) -> str:
    """The cells, or the columns, that a wrong file of a data set or view concerns, as far as can be told."""
    shard = _SHARD_FILE.fullmatch(file)
    array = shard["array"].removeprefix("X/") if shard else ""
    if shard and array in VALUES:
        return _cells_of(part, array, int(shard["shard"]), numbers)
    if shard and part.is_view:
        per_row = len(part.manifest["proteins"]["names"]) if array == PROTEINS else 1
        step = _per_shard(part.folder / array) // per_row
        first, last = int(shard["shard"]) * step, min((int(shard["shard"]) + 1) * step, part.manifest.get("n_rows", 0))
        return f"rows {first:,}-{last - 1:,} of the view" if step else ""
    kind, _, rest = file.partition("/")
    if kind in ("obs", "var") and rest and not part.is_view:
        index = "_index" if rest.startswith(("_index", "index")) else rest.partition("/")[0]
        whose = "cells" if kind == "obs" else "genes"
        return f"the names of all {whose}" if index == "_index" else f"{kind} column {index!r} of all {whose}"
    return "all cells"


def _per_shard(folder: Path) -> int:
    """Values a file of an array holds; 0 when its metadata are gone."""
    try:
        array = open_array(folder)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError):
        return 0
    return int((array.shards or array.chunks)[0])


def _cells_of(part: Part, array: str, shard: int, numbers: Recount | None) -> str:
    """Cells with an entry in what cannot be read of a shard; in all of it when everything decodes."""
    step = _per_shard(part.matrix / array)
    if numbers is None or numbers.indptr is None or not step:
        return "cells that cannot be told without row pointers"
    lo, hi = shard * step, (shard + 1) * step
    bad = [(a, b) for a, b in numbers.unreadable.get(array, []) if lo <= a < hi] or [(lo, hi)]
    ranges = _joined([cells for a, b in bad if (cells := numbers.cells(a, b))])
    what = "row" if part.is_view else "cell"
    shown = ", ".join(f"{a:,}-{b:,}" if a != b else f"{a:,}" for a, b in ranges[:5])
    n_cells = sum(b - a + 1 for a, b in ranges)
    return f"{n_cells:,} {what}{'s' if n_cells != 1 else ''}: {shown}" + (", …" if len(ranges) > 5 else "")


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that touch as one; they come in order."""
    joined: list[tuple[int, int]] = []
    for first, last in ranges:
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return joined


def check_dataset(part: Part, numbers: Recount) -> Iterator[Finding]:
    """The numbers of a data set's manifest against its arrays."""
    counted: dict[str, Any] = {"nnz": numbers.nnz}
    if numbers.indptr is not None:
        counted |= {"n_obs": len(numbers.indptr) - 1, "zero_count_cells": numbers.zero_count_cells}
    if not numbers.unreadable:
        counted |= {"sum": numbers.total, "largest": numbers.largest}
    yield from _disagreements(part, "manifest.json", counted)
    for table, axis, key in (("obs", 0, "n_obs"), ("var", 1, "n_vars")):
        try:
            found = {"X": _shape(part.matrix)[axis], table: _length(part.folder / table)}
        except (OSError, ValueError, KeyError, RuntimeError, TypeError):
            continue  # a file of the table is damaged: that is told already
        if set(found.values()) != {part.manifest.get(key)}:
            lengths = " and ".join(f"{name} has {n:,}" for name, n in found.items())
            yield part.finding("manifest.json", f"{key} is {part.manifest.get(key)}, but {lengths}", "all of it")
    if not numbers.unreadable and numbers.top_index >= part.manifest.get("n_vars", 0):
        what = f"a gene index is {numbers.top_index:,}, there are {part.manifest.get('n_vars'):,} genes"
        yield part.finding("X/indices", what)


def _disagreements(part: Part, marker: str, counted: dict[str, Any]) -> Iterator[Finding]:
    for key, found in counted.items():
        said = part.manifest.get(key)
        if said != found:
            yield part.finding(marker, f"{key} is {said}, but the arrays hold {found}", "all of it")


def _shape(matrix: Path) -> tuple[int, int]:
    shape: Any = open_group(matrix).attrs["shape"]
    return int(shape[0]), int(shape[1])


def _length(table: Path) -> int:
    group = open_group(table)
    attributes: Any = group.attrs
    return len(ad.io.read_elem(group[attributes["_index"]]))


def check_vocabulary(path: Path, record: dict[str, Any], parts: list[Part]) -> Iterator[Finding]:
    """The vocabulary of an atlas against the values that occur in the obs columns of its data sets."""
    remedy = f"scviaduct repair {path} computes it again"
    datasets = [part for part in parts if not part.is_view]
    if not datasets:
        return
    n_obs = sum(part.manifest["n_obs"] for part in datasets)
    found, identifiers = vocabulary([open_group(part.folder / "obs") for part in datasets], n_obs)
    if identifiers != record["identifiers"]:
        what = f"the columns that name cells are {record['identifiers']}, by obs they are {identifiers}"
        yield Finding(ATLAS_MARKER, ATLAS_MARKER, what, "the vocabulary", remedy)
    for column in dict.fromkeys([*found, *record["vocabulary"]]):
        said, there = record["vocabulary"].get(column), found.get(column)
        if said == there:
            continue
        if said is None or there is None:
            what = "lacks it" if said is None else "has it, but it is no text column of any data set"
        else:
            differ = sorted(set(said) ^ set(there)) or ["their order"]
            what = f"does not match obs in {len(differ):,} values, e.g. {differ[0]!r}"
        place = f"the vocabulary of {column!r}"
        yield Finding(ATLAS_MARKER, ATLAS_MARKER, f"{place} {what}", f"obs column {column!r}", remedy)


def check_lineage(part: Part, path: Path, record: dict[str, Any]) -> Iterator[Finding]:
    """Is view.json as it was written, and is the view still one of the atlas's data sets?"""
    plain = {key: value for key, value in part.manifest.items() if key not in ("digest", "files")}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    if digest != part.manifest.get("digest"):
        yield part.finding(VIEW_MARKER, "it was changed after it was written: its digest does not fit", "all of it")
    for id_, made_of in part.manifest.get("datasets", {}).items():
        marker = path / "datasets" / id_ / DATASET_MARKER
        if record and id_ not in record["datasets"]:
            yield _stale(part, path, f"the atlas no longer has the data set {id_!r}")
        elif marker.is_file() and file_digest(marker) != made_of:
            yield _stale(part, path, f"data set {id_!r} has changed since it was made")


def _stale(part: Part, path: Path, why: str) -> Finding:
    remedy = f"scviaduct prepare {path} --name {part.id} --overwrite with the same options makes it anew"
    return Finding(part.name, f"{part.name}/{VIEW_MARKER}", f"stale: {why}", "all of it", remedy, "stale")


def check_view(part: Part, path: Path, numbers: Recount) -> Iterator[Finding]:
    """The numbers of view.json against the arrays: counts, codes of each column, sources."""
    manifest, n_rows = part.manifest, part.manifest["n_rows"]
    counted: dict[str, Any] = {"nnz": numbers.nnz}
    if numbers.indptr is not None:
        counted["n_rows"] = len(numbers.indptr) - 1
    if not numbers.unreadable:
        counted["sum"] = numbers.total
    yield from _disagreements(part, "view.json", counted)
    if not numbers.unreadable and numbers.top_index >= len(manifest["genes"]):
        yield part.finding("indices", f"a gene index is {numbers.top_index:,} of {len(manifest['genes']):,} genes")
    for name, column in manifest["columns"].items():
        yield from _check_column(part, name, column, n_rows)
    yield from _check_sources(part, path, n_rows)
    if "proteins" in manifest:
        yield from _check_proteins(part, n_rows)


def _check_column(part: Part, name: str, said: dict[str, Any], n_rows: int) -> Iterator[Finding]:
    array = array_name(name)
    values = _column(part, array, n_rows)
    if values is None:
        return
    categories = said.get("categories")
    if categories is not None:
        outside = np.flatnonzero((values < MISSING) | (values >= len(categories)))
        if len(outside):
            what = f"code {values[outside[0]]} where there are {len(categories):,} categories"
            yield part.finding(array, what, f"{len(outside):,} rows, e.g. {outside[0]:,}")
            return
    tally = Tally(Column(name, None if categories is None else tuple(categories)))
    tally.add(values, np.zeros(n_rows, np.int8), np.zeros(n_rows, np.int8))
    for key, counted in tally.to_dict().items():
        if key != "missing_example" and counted != said.get(key):
            yield part.finding(VIEW_MARKER, f"{key} of column {name!r} do not match its values", f"column {name!r}")


def _check_proteins(part: Part, n_rows: int) -> Iterator[Finding]:
    """Every cell has a count of every protein, at most the largest, and 0 of those its data set's panel lacks."""
    panels = Panels.of(part.manifest["proteins"])
    assert panels is not None
    counts = _column(part, PROTEINS, n_rows * len(panels.names))
    datasets = _column(part, array_name(DATASET), n_rows)
    if counts is None or datasets is None:
        return
    counts, counted = counts.reshape(n_rows, -1), panels.counted(part.manifest["columns"][DATASET]["categories"])
    if (largest := int(counts.max(initial=0))) > panels.largest:
        yield part.finding(PROTEINS, f"a count is {largest:,}, {VIEW_MARKER} says at most {panels.largest:,}")
    strange = np.flatnonzero(((counts > 0) & ~counted[datasets]).any(axis=1))
    if len(strange):
        what = "counts of proteins that the panel of the cell's data set lacks"
        yield part.finding(PROTEINS, what, f"{len(strange):,} rows, e.g. {strange[0]:,}")


def _column(part: Part, array: str, n_rows: int) -> NDArray[Any] | None:
    """(rows,) the values of an array; None when they cannot be read, which the file's digest tells already."""
    try:
        opened = open_array(part.folder / array)
        return intact(opened, 0, n_rows) if opened.shape == (n_rows,) else None
    except (OSError, ValueError, KeyError, RuntimeError, TypeError):
        return None


def _check_sources(part: Part, path: Path, n_rows: int) -> Iterator[Finding]:
    """Every row of the view comes from a cell of the atlas, and no cell is there twice."""
    datasets, rows = (_column(part, f"source/{name}", n_rows) for name in ("dataset", "row"))
    if datasets is None or rows is None:
        return
    ids = part.manifest["columns"][DATASET]["categories"]
    for number in range(int(datasets.max(initial=-1)) + 1):
        here = rows[datasets == number]
        id_ = ids[number] if number < len(ids) else str(number)
        n_obs = _n_obs(path / "datasets" / id_)
        outside = here[(here < 0) | (here >= n_obs)]
        if len(outside):
            what = f"data set {id_!r} has {n_obs:,} cells, e.g. {outside[0]:,} is none of them"
            yield part.finding("source/row", what, f"{len(outside):,} rows")
        elif (twice := len(here) - np.count_nonzero(np.bincount(here, minlength=1))) > 0:
            yield part.finding("source/row", f"cells of data set {id_!r} occur more than once", f"{twice:,} rows")


def _n_obs(dataset: Path) -> int:
    try:
        return int(read_json(dataset / DATASET_MARKER)["n_obs"])
    except (IncompleteError, KeyError, TypeError):
        return np.iinfo(np.int64).max  # that it is gone or damaged is told already
