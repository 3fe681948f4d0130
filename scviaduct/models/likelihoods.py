"""-log p(x | decoder) of counts, with hand-written gradients on CPUs.

One autograd node takes the decoder's logits to the loss, so that softmax, rate and likelihood are one pass over memory:
see likelihood_kernels for the formulas. Other devices and float64 use plain torch operations of the same formulas.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scviaduct.models import likelihood_kernels as kernels
from scviaduct.models.autograd import graph_is_kept, once_differentiable
from scviaduct.models.counts import Counts, use_threads

KINDS = {"nb": kernels.NB, "zinb": kernels.ZINB, "poisson": kernels.POISSON, "normal": kernels.NORMAL}
"""Names of the likelihoods, as scvi-tools' `gene_likelihood`."""

_EPS = 1e-8
_THETA_RANGE = (1e-30, 1e30)  # float32 without 0 and infinity


class Decoded(NamedTuple):
    """What a decoder says of some cells."""

    logits: Tensor
    """(cells, genes) whose softmax (or softplus) is the scale."""
    library: Tensor
    """(cells,) log size: the rate is exp(library) * scale."""
    px_r: Tensor | None = None
    """(genes,) or (cells, genes) log inverse dispersion; the log standard deviation of a Normal; None for Poisson."""
    zi_logits: Tensor | None = None
    """(cells, genes) logit of an extra zero, ZINB only."""
    softplus: bool = False
    """Softplus instead of softmax: used with an explicit size factor."""

    @property
    def scale(self) -> Tensor:
        """(cells, genes) expected share (softmax) or normalised expression (softplus) of each gene."""
        return F.softplus(self.logits) if self.softplus else torch.softmax(self.logits, 1)

    @property
    def rate(self) -> Tensor:
        """(cells, genes) expected counts."""
        return torch.exp(self.library).unsqueeze(1) * self.scale

    def scaled(self, library_size: float | None) -> Tensor:
        """(cells, genes) expected counts of cells of this size; None for their own."""
        return self.rate if library_size is None else self.scale * library_size

    @property
    def theta(self) -> Tensor | None:
        """exp(px_r): the inverse dispersion."""
        return None if self.px_r is None else torch.exp(self.px_r).clamp(*_THETA_RANGE)


class Reconstruction(NamedTuple):
    """-log p(x | decoder)."""

    mean: Tensor
    """Mean over the cells, to differentiate."""
    per_cell: Tensor
    """(cells,), detached."""

    @property
    def total(self) -> Tensor:
        """Sum over the cells, detached."""
        return self.per_cell.sum()


def over_cells(values: Tensor) -> Tensor:
    """The mean of (cells,) values; 0 over no cells, which a worker may hold of a batch that others have cells of."""
    return values.sum() / max(1, len(values))


def reconstruction(kind: str, counts: Counts, px: Decoded) -> Reconstruction:
    """-log p(counts | px) under one of KINDS, summed over genes.

    Raises:
        ValueError: a tensor of px has not the shape that the counts ask for.
    """
    _check_shapes(counts, px)
    if px.logits.device.type == "cpu" and px.logits.dtype == torch.float32:
        mean, loss = _Fused.apply(counts, KINDS[kind], px.softplus, px.logits, px.library, px.px_r, px.zi_logits)
    else:
        loss = negative_log_likelihood(kind, counts.dense.to(px.logits.dtype), px).sum(1)
        mean = over_cells(loss)
    return Reconstruction(mean, loss.detach())


def squared_errors(logits: Tensor, x: Tensor) -> Reconstruction:
    """Sum over genes of (relu(logit) - x)**2, which stands for -log p where values are no counts.

    Args:
        logits: (cells, genes).
        x: (cells, genes) values.
    """
    errors = ((F.relu(logits) - x) ** 2).sum(1)
    return Reconstruction(over_cells(errors), errors.detach())


def _check_shapes(counts: Counts, px: Decoded) -> None:
    """The kernel reads and writes without asking again."""
    n, g = counts.n_cells, counts.n_genes
    allowed: dict[str, list[tuple[int, ...]]] = {
        "logits": [(n, g)],
        "library": [(n,)],
        "px_r": [(g,), (n, g)],
        "zi_logits": [(n, g)],
    }
    for name, shapes in allowed.items():
        tensor = getattr(px, name)
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {' or '.join(map(str, shapes))}")


