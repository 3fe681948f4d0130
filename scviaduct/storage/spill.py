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
from numpy.typing import NDArray

from scviaduct.errors import IncompleteError
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.columns import DATASET, OBS_DATASET, Column
from scviaduct.storage.scan import Rows
from scviaduct.storage.shuffle import RANGES, gather, key_ranges, pick, shuffle_keys, sort_genes

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


def facts_dtype(columns: Sequence[Column]) -> np.dtype:
    """One record a cell of a data set: whether to keep it, and the obs columns as the view stores them."""
    return np.dtype([("keep", np.bool_), *((f"obs{i}", column.dtype) for i, column in enumerate(columns))])


def record_dtype(facts: np.dtype) -> np.dtype:
    """What goes with a cell's counts: its key, its source, the number of its non-zeros, and the obs columns."""
    return np.dtype(_CELL + [(name, facts[name]) for name in (facts.names or ())[1:]])


def write_facts(
    path: Path, atlas: Atlas, dataset_id: str, columns: Sequence[Column], keep: NDArray[np.bool_] | None
) -> None:
    """Write what is to know of a data set's cells besides their counts, once, so that a task reads only its part."""
    frame = atlas.obs(dataset_id)
    facts = np.empty(len(frame), facts_dtype(columns))
    facts["keep"] = True if keep is None else keep
    for i, column in enumerate(columns):
        if column.name == DATASET:
            facts[f"obs{i}"] = (column.categories or ()).index(dataset_id)
        else:
            source = DATASET if column.name == OBS_DATASET else column.name
            facts[f"obs{i}"] = column.encode(frame.get(source), len(frame))
    with path.open("wb") as file:
        _save(file, facts)


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
    ordered = np.empty(nnz[cells].sum(), indices.dtype), np.empty(nnz[cells].sum(), data.dtype)
    gather(cells, indptr, indices, data, *ordered)
    _write(task.out, (records, *ordered), zero=int((facts["keep"] & (nnz == 0)).sum()))


def _selected(task: Task) -> Counts:
    """(row pointers, gene indices, counts) of the task's cells over the chosen genes."""
    indptrs, pieces, dtype = [np.zeros(1, np.int64)], [], index_dtype(task.n_genes)
    for _, indptr, indices, data in task.rows.blocks():
        if task.columns is not None:
            chosen = np.zeros_like(indptr), np.empty(len(indices), dtype), np.empty_like(data)
            n = pick(indptr, indices, data, task.columns, *chosen)
            indptr, indices, data = chosen[0], chosen[1][:n].copy(), chosen[2][:n].copy()
        indptrs.append(indptrs[-1][-1] + indptr[1:])
        pieces.append((indices, data))
    indptr = np.concatenate(indptrs)
    indices = np.concatenate([i for i, _ in pieces]).astype(dtype, copy=False)
    data = np.concatenate([d for _, d in pieces])
    if task.columns is not None and (np.diff(task.columns[task.columns >= 0]) < 0).any():
        sort_genes(indptr, indices, data)
    return indptr, indices, data


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
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.view(np.uint8).data)


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

    def read(self, first: int, last: int) -> Cells:
        """The cells whose keys lie in the ranges `first` to `last`, in their order."""
        cells, nnz = self.borders[[first, last]].T.tolist()
        with self.path.open("rb") as file:
            (records, indices, data) = (
                _part(file, *array, *span) for array, span in zip(self._arrays, (cells, nnz, nnz), strict=True)
            )
        return records, indices, data


def _skip(file: BinaryIO) -> tuple[int, np.dtype]:
    """Where the values of the array begin that the file stands at, and their type; moves behind them."""
    np.lib.format.read_magic(file)
    (n,), _, dtype = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    file.seek(n * dtype.itemsize, os.SEEK_CUR)
    return start, dtype


def _part(file: BinaryIO, start: int, dtype: np.dtype, first: int, last: int) -> NDArray[Any]:
    file.seek(start + first * dtype.itemsize)
    values = np.fromfile(file, dtype, last - first)
    if len(values) < last - first:
        raise IncompleteError(f"{file.name} was cut off; remove it, and run scviaduct prepare again")
    return values
