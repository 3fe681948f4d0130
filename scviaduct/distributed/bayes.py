"""Differential expression from posterior draws of two groups (Lopez et al. 2018; Boyeau et al. 2019), as in scvi-tools.

A draw of group 1 and one of group 2 make a pair. Arrays are (pairs, features); the k-th rows are the k-th pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scviaduct.errors import ConfigError

Array = NDArray[np.floating]
_EPS = 1e-8
_TILE = 256  # features at once: 5,000 pairs of them are 10 MB of float64
_LEAST = 1e-10  # pseudocount
_LFC_SHARE = 1e-3  # of the pseudocount in the reported log fold changes


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """What counts as a difference."""

    mode: Literal["vanilla", "change"] = "change"
    """"change": the log2 fold change exceeds delta; "vanilla": group 1 is higher."""
    delta: float | Literal["auto"] = 0.25
    """Smallest log2 fold change that counts; "auto" finds one from the fold changes of all features."""
    pseudocounts: float | None = None
    """Added to both values of a fold change; None estimates it from features that are hardly seen."""
    sides: Literal["three", "two"] = "three"
    """Whether higher and lower are tested apart ("three" hypotheses) or together."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("vanilla", "change"):
            raise ConfigError(f"mode={self.mode!r} is neither 'vanilla' nor 'change'")
        if self.delta != "auto" and not float(self.delta) >= 0:
            raise ConfigError(f"delta={self.delta!r} must be 0 or more, or 'auto'")
        if self.pseudocounts is not None and self.pseudocounts <= 0:
            raise ConfigError(f"pseudocounts={self.pseudocounts!r} must be above 0; leave it out to estimate it")

    def __call__(self, one: Array, two: Array, hardly_seen: tuple[Array, Array] | None = None) -> pd.DataFrame:
        """One row a feature; `hardly_seen` are (features,) masks for each group, to estimate pseudocounts with."""
        scales = {"scale1": one.mean(0), "scale2": two.mean(0)}
        if self.mode == "vanilla":
            higher = np.concatenate([(one[:, t] > two[:, t]).mean(0) for t in _tiles(one)])
            found = {"proba_m1": higher, "proba_m2": 1 - higher, "bayes_factor": bayes_factor(higher)}
            return pd.DataFrame(found | scales)
        offset = self.pseudocounts or pseudocount(one, two, *(hardly_seen or (None, None)))
        delta = self._delta(one, two, offset)
        parts = [self._change(one[:, t], two[:, t], offset, delta) for t in _tiles(one)]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        p = found["proba_de"]
        first = {"proba_de": p, "proba_not_de": 1 - p, "bayes_factor": bayes_factor(p)}
        return pd.DataFrame(first | scales | {"pseudocounts": offset, "delta": delta} | found)

    def _change(self, one: Array, two: Array, offset: float, delta: float) -> dict[str, Array]:
        change = log_fold(one, two, offset)
        up, down = (change >= delta).mean(0), (change < -delta).mean(0)
        lfc = log_fold(one, two, _LFC_SHARE * offset)
        return {
            "proba_de": up + down if self.sides == "two" else np.maximum(up, down),
            "lfc_mean": lfc.mean(0),
            "lfc_median": np.median(lfc, 0),
            "lfc_std": lfc.std(0),
            "lfc_min": lfc.min(0),
            "lfc_max": lfc.max(0),
        }

    def _delta(self, one: Array, two: Array, offset: float) -> float:
        """0.6 times the mean distance of the outer two of three normals fitted to the mean fold changes."""
        if self.delta != "auto":
            return float(self.delta)
        from sklearn.mixture import GaussianMixture

        means = np.concatenate([log_fold(one[:, t], two[:, t], offset).mean(0) for t in _tiles(one)])
        if len(means) < 3:
            raise ConfigError(f"delta='auto' is found from the fold changes of many features, not of {len(means)}")
        centres = np.sort(GaussianMixture(3, random_state=self.seed).fit(means[:, None]).means_.ravel())
        return max(0.1, float(0.6 * np.abs(centres[[0, -1]]).mean()))


def bayes_factor(p: Array) -> Array:
    """log p / (1 - p), finite."""
    return np.log(p + _EPS) - np.log(1 - p + _EPS)


def log_fold(one: Array, two: Array, offset: float) -> NDArray[np.float64]:
    """log2 fold change of each pair."""
    return np.log2(one.astype(np.float64) + offset) - np.log2(two.astype(np.float64) + offset)


def pseudocount(one: Array, two: Array, unseen_one: Array | None, unseen_two: Array | None) -> float:
    """What shrinks fold changes of features that are hardly seen to 0.

    scvi-tools' estimate: of these features' largest values the 0.9 quantile, in the group where it is higher, divided by
    the number of features.
    """
    quantiles = [_LEAST]
    for values, unseen in ((one, unseen_one), (two, unseen_two)):
        if unseen is not None and unseen.any():
            quantiles.append(float(np.quantile(values.max(0)[unseen], 0.9)))
    return max(_LEAST, max(quantiles) / one.shape[1])


def is_de(p: NDArray[np.float64], fdr: float) -> NDArray[np.bool_]:
    """The largest set of features, best first, whose expected share of false discoveries is at most `fdr`."""
    order = np.argsort(-p, kind="stable")
    expected = np.cumsum(1 - p[order]) / np.arange(1, len(p) + 1)
    found = np.zeros(len(p), bool)
    found[order[: int((expected <= fdr).sum())]] = True
    return found


def _tiles(values: Array) -> Iterator[slice]:
    for start in range(0, values.shape[1], _TILE):
        yield slice(start, start + _TILE)
