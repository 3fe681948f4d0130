"""Draws from and densities of the normals that a network gives as means and log variances side by side.

On CPUs each is one pass over memory with a hand-written gradient (gaussian_kernels), elsewhere torch's operations.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scviaduct.models import gaussian_kernels as kernels
from scviaduct.models.autograd import once_differentiable
from scviaduct.models.chunks import Kernel, chunks_of, run
from scviaduct.models.memory import empty


def draw_and_kl(parts: Tensor, noise: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A draw from N(mean, v) with v = exp(log_var) + eps, and KL(N(mean, v) || N(0, 1)).

    Args:
        parts: (..., 2 * latent) mean and log_var.
        noise: (..., latent) standard normal numbers.
        eps: the least variance.

    Returns:
        (..., latent) and (...).
    """
    if _by_kernel(parts):
        return _Draw.apply(parts, noise, eps)
    mean, log_var = parts.chunk(2, dim=-1)
    v = torch.exp(log_var) + eps
    return torch.addcmul(mean, torch.sqrt(v), noise), 0.5 * (v + mean**2 - 1.0 - torch.log(v)).sum(-1)


def log_density(parts: Tensor, z: Tensor, eps: float) -> Tensor:
    """(cells, labels) log N(z | mean, exp(log_var) + eps), summed over the latent dimensions.

    Args:
        parts: (cells, labels, 2 * latent) mean and log_var.
        z: (cells, latent), or (cells, labels, latent).
        eps: the least variance.
    """
    if _by_kernel(parts):
        return _LogDensity.apply(parts, z, eps)
    mean, log_var = parts.chunk(2, dim=-1)
    v = torch.exp(log_var) + eps
    point = z.unsqueeze(1) if z.dim() == 2 else z
    return -0.5 * ((point - mean) ** 2 / v + torch.log(v) + math.log(2.0 * math.pi)).sum(-1)


def _by_kernel(parts: Tensor) -> bool:
    return parts.device.type == "cpu" and parts.dtype == torch.float32


def _rows(t: Tensor) -> Any:
    """A tensor as the (rows, last) array that the kernels read."""
    return t.detach().reshape(-1, t.shape[-1]).contiguous().numpy()


_DRAW = kernels.draw, kernels.draw_parallel
_DRAW_BACK = kernels.draw_back, kernels.draw_back_parallel
_LOG_DENSITY = kernels.log_density, kernels.log_density_parallel
_LOG_DENSITY_BACK = kernels.log_density_back, kernels.log_density_back_parallel


def _run(kernel: Kernel, parts: Any, *arguments: Any) -> None:
    """Call a kernel on the rows of `parts`, cut into chunks by their number."""
    run(kernel, parts, *arguments, chunks_of(len(parts)))


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, noise: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        z, kl = torch.empty(noise.shape), torch.empty(noise.shape[:-1])
        _run(_DRAW, _rows(parts), _rows(noise), np.float32(eps), _rows(z), kl.numpy().reshape(-1))
        ctx.save_for_backward(parts, noise)
        ctx.eps = np.float32(eps)
        return z, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_z: Tensor, by_kl: Tensor) -> tuple[Tensor, None, None]:
        parts, noise = ctx.saved_tensors
        out = empty(*parts.shape)
        given = by_kl.contiguous().numpy().reshape(-1)
        _run(_DRAW_BACK, _rows(parts), _rows(noise), ctx.eps, _rows(by_z), given, _rows(out))
        return out, None, None


class _LogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, z: Tensor, eps: float) -> Tensor:
        out = torch.empty(parts.shape[:-1])
        _run(_LOG_DENSITY, _rows(parts), _rows(z), np.float32(eps), out.numpy().reshape(-1))
        ctx.save_for_backward(parts, z)
        ctx.eps = np.float32(eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        parts, z = ctx.saved_tensors
        dparts, dz = empty(*parts.shape), torch.empty(z.shape)
        given = grad.contiguous().numpy().reshape(-1)
        _run(_LOG_DENSITY_BACK, _rows(parts), _rows(z), ctx.eps, given, _rows(dparts), _rows(dz))
        return dparts, dz, None
