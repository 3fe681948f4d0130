"""Executes the sampler's plan: blocks are read ahead in a thread, and a batch is a gather of their rows."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from scviaduct.schema import Batch
from scviaduct.storage.sampler import Epoch, Sampler, Segment

T = TypeVar("T")


class BlockSource(Protocol):
    """Cells in blocks of `block_rows`, readable in any order: a training view, or a query in memory."""

    n_genes: int
    n_rows: int
    block_rows: int

    def read(self, block: int) -> Batch:
        """Rows [block · block_rows, …) in stored order."""
        ...


class MemorySource:
    """A BlockSource over cells that are in memory, such as one query data set."""

    def __init__(self, cells: Batch, block_rows: int = 1024) -> None:
        self.cells, self.block_rows = cells, block_rows
        self.n_genes, self.n_rows = cells.n_genes, cells.n_cells

    def read(self, block: int) -> Batch:
        """Rows [block · block_rows, …) in stored order; arrays are views, not copies."""
        rows = slice(block * self.block_rows, min(self.n_rows, (block + 1) * self.block_rows))
        start, stop = self.cells.indptr[rows.start], self.cells.indptr[rows.stop]
        per_cell = {name: getattr(self.cells, name)[rows] for name in _PER_CELL}
        return replace(
            self.cells,
            indptr=self.cells.indptr[rows.start : rows.stop + 1] - start,
            indices=self.cells.indices[start:stop],
            data=self.cells.data[start:stop],
            **per_cell | {"rows": np.arange(rows.start, rows.stop)},
        )


_PER_CELL = ("batch_index", "labels", "categorical", "continuous", "size_factor", "rows")


@numba.njit(nogil=True, cache=True)
def _gather_rows(indptr, indices, data, rows, out_indptr, out_indices, out_data, cell):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Append `rows` of one CSR block to the output from output row `cell` on."""
    for row in rows:
        at = out_indptr[cell]
        for j in range(indptr[row], indptr[row + 1]):
            out_indices[at] = indices[j]
            out_data[at] = data[j]
            at += 1
        cell += 1
        out_indptr[cell] = at


def gather(pieces: list[tuple[Batch, NDArray[np.int64]]]) -> Batch:
    """One batch of the given rows of the given blocks, in order; the fields of the first piece decide what exists."""
    cells = sum(len(rows) for _, rows in pieces)
    nnz = sum(int((block.indptr[rows + 1] - block.indptr[rows]).sum()) for block, rows in pieces)
    indptr, indices, data = np.zeros(cells + 1, np.int64), np.empty(nnz, np.int32), np.empty(nnz, np.float32)
    at = 0
    for block, rows in pieces:
        _gather_rows(block.indptr, block.indices, block.data, rows, indptr, indices, data, at)
        at += len(rows)
    first = pieces[0][0]
    per_cell = {
        name: np.concatenate([getattr(block, name)[rows] for block, rows in pieces])
        if getattr(first, name).size
        else getattr(first, name)
        for name in _PER_CELL
    }
    return Batch(n_genes=first.n_genes, indptr=indptr, indices=indices, data=data, **per_cell)


class Prefetched(Generic[T]):
    """An iterator whose items are made up to `depth` ahead by a thread; `waited` sums the seconds it kept one waiting.

    Use as a context manager: leaving it stops the thread. An error in the thread is raised by the next item.
    """

    def __init__(self, make: Callable[[], Iterator[T]], depth: int = 8) -> None:
        self._queue: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name="scviaduct-prefetch", daemon=True)
        self.waited = 0.0

    def __enter__(self) -> Prefetched[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(timeout=0.05)

    def _drain(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            return

    def _run(self, make: Callable[[], Iterator[T]]) -> None:
        try:
            for item in make():
                self._queue.put(("item", item))
                if self._stopped.is_set():
                    return
            self._queue.put(("end", None))
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, who raises it
            self._queue.put(("error", error))

    def __iter__(self) -> Iterator[T]:
        while True:
            begin = time.perf_counter()
            kind, item = self._queue.get()
            self.waited += time.perf_counter() - begin
            if kind == "end":
                return
            if kind == "error":
                raise item  # type: ignore[misc]
            yield item  # type: ignore[misc]


class Loader:
    """Minibatches of one rank, in the sampler's order."""

    def __init__(self, source: BlockSource, sampler: Sampler, *, rank: int = 0, world_size: int = 1) -> None:
        self.source, self.sampler = source, sampler
        self.rank, self.world_size = rank, world_size

    def epoch(self, index: int, start_step: int = 0) -> Prefetched[Batch]:
        """Batches of steps [start_step, steps) of an epoch; open it with `with`."""
        return Prefetched(lambda: self._batches(index, start_step), depth=self._depth())

    def _depth(self) -> int:
        # about 8,192 cells ahead: covers the burst when all lanes cross a block border at once
        return max(2, min(64, 8192 * self.world_size // self.sampler.batch_size))

    def _batches(self, index: int, start_step: int) -> Iterator[Batch]:
        epoch = self.sampler.epoch(index)
        open_blocks: dict[int, tuple[Batch, NDArray[np.int64]]] = {}
        for step in range(start_step, self.sampler.steps):
            lanes = self.sampler.request(epoch, step, self.rank, self.world_size)
            needed = {segment.block for lane in lanes for segment in lane}
            for block in needed - open_blocks.keys():
                open_blocks[block] = (self.source.read(block), self.sampler.rows_of(index, block))
            yield self._assemble(epoch, lanes, open_blocks)
            last = {lane[-1].block for lane in lanes if lane}
            open_blocks = {b: v for b, v in open_blocks.items() if b in last}

    def _assemble(
        self, epoch: Epoch, lanes: list[list[Segment]], blocks: dict[int, tuple[Batch, NDArray[np.int64]]]
    ) -> Batch:
        segments = [segment for lane in lanes for segment in lane]
        pieces = [(blocks[s.block][0], blocks[s.block][1][s.start : s.stop]) for s in segments]
        if not pieces:  # a rank without a cell at this step still takes part in it
            pieces = [(self.source.read(0), np.zeros(0, np.int64))]
        batch = gather(pieces)
        borders = np.cumsum([0] + [sum(s.stop - s.start for s in lane) for lane in lanes])
        return replace(batch, seeds=self.sampler.seeds(epoch.index, batch.rows), lanes=borders)


def stream(source: BlockSource, *, rank: int = 0, world_size: int = 1) -> Prefetched[Batch]:
    """Every block once in stored order (for embedding); ranks take neighbouring runs of blocks."""
    n_blocks = -(-source.n_rows // source.block_rows)
    mine = range(rank * n_blocks // world_size, (rank + 1) * n_blocks // world_size)
    return Prefetched(lambda: (source.read(block) for block in mine), depth=4)
