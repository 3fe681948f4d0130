"""The proteins of totalVI: what its decoders say of them, the losses of their counts, and counts drawn from the model."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scviaduct.models.draws import negative_binomial
from scviaduct.models.likelihoods import over_cells
from scviaduct.models.nets import Gaussian
from scviaduct.models.noise import Noise

_EPS = 1e-8


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
    log_efficiency: Tensor
    """Of the cell's batch."""
    log_phi: Tensor
    """Inverse dispersion: (proteins,) or (cells, proteins)."""
    prior_mean: Tensor
    """Of the log background rate in the cell's batch."""
    prior_log_std: Tensor
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
        return torch.distributions.Normal(self.prior_mean, torch.exp(self.prior_log_std))

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


def losses(py: Proteins, y: Tensor, seen: Tensor, noise: Tensor) -> ProteinLosses:
    """Losses of counts y at a draw of the background.

    Args:
        py: what the model says.
        y: (cells, proteins) counts.
        seen: (cells, proteins) whether they were measured.
        noise: (cells, proteins) standard normal numbers that draw the background.
    """
    mean, std = py.background
    likelihood = torch.where(seen, mixture_nll(y, torch.addcmul(mean, std, noise), py), 0.0).sum(1)
    kl = background_kl(py, seen)
    return ProteinLosses(over_cells(likelihood + kl), likelihood.detach(), kl.detach())


def background_kl(py: Proteins, seen: Tensor) -> Tensor:
    """(cells,) KL of the background to its prior, the efficiencies' prior, and the pull towards foreground."""
    q, log_std = py.background, py.prior_log_std
    distance = (q.std**2 + (q.mean - py.prior_mean) ** 2) * torch.exp(-2 * log_std)
    kl = log_std - torch.log(q.std) + 0.5 * (distance - 1.0)
    efficiency = py.log_efficiency + 0.5 * py.log_efficiency**2 + 0.5 * math.log(2 * math.pi)
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
