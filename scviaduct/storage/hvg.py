"""Highly variable genes of an atlas that does not fit in memory, as `scanpy.pp.highly_variable_genes` finds them.

Seurat v3 (Stuart et al., Cell 2019) takes two passes over the counts: per batch, a loess fit of log10 variance on log10
mean; variance of the standardised counts, clipped at sqrt(cells); genes ranked within each batch, then ordered by their
median rank and by the number of batches that rank them among the first. The other flavors are in dispersion.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from skmisc.loess import loess

from scviaduct.errors import ConfigError, DataError, MissingColumnError, nearest
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.columns import DATASET, OBS_DATASET, as_text
from scviaduct.storage.dispersion import add_logarithms, add_normalised, merge_batches, normalised_dispersion
from scviaduct.storage.genes import match, normalise
from scviaduct.storage.scan import occurring, sum_by_group

log = logging.getLogger(__name__)

Flavor = Literal["seurat_v3", "seurat", "cell_ranger"]

_SPANS = (0.3, 0.5, 0.7, 1.0)
"""0.3 is scanpy's; batches of a few cells have so few distinct means that loess is singular below a wider span."""
_FEWEST_GENES = 10
"""skmisc's loess crashes the process below 4 points and finds no fit at any span below about 10."""


def gene_columns(atlas: Atlas, genes: Sequence[str]) -> dict[str, NDArray[np.int32]]:
    """For each data set, the position in `genes` of each of its genes, -1 where not chosen.

    Names on the atlas's gene axis are found there; others by var_names or the column of var that has most of them.

    Raises DataError when a gene is in no data set, or a data set has none of the genes.
    """
    on_axis = set(atlas.genes()).issuperset(names := normalise(genes))
    columns, somewhere = {}, np.zeros(len(genes), bool)
    for info in atlas.datasets:
        if on_axis:
            found = atlas.axis.columns(info.id, names)
        else:
            found = match(genes, var := atlas.var(info.id), where=f"data set {info.id!r}").columns(len(var))
        if not (found >= 0).any():
            raise DataError(
                f"Data set {info.id!r} has none of the {len(genes)} chosen genes ({', '.join(genes[:3])}, …)."
            )
        columns[info.id] = found
        somewhere[found[found >= 0]] = True
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
    available = atlas.obs_columns(dataset_id)
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
    atlas: Atlas,
    *,
    n_top_genes: int,
    genes: Sequence[str],
    batch_key: str | None = None,
    flavor: Flavor = "seurat_v3",
    keep: Mapping[str, NDArray[np.bool_]] | None = None,
    executor: Executor | None = None,
) -> pd.DataFrame:
    """Rank `genes` by how variable they are, as `scanpy.pp.highly_variable_genes` would in memory.

    Genes are ranked within the values of the obs column `batch_key` and the ranks merged by scanpy's rule; by default
    within the data sets, and a single data set is not divided. `keep` masks the cells to use, {data set: (cells,)}; all
    by default. A gene that a data set lacks counts as zero there. The flavors:

    * "seurat_v3": on counts. Frame of `highly_variable`, `highly_variable_rank`, `highly_variable_nbatches`,
      `variances_norm`.
    * "seurat" and "cell_ranger": on what `normalize_total(target_sum=1e4)` over `genes`, then `log1p`, give. Frame of
      `highly_variable`, `means`, `dispersions`, `dispersions_norm`; over batches also `highly_variable_nbatches` and
      `highly_variable_intersection`.

    The frame is indexed by gene, in the order of `genes`. A batch in which nothing can be ranked (a few cells) takes no
    part and is named in a warning. The result does not depend on the number of threads or on `executor`.

    Raises DataError when no batch can be ranked, or as `batches` and `gene_columns` do; ConfigError for a flavor that
    does not exist.
    """
    if flavor not in get_args(Flavor):
        raise ConfigError(f"There is no flavor {flavor!r}: {nearest(flavor, get_args(Flavor))}")
    cells = _Cells.of(atlas, genes, batches(atlas, batch_key), keep, executor)
    if flavor == "seurat_v3":
        return _seurat_v3(cells, n_top_genes)
    whole = batch_key is None and len(atlas.datasets) == 1
    return _by_dispersion(cells, flavor, n_top_genes, whole=whole)


