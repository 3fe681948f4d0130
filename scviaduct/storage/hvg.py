"""Highly variable genes of an atlas that does not fit in memory: two streaming passes, memory of genes × batches.

The method is Seurat v3's (Stuart et al., Cell 2019), as scanpy's `flavor="seurat_v3"` defines it: per batch, a loess
fit of log10 variance on log10 mean; variance of the standardised counts, clipped at sqrt(cells); genes ranked within
each batch, then ordered by their median rank and by the number of batches that rank them among the first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from skmisc.loess import loess

from scviaduct.errors import DataError, MissingColumnError, nearest
from scviaduct.storage.columns import DATASET, OBS_DATASET, as_text
from scviaduct.storage.genes import match, select

if TYPE_CHECKING:
    from scviaduct.storage.atlas import Atlas

log = logging.getLogger(__name__)

_SPANS = (0.3, 0.5, 0.7, 1.0)
"""0.3 is scanpy's; batches of a few cells have so few distinct means that loess is singular below a wider span."""
_FEWEST_GENES = 10
"""skmisc's loess crashes the process below 4 points and finds no fit at any span below about 10."""


def gene_columns(atlas: Atlas, genes: Sequence[str]) -> dict[str, NDArray[np.int32]]:
    """For each data set, the position in `genes` of each of its genes, -1 where not chosen.

    Raises DataError when a gene is in no data set, or a data set has none of the genes.
    """
    columns, somewhere = {}, np.zeros(len(genes), bool)
    for info in atlas.datasets:
        var = atlas.var(info.id)
        found = match(genes, var, where=f"data set {info.id!r}")
        if found.n_matched == 0:
            raise DataError(
                f"Data set {info.id!r} has none of the {len(genes)} chosen genes ({', '.join(genes[:3])}, …)."
            )
        columns[info.id] = found.columns(len(var))
        somewhere |= found.positions >= 0
    if not somewhere.all():
        absent = [gene for gene, here in zip(genes, somewhere, strict=True) if not here]
        raise DataError(f"{len(absent)} of {len(genes)} genes are in no data set of the atlas: {', '.join(absent[:5])}")
    return columns


@dataclass(frozen=True)
class Batches:
    """The batch of every cell, by data set."""

    names: tuple[str, ...]
    codes: dict[str, NDArray[np.int32]]


def batches(atlas: Atlas, batch_key: str | None) -> Batches:
    """The batch of every cell: its value of an obs column, or its data set when `batch_key` is None or "dataset".

    Raises MissingColumnError when a data set lacks the column, DataError when cells have no value.
    """
    if batch_key in (None, DATASET):
        names = tuple(info.id for info in atlas.datasets)
        return Batches(names, {d.id: np.full(d.n_obs, i, np.int32) for i, d in enumerate(atlas.datasets)})
    columns = {info.id: _batch_column(atlas, info.id, batch_key) for info in atlas.datasets}
    names = tuple(sorted({name for column in columns.values() for name in column.categories}))
    index = pd.Index(names)
    return Batches(
        names, {id_: index.get_indexer(c.categories)[c.codes].astype(np.int32) for id_, c in columns.items()}
    )


def _batch_column(atlas: Atlas, dataset_id: str, key: str) -> pd.Categorical:
    available = atlas.obs(dataset_id).columns
    key = DATASET if key == OBS_DATASET else key
    if key not in available:
        raise MissingColumnError(f"Data set {dataset_id!r} has no obs column {key!r}: {nearest(key, available)}")
    column = atlas.obs(dataset_id, [key])[key]
    missing = column.index[column.isna()]
    if len(missing):
        raise DataError(
            f"{len(missing)} cells of data set {dataset_id!r} have no {key} (e.g. {missing[0]}). "
            "Give them a value, or use another batch column."
        )
    return as_text(column)


def highly_variable_genes(
    atlas: Atlas, *, n_top_genes: int, genes: Sequence[str], batch_key: str | None = None
) -> pd.DataFrame:
    """Rank `genes` by how variable they are, as `scanpy.pp.highly_variable_genes(flavor="seurat_v3")` would.

    Returns a frame indexed by gene with `highly_variable`, `highly_variable_rank`, `highly_variable_nbatches` and
    `variances_norm`. A gene that a data set lacks counts as zero there. A batch whose trend cannot be fitted (a few
    cells) takes no part and is named in a warning. Raises DataError when that leaves none.
    """
    columns, by_cell = gene_columns(atlas, genes), batches(atlas, batch_key)
    moments = _moments(atlas, columns, by_cell, len(genes))
    fitted = [(b, std) for b in range(len(by_cell.names)) if (std := _expected_std(moments, b)) is not None]
    _report_unfitted(by_cell.names, [b for b, _ in fitted], moments)
    clip = np.zeros_like(moments.mean)
    std = np.ones_like(moments.mean)
    for b, batch_std in fitted:
        std[b] = batch_std
        clip[b] = batch_std * np.sqrt(moments.n_cells[b]) + moments.mean[b]
    total, squares = _clipped_sums(atlas, columns, by_cell, clip)
    kept = [b for b, _ in fitted]
    n, mean = moments.n_cells[kept, None], moments.mean[kept]
    variances = (n * mean**2 + squares[kept] - 2 * total[kept] * mean) / ((n - 1) * std[kept] ** 2)
    return _rank(variances, genes, n_top_genes)


