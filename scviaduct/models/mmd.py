"""Maximum mean discrepancy between the conditions of a batch, summed over pairs of conditions (trVAE's regulariser).

For conditions i and j with n_i and n_j cells, MMD(i, j) = mean k(x_i, x_i) + mean k(x_j, x_j) - 2 mean k(x_i, x_j), with a
cell's pair with itself included, and k(a, b) = sum_r exp(-r |a - b|^2) over 19 bandwidths 1 / (2 r) from 1e-6 to 1e6. A sum
of MMDs over pairs of conditions is a weighted sum over pairs of cells,

    sum_ab w[c_a, c_b] k(x_a, x_b),   w[i, i] = (pairs that i is in) / n_i^2,   w[i, j] = -1 / (n_i n_j),

so every kernel is computed once, however many conditions there are. The gradient is made in the same pass.

A batch that is spread over processes is compared as a whole (docs/decisions/0018): each process receives the other
processes' cells, and computes the rows a of the sum that are its own.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from scviaduct.models.autograd import once_differentiable
from scviaduct.models.counts import use_threads
from scviaduct.models.vectormath import RELAXED, exp

_ALPHAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 1e2, 1e3, 1e4, 1e5, 1e6)
_RATES = np.array([0.5 / alpha for alpha in _ALPHAS], np.float32)
_ELEMENTS_AT_ONCE = 2**25  # of the torch path's largest intermediate: 128 MiB in float32

Row = NDArray[np.float32]


def mmd(x: Tensor, conditions: Tensor, boundary: int | None = None) -> Tensor:
    """Sum of the MMDs of all pairs of conditions in the global batch, as a scalar.

    With several processes it is this process's share, scaled so that the mean over processes weighted by their cells,
    which is how losses are averaged here, is the sum; the same holds for the gradient by the processes' own cells.

    Args:
        x: (cells, width) float32 or float64.
        conditions: (cells,) int64 codes.
        boundary: None compares all conditions with a cell in the batch; otherwise those with a code below it are compared
            with those from it on, conditions with fewer than two cells left out.
    """
    return _Mmd.apply(x, conditions, boundary)


class _Mmd(torch.autograd.Function):
    """The pass that makes the value makes the gradient too; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, conditions: Tensor, boundary: int | None) -> Tensor:
        own = x if x.dtype == torch.float64 else x.float()
        everyone, codes, start = _gathered(own, conditions)
        present, codes, cells = torch.unique(codes, return_inverse=True, return_counts=True)
        table = pair_weights(present, cells.to(own), boundary)
        rows = slice(start, start + len(own))
        compute = _by_kernel if own.dtype == torch.float32 and own.device.type == "cpu" else _by_torch
        value, gradient = compute(everyone, codes, table, rows)
        share = len(everyone) / max(1, len(own))
        ctx.save_for_backward((gradient * share).to(x.dtype))
        return (value * share).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None


def pair_weights(present: Tensor, cells: Tensor, boundary: int | None) -> Tensor:
    """(present, present) weight w[i, j] of a pair of cells by their conditions.

    Args:
        present: (present,) codes of the conditions in the batch.
        cells: (present,) cells of each.
        boundary: as for `mmd`.
    """
    if boundary is None:
        compared = ~torch.eye(len(present), dtype=torch.bool, device=present.device)
    else:
        low, enough = present < boundary, cells >= 2
        compared = (low[:, None] != low) & enough[:, None] & enough
    share = 1.0 / cells
    return torch.diag(compared.sum(1) * share**2) - compared * torch.outer(share, share)


