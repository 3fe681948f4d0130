"""obs and var of several data sets as one table: text in the categories of the vocabulary, genes on the common axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata.utils import make_index_unique

from scviaduct.storage.columns import DATASET, OBS_DATASET, Column, as_text, is_numeric
from scviaduct.storage.genes import NAMES

if TYPE_CHECKING:
    from scviaduct.storage.atlas import Atlas


def joined_obs(atlas: Atlas, ids: Sequence[str]) -> pd.DataFrame:
    """obs of these data sets: text as categories of the vocabulary, and the data set's id as the category "dataset".

    A source's own column of that name becomes "obs.dataset". Columns that name cells are text, not categories. Names of
    cells get the prefix "<data set>:" when they collide. Each column is made at once and let go in the sources, so at
    most one copy of obs and one column more are held.
    """
    frames = [atlas.obs(id_).rename(columns={DATASET: OBS_DATASET}) for id_ in ids]
    lengths = [len(frame) for frame in frames]
    names = pd.Index(np.concatenate([frame.index.to_numpy(object) for frame in frames])).astype(str)
    text = {OBS_DATASET if name == DATASET else name: values for name, values in atlas.vocabulary.items()}
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(column for frame in frames for column in frame.columns):
        parts = [frame.pop(name) if name in frame else None for frame in frames]
        columns[name] = _categories(name, text[name], parts, lengths) if name in text else _plain(parts, lengths)
    columns[DATASET] = pd.Categorical.from_codes(np.repeat(range(len(ids)), lengths), list(ids))
    obs = pd.DataFrame(columns, index=names, copy=False)
    if not obs.index.is_unique:
        prefixed = np.concatenate([f"{id_}:" + names[o : o + n] for id_, o, n in _spans(ids, lengths)])
        obs.index = make_index_unique(pd.Index(prefixed))
    return obs


def _spans(ids: Sequence[str], lengths: list[int]) -> list[tuple[str, int, int]]:
    return list(zip(ids, np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True))


def _categories(name: str, values: Sequence[str], parts: list[pd.Series | None], lengths: list[int]) -> pd.Categorical:
    column = Column(name, tuple(values))
    codes = [column.encode(part, n) for part, n in zip(parts, lengths, strict=True)]
    return pd.Categorical.from_codes(np.concatenate(codes), list(values))


def _plain(parts: list[pd.Series | None], lengths: list[int]) -> Any:
    """Numbers as they are, anything else as text; missing where a data set lacks the column."""
    there = [part for part in parts if part is not None]
    numeric = all(map(is_numeric, there))
    values = pd.concat([part if numeric else _texts(part) for part in there], ignore_index=True).array
    if len(there) == len(parts):
        return values
    at, rows = 0, []
    for part, n in zip(parts, lengths, strict=True):
        rows.append(np.full(n, -1) if part is None else np.arange(at, at + n))
        at += 0 if part is None else n
    filled = pd.Series(values).reindex(np.concatenate(rows))
    return filled.array


def _texts(column: pd.Series) -> pd.Series:
    if pd.api.types.infer_dtype(column, skipna=True) == "string":
        return column.astype(object)
    text = as_text(column)
    return pd.Series(np.append(text.categories.to_numpy(object), np.nan)[text.codes])


def joined_var(atlas: Atlas, ids: Sequence[str], genes: Sequence[str]) -> pd.DataFrame:
    """var of these genes of the common axis, each as the first of the data sets has it that has it at all."""
    frames = []
    for id_ in ids:
        frame = atlas.var(id_)
        if atlas.axis.via[id_] != NAMES:
            frame["var_names"] = frame.index
        frame.index = pd.Index(atlas.axis.names[id_], dtype=object)
        frames.append(frame[frame.index.notna()])
    var = pd.concat([_without_categories(frame) for frame in frames])
    return var[~var.index.duplicated()].reindex(pd.Index(genes))


def _without_categories(frame: pd.DataFrame) -> pd.DataFrame:
    kinds: Mapping[Any, Any] = {c: object for c in frame.columns if frame[c].dtype == "category"}
    return frame.astype(kinds)
