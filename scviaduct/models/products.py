"""Large matrix products, and those with a last layer of many thousand outputs, by oneDNN where torch has it.

torch.mm is MKL's. On AMD's CPUs it took 1.2 to 1.3 times as long for these shapes (128 cells, 223 units, 1,024 of 50,000
outputs at a time, one thread of an EPYC of 2022: 40, 48 and 41 ms for output, weight gradient and input gradient of all
outputs, oneDNN 35, 38 and 34), and its last bits depend on the number of threads more often.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scviaduct.models.autograd import once_differentiable
from scviaduct.models.memory import empty

WIDE = 1 << 14
"""Outputs from which on a layer is worth `wide_linear`."""

LARGE, LARGE_BY_ROW = 1 << 25, 1 << 22
"""Multiplications from which on a product is worth `large_linear`, and those of one with `MANY` rows: below, its Python
costs what oneDNN saves. In a step the arrays come from outside the nearest cache, and a product of many rows, which writes
as much as it reads, gains most: of 2,032 rows 665 us against 930 with 128 inputs and outputs, 205 against 290 with 30
inputs."""

MANY = 1 << 10

_SMALL = 1 << 15  # numbers of a weight
_BLOCK = 4096  # outputs whose gradient is turned around at a time, in the cache

# The operator that torch.compile emits for a Linear; there is no other name for it.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def times_transposed(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """X w^T (+ bias) of float32 matrices on a CPU; not differentiable."""
    if _ONEDNN is None or x.numel() == 0 or w.numel() == 0:
        y = torch.mm(x, w.T).to(x.dtype)  # torch.autocast would make it bfloat16
        return y if bias is None else y + bias
    return _ONEDNN(x, w, bias, "none", [], "")


def back(slopes: Tensor, x_t: Tensor, rows: Tensor, by_x: Tensor | None, by_rows: Tensor | None) -> None:
    """The way back through `x rows^T`, given its gradient: add to that of x, fill that of the rows; None: not wanted."""
    if by_rows is not None:
        by_rows.copy_(times_transposed(slopes.T, x_t))
    if by_x is not None:
        by_x.add_(times_transposed(slopes, rows.T))


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return times_transposed(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (wants_x, wants_weight, wants_bias) = ctx.saved_tensors, ctx.needs_input_grad
        by_x = torch.zeros_like(x) if wants_x else None
        by_weight = empty(*weight.shape) if wants_weight else None
        x_t = x.T.contiguous()
        for start in range(0, len(weight), _BLOCK):
            at = slice(start, start + _BLOCK)
            back(grad[:, at], x_t, weight[at], by_x, None if by_weight is None else by_weight[at])
        return by_x, by_weight, grad.sum(0) if wants_bias else None


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` of float32 matrices on a CPU, differentiable."""
    y: Tensor = _WideLinear.apply(x, weight, bias)
    return y


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether `x weight^T` is worth `large_linear`."""
    rows = x.shape[0]
    return rows * weight.numel() >= (LARGE_BY_ROW if rows >= MANY else LARGE)


class _LargeLinear(_WideLinear):
    """Output and input gradient by oneDNN, the weight's gradient by MKL, each where it is the faster one."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (wants_x, wants_weight, wants_bias) = ctx.saved_tensors, ctx.needs_input_grad
        by_x = times_transposed(grad, weight.T) if wants_x else None
        by_weight = None
        if wants_weight:  # MKL wants the longer side last; the transposed result is copied, so it must be small
            turned = len(weight) > weight.shape[1] and weight.numel() <= _SMALL
            by_weight = torch.mm(x.T, grad).T if turned else torch.mm(grad.T, x)
        return by_x, by_weight, grad.sum(0) if wants_bias else None


def large_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` of float32 matrices on a CPU, differentiable."""
    y: Tensor = _LargeLinear.apply(x, weight, bias)
    return y
