"""Label transfer: the nearest reference cells vote, and the share of votes against the winner is the uncertainty.

Weights as in scArches (Lotfollahi et al. 2022): w_j ∝ exp(-d_j · s² / 4), where d are the distances to the k nearest
reference cells and s their standard deviation; uncertainty = 1 - Σ of the winner's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scviaduct.distributed.knn import ALL, CellIndex, Probe
from scviaduct.errors import ConfigError
from scviaduct.schema import MISSING

_CHUNK = 4096  # query cells at a time: their weights for 500 labels are 16 MB


@dataclass(frozen=True)
class Transferred:
    """One label per query cell."""

    codes: NDArray[np.int64]
    """(cells,) position among the categories."""
    uncertainty: NDArray[np.float32]
    """(cells,) in [0, 1]."""
    probe: Probe = ALL
    """How the neighbours were found."""

    def named(self, categories: Sequence[str], max_uncertainty: float = 1.0, unknown: str = "Unknown") -> NDArray[Any]:
        """(cells,) label names, `unknown` where the uncertainty exceeds `max_uncertainty`."""
        names = np.asarray(categories, object)[self.codes]
        names[self.uncertainty > max_uncertainty] = unknown
        return names


class Neighbours:
    """The labelled cells of a reference, of (cells, n_latent) latents and (cells,) codes, as voters.

    `exact` compares with every one of them; else beyond 200,000 about 0.999 of the neighbours are found (knn.py).

    Raises:
        ConfigError: no reference cell has a label.
        DataError: a latent is not a number.
    """

    def __init__(
        self,
        latent: NDArray[np.float32],
        labels: NDArray[np.integer[Any]],
        n_neighbors: int = 50,
        *,
        exact: bool = False,
    ) -> None:
        known = np.flatnonzero(labels != MISSING)
        if not len(known):
            raise ConfigError(
                "No reference cell has a label, so none can be transferred; train with another --labels-key."
            )
        self._cells, self._labels = CellIndex(latent, known, exact=exact), labels
        self.n_labels = int(labels.max()) + 1
        self.n_neighbors = min(n_neighbors, len(known))

    def search(self, latent: NDArray[np.float32], threads: int = 1) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Euclidean distances and reference rows, (cells, n_neighbors) each, nearest first."""
        probe = self._cells.probe(latent, self.n_neighbors, threads)
        return self._cells.search(latent, self.n_neighbors, probe, threads)

    def transfer(self, latent: NDArray[np.float32], threads: int = 1) -> Transferred:
        """The label of each query cell, (cells, n_latent) latents in; the same for any number of threads."""
        codes, uncertainty = np.zeros(len(latent), np.int64), np.zeros(len(latent), np.float32)
        probe = self._cells.probe(latent, self.n_neighbors, threads)
        for start in range(0, len(latent), _CHUNK):
            some = slice(start, start + _CHUNK)
            share = self._shares(*self._cells.search(latent[some], self.n_neighbors, probe, threads))
            codes[some] = share.argmax(1)  # ties go to the first category, as in scArches
            # weights of unanimous neighbours sum to 1 up to rounding, never to more than 1 here
            uncertainty[some] = np.clip(1 - share.max(1), 0, 1)
        return Transferred(codes, uncertainty, probe)

    def shares(self, latent: NDArray[np.float32]) -> NDArray[np.float64]:
        """Weight of every label, (cells, labels); rows sum to 1."""
        return self._shares(*self.search(latent))

    def _shares(self, distances: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        share = np.zeros((len(rows), self.n_labels))
        np.add.at(share, (np.arange(len(rows))[:, None], self._labels[rows]), kernel(distances))
        return share


def kernel(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """scArches' weights of neighbours at these distances, (cells, k); rows sum to 1."""
    scores = -distances * distances.std(axis=1, keepdims=True) ** 2 / 4
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))  # the shift keeps far-off cells from 0/0
    return weights / weights.sum(axis=1, keepdims=True)