def _gathered(x: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor, int]:
    """The cells and conditions of all processes in rank order, and where this process's begin."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x, conditions, 0
    sizes = [conditions.new_zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, conditions.new_tensor([len(x)]))
    counts = [int(n) for n in sizes]
    mine = x.new_zeros(max(counts), x.shape[1] + 1)
    mine[: len(x)] = torch.cat([x, conditions.unsqueeze(1).to(x)], 1)  # codes are exact in float32 up to 2**24
    parts = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(parts, mine)
    both = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
    return both[:, :-1].contiguous(), both[:, -1].long(), sum(counts[: dist.get_rank()])


def _by_torch(everyone: Tensor, codes: Tensor, table: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Value and (own cells, width) gradient of the own rows by torch operations, for any device and type."""
    rates = everyone.new_tensor([0.5 / alpha for alpha in _ALPHAS])
    value, gradients = everyone.new_zeros(()), []
    at_once = max(1, _ELEMENTS_AT_ONCE // (len(everyone) * (len(rates) + everyone.shape[1])))
    for own, condition in zip(everyone[rows].split(at_once), codes[rows].split(at_once), strict=True):
        difference = own.unsqueeze(1) - everyone
        kernels = torch.exp(-(difference**2).sum(2, keepdim=True) * rates)
        weights = table[condition][:, codes]
        value += (weights * kernels.sum(2)).sum()
        slopes = -4.0 * weights * (kernels @ rates)  # twice for (a, b) and (b, a), twice for the square
        gradients.append((slopes.unsqueeze(1) @ difference).squeeze(1))
    return value, torch.cat(gradients)


def _by_kernel(everyone: Tensor, codes: Tensor, table: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """As `_by_torch`, on a CPU: at 128 cells and 10 dimensions 0.9 ms instead of 3.8 (pair by pair of 10 conditions: 360)."""
    n = rows.stop - rows.start
    values, gradient = np.empty(n), torch.empty(n, everyone.shape[1])
    chunks = use_threads(n)
    arrays = (everyone.t().contiguous().numpy(), codes.numpy(), table.numpy(), rows.start, values, gradient.numpy())
    if chunks == 1:
        _chunk_of_rows(*arrays, 0, 1)
    else:
        _all_rows(*arrays, chunks)
    return torch.tensor(values.sum(), dtype=torch.float32), gradient


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _kernels(x: Row, a: int | np.int64, squares: Row, kernel: Row, slope: Row) -> None:
    """Of cell a with each cell b: squared distance, sum of the kernels, and minus its derivative by that distance."""
    squares[:], kernel[:], slope[:] = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for k in range(x.shape[0]):
        row = x[k]
        for b in range(squares.size):
            difference = row[a] - row[b]
            squares[b] += difference * difference
    for r in range(_RATES.size):
        rate = _RATES[r]
        for b in range(squares.size):
            e = exp(-rate * squares[b])
            kernel[b] += e
            slope[b] += rate * e


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _chunk_of_rows(
    x: Row,
    codes: NDArray[np.int64],
    table: Row,
    start: int,
    values: NDArray[np.float64],
    gradient: Row,
    chunk: int | np.int64,
    chunks: int,
) -> None:
    """Fill values and gradients of one of `chunks` equal parts of the own rows; x is (width, all cells)."""
    work = np.empty((3, x.shape[1]), np.float32)
    squares, kernel, slope = work[0], work[1], work[2]
    n = values.size
    for i in range(n * chunk // chunks, n * (chunk + 1) // chunks):
        a = start + i
        _kernels(x, a, squares, kernel, slope)
        weights, value = table[codes[a]], 0.0
        for b in range(kernel.size):
            weight = weights[codes[b]]
            value += float(weight) * float(kernel[b])
            slope[b] *= np.float32(-4.0) * weight
        values[i] = value
        for k in range(x.shape[0]):
            row, total = x[k], np.float32(0.0)
            for b in range(slope.size):  # differences, not products: the narrowest kernel's slope is 5e5
                total += slope[b] * (row[a] - row[b])
            gradient[i, k] = total


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def _all_rows(
    x: Row, codes: NDArray[np.int64], table: Row, start: int, values: NDArray[np.float64], gradient: Row, chunks: int
) -> None:
    for chunk in numba.prange(chunks):
        _chunk_of_rows(x, codes, table, start, values, gradient, np.int64(chunk), chunks)
