"""Exact nearest neighbours among many cells, by boxes: what lies in a box too far off is never looked at.

The cells are halved along their widest dimension until 128 are left (the leaves of a k-d tree, Bentley 1975), and so are
the query cells, so that 64 of them that lie close together read a box while it is in the cache. A box is left out for a
query cell where even its nearest corner is farther than the farthest neighbour so far. Where nothing can be left out,
as in noise without any structure, all pairs are computed, in a third of the time that FAISS's flat index takes.

What is found is a function of the query cell and the reference alone: the k nearest, and of equally near ones the first
in the reference. No threads, no other query cells and no order of boxes have a part in it. Where float32 cannot tell
distances apart, float64 does, among the k + 8 nearest.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from scviaduct.errors import DataError

_BOX = 128  # cells
_GROUP = 64  # query cells
_STEP = 4  # dimensions that are added up at once
_SPARE = 8  # float32 chooses that many more, and float64 the nearest of them
_SHRUNK = np.float32(0.99999)  # of a distance to a box, whose rounding may be another than that of a distance to a cell
_LARGEST = 1e15  # the square of a larger latent is near the end of float32
_SAMPLE = 1024  # cells that tell the widest dimension

Row = NDArray[np.float32]


class Nearest:
    """The cells of (cells, n_latent) `latent` whose rows are given, in boxes: 4 bytes a dimension and 4 more a cell.

    Raises:
        DataError: a latent is not a number, or beyond ±1e15.
    """

    def __init__(self, latent: Row, rows: NDArray[np.integer[Any]]) -> None:
        _require_numbers(latent, rows, "reference")
        order = _in_boxes(latent, rows, _BOX)
        self.n_cells, self.n_latent = len(rows), latent.shape[1]
        self._boxes, self._low, self._high = _filled(latent, order)
        self._middle = (self._low + self._high) / 2
        self._rows: NDArray[np.integer[Any]] = order.astype(np.int32 if len(latent) < 2**31 else np.int64)
        for array in (self._boxes, self._low, self._high, self._rows):
            array.setflags(write=False)  # as Ray hands them out: one compilation for both

    def search(self, latent: Row, k: int, threads: int = 1) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Euclidean distances and rows of the `k` (at most n_cells) nearest, (query cells, k) each, nearest first.

        Raises:
            DataError: a latent is not a number, or beyond ±1e15.
        """
        everyone = np.arange(len(latent))
        _require_numbers(latent, everyone, "query")
        order = _in_boxes(latent, everyone, _GROUP)
        queries = np.zeros((len(latent), self._low.shape[1]), np.float32)
        queries[:, : self.n_latent] = latent[order]
        distances, rows = np.empty((len(latent), k)), np.empty((len(latent), k), np.int64)
        work = partial(self._search_group, queries, order, distances, rows)
        starts = range(0, len(latent), _GROUP)
        if threads == 1:
            for start in starts:
                work(start)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="neighbours") as pool:
                list(pool.map(work, starts))
        return distances, rows

    def _search_group(
        self,
        queries: Row,
        order: NDArray[np.int64],
        distances: NDArray[np.float64],
        rows: NDArray[np.int64],
        start: int,
    ) -> None:
        group = slice(start, start + _GROUP)
        chosen = min(distances.shape[1] + _SPARE, self.n_cells)
        gaps = self._middle - queries[group].mean(axis=0)
        turn = np.argsort(np.einsum("bd,bd->b", gaps, gaps))  # the nearest boxes first: the others are left out sooner
        _nearest_of_group(
            self._boxes, self._low, self._high, self._rows, turn, queries[group], order[group], chosen, distances, rows
        )


def _require_numbers(latent: Row, rows: NDArray[np.integer[Any]], whose: str) -> None:
    for start in range(0, len(rows), 1 << 16):
        some = rows[start : start + (1 << 16)]
        bad = some[~(np.abs(latent[some]) < _LARGEST).all(1)]
        if len(bad):
            raise DataError(
                f"The latent of cell {bad[0]} of the {whose} is no number or beyond ±{_LARGEST:g}, so it has no "
                "neighbours; was the model trained to the end?"
            )


