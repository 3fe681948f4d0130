"""The cells of a Batch on the model's device: sparse counts on CPUs, dense ones elsewhere.

On a CPU counts are never made dense: at 16 % density, 2,000 genes and 128 hidden units the sparse product below takes
0.28 ms for 128 cells on one thread where a dense one takes 0.65 ms, and its weight gradient 0.44 ms instead of 0.66 ms;
at 5 % it is 0.13 and 0.16 ms. Nor is there a buffer that backward could find overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numba
import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from scviaduct.errors import DataError
from scviaduct.models.autograd import once_differentiable
from scviaduct.models.likelihood_kernels import Nonzeros
from scviaduct.models.memory import empty
from scviaduct.models.vectormath import RELAXED, log, lost
from scviaduct.schema import MISSING, Batch, Schema

TRANSFORMS = ("log1p", "counts", "binary")
"""What an encoder may see of a count x > 0: log(1 + x), x, or 1."""

_TILE = 1 << 18  # numbers of the weight that are in the cache (1 MB) while all cells take their rows from them
_PARALLEL_FROM = 32  # cells: below this, waking threads costs more than it saves


def as_tensor(array: NDArray[Any], dtype: DTypeLike, device: torch.device) -> Tensor:
    """A numpy array on a device, without a copy where that is possible (torch needs memory it may write to)."""
    return torch.from_numpy(np.require(array, dtype, ["C", "W"])).to(device)


def use_threads(n_cells: int) -> int:
    """Let numba use as many threads as torch in this thread; returns into how many chunks to cut the cells."""
    wanted = torch.get_num_threads()
    threads = min(wanted, cast(Any, numba.config).NUMBA_NUM_THREADS)
    if n_cells < _PARALLEL_FROM or threads == 1:
        return 1
    numba.set_num_threads(threads)
    if torch.get_num_threads() != wanted:  # where both share one OpenMP, numba's first call sets it to all cores
        torch.set_num_threads(wanted)
    return threads


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=True)
def _sum_rows(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    values: NDArray[np.float32],
    table: NDArray[np.float32],
    out: NDArray[np.float32],
    tile: int,
    chunk: int | np.int64,
    chunks: int,
) -> None:
    """out[i] = sum_j values[j] * table[indices[j]], four rows of the table at a time, for one chunk of i.

    All i take their sorted indices from one tile of the table before the next, so that its rows are read into the cache once.
    """
    n, width = out.shape
    first, last = n * chunk // chunks, n * (chunk + 1) // chunks
    at = indptr[first:last].copy()
    for start in range(0, max(1, len(table)), tile):
        for i in range(first, last):
            o, j, stop = out[i], at[i - first], indptr[i + 1]
            if start == 0:
                o[:] = np.float32(0.0)
            end = j
            while end < stop and indices[end] < start + tile:
                end += 1
            at[i - first] = end
            while j + 4 <= end:
                t0, t1, t2, t3 = table[indices[j]], table[indices[j + 1]], table[indices[j + 2]], table[indices[j + 3]]
                v0, v1, v2, v3 = values[j], values[j + 1], values[j + 2], values[j + 3]
                for k in range(width):
                    o[k] += (v0 * t0[k] + v1 * t1[k]) + (v2 * t2[k] + v3 * t3[k])
                j += 4
            while j < end:
                t0, v0 = table[indices[j]], values[j]
                for k in range(width):
                    o[k] += v0 * t0[k]
                j += 1


@numba.njit(nogil=True, cache=True, parallel=True)
def _sum_rows_parallel(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    values: NDArray[np.float32],
    table: NDArray[np.float32],
    out: NDArray[np.float32],
    tile: int,
    chunks: int,
) -> None:
    for chunk in numba.prange(chunks):
        _sum_rows(indptr, indices, values, table, out, tile, np.int64(chunk), chunks)


def _product(indptr: NDArray, indices: NDArray, values: NDArray, table: Tensor, chunks: int) -> Tensor:
    """CSR values @ table."""
    out = empty(len(indptr) - 1, table.shape[1])
    rows = np.ascontiguousarray(table.detach().numpy())
    # The longer of table and output is the one to go through once.
    tile = max(1, _TILE // out.shape[1] if len(rows) > len(out) else len(rows))
    if chunks == 1:
        _sum_rows(indptr, indices, values, rows, out.numpy(), tile, 0, 1)
    else:
        _sum_rows_parallel(indptr, indices, values, rows, out.numpy(), tile, chunks)
    return out


@numba.njit(nogil=True, cache=True)
def _transposed(
    indptr: NDArray[np.int64], indices: NDArray[np.int32], values: NDArray[np.float32], n_columns: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """CSR to CSC by counting."""
    ends = np.zeros(n_columns + 1, np.int64)
    for j in range(indices.size):
        ends[indices[j] + 1] += 1
    ends = np.cumsum(ends)
    place = ends[:-1].copy()
    rows, moved = np.empty(indices.size, np.int32), np.empty(indices.size, np.float32)
    for i in range(indptr.size - 1):
        for j in range(indptr[i], indptr[i + 1]):
            p = place[indices[j]]
            rows[p], moved[p] = i, values[j]
            place[indices[j]] = p + 1
    return ends, rows, moved


@numba.njit(nogil=True, cache=True)
def _totals(indptr: NDArray[np.int64], values: NDArray[np.float32]) -> NDArray[np.float32]:
    out = np.zeros(indptr.size - 1, np.float32)
    for i in range(out.size):
        out[i] = values[indptr[i] : indptr[i + 1]].sum()
    return out


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _log1p(indptr: NDArray[np.int64], values: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """log(1 + value * the cell's scale)."""
    out = np.empty(values.size, np.float32)
    for i in range(scale.size):
        own, at = out[indptr[i] : indptr[i + 1]], values[indptr[i] : indptr[i + 1]]
        for j in range(own.size):
            x = at[j] * scale[i]
            u = np.float32(1.0) + x
            own[j] = log(u) + lost(x, u) / u
    return out


class _SparseProduct(torch.autograd.Function):
    """values @ weight; the gradient of the weight runs over the transposed values, gene by gene."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, counts: Counts, values: NDArray[np.float32]) -> Tensor:
        ctx.counts, ctx.values = counts, values
        x = counts.nonzeros
        return _product(x.indptr, x.genes, values, weight, use_threads(counts.n_cells))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        counts = ctx.counts
        x = counts.nonzeros
        indptr, cells, values = _transposed(x.indptr, x.genes, ctx.values, counts.n_genes)
        return _product(indptr, cells, values, grad.contiguous(), use_threads(counts.n_cells)), None, None


@dataclass(frozen=True, eq=False)
class Counts:
    """Raw counts of some cells over the model's genes."""

    nonzeros: Nonzeros
    n_cells: int
    n_genes: int
    device: torch.device

    @cached_property
    def log1p_values(self) -> NDArray[np.float32]:
        """(nnz,) log(1 + count)."""
        return torch.log1p(torch.from_numpy(self.nonzeros.counts).float()).numpy()

    @cached_property
    def total(self) -> Tensor:
        """(cells,) counts per cell."""
        if self.device.type != "cpu":
            return self.dense.sum(1)
        return torch.from_numpy(_totals(self.nonzeros.indptr, self.nonzeros.counts)).to(self.device)

    @cached_property
    def dense(self) -> Tensor:
        """(cells, genes) raw counts."""
        return self.scattered(self.nonzeros.counts)

    @cached_property
    def log1p_share_values(self) -> NDArray[np.float32]:
        """(nnz,) log(1 + count / (1 + the cell's mean count over all genes)): totalVI's encoder input."""
        scale = (1.0 / (1.0 + self.total.cpu() / self.n_genes)).numpy()
        return _log1p(self.nonzeros.indptr, self.nonzeros.counts.astype(np.float32, copy=False), scale)

    def values(self, transform: str) -> NDArray[np.float32]:
        """(nnz,) what one of TRANSFORMS makes of the counts."""
        if transform == "log1p":
            return self.log1p_values
        return self.nonzeros.counts if transform == "counts" else np.ones(len(self.nonzeros.counts), np.float32)

    def product(self, values: NDArray[np.float32], weight: Tensor) -> Tensor:
        """values @ weight for a (genes, width) weight, with one of `values` for each non-zero count."""
        if self.device.type == "cpu" and weight.dtype == torch.float32:
            return _SparseProduct.apply(weight, self, values)
        return self.scattered(values).to(weight.dtype) @ weight

    def scattered(self, values: NDArray[np.float32]) -> Tensor:
        """(cells, genes) with `values` at the non-zeros, made on the device."""
        indptr, genes, there = (
            torch.from_numpy(a).to(self.device, non_blocking=True)
            for a in (self.nonzeros.indptr, self.nonzeros.genes, values)
        )
        cells = torch.repeat_interleave(torch.arange(self.n_cells, device=self.device), indptr.diff())
        out = torch.zeros(self.n_cells, self.n_genes, device=self.device)
        out[cells, genes.long()] = there.to(out.dtype)  # stored types are widened here
        return out


@dataclass(frozen=True, eq=False)
class Cells:
    """A Batch as a model sees it."""

    counts: Counts
    codes: tuple[Tensor, ...]
    """One (cells,) tensor per covariate: batch first, then the further categorical ones."""
    labels: Tensor
    """(cells,) code in schema.labels, MISSING where unlabelled."""
    continuous: Tensor
    size_factor: Tensor
    proteins: Tensor
    """(cells, proteins) counts."""

    @classmethod
    def of(cls, batch: Batch, schema: Schema, device: torch.device) -> Cells:
        """Move a batch to a device. The CPU's kernels want float32 counts; others take the types as they come.

        Raises:
            DataError: the batch's genes or covariates are not as many as the schema's.
        """
        _check(batch, schema)
        cpu = device.type == "cpu"
        nonzeros = Nonzeros(
            np.require(batch.indptr, np.int64, ["C", "W"]),
            np.require(batch.indices, np.int32 if cpu else None, ["C", "W"]),
            np.require(batch.data, np.float32 if cpu else None, ["C", "W"]),
        )
        further = as_tensor(batch.categorical.T, np.int64, device)
        return cls(
            Counts(nonzeros, batch.n_cells, batch.n_genes, device),
            (as_tensor(batch.batch_index, np.int64, device), *further[: len(schema.categorical)]),
            as_tensor(batch.labels if batch.labels.size else np.full(batch.n_cells, MISSING), np.int64, device),
            as_tensor(batch.continuous, np.float32, device),
            as_tensor(batch.size_factor, np.float32, device),
            as_tensor(batch.proteins, np.float32, device),
        )

    def in_batch(self, code: int | Tensor | None) -> Cells:
        """The same cells as if they came from the batch with this code, or with a (cells,) code each; None: their own."""
        if code is None:
            return self
        codes = code if isinstance(code, Tensor) else torch.full_like(self.codes[0], code)
        return replace(self, codes=(codes, *self.codes[1:]))


def _check(batch: Batch, schema: Schema) -> None:
    """Shapes and gene indices, because the kernels trust them; counts were checked when the data were stored."""
    n = batch.n_cells
    wanted = {
        "genes": (batch.n_genes, len(schema.genes)),
        "non-zeros": (len(batch.data), int(batch.indptr[-1])),
        "gene indices": (len(batch.indices), int(batch.indptr[-1])),
        "batch codes": (len(batch.batch_index), n),
        "labels": (len(batch.labels), n if len(batch.labels) else 0),
        "categorical covariates": (batch.categorical.size, n * len(schema.categorical)),
        "continuous covariates": (batch.continuous.size, n * len(schema.continuous)),
        "size factors": (len(batch.size_factor), n if schema.size_factor else len(batch.size_factor)),
        "protein counts": (batch.proteins.size, n * len(schema.proteins)),
    }
    for what, (has, needs) in wanted.items():
        if has != needs:
            raise DataError(
                f"A batch of {n} cells has {has} {what}, the model needs {needs}; was it made with another schema?"
            )
    if batch.indptr[0] != 0 or (np.diff(batch.indptr.astype(np.int64)) < 0).any():
        raise DataError(f"A batch of {n} cells has an indptr that does not rise from 0; its counts are damaged")
    if batch.indices.size and not 0 <= int(batch.indices.min()) <= int(batch.indices.max()) < batch.n_genes:
        raise DataError(
            f"A batch of {n} cells has gene indices {batch.indices.min()} … {batch.indices.max()}, "
            f"but there are {batch.n_genes} genes; its counts are damaged"
        )
