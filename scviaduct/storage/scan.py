"""One pass over the cells of an atlas: Dask tasks over ranges of cells, added up in a fixed order.

A task is a function of a module with a range and small arrays as arguments, so threads, processes and clusters run the
same ones. Results are added in the order of the cells whatever the number of workers: floats come out the same, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import dask
import numpy as np
from numpy.typing import NDArray

from scviaduct.storage.atlas import Atlas, Counts
from scviaduct.storage.manifest import DATASET_MARKER, file_digest
from scviaduct.storage.memory import Recycled
from scviaduct.storage.places import Place
from scviaduct.storage.tasks import cores

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_ROWS = 16_384
"""Cells of a task. Σx² of fewer than 32,768 counts below 2²⁴ is exact in int64."""
_VALUES = 2**22
"""Non-zeros that are decoded at once."""
_AHEAD = 8
"""Results that are added in one go."""
_BLOCKS = Recycled(32)
"""Memory of blocks, used again: fresh pages cost more than decoding what goes into them."""
_MEMORY = 2**29
"""Bytes that the sums of running tasks may take together."""

Block = tuple[slice, NDArray[np.int64], NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class Rows:
    """Cells `first` to `last` of one data set, as a task gets them; `digest` is its manifest's."""

    path: Place
    digest: str
    first: int
    last: int

    @property
    def n_vars(self) -> int:
        """Genes of the data set."""
        return _opened(self.path, self.digest).n_vars

    @property
    def nnz(self) -> int:
        """Non-zeros of the cells."""
        indptr = _opened(self.path, self.digest).indptr
        return int(indptr[self.last] - indptr[self.first])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored type of the counts."""
        return _opened(self.path, self.digest).dtype

    def blocks(self) -> Iterator[Block]:
        """(cells, counted from `first`; row pointers, gene indices, counts as stored) in order."""
        counts = _opened(self.path, self.digest)
        first = self.first
        while first < self.last:
            wanted = counts.indptr[first] + _VALUES
            last = int(np.searchsorted(counts.indptr, wanted, side="right")) - 1
            last = min(max(last, first + 1), self.last)
            yield slice(first - self.first, last - self.first), *counts.raw(first, last)
            first = last


@lru_cache(maxsize=8)
def _opened(path: Place, digest: str) -> Counts:  # the digest tells a data set from its successor
    """The counts, opened once in a process: its row pointers, 8 bytes a cell, are read then."""
    return Counts(path, allocate=_BLOCKS)


def ranges(atlas: Atlas, dataset_id: str) -> list[Rows]:
    """All cells of a data set, in order. Raises IncompleteError when a file of it is gone."""
    counts = atlas.counts(dataset_id)
    digest = file_digest(counts.path / DATASET_MARKER)
    starts = range(0, counts.n_obs, _ROWS)
    return [Rows(counts.path, digest, first, min(first + _ROWS, counts.n_obs)) for first in starts]


def fold(
    work: Mapping[str, Sequence[Callable[[], Piece]]],
    add: Callable[..., Result],
    *,
    executor: Executor | None = None,
    task_bytes: int = 0,
) -> dict[str, Result]:
    """For each data set, its tasks' results added up: add(None, first, …), then add(sum, next, …) until all are in.

    Runs in threads, at most as many as can hold `task_bytes` each in bounded memory, or on `executor`.
    """
    totals = {}
    for dataset_id, tasks in work.items():
        # Wrapped: dask would look through arguments for more tasks.
        pieces = [dask.delayed(partial(task), pure=False)() for task in tasks]
        total = None
        for i in range(0, max(1, len(pieces)), _AHEAD):
            total = dask.delayed(add, pure=False)(total, *pieces[i : i + _AHEAD])
        totals[dataset_id] = total
    if executor is not None:
        return dask.compute(totals, scheduler=executor)[0]
    workers = int(np.clip(_MEMORY // max(1, task_bytes), 1, cores()))
    return dask.compute(totals, scheduler="threads", num_workers=workers)[0]


@dataclass(frozen=True)
class Grouped:
    """Sums over the cells of some groups (batches) of a data set, gene by gene."""

    groups: NDArray[np.int64]
    """(groups that occur,), of `n_groups`."""
    n_groups: int
    sums: NDArray[Any]
    """(groups that occur, genes of the data set, quantities)."""


def sum_by_group(
    atlas: Atlas,
    codes: Mapping[str, NDArray[np.int32]],
    kernel: Callable[..., None],
    given: Mapping[str, NDArray[Any]],
    dtype: type[np.int64 | np.float64],
    *,
    quantities: int,
    executor: Executor | None,
) -> dict[str, Grouped]:
    """For each data set, what `kernel` adds up of each gene for each group of its cells.

    `codes` give (cells,) the group of each, -1 to leave a cell out. The kernel is called with (row pointers, gene
    indices, counts, (cells,) row of the sums, the same rows of `given`, sums); `given` are (groups that occur, genes).
    """
    work, most = {}, 1
    for info in atlas.datasets:
        groups, slots = occurring(codes[info.id])
        cells = ranges(atlas, info.id)
        parts = [slots[rows.first : rows.last] for rows in cells]
        most = max(most, *(len(np.unique(part)) * info.n_vars for part in parts))
        one = (len(groups), kernel, given[info.id], dtype, quantities)
        work[info.id] = [partial(_sum_range, rows, part, *one) for rows, part in zip(cells, parts, strict=True)]
    totals = fold(work, _add_groups, executor=executor, task_bytes=most * quantities * 8)
    return {
        dataset_id: Grouped(occurring(codes[dataset_id])[0], total.n_groups, total.sums)
        for dataset_id, total in totals.items()
    }


def occurring(codes: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(codes that occur,) and (cells,) the position of each cell's among them; a code of -1 stays -1."""
    groups = np.unique(codes[codes >= 0]).astype(np.int64)
    return groups, np.where(codes >= 0, np.searchsorted(groups, codes), -1)


def _sum_range(
    rows: Rows, codes: NDArray[np.int64], n_groups: int, kernel: Callable[..., None], given: NDArray[Any],
    dtype: type[np.int64 | np.float64], quantities: int,
) -> Grouped:  # fmt: skip
    groups, slots = occurring(codes)
    sums = np.zeros((len(groups), rows.n_vars, quantities), dtype)
    if len(groups):
        here = given[groups]
        for cells, indptr, indices, data in rows.blocks():
            kernel(indptr, indices, data, slots[cells], here, sums)
    return Grouped(groups, n_groups, sums)


def _add_groups(total: Grouped | None, *pieces: Grouped) -> Grouped:
    """Float64 sums of all groups. Whole numbers are exact below 2⁵³; beyond, where int64 could overflow, they round."""
    if total is None:
        n_groups, shape = pieces[0].n_groups, pieces[0].sums.shape[1:]
        total = Grouped(np.arange(n_groups), n_groups, np.zeros((n_groups, *shape)))
    for piece in pieces:
        total.sums[piece.groups] += piece.sums
    return total
