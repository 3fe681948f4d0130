"""Label transfer: the nearest reference cells vote, and the share of votes against the winner is the uncertainty.

Weights as in scArches (Lotfollahi et al. 2022): w_j ∝ exp(-d_j · s² / 4), where d are the distances to the k nearest
reference cells and s their standard deviation; uncertainty = 1 - Σ of the winner's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from scviaduct.errors import ConfigError
from scviaduct.schema import MISSING

_CHUNK = 4096  # queries at a time: 4,096 x 50 neighbours x 30 dimensions of float64 are 50 MB


@dataclass(frozen=True)
class Transferred:
    """One label per query cell."""

    codes: NDArray[np.int64]
    """(cells,) position among the categories."""
    uncertainty: NDArray[np.float32]
    """(cells,) in [0, 1]."""

    def named(self, categories: Sequence[str], max_uncertainty: float = 1.0, unknown: str = "Unknown") -> NDArray[Any]:
        """(cells,) label names, `unknown` where the uncertainty exceeds `max_uncertainty`."""
        names = np.asarray(categories, object)[self.codes]
        names[self.uncertainty > max_uncertainty] = unknown
        return names


class Neighbours:
    """Exact nearest neighbours among labelled reference latents, (cells, n_latent) and (cells,) codes.

    Raises:
        ConfigError: no reference cell has a label.
    """

    def __init__(self, latent: NDArray[np.float32], labels: NDArray[np.integer[Any]], n_neighbors: int = 50) -> None:
        known = np.flatnonzero(labels != MISSING)
        if not len(known):
            raise ConfigError(
                "No reference cell has a label, so none can be transferred; train with another --labels-key."
            )
        self._latent = np.ascontiguousarray(latent[known], np.float32)
        self._labels = np.asarray(labels[known], np.int64)
        self.n_neighbors = min(n_neighbors, len(known))
        self._index = faiss.IndexFlatL2(self._latent.shape[1])
        self._index.add(self._latent)

    def search(self, latent: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Euclidean distances and reference rows, (cells, n_neighbors) each, nearest first."""
        latent = np.ascontiguousarray(latent, np.float32)
        _, rows = self._index.search(latent, self.n_neighbors)
        # FAISS computes |x|²+|y|²-2xy in float32: right neighbours, but distances near 0 lose their digits
        gaps = latent[:, None, :].astype(np.float64) - self._latent[rows]
        return np.sqrt((gaps**2).sum(-1)), rows

    def transfer(self, latent: NDArray[np.float32]) -> Transferred:
        """The label of each query cell, (cells, n_latent) latents in."""
        parts = [self._vote(latent[start : start + _CHUNK]) for start in range(0, len(latent), _CHUNK)]
        codes, shares = zip(*parts, strict=True) if parts else ([np.zeros(0, np.int64)], [np.zeros(0)])
        # weights of unanimous neighbours sum to 1 up to rounding, never to more than 1 here
        uncertainty = np.clip(1 - np.concatenate(shares), 0, 1).astype(np.float32)
        return Transferred(np.concatenate(codes), uncertainty)

    def _vote(self, latent: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        share = self.shares(latent)
        winner = share.argmax(1)  # ties go to the first category, as in scArches
        return winner, share[np.arange(len(share)), winner]

    def shares(self, latent: NDArray[np.float32]) -> NDArray[np.float64]:
        """Weight of every label, (cells, labels); rows sum to 1."""
        distances, rows = self.search(latent)
        weights = kernel(distances)
        labels = self._labels[rows]
        share = np.zeros((len(latent), int(self._labels.max()) + 1))
        np.add.at(share, (np.arange(len(latent))[:, None], labels), weights)
        return share


def kernel(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """scArches' weights of neighbours at these distances, (cells, k); rows sum to 1."""
    scores = -distances * distances.std(axis=1, keepdims=True) ** 2 / 4
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))  # the shift keeps far-off cells from 0/0
    return weights / weights.sum(axis=1, keepdims=True)
