"""The second half of preparing: sorted files become one order of all cells, written as the arrays of a view.

Range by range of keys the cells of all files are read, sorted and appended, while the next range is read and the last
shards are compressed. Everything that is written is a function of the cells: the memory decides only how many ranges
are taken at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray

from scviaduct.errors import IncompleteError
from scviaduct.storage.arrays import Codec, encode_shard, make_array, make_group, write_parts
from scviaduct.storage.columns import Column, Tally
from scviaduct.storage.memory import Allocate, Recycled
from scviaduct.storage.panels import Panels
from scviaduct.storage.shuffle import RANGES, gather
from scviaduct.storage.spill import Cells, Totals, index_dtype
from scviaduct.storage.tasks import cores, in_order
from scviaduct.storage.view import PROTEINS, array_name

_CHUNK, _CHUNKS_PER_SHARD = 65_536, 128
"""Non-zeros decoded at once, about a fifth of a block of 1,024 cells, so that little is decoded in vain."""
_BLOCKS_PER_SHARD = 256
_BUCKETS_HELD = 24
"""The memory over that of a bucket: up to three are held sorted and two while they are sorted; shards are beside."""


class Sorted(Protocol):
    """Cells that are sorted by key."""

    totals: Totals
    borders: NDArray[np.int64]
    """(RANGES + 1, 2) cells and non-zeros before each range of keys."""

    def records(self, first: int, last: int) -> NDArray[Any]:
        """What goes with the cells whose keys lie in the ranges `first` to `last`, in their order."""
        ...

    def counts(self, first: int, last: int, indices: NDArray[Any], data: NDArray[Any]) -> None:
        """Fill (nnz,) gene indices and counts of those cells."""
        ...


@dataclass(frozen=True)
class Form:
    """What decides how a view is stored, besides the cells."""

    columns: tuple[Column, ...]
    n_genes: int
    block_rows: int
    codec: Codec
    panels: Panels | None


def total(parts: Sequence[Sorted]) -> Totals:
    """The totals of all parts."""
    fields = np.array([part.totals for part in parts], np.int64).reshape(-1, 5)
    sums = Totals(*fields.sum(axis=0).tolist())
    return sums._replace(largest=int(fields[:, 3].max(initial=0)))


def write(
    path: Path, parts: Sequence[Sorted], form: Form, *, memory: int, pool: Executor, on_cells: Callable[[int], None]
) -> list[Tally]:
    """Write the arrays of a view, of the cells of all parts in the order of their keys; what the columns contain.

    Cells with equal keys (of different data sets) stand in the order of the parts. `on_cells` is told how many cells
    have been written. Raises IncompleteError when non-zeros are lost.
    """
    expected, nnz, counted = total(parts), 0, 0
    tallies = [Tally(column) for column in form.columns]
    arrays = Recycled(48)  # of buckets and shards: fresh pages cost more than the work on what goes into them
    shards = _Shards(pool, arrays)
    writers = _writers(path, expected, form, shards)
    writers["indptr"].append(np.zeros(1, np.int64))
    bucket = partial(_bucket, parts, (writers["indices"].dtype, writers["data"].dtype), arrays)
    per_cell = form.panels.per_cell.itemsize if form.panels else 0
    for records, indices, data in in_order(pool, bucket, _buckets(parts, memory, per_cell), ahead=2):
        writers["data"].append(data)
        writers["indices"].append(indices)
        writers["indptr"].append(nnz + np.cumsum(records["nnz"], dtype=np.int64))
        writers["source/dataset"].append(records["dataset"])
        writers["source/row"].append(records["row"])
        for i, tally in enumerate(tallies):
            writers[array_name(tally.column.name)].append(records[f"obs{i}"])
            tally.add(records[f"obs{i}"], records["dataset"], records["row"])
        if form.panels:
            writers[PROTEINS].append(records["proteins"].reshape(-1))
        nnz += len(data)
        counted += int(data.sum(dtype=np.int64))
        on_cells(writers["source/row"].position)
    for writer in writers.values():
        writer.close()
    shards.wait()
    if (nnz, counted) != (expected.nnz, expected.sum):
        raise IncompleteError(f"{path}: {expected.nnz - nnz} non-zeros were lost between shuffling and writing.")
    return tallies


def _buckets(parts: Sequence[Sorted], memory: int, per_cell: int) -> list[tuple[int, int]]:
    """Runs of key ranges whose cells take at most a share of the memory; a single range may take more.

    `per_cell` are the bytes of a cell's protein counts.
    """
    n_bytes = np.zeros(RANGES)
    for part in parts:
        cells, nnz = np.diff(part.borders, axis=0).T
        # u16 counts and indices; records are 28 bytes, the obs columns and the proteins
        n_bytes += cells * (100 + per_cell) + nnz * 4
    buckets, first, held = [], 0, 0.0
    for r, size in enumerate(n_bytes):
        if held and held + size > memory / _BUCKETS_HELD:
            buckets.append((first, r))
            first, held = r, 0.0
        held += size
    return [*buckets, (first, RANGES)]


def _bucket(
    parts: Sequence[Sorted], types: tuple[np.dtype, np.dtype], allocate: Allocate, ranges: tuple[int, int]
) -> Cells:
    """The cells of some key ranges from all parts, sorted."""
    records = np.concatenate([part.records(*ranges) for part in parts])
    ends = np.cumsum([0, *(np.ptp(part.borders[list(ranges), 1]) for part in parts)])
    indptr = np.concatenate([[0], np.cumsum(records["nnz"], dtype=np.int64)])
    if indptr[-1] != ends[-1]:
        raise IncompleteError(f"{ends[-1] - indptr[-1]} non-zeros belong to no cell: run scviaduct prepare again.")
    found, ordered = ([allocate(int(ends[-1]), dtype) for dtype in types] for _ in range(2))
    for part, start, stop in zip(parts, ends[:-1], ends[1:], strict=True):
        part.counts(*ranges, *(array[start:stop] for array in found))
    order = np.argsort(records["key"], kind="stable")
    gather(order, indptr, *found, *ordered)
    return records[order], ordered[0], ordered[1]


class Shard(NamedTuple):
    """One file of an array."""

    array: zarr.Array
    codec: Codec
    path: Path


class _Shards:
    """Shards that are being compressed and written, a few at a time: each is held in memory until it is."""

    def __init__(self, pool: Executor, allocate: Allocate) -> None:
        self._pool, self._most, self.allocate = pool, cores() + 1, allocate
        self._pending: deque[Future[None]] = deque()

    def write(self, shard: Shard, values: NDArray[Any]) -> None:
        while len(self._pending) >= self._most:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(_store, shard, values))

    def wait(self) -> None:
        while self._pending:
            self._pending.popleft().result()


def _store(shard: Shard, values: NDArray[Any]) -> None:
    array, codec, path = shard
    fill = array.fill_value
    content = encode_shard(values, chunk=array.chunks[0], per_shard=_per_shard(array), fill=fill, codec=codec)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parts(path, content)


def _per_shard(array: zarr.Array) -> int:
    return array.shards[0] // array.chunks[0]  # type: ignore[index]


class _Writer:
    """Appends to a 1-D array in the folder `path` in whole shards."""

    def __init__(self, path: Path, array: zarr.Array, codec: Codec, shards: _Shards) -> None:
        self._path, self._array, self._codec, self._shards, self.position = path, array, codec, shards, 0
        self._length: int = array.shape[0]
        self.dtype = array.dtype
        self._shard = self._empty()
        self._filled = self._written = 0

    def append(self, values: NDArray[Any]) -> None:
        """Take values; a shard that is full is written."""
        while len(values):
            n = min(len(values), len(self._shard) - self._filled)
            if not n:
                raise IncompleteError(f"{self._path}: more than {self._length} values came.")
            self._shard[self._filled : self._filled + n] = values[:n]
            self._filled, self.position, values = self._filled + n, self.position + n, values[n:]
            if self._filled == len(self._shard):
                file = self._path / "c" / str(self._written)
                self._shards.write(Shard(self._array, self._codec, file), self._shard)
                self._shard, self._filled, self._written = self._empty(), 0, self._written + 1

    def close(self) -> None:
        """Raises IncompleteError when values are missing."""
        if self.position != self._length:
            raise IncompleteError(f"{self._path}: {self.position} of {self._length} values were written.")

    def _empty(self) -> NDArray[Any]:
        shard = _per_shard(self._array) * self._array.chunks[0]
        return self._shards.allocate(min(shard, self._length - self.position), self._array.dtype)


def _writers(path: Path, cells: Totals, form: Form, waiting: _Shards) -> dict[str, _Writer]:
    """One writer for each array of a view. No stored value equals its array's fill value."""
    count, index, int64 = np.min_scalar_type(cells.largest), index_dtype(form.n_genes), np.dtype(np.int64)
    for group in (path, path / "source", path / "obs"):
        make_group(group)

    def array(name: str, length: int, dtype: np.dtype, fill: float, chunk: int, per_shard: int) -> _Writer:
        shards = (chunk * per_shard,)
        made = make_array(
            path / name, shape=(length,), dtype=dtype, chunks=(chunk,), shards=shards, fill=fill, codec=form.codec
        )
        return _Writer(path / name, made, form.codec, waiting)

    def of_cells(name: str, dtype: np.dtype, fill: float) -> _Writer:
        return array(name, cells.cells, dtype, fill, form.block_rows, _BLOCKS_PER_SHARD)

    def of_proteins(panels: Panels) -> _Writer:
        n, most = len(panels.names), np.iinfo(panels.dtype).max
        per_shard = panels.blocks_per_shard(form.block_rows, _BLOCKS_PER_SHARD)
        return array(PROTEINS, cells.cells * n, panels.dtype, most, form.block_rows * n, per_shard)

    return {
        "data": array("data", cells.nnz, count, 0, _CHUNK, _CHUNKS_PER_SHARD),
        "indices": array("indices", cells.nnz, index, np.iinfo(index).max, _CHUNK, _CHUNKS_PER_SHARD),
        "indptr": array("indptr", cells.cells + 1, int64, -1, form.block_rows, _BLOCKS_PER_SHARD),
        "source/dataset": of_cells("source/dataset", np.dtype(np.int32), -1),
        "source/row": of_cells("source/row", int64, -1),
        **{array_name(c.name): of_cells(array_name(c.name), c.dtype, c.fill) for c in form.columns},
        **({PROTEINS: of_proteins(form.panels)} if form.panels else {}),
    }
