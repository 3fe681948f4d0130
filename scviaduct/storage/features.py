"""Which features of a file become genes: other modalities are set aside, genes named twice refused or summed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scviaduct.errors import DataError
from scviaduct.storage.genes import normalise

TYPES = ("feature_types", "feature_type")
"""var columns in which scanpy, and 10x Genomics itself, keep what a feature is."""


@dataclass(frozen=True, eq=False)
class Features:
    """The genes of a file and where its features go."""

    var: pd.DataFrame
    """One row a gene: the first of those with the same name."""
    lookup: NDArray[np.int32] | None
    """(features of the file,) the gene each is counted for, -1 for none; None when each feature is a gene."""
    other: dict[str, int]
    """Features that are no genes, by type: set aside."""
    summed: int
    """Features that are counted for an earlier one of the same name."""


def choose_features(path: Path, var: pd.DataFrame, wanted: str, *, sum_duplicates: bool) -> Features:
    """The features of type `wanted` as genes, once each.

    Types are told from a column of 10x Genomics ("Gene Expression", "Antibody Capture", …); a column of the same name
    with other content, such as biotypes, is none.

    Raises DataError when genes are named twice, Ensembl versions aside, and `sum_duplicates` is off.
    """
    kept, other = _of_type(var, wanted)
    names = np.asarray(normalise(var.index[kept]), object)
    gene, first = _numbered(names)
    if len(first) < len(names) and not sum_duplicates:
        raise _twice(path, var.index[kept], names)
    if len(first) == len(var):
        return Features(var, None, other, 0)
    lookup = np.full(len(var), -1, np.int32)
    lookup[kept] = gene
    return Features(var.iloc[kept[first]], lookup, other, len(names) - len(first))


def _of_type(var: pd.DataFrame, wanted: str) -> tuple[NDArray[np.intp], dict[str, int]]:
    column = next((c for c in TYPES if c in var.columns and (var[c] == wanted).any()), None)
    if column is None:
        return np.arange(len(var)), {}
    types = var[column].astype(object).where(var[column].notna(), "without a type")
    return np.flatnonzero(types == wanted), {str(t): n for t, n in Counter(types).items() if t != wanted}


def _numbered(names: NDArray[np.object_]) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """The number of each name in the order of first occurrence, and where each first occurs."""
    codes, distinct = pd.factorize(names)
    first = np.flatnonzero(~pd.Index(names).duplicated())
    assert len(first) == len(distinct)
    return codes.astype(np.int32), first


def _twice(path: Path, shown_as: pd.Index, names: NDArray[np.object_]) -> DataError:
    plain = pd.Index(names)
    twice = plain[plain.duplicated()].unique()
    shown = "; ".join(" and ".join(map(repr, shown_as[plain == name][:3])) for name in twice[:3])
    verb = "gene occurs" if len(twice) == 1 else "genes occur"
    return DataError(
        f"{path}: {len(twice):,} {verb} more than once in var_names (Ensembl versions aside), e.g. {shown}. "
        "Use unique ids as var_names (often another column of var has them), or add up their counts with "
        "--sum-duplicates"
    )
