"""obs columns as numbers: one code per category, the same for all data sets, or a float."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scviaduct.schema import MISSING

DATASET = "dataset"
"""Name of the column that says which data set a cell is from."""
OBS_DATASET = "obs.dataset"
"""Name an obs column called "dataset" gets in a view: data set ids are not to be mixed up with it."""
MOST_VALUES = 1000
"""A numeric column with more different values is not taken for a category."""


def as_text(values: pd.Series) -> pd.Categorical:
    """An obs column as sorted categories of strings that occur; missing values stay missing, 1 and 1.0 are both "1"."""
    categorical = pd.Categorical(values).remove_unused_categories()
    texts = pd.Index([_text(c) for c in categorical.categories], dtype=object)
    names = pd.Index(sorted(set(texts)), dtype=object)
    lookup = np.append(names.get_indexer(texts), MISSING)
    return pd.Categorical.from_codes(lookup[categorical.codes], categories=names)


def _text(value: Any) -> str:
    whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value)) if whole else str(value)


@dataclass(frozen=True)
class Column:
    """How one obs column is stored in a view: codes in `categories`, or float64 when there are none."""

    name: str
    categories: tuple[str, ...] | None = None

    @property
    def dtype(self) -> np.dtype:
        """The smallest integer type with room for MISSING and `fill`, or float64."""
        return np.dtype(np.float64) if self.categories is None else np.min_scalar_type(-len(self.categories) - 3)

    @property
    def fill(self) -> int | float:
        """A value no cell can have: what an array reads as where a file of it is gone."""
        return float(np.finfo(np.float64).min) if self.categories is None else -2

    def encode(self, values: pd.Series | None, n_obs: int) -> NDArray[Any]:
        """(n_obs,) codes or floats; a data set without the column gives missing values."""
        if values is None:
            return np.full(n_obs, np.nan if self.categories is None else MISSING, self.dtype)
        if self.categories is None:
            return values.to_numpy(np.float64, na_value=np.nan)
        text = as_text(values)
        lookup = np.append(pd.Index(self.categories).get_indexer(text.categories), MISSING)
        return lookup[text.codes].astype(self.dtype)


def view_columns(
    vocabulary: Mapping[str, Sequence[str]], frames: Iterable[pd.DataFrame], ids: Sequence[str]
) -> tuple[list[Column], list[str]]:
    """The obs columns a view stores, and those it does not because they name cells (text that has no vocabulary).

    `frames` are the data sets' obs, in order. Columns that are numeric wherever they occur are stored as floats.
    """
    numbers: dict[str, bool] = {}
    for frame in frames:
        for name in frame.columns:
            numbers[name] = numbers.get(name, True) and is_numeric(frame[name])
    identifiers = [name for name, numeric in numbers.items() if not numeric and name not in vocabulary]
    stored = [Column(name, tuple(c)) for name, c in vocabulary.items()]
    stored += [Column(name) for name, numeric in numbers.items() if numeric and name not in vocabulary]
    renamed = [Column(OBS_DATASET, c.categories) if c.name == DATASET else c for c in stored]
    return [Column(DATASET, tuple(ids)), *renamed], identifiers


def is_numeric(values: pd.Series) -> bool:
    """Numbers, truth values aside."""
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


@dataclass
class Tally:
    """What a stored column contains, counted while it is written."""

    column: Column
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    values: NDArray[np.float64] | None = field(default_factory=lambda: np.zeros(0))
    """Distinct values of a numeric column; None when they are not whole numbers or more than MOST_VALUES."""
    minimum: float = np.inf
    missing: int = 0
    example: tuple[int, int] | None = None
    """(data set, row) of the first cell without a value."""

    def add(self, values: NDArray[Any], datasets: NDArray[Any], rows: NDArray[Any]) -> None:
        """Count the values of some cells."""
        absent = np.isnan(values) if self.column.categories is None else values == MISSING
        self.missing += int(absent.sum())
        if self.example is None and absent.any():
            first = int(absent.argmax())
            self.example = (int(datasets[first]), int(rows[first]))
        if self.column.categories is None:
            self._add_numbers(values[~absent])
        else:
            counts = np.bincount(values[~absent], minlength=len(self.column.categories))
            self.counts = counts if not self.counts.size else self.counts + counts

    def _add_numbers(self, values: NDArray[np.float64]) -> None:
        self.minimum = min(self.minimum, float(values.min(initial=np.inf)))
        if self.values is not None:
            distinct = np.union1d(self.values, values)
            whole = len(distinct) <= MOST_VALUES and bool(
                (np.isfinite(distinct) & (distinct == np.floor(distinct))).all()
            )
            self.values = distinct if whole else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record of the column and its content."""
        record: dict[str, Any] = {"missing": self.missing, "missing_example": self.example}
        if self.column.categories is None:
            values = None if self.values is None else self.values.tolist()
            return record | {"values": values, "minimum": self.minimum if np.isfinite(self.minimum) else None}
        return record | {"categories": list(self.column.categories), "counts": self.counts.tolist()}
