"""Which values the obs columns of an atlas have, and which columns name cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import zarr

from scviaduct.storage.columns import as_text

FEW = 100
"""A column with so many different values, or fewer, does not name cells, however few these are."""
_HELD = 2**20
"""Strings that are held before distinct values are counted by their hashes: 8 bytes each instead of about 80."""

Read = Callable[[], Iterable[str]]


def vocabulary(frames: Sequence[zarr.Group], n_obs: int) -> tuple[dict[str, list[str]], list[str]]:
    """({column: its values as sorted text}, columns that name cells) of the obs of all data sets on disk.

    Columns that are numeric wherever they occur are in neither. A column names cells when it has more than 100
    different values, and more than there are half as many cells (`n_obs`).
    """
    numeric: dict[str, bool] = {}
    for frame in frames:
        for name in _columns(frame):
            numeric[name] = numeric.get(name, True) and _is_numeric(frame[name])
    found: dict[str, list[str]] = {}
    identifiers = []
    for name in (n for n, is_numeric in numeric.items() if not is_numeric):
        values = _values([partial(_texts, f, name) for f in frames if name in _columns(f)], max(n_obs // 2, FEW))
        if values is None:
            identifiers.append(name)
        else:
            found[name] = values
    return found, identifiers


def _columns(frame: zarr.Group) -> list[str]:
    return list(frame.attrs["column-order"])  # type: ignore[arg-type]


def _is_numeric(column: zarr.Array | zarr.Group) -> bool:
    if isinstance(column, zarr.Group):
        return column.attrs.get("encoding-type") == "nullable-integer"
    return column.dtype.kind in "iuf"


def _texts(frame: zarr.Group, name: str) -> Iterable[str]:
    return as_text(pd.Series(ad.io.read_elem(frame[name]))).categories


def _values(columns: Sequence[Read], limit: int) -> list[str] | None:
    """Different values of all columns, sorted; None when there are more than `limit`."""
    found: set[str] = set()
    for read in columns:
        found.update(read())
        if len(found) > min(limit, _HELD):
            break
    else:
        return sorted(found)
    if len(found) > limit or _many(columns, limit):
        return None
    return sorted(set[str]().union(*(read() for read in columns)))


def _many(columns: Sequence[Read], limit: int) -> bool:
    """Whether there are more than `limit` different values, told from 64-bit hashes."""
    seen = np.empty(0, np.uint64)
    for read in columns:
        seen = np.union1d(seen, pd.util.hash_array(np.asarray(list(read()), object), categorize=False))
        if len(seen) > limit:
            return True
    return False
