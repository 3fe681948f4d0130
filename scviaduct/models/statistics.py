"""Batch norm's statistics over the cells of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scviaduct.models.autograd import once_differentiable


def several_processes() -> bool:
    """Whether statistics have to be gathered."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def union(moments: Tensor, n: int) -> tuple[Tensor, int]:
    """(2, width) mean and variance of all processes' rows, and their number, from those of this process' n rows.

    Variance of a union: within plus between the parts (Chan et al., 1979), without cancellation.
    """
    mine = torch.cat([moments.new_tensor([float(n)]), moments.flatten()])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    ns, means, variances = torch.stack(parts).split([1, moments.shape[1], moments.shape[1]], dim=1)
    total = ns.sum()
    mean = (ns * means).sum(0) / total
    variance = (ns * (variances + (means - mean) ** 2)).sum(0) / total
    return torch.stack([mean, variance]), int(total)


class _Synchronised(torch.autograd.Function):
    """Batch normalisation over the union of all processes' cells, however many each holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, int]:
        own = torch.stack([x.mean(0), x.var(0, correction=0)]) if len(x) else x.new_zeros(2, x.shape[1])
        moments, ctx.total = union(own, len(x))
        scale = torch.rsqrt(moments[1] + eps)
        normalised = (x - moments[0]) * scale
        ctx.save_for_backward(normalised, weight, scale)
        ctx.mark_non_differentiable(moments)
        return torch.addcmul(bias, normalised, weight), moments, ctx.total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        normalised, weight, scale = ctx.saved_tensors
        local = torch.stack([grad.sum(0), (grad * normalised).sum(0)])
        both = local.clone()
        dist.all_reduce(both)
        both /= ctx.total
        return (grad - both[0] - normalised * both[1]) * (weight * scale), local[1], local[0], None


def normalised_over_processes(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, int]:
    """Batch-normalised (cells, width); the (2, width) mean and variance of all processes' cells; their number."""
    return _Synchronised.apply(x, weight, bias, eps)