@dataclass(frozen=True, eq=False)
class _Cells:
    """The cells whose genes are ranked."""

    atlas: Atlas
    genes: Sequence[str]
    columns: dict[str, NDArray[np.int32]]
    """{data set: (its genes,) position in `genes`, or -1}."""
    names: tuple[str, ...]
    """Of the batches."""
    codes: dict[str, NDArray[np.int32]]
    """{data set: (cells,) batch, -1 for a cell that is not used}."""
    n_cells: NDArray[np.int64]
    """(batches,) cells that are used."""
    executor: Executor | None

    @classmethod
    def of(
        cls,
        atlas: Atlas,
        genes: Sequence[str],
        by_cell: Batches,
        keep: Mapping[str, NDArray[np.bool_]] | None,
        executor: Executor | None,
    ) -> _Cells:
        codes = by_cell.codes
        if keep is not None:
            codes = {id_: np.where(keep[id_], values, -1).astype(np.int32) for id_, values in codes.items()}
        n_cells = sum(np.bincount(c[c >= 0], minlength=len(by_cell.names)) for c in codes.values())
        columns = gene_columns(atlas, genes)
        return cls(atlas, genes, columns, by_cell.names, codes, np.asarray(n_cells), executor)

    def sums(
        self,
        kernel: Callable[..., None],
        given: Mapping[str, NDArray[Any]],
        dtype: type[np.int64 | np.float64],
        quantities: int,
    ) -> NDArray[np.float64]:
        """(quantities, batches, genes) what the kernel adds up (see `sum_by_group`), over all data sets."""
        found = sum_by_group(
            self.atlas, self.codes, kernel, given, dtype, quantities=quantities, executor=self.executor
        )
        sums = np.zeros((quantities, len(self.names), len(self.genes)))
        for id_, columns in self.columns.items():
            used = columns >= 0
            at = np.ix_(np.arange(quantities), found[id_].groups, columns[used])
            sums[at] += np.moveaxis(found[id_].sums[:, used], 2, 0)
        return sums

    def by_gene(self, values: NDArray[Any], fill: Any) -> dict[str, NDArray[Any]]:
        """{data set: (batches that occur, its genes)} of (batches, genes) values; `fill` for genes not in question."""
        given = {}
        for id_, columns in self.columns.items():
            here = values[occurring(self.codes[id_])[0]]
            given[id_] = np.where(columns >= 0, here[:, columns], fill).astype(values.dtype)
        return given

    def report_left_out(self, ranked: Collection[int]) -> None:
        """Warn of batches in which nothing could be ranked; DataError when those are all."""
        others = [b for b in np.flatnonzero(self.n_cells) if b not in ranked]
        left_out = [f"{self.names[b]} ({self.n_cells[b]} cells)" for b in others]
        if not ranked:
            raise DataError(
                f"Highly variable genes cannot be found: no batch has enough variable genes "
                f"({', '.join(left_out[:5]) or 'no cell is left'}). Use larger batches, or name the genes yourself."
            )
        if left_out:
            log.warning("too small to rank genes, left out of the choice: %s", ", ".join(left_out))


def _seurat_v3(cells: _Cells, n_top_genes: int) -> pd.DataFrame:
    moments = _moments(cells)
    fitted = {b: std for b in range(len(cells.names)) if (std := _expected_std(moments, b)) is not None}
    cells.report_left_out(fitted)
    kept = list(fitted)
    n, mean = moments.n_cells[kept, None], moments.mean[kept]
    std = np.stack(list(fitted.values()))
    total, squares = _clipped_sums(cells, moments, kept, std * np.sqrt(n) + mean)
    variances = (n * mean**2 + squares - 2 * total * mean) / ((n - 1) * std**2)
    return _rank(variances, cells.genes, n_top_genes)