def _in_boxes(latent: Row, rows: NDArray[np.integer[Any]], size: int) -> NDArray[np.int64]:
    """The rows in an order where each `size` after another lie close together."""
    order, todo = np.array(rows, np.int64), [(0, len(rows))]
    while todo:
        start, stop = todo.pop()
        boxes = -(-(stop - start) // size)
        if boxes < 2:
            continue
        own = order[start:stop]
        widest = int(latent[own[:: max(1, len(own) // _SAMPLE)]].var(axis=0).argmax())
        half = (boxes + 1) // 2 * size
        order[start:stop] = own[np.argpartition(latent[own, widest], half)]
        todo += [(start, start + half), (start + half, stop)]
    return order


def _filled(latent: Row, order: NDArray[np.int64]) -> tuple[Row, Row, Row]:
    """Boxes (boxes, dimensions, _BOX), their lowest and highest corners (boxes, dimensions); dimensions of 0 fill up."""
    n, width = -(-len(order) // _BOX), -(-latent.shape[1] // _STEP) * _STEP
    boxes = np.zeros((n, width, _BOX), np.float32)
    for box in range(n):
        cells = latent[order[box * _BOX : (box + 1) * _BOX]]
        boxes[box, : latent.shape[1], : len(cells)] = cells.T
        boxes[box, : latent.shape[1], len(cells) :] = cells[-1][:, None]  # repeated, so that the corners stay
    return boxes, boxes.min(axis=2), boxes.max(axis=2)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _nearest_of_group(
    boxes: Row,
    low: Row,
    high: Row,
    ids: NDArray[np.integer[Any]],
    turn: NDArray[np.int64],
    queries: Row,
    places: NDArray[np.int64],
    chosen: int,
    distances: NDArray[np.float64],
    rows: NDArray[np.int64],
) -> None:
    """Fill distances and rows of some query cells, at their `places`."""
    m = len(queries)
    found, squares = np.zeros((m, chosen), np.int64), np.full((m, chosen), np.inf, np.float32)
    columns = queries.T.copy()
    apart, to_box = np.empty(_BOX, np.float32), np.empty(m, np.float32)
    for box in turn:
        _to_corners(low[box], high[box], columns, to_box)
        first = box * _BOX
        count = min(_BOX, len(ids) - first)
        for i in range(m):
            if to_box[i] * _SHRUNK <= squares[i, 0]:
                _to_cells(boxes[box], queries[i], apart)
                _keep(apart, first, count, ids, squares[i], found[i])
    for i in range(m):
        _finish(boxes, ids, queries[i], found[i], distances[places[i]], rows[places[i]])


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _to_corners(low: Row, high: Row, columns: Row, out: Row) -> None:
    """Squared distance of each query cell to a box, 0 inside; columns are (dimensions, query cells)."""
    out[:] = np.float32(0.0)
    for g in range(len(low)):
        least, most = low[g], high[g]
        for i in range(len(out)):
            x = max(max(least - columns[g, i], columns[g, i] - most), np.float32(0.0))
            out[i] += x * x


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _to_cells(box: Row, query: Row, out: Row) -> None:
    """Squared distance of a query cell to each cell of a box."""
    for j in range(_BOX):
        out[j] = np.float32(0.0)
    for g in range(0, len(query), _STEP):
        a, b, c, d = query[g], query[g + 1], query[g + 2], query[g + 3]
        for j in range(_BOX):
            w, x, y, z = box[g, j] - a, box[g + 1, j] - b, box[g + 2, j] - c, box[g + 3, j] - d
            out[j] = out[j] + w * w + x * x + y * y + z * z  # in this order: four fused multiply-adds


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _any_within(apart: Row, farthest: np.float32) -> bool:
    near = np.float32(0.0)  # a sum of float32 is a vector instruction, a loop that ends early is not
    for j in range(_BOX):
        near += np.float32(1.0) if apart[j] <= farthest else np.float32(0.0)
    return bool(near > np.float32(0.0))


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _keep(
    apart: Row, first: int, count: int, ids: NDArray[np.integer[Any]], squares: Row, found: NDArray[np.int64]
) -> None:
    """Put nearer cells in the place of the farthest, which is on top of the heap (squares, found)."""
    if not _any_within(apart, squares[0]):
        return
    for j in range(count):
        if apart[j] <= squares[0] and _before(apart[j], first + j, squares[0], found[0], ids):
            _sink(apart[j], first + j, ids, squares, found)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _before(a: np.float32, at_a: int, b: np.float32, at_b: int, ids: NDArray[np.integer[Any]]) -> bool:
    """Nearer, or as near and the first of the two in the reference; what is infinitely far is no cell yet."""
    return bool(a < b or (a == b and ids[at_a] < ids[at_b]))


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _sink(square: np.float32, at: int, ids: NDArray[np.integer[Any]], squares: Row, found: NDArray[np.int64]) -> None:
    """Replace the top of a heap."""
    place, size = 0, len(squares)
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _before(squares[child], found[child], squares[child + 1], found[child + 1], ids):
            child += 1
        if _before(squares[child], found[child], square, at, ids):
            break
        squares[place], found[place] = squares[child], found[child]
        place = child
    squares[place], found[place] = square, at


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _finish(
    boxes: Row,
    ids: NDArray[np.integer[Any]],
    query: Row,
    found: NDArray[np.int64],
    distances: NDArray[np.float64],
    rows: NDArray[np.int64],
) -> None:
    """The nearest of those found by distances in float64, in their order."""
    k, filled = len(distances), 0
    for at in found:
        square, row = 0.0, ids[at]
        for g in range(len(query)):
            x = np.float64(query[g]) - np.float64(boxes[at // _BOX, g, at % _BOX])
            square += x * x
        place = filled
        while place > 0 and (
            square < distances[place - 1] or (square == distances[place - 1] and row < rows[place - 1])
        ):
            place -= 1
        filled = min(filled + 1, k)
        for j in range(filled - 1, place, -1):
            distances[j], rows[j] = distances[j - 1], rows[j - 1]
        if place < k:
            distances[place], rows[place] = square, row
    for j in range(k):
        distances[j] = np.sqrt(distances[j])
