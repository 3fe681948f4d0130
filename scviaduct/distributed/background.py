"""Where totalVI's prior of the proteins' background starts: at what the cells of each batch look like.

As in scvi-tools, a mixture of two normal distributions is fitted to log(1 + counts) over the proteins of each of 100
cells of a batch, and the lower mean is that cell's background.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from scviaduct.models.totalvi import TotalVI
from scviaduct.storage.loader import BlockSource, stream
from scviaduct.storage.sampler import mix

CELLS = 100
"""Cells of each batch that are looked at."""
_FEWEST, _NARROW = 5, 0.05
"""Below so many proteins a batch starts at 0, with this standard deviation; so does a cell without counts."""


def tell_background(model: TotalVI, source: BlockSource) -> None:
    """Start the prior of the batches that the cells of `source` come from and that the model still learns.

    One pass over the cells; every process that makes it finds the same.
    """
    if not model.wants_background:
        return
    measured = np.array(model.schema.measured, bool)
    means, stds = np.full((2, len(measured)), np.nan)
    for batch, counts in enumerate(_some_cells(source, len(measured))):
        if len(counts):
            means[batch], stds[batch] = background(counts[:, measured[batch]])
    model.set_background_prior(means, stds)


def _some_cells(source: BlockSource, n_batches: int) -> list[NDArray[np.float32]]:
    """For each batch the protein counts of 100 of its cells, chosen by a hash of their rows."""
    keys = [np.zeros(0, np.uint64)] * n_batches
    chosen: list[NDArray[np.float32]] = [np.zeros((0, 0), np.float32)] * n_batches
    with stream(source) as blocks:
        for block in blocks:
            hashed = mix(block.rows.astype(np.uint64))
            for batch in np.unique(block.batch_index).tolist():
                here = block.batch_index == batch
                both = np.concatenate([keys[batch], hashed[here]])
                first = np.argsort(both, kind="stable")[:CELLS]
                counts = block.proteins[here]
                chosen[batch] = np.concatenate([chosen[batch].reshape(-1, counts.shape[1]), counts])[first]
                keys[batch] = both[first]
    return chosen


def background(counts: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and standard deviation of the log background of (cells, proteins) counts: the averages of the cells'."""
    if counts.shape[1] < _FEWEST:
        return 0.0, _NARROW
    means, stds = zip(*map(_of_cell, np.log1p(counts)), strict=True)
    return float(np.mean(means)), float(np.sqrt(np.square(stds).sum()) / len(counts))


def _of_cell(values: NDArray[np.float32]) -> tuple[float, float]:
    """The lower of two normal distributions that (proteins,) values are drawn from."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)  # also when all values are equal
        try:
            mixture = GaussianMixture(2, random_state=0).fit(values.astype(np.float64).reshape(-1, 1))
        except ConvergenceWarning:
            return 0.0, _NARROW
    low = int(np.argmin(mixture.means_))
    return float(mixture.means_[low, 0]), float(np.sqrt(mixture.covariances_[low, 0, 0]))