@dataclass(frozen=True)
class _Moments:
    """Per batch: number of cells (batches,), Σx, Σx², mean and unbiased variance of each gene (batches, genes)."""

    n_cells: NDArray[np.int64]
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


def _moments(cells: _Cells) -> _Moments:
    nothing = {id_: np.zeros((len(cells.names), 0), np.uint8) for id_ in cells.columns}
    total, squares = cells.sums(_add_squares, nothing, np.int64, 2)
    n = cells.n_cells[:, None]
    mean = total / np.maximum(n, 1)
    return _Moments(cells.n_cells, total, squares, mean, _spread(n, total, squares) / np.maximum(n * (n - 1), 1))


def _spread(n: NDArray[np.int64], total: NDArray[Any], squares: NDArray[np.float64]) -> NDArray[np.float64]:
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


def _clipped_sums(
    cells: _Cells, moments: _Moments, batches: list[int], clip: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(batches, genes) Σ min(x, clip) and Σ min(x, clip)², of some of the batches.

    Only counts beyond the clip, which are few, are added up: whole numbers, exact in any order.
    """
    most = np.iinfo(np.uint32).max
    thresholds = np.full((len(cells.names), len(cells.genes)), most, np.uint32)
    thresholds[batches] = np.minimum(np.floor(clip), most)
    n_over, over, squares_over = cells.sums(_add_beyond, cells.by_gene(thresholds, most), np.int64, 3)[:, batches]
    total = moments.total[batches] - over + n_over * clip
    return total, moments.squares[batches] - squares_over + n_over * clip**2


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


def _by_dispersion(cells: _Cells, flavor: Flavor, n_top_genes: int, *, whole: bool) -> pd.DataFrame:
    kernel = add_normalised if flavor == "seurat" else add_logarithms
    used = cells.by_gene(np.ones((len(cells.names), len(cells.genes)), np.uint8), 0)
    total, squares = cells.sums(kernel, used, np.float64, 2)
    frames = {}
    for b in np.flatnonzero(cells.n_cells > 1).tolist():
        expressed = (total[b] > 0) | whole
        of_batch = total[b, expressed], squares[b, expressed]
        frame = normalised_dispersion(cells.n_cells[b], *of_batch, flavor=flavor, n_top_genes=n_top_genes)
        if frame["dispersions_norm"].notna().any():
            frames[b] = expressed, frame
    cells.report_left_out(frames)
    if whole:
        frame = frames[0][1].set_index(pd.Index(cells.genes))
        return frame[["highly_variable", "means", "dispersions", "dispersions_norm"]]
    return merge_batches(list(frames.values()), cells.genes, n_top_genes)


@numba.njit(nogil=True, cache=True)
def _add_squares(indptr, indices, data, slots, _, sums):  # type: ignore[no-untyped-def]  # pragma: no cover
    for cell in range(len(slots)):
        slot = slots[cell]
        if slot >= 0:
            for j in range(indptr[cell], indptr[cell + 1]):
                count = np.int64(data[j])
                sums[slot, indices[j], 0] += count
                sums[slot, indices[j], 1] += count * count


@numba.njit(nogil=True, cache=True)
def _add_beyond(indptr, indices, data, slots, thresholds, sums):  # type: ignore[no-untyped-def]  # pragma: no cover
    for cell in range(len(slots)):
        slot = slots[cell]
        if slot >= 0:
            for j in range(indptr[cell], indptr[cell + 1]):
                if data[j] > thresholds[slot, indices[j]]:
                    count = np.int64(data[j])
                    sums[slot, indices[j], 0] += 1
                    sums[slot, indices[j], 1] += count
                    sums[slot, indices[j], 2] += count * count
