"""A hidden layer after its matrix product as one autograd node, on CPUs: see layer_kernels for what it computes.

Batch norm's statistics are those of all processes' rows; other devices and float64 use torch's operations (nets).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from scviaduct.models import layer_gradients as gradients
from scviaduct.models import layer_kernels as kernels
from scviaduct.models.autograd import once_differentiable
from scviaduct.models.chunks import chunks_of, run
from scviaduct.models.memory import empty
from scviaduct.models.noise import BITS, Kept
from scviaduct.models.statistics import several_processes, union

if TYPE_CHECKING:
    from scviaduct.models.nets import BatchNorm

_MOMENTS = kernels.moments, kernels.moments_parallel
_FORWARD = kernels.forward, kernels.forward_parallel
_SUMS = gradients.sums, gradients.sums_parallel
_BACKWARD = gradients.backward, gradients.backward_parallel


class Values(NamedTuple):
    """A layer's values before its norm: (rows of h, each as often as codes says) + added[codes]."""

    h: Tensor
    """(rows, width), or fewer rows where several in a row have the same."""
    added: Tensor
    """(categories, width)."""
    codes: Tensor
    """(rows,)."""

    @property
    def fusable(self) -> bool:
        """Whether the kernels can take them: pairs of units share their random bits."""
        return self.h.device.type == "cpu" and self.h.dtype == torch.float32 and self.h.shape[1] % 2 == 0

    def dense(self) -> Tensor:
        """(rows, width) by torch's operations."""
        h = self.h
        if len(h) != len(self.codes):
            h = h.repeat_interleave(len(self.codes) // len(h), 0)
        return h + (self.added if len(self.added) == 1 else F.embedding(self.codes, self.added))


class _Step(NamedTuple):
    """How a layer goes on from its values."""

    source: kernels.Source
    kind: int
    moments: NDArray[np.float32]
    """(2, width) mean and variance per unit, for a norm by column."""
    rows: int
    """Of how many rows these are the moments, so that gradients pass through them; 0 for running statistics."""
    eps: float
    slope: float
    kept: Kept | None


class _Layer(torch.autograd.Function):
    """Norm, activation and dropout of `Values`."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, added: Tensor, codes: Tensor, weight: Tensor | None, bias: Tensor | None, step: _Step
    ) -> Tensor:
        rows, width = codes.shape[0], h.shape[1]
        dropout, out = _dropout(step.kept), empty(rows, width)
        ctx.norm, ctx.rows, ctx.kept = _norm(step, weight, bias), step.rows, dropout.kept
        run(_FORWARD, step.source, ctx.norm, dropout, out.numpy(), chunks_of(rows))
        ctx.save_for_backward(h, added, codes, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, added, codes, out = ctx.saved_tensors
        source, chunks, width = _source(h, added, codes), chunks_of(codes.shape[0]), h.shape[1]
        sums, pull = np.zeros((2, 2, width), np.float32)
        dh, dadded = empty(*h.shape), empty(added.shape[0] * ctx.needs_input_grad[1], width)
        parts = np.empty((chunks, *added.shape), np.float32)
        back = gradients.Back(grad.contiguous().numpy(), out.numpy(), sums, pull, parts, dh.numpy(), dadded.numpy())
        by_norm = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        if ctx.rows or by_norm or gradients.put_together_by_sums(source, ctx.norm):
            run(_SUMS, source, ctx.norm, ctx.kept, back, ctx.rows, chunks)
            if ctx.rows and several_processes():
                dist.all_reduce(torch.from_numpy(pull))
        run(_BACKWARD, source, ctx.norm, ctx.kept, back, chunks)
        dweight = torch.from_numpy(sums[1] / np.sqrt(ctx.norm.variance + ctx.norm.eps)) if by_norm else None
        dbias = torch.from_numpy(sums[0]) if by_norm else None
        return dh, dadded if dadded.shape[0] else None, None, dweight, dbias, None


def normalised_and_rectified(
    values: Values, batch_norm: BatchNorm | None, *, layer_norm: bool, negative_slope: float, kept: Kept | None
) -> Tensor:
    """(rows, width) dropout(activation(norm(values))); batch norm's running statistics move as in torch.

    Raises:
        IndexError: a code has no row.
        ValueError: batch norm over one row, which has no variance.
    """
    source = _source(*values)
    kernels.require_codes(source.codes, source.added.shape[0], "categories")
    if batch_norm is None:
        kind = kernels.BY_ROW if layer_norm else kernels.AS_IT_IS
        step = _Step(source, kind, np.zeros((2, values.h.shape[1]), np.float32), 0, 1.0, negative_slope, kept)
        return _Layer.apply(*values, None, None, step)
    if batch_norm.training and not batch_norm.frozen:
        moments, rows = _moments(source)
        batch_norm.observe(torch.from_numpy(moments), rows)
    else:
        moments, rows = np.stack([batch_norm.running_mean.numpy(), batch_norm.running_var.numpy()]), 0
    step = _Step(source, kernels.BY_COLUMN, moments, rows, batch_norm.eps, negative_slope, kept)
    return _Layer.apply(*values, batch_norm.weight, batch_norm.bias, step)


def _moments(source: kernels.Source) -> tuple[NDArray[np.float32], int]:
    """(2, width) mean and variance of the rows of all processes, and how many they are."""
    rows, moments = source.codes.size, np.empty((2, source.h.shape[1]), np.float32)
    run(_MOMENTS, source, *moments, chunks_of(rows))
    if several_processes():
        together, rows = union(torch.from_numpy(moments), rows)
        moments = together.numpy()
    if rows < 2:
        raise ValueError("Batch norm needs more than one cell; give the batch more cells, or use layer norm")
    return moments, rows


def _source(h: Tensor, added: Tensor, codes: Tensor) -> kernels.Source:
    spread = codes.shape[0] // max(1, h.shape[0])
    return kernels.Source(h.detach().contiguous().numpy(), added.detach().contiguous().numpy(), codes.numpy(), spread)


def _norm(step: _Step, weight: Tensor | None, bias: Tensor | None) -> kernels.Norm:
    """The norm's numbers per unit; without a weight they are not read, but for the shift."""
    mean, variance = step.moments
    w, b = (mean if t is None else t.detach().numpy() for t in (weight, bias))
    return kernels.Norm(
        step.kind, mean, variance, np.empty_like(mean), w, b, np.float32(step.eps), np.float32(step.slope)
    )


def _dropout(kept: Kept | None) -> kernels.Dropout:
    """`u >= p` on the integers that u is made of: (k + 1/2) / 2**bits >= p."""
    if kept is None:
        return kernels.Dropout(np.zeros(0, np.uint64), 0, 1, np.uint64(0), np.float32(1.0))
    least = np.uint64(max(0, math.ceil(float(np.float32(kept.p)) * 2.0**BITS - 0.5)))
    return kernels.Dropout(kept.seeds, kept.draw, kept.labels, least, np.float32(1.0 / (1.0 - kept.p)))
