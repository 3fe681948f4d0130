"""The proteins of totalVI: what its decoders say of them, the losses of their counts, and counts drawn from the model.

On CPUs the losses are one autograd node that fills the gradients along with them (protein_kernels); other devices and
float64 use torch's operations of the same formulas.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scviaduct.models import protein_kernels as kernels
from scviaduct.models import row_kernels
from scviaduct.models.autograd import once_differentiable
from scviaduct.models.chunks import run
from scviaduct.models.draws import negative_binomial
from scviaduct.models.layer_kernels import require_codes
from scviaduct.models.likelihoods import over_cells
from scviaduct.models.nets import Gaussian
from scviaduct.models.noise import Noise

_EPS = 1e-8
_KERNEL = kernels.losses, kernels.losses_parallel


class PerBatch(NamedTuple):
    """What the cells of a batch share, (batches, proteins) each."""

    codes: Tensor
    """(cells,) the batch of each cell."""
    log_efficiency: Tensor
    prior_mean: Tensor
    """Of the log background rate."""
    prior_log_std: Tensor
    log_phi: Tensor
    """Inverse dispersion; or (proteins,) for all batches."""

    def of_cells(self, table: Tensor) -> Tensor:
        """(cells, proteins) rows of the cells' batches; (proteins,) stays as it is."""
        return F.embedding(self.codes, table) if table.dim() > 1 else table


class Proteins(NamedTuple):
    """What a model says of the proteins of some cells, (cells, proteins) each."""

    log_alpha: Tensor
    """Mean of the log background rate."""
    log_beta: Tensor
    """Logit of its standard deviation."""
    excess: Tensor
    """Logit of the foreground rate over the background rate."""
    mixing: Tensor
    """Logit of the probability of background."""
    batches: PerBatch
    exp_std: bool
    """Whether exp makes the standard deviation positive, not softplus."""

    @property
    def background(self) -> Gaussian:
        """q(log background | z, s)."""
        positive = torch.exp if self.exp_std else F.softplus
        return Gaussian(self.log_alpha, positive(self.log_beta) + _EPS)

    @property
    def prior(self) -> torch.distributions.Normal:
        """p(log background | s)."""
        mean, log_std = (self.batches.of_cells(t) for t in (self.batches.prior_mean, self.batches.prior_log_std))
        return torch.distributions.Normal(mean, torch.exp(log_std))

    @property
    def log_efficiency(self) -> Tensor:
        """Of the cell's batch."""
        return self.batches.of_cells(self.batches.log_efficiency)

    @property
    def log_phi(self) -> Tensor:
        """Inverse dispersion: (proteins,) or (cells, proteins)."""
        return self.batches.of_cells(self.batches.log_phi)

    @property
    def foreground(self) -> Tensor:
        """Foreground rate over background rate, at least 1."""
        return F.relu(self.excess) + 1.0 + _EPS


class ProteinLosses(NamedTuple):
    """Losses of the proteins' counts."""

    mean: Tensor
    """Mean over the cells of likelihood + kl, to differentiate."""
    likelihood: Tensor
    """(cells,) -log p(y | z, b, s) of the measured proteins, detached."""
    kl: Tensor
    """(cells,), detached; see `background_kl`."""


def losses(py: Proteins, y: Tensor, measured: Tensor, noise: Tensor) -> ProteinLosses:
    """Losses of counts y at a draw of the background.

    Args:
        py: what the model says.
        y: (cells, proteins) counts.
        measured: (batches, proteins) whether they were counted.
        noise: (cells, proteins) standard normal numbers that draw the background.

    Raises:
        IndexError: a cell's batch is none of those.
        ValueError: shapes that do not fit together.
    """
    if y.device.type == "cpu" and y.dtype == py.mixing.dtype == torch.float32:
        given = _Given(y, measured, noise, py.batches.codes, py.exp_std)
        _check(py, given)
        return ProteinLosses(*_Losses.apply(given, *py[:4], *py.batches[1:]))
    mean, std = py.background
    seen = measured[py.batches.codes]
    likelihood = torch.where(seen, mixture_nll(y, torch.addcmul(mean, std, noise), py), 0.0).sum(1)
    kl = background_kl(py, seen)
    return ProteinLosses(over_cells(likelihood + kl), likelihood.detach(), kl.detach())


class _Given(NamedTuple):
    """What is not differentiated."""

    y: Tensor
    measured: Tensor
    noise: Tensor
    codes: Tensor
    exp_std: bool


