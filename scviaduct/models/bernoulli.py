"""-log p(observed | z) of accessible regions: the decoder's last layer and PeakVI's likelihood, with hand-written gradients.

Region g of a cell is seen with probability q = p d f, where p = sigmoid(logit_g), d = sigmoid(depth), f = sigmoid(region_g).
With u = 1 + exp(-|logit|) and c = (1 - d) + d (1 - f) = 1 - d f, all of them sums of positive numbers,

    p = up / u,   1 - p = down / u,   1 - q = (down + up c) / u,

so nothing cancels however large the logits. With a = q dL/dq, which is -1 where the region was seen and q / (1 - q) elsewhere,
the gradients are a (1 - p) for the logit, the sum of a (1 - d) over regions for the depth, and of a (1 - f) over cells for
the region. Limits are those of torch's BCELoss, which PeakVI uses: a term is at most 100, and dL/dq is divided by at
least 1e-12.

On CPUs no (cells, regions) array exists. Some thousand regions at a time, the layer's output is computed, the kernel replaces
it by its gradients, and these become gradients of the hidden units and of the weight while they are in the cache. Other
devices and float64 use torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from scviaduct.errors import DataError
from scviaduct.models.autograd import graph_is_kept, once_differentiable
from scviaduct.models.counts import Counts, use_threads
from scviaduct.models.likelihood_kernels import Nonzeros
from scviaduct.models.likelihoods import Reconstruction, over_cells
from scviaduct.models.memory import empty
from scviaduct.models.nets import linear
from scviaduct.models.products import back, times_transposed
from scviaduct.models.vectormath import RELAXED, exp, log

Row = NDArray[np.float32]
_f = np.float32
_ZERO, _ONE = _f(0.0), _f(1.0)
_MOST, _FLOOR = 100.0, 1e-12  # torch's BCELoss: -log is at most 100, q (1 - q) at least 1e-12 in the gradient
_CAP, _SCALE = _f(_MOST), _f(1.0 / _FLOOR)
_TILE = 512  # regions: a thread's share; the seven rows of a tile are 14 KB and stay in the first cache
_BLOCK = 8 * _TILE  # regions whose logits exist at a time; not a matter of threads, on which sums must not depend
_BIAS, _YES, _NO, _COST, _SEEN, _BY_BIAS, _BY_REGION = range(0, 7 * _TILE, _TILE)


class Factors(NamedTuple):
    """What scales the decoder's probabilities; a factor that a model lacks is 1."""

    depth: Tensor | None
    """(cells,) logit of each cell's depth."""
    region: Tensor | None
    """(regions,) logit of each region's factor."""


class _Terms(NamedTuple):
    """Probabilities of the factors: of it, of its complement, and -log of it."""

    yes: Row
    no: Row
    cost: Row


