"""Normalised dispersion of genes: the flavors "seurat" (Satija et al. 2015) and "cell_ranger" (Zheng et al. 2017).

Both are what scanpy gives after `normalize_total(target_sum=1e4)` over the genes in question and `log1p`: variance over
mean of each gene, standardised among genes of similar mean. One pass over the counts; no normalised matrix is made.
scanpy computes the normalised values in float32; here they are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

TARGET = 1e4
"""Counts of a cell after normalisation."""
_N_BINS = 20
"""Bins of the mean expression, scanpy's default."""


def normalised_dispersion(
    n_cells: int, total: NDArray[np.float64], squares: NDArray[np.float64], *, flavor: str, n_top_genes: int
) -> pd.DataFrame:
    """`means`, `dispersions`, `dispersions_norm` and `highly_variable` by gene, from one batch's sums.

    `total` and `squares` are (genes,) sums over its cells of the normalised values (of their logarithms for
    "cell_ranger") and of their squares. Ties at the last place are all highly variable, as in scanpy.
    """
    mean = total / n_cells
    variance = (squares - total * mean) / (n_cells - 1)
    mean[mean == 0] = 1e-12
    dispersion = variance / mean
    if flavor == "seurat":
        dispersion[dispersion == 0] = np.nan
        dispersion = np.log(dispersion)
        mean = np.log1p(mean)
    frame = pd.DataFrame({"means": mean, "dispersions": dispersion})
    centre, width = _of_bins(frame, flavor)
    normed = ((frame["dispersions"] - centre) / width).to_numpy()
    frame["dispersions_norm"] = normed
    finite = np.sort(normed[~np.isnan(normed)])[::-1]
    last = min(n_top_genes, len(finite))
    frame["highly_variable"] = np.nan_to_num(normed, nan=-np.inf) >= finite[last - 1] if last else False
    return frame


def _of_bins(frame: pd.DataFrame, flavor: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(genes,) centre and width of the dispersions in each gene's bin of mean expression."""
    bins: int | NDArray[np.float64] = _N_BINS
    if flavor == "cell_ranger":
        bins = np.r_[-np.inf, np.percentile(frame["means"], np.arange(10, 105, 5)), np.inf]
    # Genes of one mean, such as those never seen, can make edges equal: scanpy then raises.
    groups = frame["dispersions"].groupby(pd.cut(frame["means"], bins=bins, duplicates="drop"), observed=True)
    if flavor == "cell_ranger":
        centre, width = groups.transform("median"), groups.transform(_median_deviation)
    else:
        centre, width = groups.transform("mean"), groups.transform("std")
        alone = width.isna()  # the only gene of its bin: its normalised dispersion is 1
        centre, width = centre.mask(alone, 0), width.mask(alone, centre)
    return centre.to_numpy(), width.to_numpy()


def _median_deviation(values: pd.Series) -> float:
    return float(np.median(np.abs(values - values.median())) / norm.ppf(0.75))


def merge_batches(
    frames: Sequence[tuple[NDArray[np.bool_], pd.DataFrame]], genes: Sequence[str], n_top_genes: int
) -> pd.DataFrame:
    """Genes in the order of how many batches rank them among the first, then of their mean normalised dispersion.

    `frames` are, for each batch, which genes it expresses, and `normalised_dispersion` of those; the others count as 0
    there. Further ties are in the order of the genes' names. A gene whose dispersion is undefined in a batch has the
    mean of the other batches.
    """
    columns = ["means", "dispersions", "dispersions_norm"]
    total, defined = np.zeros((2, len(genes), len(columns)))
    n_batches = np.zeros(len(genes), np.int64)
    for expressed, frame in frames:
        values = np.zeros((len(genes), len(columns)))
        values[expressed] = frame[columns]
        total += np.nan_to_num(values, nan=0, posinf=np.inf, neginf=-np.inf)
        defined += ~np.isnan(values)
        n_batches[expressed] += frame["highly_variable"]
    merged = pd.DataFrame(total / np.where(defined, defined, np.nan), index=pd.Index(genes), columns=columns)
    merged["highly_variable_nbatches"] = n_batches
    merged["highly_variable_intersection"] = n_batches == len(frames)
    order = ["highly_variable_nbatches", "dispersions_norm"]
    first = merged.sort_index().sort_values(order, ascending=False, na_position="last").index[:n_top_genes]
    merged.insert(0, "highly_variable", merged.index.isin(first))
    return merged


@numba.njit(inline="always")
def _add(indptr, indices, data, slots, used, sums, logged):  # type: ignore[no-untyped-def]  # pragma: no cover
    # Most counts are small, and a logarithm takes longer than all the rest.
    few = np.empty(16)
    for cell in range(len(slots)):
        slot = slots[cell]
        if slot < 0:
            continue
        total = 0.0
        for j in range(indptr[cell], indptr[cell + 1]):
            if used[slot, indices[j]]:
                total += data[j]
        scale = TARGET / max(total, 1.0)
        for count in range(len(few)):
            few[count] = np.log1p(count * scale) if logged else count * scale
        for j in range(indptr[cell], indptr[cell + 1]):
            if used[slot, indices[j]]:
                large = data[j] >= len(few)
                value = data[j] * scale if large else few[data[j]]
                if large and logged:
                    value = np.log1p(value)
                sums[slot, indices[j], 0] += value
                sums[slot, indices[j], 1] += value * value


@numba.njit(nogil=True, cache=True)
def add_normalised(indptr, indices, data, slots, used, sums):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add each cell's normalised values and their squares to (groups, genes, 2) sums, over the genes that are used."""
    _add(indptr, indices, data, slots, used, sums, False)


@numba.njit(nogil=True, cache=True)
def add_logarithms(indptr, indices, data, slots, used, sums):  # type: ignore[no-untyped-def]  # pragma: no cover
    """As `add_normalised`, of log1p of the normalised values."""
    _add(indptr, indices, data, slots, used, sums, True)
