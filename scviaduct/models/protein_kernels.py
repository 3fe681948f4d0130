"""totalVI's losses of proteins and their gradients, cell by cell, for CPUs; see models.totalvi for the model.

With m = logit pi, b = mean + std * e the drawn log background, mu1 = exp(b + efficiency), mu2 = mu1 * foreground,
t = log(phi + eps), T = phi + mu + eps: NB(mu) = phi (t - log T) + y (log(mu + eps) - log T), and the likelihood's
negative logarithm is

    softplus(-m) - logaddexp(NB(mu1), NB(mu2) - m) - lgamma(y + phi) + lgamma(phi) + lgamma(y + 1).

`second` is the posterior chance of foreground: the derivative of the logaddexp by NB(mu2). Everything is float64: there are
few proteins, and their counts are in the thousands. numba's float() of a float32 stays float32; np.float64 widens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from scviaduct.models.likelihood_kernels import rising

_EPS = 1e-8
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

Row = NDArray[np.float32]


class Said(NamedTuple):
    """What the networks and tables say of the proteins: (cells, proteins), or (1, proteins) where all cells share it."""

    mean: Row  # of q(log background)
    std: Row  # its logit: softplus or exp makes it positive
    foreground: Row  # its logit: 1 + relu
    mixing: Row
    efficiency: Row
    log_phi: Row
    prior_mean: Row
    prior_log_std: Row


class Seen(NamedTuple):
    """The data."""

    y: Row  # (cells, proteins)
    measured: NDArray[np.bool_]  # (cells, proteins)
    noise: Row  # (cells, proteins)
    exp_std: bool


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _sigmoid(x: float) -> float:
    e = math.exp(-abs(x))
    return (1.0 if x > 0.0 else e) / (1.0 + e)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _negative_binomial(y: float, mu: float, phi: float) -> tuple[float, float, float]:
    """The part of the log probability that depends on mu, and its derivatives by mu and phi."""
    total = phi + mu + _EPS
    log_share = math.log((phi + _EPS) / total)
    value = phi * log_share + y * math.log((mu + _EPS) / total)
    by_phi = log_share + phi / (phi + _EPS) - (phi + y) / total
    return value, y / (mu + _EPS) - (phi + y) / total, by_phi


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _likelihood(y: float, said: tuple, g: NDArray[np.float64]) -> float:
    """Loss of a protein of a cell; g becomes its gradients by log background, foreground, mixing and log phi."""
    log_mu, foreground, m, log_phi = said
    ratio = max(foreground, 0.0) + 1.0 + _EPS
    mu, phi = math.exp(log_mu), math.exp(log_phi)
    low, low_by_mu, low_by_phi = _negative_binomial(y, mu, phi)
    high, high_by_mu, high_by_phi = _negative_binomial(y, mu * ratio, phi)
    value, digamma = rising(y, phi)
    second = _sigmoid(high - m - low)
    g[0] = -mu * ((1.0 - second) * low_by_mu + second * high_by_mu * ratio)
    g[1] = -second * high_by_mu * mu if foreground > 0.0 else 0.0
    g[2] = second - _sigmoid(-m)
    g[3] = -phi * ((1.0 - second) * low_by_phi + second * high_by_phi + digamma)
    return _softplus(-m) - low - _softplus(high - m - low) - value + math.lgamma(y + 1.0)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _divergence(mean: float, std: float, prior_mean: float, prior_log_std: float, g: NDArray[np.float64]) -> float:
    """KL of the background to its prior; g becomes its gradients by mean, std, prior's mean and log std."""
    precision, away = math.exp(-2.0 * prior_log_std), mean - prior_mean
    g[0], g[1] = away * precision, std * precision - 1.0 / std
    g[2], g[3] = -away * precision, 1.0 - (std * std + away * away) * precision
    return prior_log_std - math.log(std) + 0.5 * ((std * std + away * away) * precision - 1.0)


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _protein(
    said: Said, seen: Seen, i: int | np.int64, p: int, weight: float, out: Row, work: NDArray[np.float64]
) -> tuple[float, float]:
    """Likelihood and KL of protein p of cell i; out[field, i, p] become the gradients of weight * (their sum)."""
    k = i if said.log_phi.shape[0] > 1 else 0
    m, efficiency, logit = np.float64(said.mixing[i, p]), np.float64(said.efficiency[i, p]), np.float64(said.std[i, p])
    std = (math.exp(logit) if seen.exp_std else _softplus(logit)) + _EPS
    std_by_logit = std - _EPS if seen.exp_std else _sigmoid(logit)
    prior = efficiency + 0.5 * efficiency * efficiency + _HALF_LOG_2PI + 1e-3 * _softplus(-m)
    loss, kl = 0.0, 0.0
    g, d = work[0], work[1]
    work[:] = 0.0
    if seen.measured[i, p]:
        e = np.float64(seen.noise[i, p])
        log_mu = np.float64(said.mean[i, p]) + std * e + efficiency
        loss = _likelihood(
            np.float64(seen.y[i, p]), (log_mu, np.float64(said.foreground[i, p]), m, np.float64(said.log_phi[k, p])), g
        )
        kl = _divergence(
            np.float64(said.mean[i, p]), std, np.float64(said.prior_mean[i, p]), np.float64(said.prior_log_std[i, p]), d
        )
        d[1] += g[0] * e
    out[0, i, p], out[1, i, p] = weight * (g[0] + d[0]), weight * d[1] * std_by_logit
    out[2, i, p], out[3, i, p] = weight * g[1], weight * (g[2] - 1e-3 * _sigmoid(-m))
    out[4, i, p], out[5, i, p] = weight * (g[0] + 1.0 + efficiency), weight * g[3]
    out[6, i, p], out[7, i, p] = weight * d[2], weight * d[3]
    return loss, kl + prior


@numba.njit(forceinline=True, nogil=True, cache=True, error_model="numpy")
def _cell(said: Said, seen: Seen, i: int | np.int64, weight: float, losses: Row, out: Row) -> None:
    loss, kl, work = 0.0, 0.0, np.empty((2, 4))
    for p in range(seen.y.shape[1]):
        own_loss, own_kl = _protein(said, seen, i, p, weight, out, work)
        loss += own_loss
        kl += own_kl
    losses[0, i], losses[1, i] = loss, kl


@numba.njit(nogil=True, cache=True, error_model="numpy")
def proteins(said: Said, seen: Seen, weight: float, losses: Row, out: Row) -> None:
    """Fill losses (2, cells), likelihood and KL, and out (8, cells, proteins): gradients of weight * sum, as in Said."""
    for i in range(seen.y.shape[0]):
        _cell(said, seen, i, weight, losses, out)


@numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
def proteins_parallel(said: Said, seen: Seen, weight: float, losses: Row, out: Row) -> None:
    """As `proteins`, cells spread over threads."""
    for i in numba.prange(seen.y.shape[0]):
        _cell(said, seen, np.int64(i), weight, losses, out)