class _Out(NamedTuple):
    loss: Row  # (tiles, cells)
    depth: Row  # (tiles, cells) gradient
    bias: Row  # (regions,) gradient
    region: Row  # (regions,) gradient


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy", fastmath=RELAXED)
def _row(logits: Row, w: Row, d: tuple, weight: np.float32) -> tuple[np.float32, np.float32]:
    """One cell in one tile, `w` as in `_tiles`: loss and gradient of the depth; logits become their gradients."""
    loss, by_depth = _ZERO, _ZERO
    d_yes, d_no, d_cost = d
    for g in range(logits.size):
        logit = logits[g] + w[_BIAS + g]
        e = exp(-abs(logit))
        u = _ONE + e
        up, down = (_ONE, e) if logit > _ZERO else (e, _ONE)
        rest = down + up * (d_no + d_yes * w[_NO + g])
        q = up * (d_yes * w[_YES + g])
        inverse = _ONE / u
        floor = min(_ONE, q * rest * inverse * inverse * _SCALE)
        one = w[_SEEN + g] > _ZERO
        cost = d_cost + w[_COST + g] - min(logit, _ZERO) if one else _ZERO
        loss += min(cost + log(u / (_ONE if one else rest)), _CAP)
        a = weight * floor * (-_ONE if one else q / rest)
        by_depth += a * d_no
        w[_BY_REGION + g] += a * w[_NO + g]
        slope = a * down * inverse
        w[_BY_BIAS + g] += slope
        logits[g] = slope
    return loss, by_depth


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _mark(genes: NDArray[np.int32], counts: Row, lo: int, hi: int, w: Row) -> int:
    """Write a cell's counts of the regions lo … hi to `w`; returns how many."""
    found = 0
    for j in range(np.searchsorted(genes, lo), np.searchsorted(genes, hi)):
        if lo <= genes[j] < hi:
            w[_SEEN + genes[j] - lo] = counts[j]
            found += 1
    return found


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _tiles(
    x: Nonzeros,
    start: int,
    logits: Row,
    bias: Row,
    f: _Terms,
    d: _Terms,
    weight: np.float32,
    out: _Out,
    first: int,
    last: int,
) -> int:
    """Fill `out` for some tiles, the logits of which begin with region `start`; returns how many non-zeros are in them.

    All of a tile's rows are in one array at constant distances: LLVM gives up on proving that seven arrays do not overlap.
    """
    n, width = logits.shape[0], bias.size
    w, found = np.empty(7 * _TILE, np.float32), 0
    for tile in range(first, last):
        lo, hi = tile * _TILE, min(width, (tile + 1) * _TILE)
        size = hi - lo
        w[:] = _ZERO
        w[_BIAS : _BIAS + size] = bias[lo:hi]
        w[_YES : _YES + size], w[_NO : _NO + size], w[_COST : _COST + size] = f.yes[lo:hi], f.no[lo:hi], f.cost[lo:hi]
        for i in range(n):
            genes, counts = x.genes[x.indptr[i] : x.indptr[i + 1]], x.counts[x.indptr[i] : x.indptr[i + 1]]
            found += _mark(genes, counts, lo, hi, w)
            out.loss[tile, i], out.depth[tile, i] = _row(
                logits[i, lo - start : hi - start], w, (d.yes[i], d.no[i], d.cost[i]), weight
            )
            w[_SEEN : _SEEN + size] = _ZERO
        out.bias[lo:hi], out.region[lo:hi] = w[_BY_BIAS : _BY_BIAS + size], w[_BY_REGION : _BY_REGION + size]
    return found


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _one_thread(
    x: Nonzeros, start: int, logits: Row, bias: Row, f: _Terms, d: _Terms, weight: np.float32, out: _Out
) -> int:
    first = start // _TILE
    return _tiles(x, start, logits, bias, f, d, weight, out, first, first - (-logits.shape[1] // _TILE))


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def _threads(
    x: Nonzeros, start: int, logits: Row, bias: Row, f: _Terms, d: _Terms, weight: np.float32, out: _Out, chunks: int
) -> int:
    first, tiles, found = start // _TILE, -(-logits.shape[1] // _TILE), 0
    for chunk in numba.prange(chunks):
        begin, end = first + tiles * chunk // chunks, first + tiles * (chunk + 1) // chunks
        found += _tiles(x, start, logits, bias, f, d, weight, out, begin, end)
    return found


def _terms(logits: Tensor | None, size: int) -> _Terms:
    """Sigmoid of a factor's logits, of their negative, and -log sigmoid; 1, 0 and 0 without it."""
    if logits is None:
        return _Terms(np.ones(size, _f), np.zeros(size, _f), np.zeros(size, _f))
    t = logits.detach()
    return _Terms(*(a.contiguous().numpy() for a in (torch.sigmoid(t), torch.sigmoid(-t), F.softplus(-t))))


class _Layer(NamedTuple):
    """The decoder's last layer and its gradients, by its input and by its weight, where they are wanted."""

    h: Tensor
    weight: Tensor
    by_h: Tensor | None
    by_weight: Tensor | None


def _blocks(layer: _Layer, fill: Callable[[int, Tensor], int]) -> int:
    """Compute the logits block by block, have `fill` turn them into their gradients, and use these; returns its sum."""
    units, found = layer.h.T.contiguous(), 0
    for start in range(0, len(layer.weight), _BLOCK):
        rows = layer.weight[start : start + _BLOCK]
        slopes = times_transposed(layer.h, rows)
        found += fill(start, slopes)
        back(
            slopes,
            units,
            rows,
            layer.by_h,
            None if layer.by_weight is None else layer.by_weight[start : start + _BLOCK],
        )
    return found


class _Fused(torch.autograd.Function):
    """The layer, the loss and all gradients at once; backward only scales them, and gives them away if it is the last."""

    @staticmethod
    def forward(
        ctx: Any, counts: Counts, trains: bool, h: Tensor, weight: Tensor, bias: Tensor, depth: Tensor | None,  # noqa: FBT001
        region: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        n, width = counts.n_cells, counts.n_genes
        _, _, wants_h, wants_weight, *_ = ctx.needs_input_grad
        by_h = torch.zeros_like(h) if trains and wants_h else None
        layer = _Layer(h, weight, by_h, empty(*weight.shape) if trains and wants_weight else None)
        tiles = -(-width // _TILE)
        out = [torch.empty(tiles, n), torch.empty(tiles, n), torch.empty(width), torch.empty(width)]
        chunks = use_threads(n)
        arguments = (
            bias.detach().numpy(), _terms(region, width), _terms(depth, n), _f(1.0 / max(1, n)),
            _Out(*(t.numpy() for t in out)),
        )  # fmt: skip

        def fill(start: int, logits: Tensor) -> int:
            if chunks == 1:
                return int(_one_thread(counts.nonzeros, start, logits.numpy(), *arguments))
            return int(_threads(counts.nonzeros, start, logits.numpy(), *arguments, chunks))

        if _blocks(layer, fill) != len(counts.nonzeros.genes):
            raise DataError("A batch has cells whose regions are not in increasing order; sort each cell's indices")
        loss, by_depth, by_bias, by_region = out[0].sum(0), out[1].sum(0), out[2], out[3]
        ctx.gradients = [by_h, layer.by_weight, by_bias, by_depth, by_region]
        ctx.save_for_backward(h)
        ctx.mark_non_differentiable(loss)
        return over_cells(loss), loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018 (raises if the graph is gone)
        if graph_is_kept():
            gradients = [None if g is None else g * grad for g in ctx.gradients]
        else:
            gradients, ctx.gradients = ctx.gradients, None  # the optimiser's without a copy: nobody else holds them
            if float(grad) != 1.0:
                gradients = [None if g is None else g.mul_(grad) for g in gradients]
        wanted = ctx.needs_input_grad[2:]
        return (None, None, *(g if wants else None for g, wants in zip(gradients, wanted, strict=True)))


def bernoulli(counts: Counts, h: Tensor, weight: Tensor, bias: Tensor, factors: Factors) -> Reconstruction:
    """-log p(counts > 0), summed over regions, where the regions' logits are h weight^T + bias.

    Args:
        counts: the cells; regions increase within a cell.
        h: (cells, hidden) output of the decoder's hidden layers.
        weight: (regions, hidden).
        bias: (regions,).
        factors: what scales the probabilities.

    Raises:
        ValueError: a tensor has not the shape that the counts ask for.
        DataError: a cell's regions do not increase.
    """
    n, width = counts.n_cells, counts.n_genes
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "h": (h, (n, weight.shape[1])),
        "weight": (weight, (width, h.shape[1])),
        "bias": (bias, (width,)),
    }
    wanted |= {"depth": (factors.depth, (n,)), "region": (factors.region, (width,))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    if h.device.type == "cpu" and h.dtype == torch.float32:
        mean, loss = _Fused.apply(
            counts, torch.is_grad_enabled(), h.contiguous(), weight.contiguous(), bias.contiguous(), *factors
        )
    else:
        loss = negative_log_likelihood(counts.dense > 0, linear(h, weight, bias), factors).sum(1)
        mean = over_cells(loss)
    return Reconstruction(mean, loss.detach())


def negative_log_likelihood(seen: Tensor, logits: Tensor, factors: Factors) -> Tensor:
    """(cells, regions) -log p by differentiable torch operations, on any device."""
    none = torch.full((1, 1), torch.inf, dtype=logits.dtype, device=logits.device)
    depth = none if factors.depth is None else factors.depth.unsqueeze(1)
    region = none if factors.region is None else factors.region.unsqueeze(0)
    log_q = F.logsigmoid(logits) + F.logsigmoid(depth) + F.logsigmoid(region)
    with torch.no_grad():
        q = torch.exp(log_q)
        hidden = torch.sigmoid(-depth) + torch.sigmoid(depth) * torch.sigmoid(-region)
        rest = torch.sigmoid(-logits) + torch.sigmoid(logits) * hidden
        loss = torch.where(seen, -log_q, -torch.log(rest)).clamp(max=_MOST)
        a = q * torch.where(seen, -rest, q) / (q * rest).clamp(min=_FLOOR)
    return loss + a * (log_q - log_q.detach())