class _Fused(torch.autograd.Function):
    """The kernel fills the gradients along with the loss; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        counts: Counts,
        kind: int,
        softplus: bool,  # noqa: FBT001 (autograd passes by position)
        logits: Tensor,
        library: Tensor,
        px_r: Tensor | None,
        zi_logits: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        n, n_genes = logits.shape
        chunks = use_threads(n)
        inputs = _inputs(logits, library, px_r, zi_logits)
        rows = chunks if px_r is None or px_r.dim() == 1 else n
        grads = [
            torch.empty(n),
            torch.empty(n, n_genes),
            torch.empty(n),
            torch.zeros(rows, inputs.px_r.shape[1]),
            torch.empty(inputs.zi.shape),
        ]
        out = kernels.Outputs(*(g.numpy() for g in grads))
        which = kernels.Kind(kind, softplus, np.float32(1.0 / max(1, n)))
        if chunks == 1:
            kernels.chunk_of_cells(which, counts.nonzeros, inputs, out, 0, 1)
        else:
            kernels.all_cells(which, counts.nonzeros, inputs, out, chunks)
        loss, by_logits, by_library, by_px_r, by_zi = grads
        if px_r is not None and px_r.dim() == 1:
            by_px_r = by_px_r.sum(0)
        ctx.save_for_backward(
            by_logits, by_library, by_px_r if px_r is not None else None, by_zi if zi_logits is not None else None
        )
        ctx.mark_non_differentiable(loss)
        return over_cells(loss), loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        by_input = ctx.saved_tensors
        if float(grad) != 1.0 or graph_is_kept():  # one pass over (cells, genes) saved in the usual case
            by_input = [None if g is None else g * grad for g in by_input]
        return (None, None, None, *by_input)


def _inputs(logits: Tensor, library: Tensor, px_r: Tensor | None, zi_logits: Tensor | None) -> kernels.Inputs:
    """Contiguous arrays; what does not exist is (1, 1)."""
    none = torch.zeros(1, 1)
    log_theta = none if px_r is None else torch.atleast_2d(px_r.detach())
    theta = torch.exp(log_theta).clamp_(*_THETA_RANGE)
    tensors = (logits, library, log_theta, theta, none if zi_logits is None else zi_logits)
    return kernels.Inputs(*(t.detach().contiguous().numpy() for t in tensors))


def negative_log_likelihood(kind: str, x: Tensor, px: Decoded) -> Tensor:
    """(cells, genes) -log p(x | px) by differentiable torch operations, on any device."""
    if kind == "poisson":
        return px.rate - x * _log_rate(px) + torch.lgamma(x + 1)
    assert px.px_r is not None and px.theta is not None
    mu, theta = px.rate, px.theta
    if kind == "normal":
        return 0.5 * ((x - mu) * torch.exp(-px.px_r)) ** 2 + px.px_r + 0.5 * math.log(2 * math.pi)
    total = theta + mu + _EPS
    zero = theta * torch.log1p(mu / (theta + _EPS))  # not a difference of logs: theta may be 1e6 times mu
    positive = torch.lgamma(x + 1) + torch.lgamma(theta) - torch.lgamma(x + theta)
    positive = torch.where(x > 0, positive - x * torch.log((mu + _EPS) / total), 0.0)
    if kind == "nb":
        return zero + positive
    assert px.zi_logits is not None
    t = -px.zi_logits - zero
    own = torch.where(x > 0, positive - t, -F.softplus(t))
    return F.softplus(-px.zi_logits) + own


def _log_rate(px: Decoded) -> Tensor:
    """log(rate) that stays finite where the rate leaves the range of floats."""
    if not px.softplus:
        return torch.log_softmax(px.logits, 1) + torch.nan_to_num(px.library, neginf=0.0).unsqueeze(1)
    low = px.logits < -20.0
    safe = torch.where(low, torch.zeros_like(px.logits), px.logits)
    return torch.where(low, px.logits, torch.log(F.softplus(safe))) + px.library.unsqueeze(1)
