"""The first half of preparing: cells of the data sets, sorted by their random keys, in one file for each task.

A task owns a range of cells of one data set and writes one file, under its name only once it is whole. So tasks run
anywhere and in any order, a task that is done is never done again, and no task waits for another.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scviaduct.errors import IncompleteError
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.columns import DATASET, OBS_DATASET, Column
from scviaduct.storage.genes import pick
from scviaduct.storage.memory import Recycled
from scviaduct.storage.panels import Panels
from scviaduct.storage.proteins import panel_rows
from scviaduct.storage.scan import Rows
from scviaduct.storage.shuffle import RANGES, gather, key_ranges, shuffle_keys, sort_genes

ARRAYS = Recycled(16)
"""Memory of the tasks before this one, used again: fresh pages cost more than the work on what goes into them."""

Counts = tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]
Cells = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""(records, gene indices, counts) of some cells, one cell's after the other's."""


@dataclass(frozen=True, eq=False)
class Task:
    """Cells to spill to one file."""

    rows: Rows
    number: int
    """Position of the data set in the atlas."""
    dataset_id: str
    columns: NDArray[np.int32] | None
    """(genes of the data set,) the chosen gene each is, or -1; None when they are the chosen genes in their order."""
    n_genes: int
    seed: int
    facts: Path
    """File with the obs columns of the data set's cells and whether to keep them: written by `write_facts`."""
    out: Path

    @property
    def n_cells(self) -> int:
        """Cells that the task reads."""
        return self.rows.last - self.rows.first


class Totals(NamedTuple):
    """What cells amount to; the fields of the totals of several are added, but for `largest`."""

    cells: int
    nnz: int
    sum: int
    largest: int
    zero: int
    """Cells without a count over the chosen genes: left out."""


def index_dtype(n_genes: int) -> np.dtype:
    """The type of gene indices: its largest value, which says that a chunk is gone, is never an index."""
    return np.min_scalar_type(max(n_genes, 256))


_CELL: list[tuple[str, Any]] = [("key", np.uint64), ("dataset", np.int32), ("row", np.int64), ("nnz", np.int32)]


def facts_dtype(columns: Sequence[Column], panels: Panels | None) -> np.dtype:
    """One record a cell of a data set: whether to keep it, obs columns and protein counts as the view stores them."""
    obs = [(f"obs{i}", column.dtype) for i, column in enumerate(columns)]
    return np.dtype([("keep", np.bool_), *obs, *([("proteins", panels.per_cell)] if panels else [])])


def record_dtype(facts: np.dtype) -> np.dtype:
    """What goes with a cell's counts: key, source, number of non-zeros, obs columns and protein counts."""
    return np.dtype(_CELL + [(name, facts[name]) for name in (facts.names or ())[1:]])


def write_facts(
    path: Path,
    atlas: Atlas,
    dataset_id: str,
    columns: Sequence[Column],
    keep: NDArray[np.bool_] | None,
    panels: Panels | None,
) -> None:
    """Write what is to know of a data set's cells besides their counts, once, so that a task reads only its part."""
    frame, dtype = atlas.obs(dataset_id), facts_dtype(columns, panels)
    obs = {f"obs{i}": _encoded(column, frame, dataset_id) for i, column in enumerate(columns)}
    pieces = panel_rows(panels, atlas, dataset_id, len(frame)) if panels else [(slice(0, len(frame)), None)]
    with path.open("wb") as file:
        _header(file, len(frame), dtype)
        for cells, proteins in pieces:
            facts = np.empty(cells.stop - cells.start, dtype)
            facts["keep"] = True if keep is None else keep[cells]
            for name, values in obs.items():
                facts[name] = values[cells]
            if proteins is not None:
                facts["proteins"] = proteins
            file.write(facts.view(np.uint8).data)


def _encoded(column: Column, frame: pd.DataFrame, dataset_id: str) -> NDArray[Any]:
    """(cells,) an obs column of a data set as the view stores it."""
    if column.name == DATASET:
        return np.full(len(frame), (column.categories or ()).index(dataset_id), column.dtype)
    return column.encode(frame.get(DATASET if column.name == OBS_DATASET else column.name), len(frame))


def spill(task: Task) -> None:
    """Write the file of a task: its cells with a count over the chosen genes, sorted by key.

    Raises IncompleteError when a chunk of the atlas is damaged or gone.
    """
    facts = np.load(task.facts, mmap_mode="r", allow_pickle=False)[task.rows.first : task.rows.last]
    indptr, indices, data = _selected(task)
    nnz = np.diff(indptr)
    kept = np.flatnonzero(facts["keep"] & (nnz > 0))
    keys = shuffle_keys(task.seed, task.dataset_id, task.rows.first + kept)
    order = np.argsort(keys)
    cells = kept[order]
    records = np.empty(len(cells), record_dtype(facts.dtype))
    records["key"], records["dataset"] = keys[order], task.number
    records["row"], records["nnz"] = task.rows.first + cells, nnz[cells]
    for name in (facts.dtype.names or ())[1:]:
        records[name] = facts[name][cells]
    n = int(nnz[cells].sum())
    ordered = ARRAYS(n, indices.dtype), ARRAYS(n, data.dtype)
    gather(cells, indptr, indices, data, *ordered)
    _write(task.out, (records, *ordered), zero=int((facts["keep"] & (nnz == 0)).sum()))