@dataclass(frozen=True)
class _Moments:
    """Per batch: number of cells (batches,), mean and unbiased variance of each gene (batches, genes)."""

    n_cells: NDArray[np.int64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


def _stream(
    atlas: Atlas, columns: dict[str, NDArray[np.int32]], by_cell: Batches, n_genes: int
) -> Iterator[tuple[csr_matrix, NDArray[np.int32]]]:
    """(counts over the genes, batch of each cell) of all cells, chunk by chunk."""
    for info in atlas.datasets:
        for first, block in atlas.chunks(info.id, rows=4096):
            codes = by_cell.codes[info.id][first : first + block.shape[0]]
            yield select(block, columns[info.id], n_genes), codes


def _moments(atlas: Atlas, columns: dict[str, NDArray[np.int32]], by_cell: Batches, n_genes: int) -> _Moments:
    total = np.zeros((len(by_cell.names), n_genes), np.int64)
    squares = np.zeros(total.shape)  # float64: exact below 2^53, where int64 would overflow it only rounds
    n_cells = np.zeros(len(by_cell.names), np.int64)
    for block, codes in _stream(atlas, columns, by_cell, n_genes):
        _add_squares(block.indptr.astype(np.int64), block.indices, block.data, codes, total, squares)
        n_cells += np.bincount(codes, minlength=len(n_cells))
    mean = total / np.maximum(n_cells, 1)[:, None]
    n = n_cells[:, None]
    return _Moments(n_cells, mean, _spread(n, total, squares) / np.maximum(n * (n - 1), 1))


def _spread(n: NDArray[np.int64], total: NDArray[np.int64], squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """n·Σx² − (Σx)². Both terms are rounded once from exact sums, so a gene that never varies gives exactly 0."""
    return n * squares - total.astype(np.float64) ** 2


def _expected_std(moments: _Moments, batch: int) -> NDArray[np.float64] | None:
    """(genes,) standard deviation that the mean-variance trend of a batch predicts; None when there is no fit."""
    mean, variance = moments.mean[batch], moments.variance[batch]
    varies = variance > 0
    if varies.sum() < _FEWEST_GENES:
        return None
    trend = _trend(np.log10(mean[varies]), np.log10(variance[varies]))
    if trend is None:
        return None
    log_variance = np.zeros(len(mean))
    log_variance[varies] = trend
    return np.sqrt(10**log_variance)


def _trend(log_mean: NDArray[np.float64], log_variance: NDArray[np.float64]) -> NDArray[np.float64] | None:
    for span in _SPANS:
        model = loess(log_mean, log_variance, span=span, degree=2)
        try:
            model.fit()
        except ValueError:  # "near singularities", "Extrapolation not allowed with blending"
            continue
        if np.isfinite(model.outputs.fitted_values).all():
            return model.outputs.fitted_values
    return None


def _report_unfitted(names: Sequence[str], fitted: list[int], moments: _Moments) -> None:
    left_out = [f"{names[b]} ({moments.n_cells[b]} cells)" for b in sorted(set(range(len(names))) - set(fitted))]
    if not fitted:
        raise DataError(
            f"Highly variable genes cannot be found: no batch has enough variable genes ({', '.join(left_out[:5])}). "
            "Use larger batches, or name the genes yourself."
        )
    if left_out:
        log.warning("too small to rank genes, left out of the choice: %s", ", ".join(left_out))


def _clipped_sums(
    atlas: Atlas, columns: dict[str, NDArray[np.int32]], by_cell: Batches, clip: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    total, squares = np.zeros_like(clip), np.zeros_like(clip)
    for block, codes in _stream(atlas, columns, by_cell, clip.shape[1]):
        _add_clipped(block.indptr.astype(np.int64), block.indices, block.data, codes, clip, total, squares)
    return total, squares


def _rank(variances: NDArray[np.float64], genes: Sequence[str], n_top_genes: int) -> pd.DataFrame:
    """Median rank over batches; ranks beyond `n_top_genes` do not count, as in Seurat's SelectIntegrationFeatures."""
    ranks = np.argsort(np.argsort(-variances, axis=1), axis=1).astype(np.float32)
    median = np.ma.median(np.ma.masked_array(ranks, ranks >= n_top_genes), axis=0)
    frame = pd.DataFrame(
        {
            "highly_variable_rank": np.ma.filled(median.astype(np.float64), np.nan),
            "highly_variable_nbatches": (ranks < n_top_genes).sum(axis=0),
            "variances_norm": variances.mean(axis=0),
        },
        index=pd.Index(genes),
    )
    keys = ["highly_variable_rank", "highly_variable_nbatches"]
    first = frame[keys].sort_values(keys, ascending=[True, False], na_position="last").index[:n_top_genes]
    frame.insert(0, "highly_variable", frame.index.isin(first))
    return frame


@numba.njit(nogil=True, cache=True)
def _add_squares(indptr, indices, data, codes, total, squares):  # type: ignore[no-untyped-def]  # pragma: no cover
    for cell in range(len(codes)):
        for j in range(indptr[cell], indptr[cell + 1]):
            count = np.int64(data[j])
            total[codes[cell], indices[j]] += count
            squares[codes[cell], indices[j]] += np.float64(count) * count


@numba.njit(nogil=True, cache=True)
def _add_clipped(indptr, indices, data, codes, clip, total, squares):  # type: ignore[no-untyped-def]  # pragma: no cover
    for cell in range(len(codes)):
        batch = codes[cell]
        for j in range(indptr[cell], indptr[cell + 1]):
            count = min(np.float64(data[j]), clip[batch, indices[j]])
            total[batch, indices[j]] += count
            squares[batch, indices[j]] += count * count
