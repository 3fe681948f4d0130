"""The nearest of many cells by FAISS, with the recall known.

Up to 200,000 cells, and at any number on demand, all pairs are computed. Beyond, cells lie in lists by k-means, and only
some of the lists are looked at: as few as still find 0.999 of the true neighbours of a sample of the query. Where an
eighth of the lists is not enough, as in noise without any structure, all pairs are computed.

FAISS's float32 proposes k + 8 cells, float64 orders them; of equally near cells the first in the reference comes first.
What is found depends on neither threads nor processes. With all pairs it depends on no other query cell, either; with
lists the other cells decide how many lists are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from scviaduct.errors import DataError

ALL_PAIRS = 200_000  # cells up to which all pairs are computed: 0.3 ms of a core a query cell in 30 dimensions
_RECALL = 0.999
_SAMPLE = 256  # query cells that recall is measured on
_FEWEST = 16  # lists that are tried first, then twice as many and so on
_EIGHTH = 8  # a pair costs 12 ns in lists and 1.5 ns among all pairs, a matrix product
_SPARE = 8  # cells beyond the k nearest that float64 chooses from
_POINTS = 40  # cells a list that k-means sees
_ROUNDS = 8  # of k-means
_CHUNK = 4096  # query cells at a time: 4,096 x 58 neighbours x 30 dimensions of float64 are 57 MB
_LARGEST = 1e15  # the square of a larger latent is near the end of float32

Rows = NDArray[np.integer[Any]]
Found = tuple[NDArray[np.float64], NDArray[np.int64]]


class Probe(NamedTuple):
    """How a query is searched."""

    nprobe: int
    """Lists that are looked at for a query cell; 0: all pairs are computed."""
    recall: float
    """Share of the true neighbours of a sample that these lists hold; 1 for all pairs."""


ALL = Probe(0, 1.0)


class CellIndex:
    """The cells of (cells, n_latent) `latent` whose rows are given; pickled without copies of its arrays.

    `exact` computes all pairs, as is done anyway for no more than `all_pairs` cells.

    Raises:
        DataError: a latent is not a number, or beyond ±1e15.
    """

    def __init__(
        self, latent: NDArray[np.float32], rows: Rows, *, exact: bool = False, all_pairs: int = ALL_PAIRS
    ) -> None:
        self._cells, self._rows = np.ascontiguousarray(latent[rows], np.float32), np.asarray(rows, np.int64)
        _require_numbers(self._cells, self._rows, "reference")
        self._longest = float(np.einsum("nd,nd->n", self._cells, self._cells).max())
        self.n_lists = 0 if exact or len(rows) <= all_pairs else int(2 * len(rows) ** 0.5)
        self._lists = _in_lists(self._cells, self.n_lists) if self.n_lists else None
        self._cells.setflags(write=False)  # as Ray hands them out

    def probe(self, latent: NDArray[np.float32], k: int, threads: int = 1) -> Probe:
        """The fewest lists with a recall of 0.999 on a sample of these query cells (cells, n_latent)."""
        if not self.n_lists or len(latent) <= _SAMPLE:
            return ALL
        sample = latent[np.random.default_rng(0).choice(len(latent), _SAMPLE, replace=False)]
        truth, _ = self.search(sample, k, ALL, threads)
        nprobe = _FEWEST
        while nprobe * _EIGHTH <= self.n_lists:
            found, _ = self.search(sample, k, Probe(nprobe, np.nan), threads)
            recall = float((found <= truth[:, -1:]).mean())
            if recall >= _RECALL:
                return Probe(nprobe, recall)
            nprobe *= 2
        return ALL

    def search(self, latent: NDArray[np.float32], k: int, probe: Probe = ALL, threads: int = 1) -> Found:
        """Euclidean distances and rows of the `k` (at most all) nearest, (query cells, k) each, nearest first.

        Raises:
            DataError: a latent is not a number, or beyond ±1e15.
        """
        latent = np.ascontiguousarray(latent, np.float32)
        _require_numbers(latent, np.arange(len(latent)), "query")
        squares, places = np.empty((len(latent), k)), np.empty((len(latent), k), np.int64)
        for start in range(0, len(latent), _CHUNK):
            some = slice(start, start + _CHUNK)
            if probe.nprobe:
                squares[some], places[some] = self._among_lists(latent[some], k, probe.nprobe, threads)
            else:
                squares[some], places[some] = self._among_all(latent[some], k, threads)
        return np.sqrt(squares), self._rows[places]

    def _among_lists(self, query: NDArray[np.float32], k: int, nprobe: int, threads: int) -> Found:
        assert self._lists is not None
        read = faiss.ZeroCopyIOReader  # type: ignore[attr-defined] # missing in its stubs
        index = faiss.read_index(read(faiss.swig_ptr(self._lists), len(self._lists)))
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe = nprobe
        with _faiss(threads, products=False):  # products may be rounded by their size, that is by the threads
            _, places = index.search(query, k + _SPARE, params=parameters)
        squares, places = self._ordered(query, places, k)
        short = np.isinf(squares[:, -1])  # the lists hold fewer than k cells
        if short.any():
            squares[short], places[short] = self._among_all(query[short], k, threads)
        return squares, places

    def _among_all(self, query: NDArray[np.float32], k: int, threads: int) -> Found:
        """|x|² + |y|² - 2xy by a matrix product; by (x - y)², four times slower, where its rounding could matter."""
        chosen = min(k + _SPARE, len(self._cells))
        with _faiss(threads, products=True):
            roughly, places = faiss.knn(query, self._cells, chosen)
        squares, places = self._ordered(query, places, k)
        if chosen == len(self._cells):
            return squares, places
        lengths = np.einsum("nd,nd->n", query, query, dtype=np.float64) + self._longest
        rounding = 2.0**-23 * (query.shape[1] + 4) * lengths  # Higham's bound of a sum of d products, and some more
        unsure = squares[:, -1] >= roughly[:, -1] - rounding  # else nothing that was left out can be as near
        if unsure.any():
            with _faiss(threads, products=False):
                _, others = faiss.knn(query[unsure], self._cells, chosen)
            squares[unsure], places[unsure] = self._ordered(query[unsure], others, k)
        return squares, places

    def _ordered(self, query: NDArray[np.float32], places: NDArray[np.int64], k: int) -> Found:
        """The k nearest of those proposed by squared distances in float64; infinite where there are fewer (-1)."""
        gaps = query[:, None].astype(np.float64) - self._cells[places]
        squares = np.where(places < 0, np.inf, (gaps**2).sum(-1))
        order = np.lexsort((places, squares), axis=-1)[:, :k]
        return np.take_along_axis(squares, order, 1), np.take_along_axis(places, order, 1)


def _require_numbers(latent: NDArray[np.float32], rows: Rows, whose: str) -> None:
    for start in range(0, len(rows), 1 << 16):
        some = slice(start, start + (1 << 16))
        bad = rows[some][~(np.abs(latent[some]) < _LARGEST).all(1)]
        if len(bad):
            raise DataError(
                f"The latent of cell {bad[0]} of the {whose} is no number or beyond ±{_LARGEST:g}, so it has no "
                "neighbours; was the model trained to the end?"
            )


def _in_lists(cells: NDArray[np.float32], n_lists: int) -> NDArray[np.uint8]:
    """FAISS's index as bytes; on one thread, so that the lists are the same wherever they are made."""
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(cells.shape[1]), cells.shape[1], n_lists)
    index.cp.seed, index.cp.niter = 0, _ROUNDS
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, _POINTS
    with _faiss(1, products=True):
        index.train(cells)
        index.add(cells)
    written: NDArray[np.uint8] = faiss.serialize_index(index)
    written.setflags(write=False)
    return written


@contextmanager
def _faiss(threads: int, *, products: bool) -> Iterator[None]:
    """FAISS's threads, and whether it multiplies matrices; both are of the process, and are put back."""
    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    faiss.omp_set_num_threads(threads)
    faiss.cvar.distance_compute_blas_threshold = 0 if products else 2**31 - 1
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before[0])
        faiss.cvar.distance_compute_blas_threshold = before[1]