def _selected(task: Task) -> Counts:
    """(row pointers, gene indices, counts) of the task's cells over the chosen genes."""
    rows = task.rows
    indptr = np.zeros(task.n_cells + 1, np.int64)
    indices, data, n = ARRAYS(rows.nnz, index_dtype(task.n_genes)), ARRAYS(rows.nnz, rows.dtype), 0
    for cells, starts, genes, counts in rows.blocks():
        ends = indptr[cells.start + 1 : cells.stop + 1]
        if task.columns is None:
            indices[n : n + len(genes)], data[n : n + len(genes)], ends[:] = genes, counts, starts[1:]
        else:
            pick(starts, genes, counts, task.columns, ends, indices[n:], data[n:])
        ends += n
        n = int(ends[-1])
    if task.columns is not None and (np.diff(task.columns[task.columns >= 0]) < 0).any():
        sort_genes(indptr, indices, data)
    return indptr, indices[:n], data[:n]


def _write(path: Path, cells: Cells, *, zero: int) -> None:
    """One file: totals, where each range of keys begins, then records, gene indices and counts; whole or not there."""
    records, indices, data = cells
    totals = Totals(len(records), len(data), int(data.sum(dtype=np.int64)), int(data.max(initial=0)), zero)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # a lost task may still be writing elsewhere
    try:
        with temporary.open("wb") as file:
            np.save(file, np.array(totals, np.int64))
            np.save(file, borders(records))
            for array in (records, indices, data.astype(np.min_scalar_type(totals.largest), copy=False)):
                _save(file, array)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _save(file: BinaryIO, array: NDArray[Any]) -> None:
    """np.save, which would not say why a disk refuses."""
    _header(file, len(array), array.dtype)
    file.write(array.view(np.uint8).data)


def _header(file: BinaryIO, n: int, dtype: np.dtype) -> None:
    np.lib.format.write_array_header_1_0(
        file, np.lib.format.header_data_from_array_1_0(np.empty(0, dtype)) | {"shape": (n,)}
    )


def borders(records: NDArray[Any]) -> NDArray[np.int64]:
    """(RANGES + 1, 2) cells and non-zeros before each range of keys, of records sorted by key."""
    cells = np.searchsorted(key_ranges(records["key"]), np.arange(RANGES + 1))
    nnz = np.concatenate([[0], np.cumsum(records["nnz"], dtype=np.int64)])
    return np.stack([cells, nnz[cells]], axis=1)


class Spilled:
    """A file that `spill` wrote, read range by range."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.totals = Totals(*np.load(file, allow_pickle=False).tolist())
            self.borders: NDArray[np.int64] = np.load(file, allow_pickle=False)
            self._arrays = [_skip(file) for _ in range(3)]

    def records(self, first: int, last: int) -> NDArray[Any]:
        """What goes with the cells whose keys lie in the ranges `first` to `last`, in their order."""
        start, stop = self.borders[[first, last], 0].tolist()
        offset, dtype = self._arrays[0]
        records = np.empty(stop - start, dtype)
        with self.path.open("rb") as file:
            _read_into(file, offset + start * dtype.itemsize, records)
        return records

    def counts(self, first: int, last: int, indices: NDArray[Any], data: NDArray[Any]) -> None:
        """Fill (nnz,) gene indices and counts of those cells."""
        start = int(self.borders[first, 1])
        with self.path.open("rb", buffering=0) as file:
            for out, (offset, dtype) in zip((indices, data), self._arrays[1:], strict=True):
                values = out if out.dtype == dtype else np.empty(len(out), dtype)
                _read_into(file, offset + start * dtype.itemsize, values)
                if values is not out:
                    out[:] = values


def _skip(file: BinaryIO) -> tuple[int, np.dtype]:
    """Where the values of the array begin that the file stands at, and their type; moves behind them."""
    np.lib.format.read_magic(file)
    (n,), _, dtype = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    file.seek(n * dtype.itemsize, os.SEEK_CUR)
    return start, dtype


def _read_into(file: BinaryIO, start: int, out: NDArray[Any]) -> None:
    file.seek(start)
    wanted = out.view(np.uint8).data
    while len(wanted):  # a raw file gives at most 2 GB at once
        got = file.readinto(wanted)  # type: ignore[attr-defined]
        if not got:
            raise IncompleteError(f"{file.name} was cut off; remove it, and run scviaduct prepare again")
        wanted = wanted[got:]