def _check(py: Proteins, given: _Given) -> None:
    """The kernel reads and writes without asking again."""
    cells, batches = tuple(given.y.shape), tuple(given.measured.shape)
    right = all(tuple(t.shape) == cells for t in (*py[:4], given.noise)) and given.codes.shape == cells[:1]
    right &= all(tuple(t.shape) == batches for t in py.batches[1:4]) and batches[1:] == cells[1:]
    if not right or tuple(py.batches.log_phi.shape) not in (batches, batches[1:]):
        raise ValueError(f"Counts are {cells}, panels {batches}: what is said of the proteins has other shapes")
    require_codes(given.codes.numpy(), batches[0], "batches")


class _Losses(torch.autograd.Function):
    """The kernel fills the gradients along with the losses; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, given: _Given, *said: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells, width = given.y.shape
        likelihood, kl = torch.empty(cells), torch.empty(cells)
        by_cell = torch.empty(2, 4, cells * width)
        codes = given.codes.numpy()
        tables = [np.atleast_2d(t.detach().numpy()) for t in said[4:]]
        flat = (t.detach().reshape(-1).numpy() for t in (*said[:4], given.y, given.noise))
        shared = kernels.Shared(given.measured.numpy(), codes, *tables)
        out = kernels.Results(1.0 / max(1, cells), likelihood.numpy(), kl.numpy(), *by_cell.numpy())
        run(_KERNEL, kernels.Said(given.exp_std, *flat), shared, out, max(1, cells // kernels.CELLS_PER_CHUNK))
        totals = [torch.zeros_like(t) for t in said[4:]]
        for total, rows in zip(totals, out.shared, strict=True):
            row_kernels.add_up(rows.reshape(cells, width), codes, np.atleast_2d(total.numpy()))
        ctx.save_for_backward(by_cell[0].view(4, cells, width), *totals)
        ctx.mark_non_differentiable(likelihood, kl)
        return over_cells(likelihood + kl), likelihood, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        by_cell, *totals = (g * grad for g in ctx.saved_tensors)
        return (None, *by_cell, *totals)


def background_kl(py: Proteins, seen: Tensor) -> Tensor:
    """(cells,) KL of the background to its prior, the efficiencies' prior, and the pull towards foreground."""
    q, per_batch = py.background, py.batches
    mean, log_std, efficiency = (
        per_batch.of_cells(t) for t in (per_batch.prior_mean, per_batch.prior_log_std, per_batch.log_efficiency)
    )
    distance = (q.std**2 + (q.mean - mean) ** 2) * torch.exp(-2 * log_std)
    kl = log_std - torch.log(q.std) + 0.5 * (distance - 1.0)
    efficiency = efficiency + 0.5 * efficiency**2 + 0.5 * math.log(2 * math.pi)
    return (torch.where(seen, kl, 0.0) + efficiency + 1e-3 * F.softplus(-py.mixing)).sum(1)


def mixture_nll(y: Tensor, log_background: Tensor, py: Proteins) -> Tensor:
    """(cells, proteins) -log of the mixture of two negative binomials with one dispersion.

    log(pi NB1 + (1 - pi) NB2) = logsumexp(log NB1, log NB2 - m) - softplus(-m) with m = logit pi. In float64: where
    theta is large its lgammas differ by less than float32 holds (at theta 1e6 and 3 counts the loss was 1.43, not 2.10).
    """
    counts, mixing = y.double(), py.mixing.double()
    mu1 = torch.exp(py.log_efficiency.double() + log_background.double())
    mu2 = mu1 * py.foreground.double()
    phi = torch.exp(py.log_phi.double())
    shared = torch.lgamma(counts + phi) - torch.lgamma(phi) - torch.lgamma(counts + 1)
    both = [
        phi * (torch.log(phi + _EPS) - torch.log(phi + mu + _EPS))
        + counts * (torch.log(mu + _EPS) - torch.log(phi + mu + _EPS))
        for mu in (mu1, mu2)
    ]
    mixed = torch.logsumexp(torch.stack([both[0], both[1] - mixing]), 0)
    return -(shared + mixed - F.softplus(-mixing)).to(y.dtype)


def drawn(background: Tensor, py: Proteins, noise: Noise) -> Tensor:
    """(cells, proteins) counts drawn from the mixture."""
    low = (torch.exp(py.log_efficiency) * background).cpu().double().numpy()
    high, pi = low * py.foreground.cpu().double().numpy(), torch.sigmoid(py.mixing).cpu().double().numpy()
    phi = np.broadcast_to(torch.exp(py.log_phi).detach().cpu().double().numpy(), low.shape)
    out = np.empty(low.shape, np.float32)
    for i, rng in enumerate(noise.generators()):
        out[i] = negative_binomial(rng, np.where(rng.random(low.shape[1]) < pi[i], low[i], high[i]), phi[i])
    return torch.from_numpy(out)
