"""Counts drawn from what a decoder says, for posterior predictive samples.

A cell's numbers come from numpy's Philox with the cell's seed as its key: they depend on no other cell. Rates are rounded
in float32, so a draw may differ by one count in rare cases when the cells are decoded in other batches.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scviaduct.models.likelihoods import Decoded
from scviaduct.models.noise import Noise

MOST = 1e8
"""Largest Poisson rate, as in scvi-tools."""


def draw_counts(kind: str, px: Decoded, noise: Noise) -> Tensor:
    """(cells, genes) values drawn from p(x | px) under one of likelihoods.KINDS; counts are whole numbers in float32."""
    mean = _array(px.rate)
    spread = np.ones((1, 1)) if px.theta is None else np.atleast_2d(_array(px.theta))
    zero = None if px.zi_logits is None else _array(torch.sigmoid(px.zi_logits))
    out = np.empty(mean.shape, np.float32)
    for i, rng in enumerate(noise.generators()):
        of_cell = spread[i if len(spread) > 1 else 0]
        if kind == "normal":
            out[i] = rng.normal(mean[i], of_cell)  # a Normal's px_r is its log standard deviation
            continue
        out[i] = rng.poisson(mean[i].clip(max=MOST)) if kind == "poisson" else negative_binomial(rng, mean[i], of_cell)
        if zero is not None:
            out[i, rng.random(mean.shape[1]) < zero[i]] = 0.0
    return torch.from_numpy(out)


def negative_binomial(
    rng: np.random.Generator, mean: NDArray[np.float64], theta: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Draws with variance mean + mean**2 / theta, as a Poisson whose rate is a Gamma."""
    return rng.poisson(rng.gamma(theta, mean / theta).clip(max=MOST))


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().double().numpy()
