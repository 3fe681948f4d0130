"""obs and var of AnnData files of any age as data frames."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from scviaduct.errors import ScviaductError, UnreadableFileError
from scviaduct.storage.chunks import Group


def read_frame(path: Path, file: Group, name: str) -> pd.DataFrame:
    """`name` ("obs", "var", "raw/var") of an AnnData file, index as strings; UnreadableFileError when it cannot be."""
    try:
        node = file[name]
        frame = _compound(node, file.get("uns")) if isinstance(node, h5py.Dataset) else read_element(path, node)
    except ScviaductError:
        raise
    except Exception as error:
        raise _cannot_read(path, name, error) from error
    if not isinstance(frame, pd.DataFrame):
        raise _cannot_read(path, name, f"it holds a {type(frame).__name__}, not a table")
    if frame.index.dtype != object or not all(isinstance(value, str) for value in frame.index):
        frame.index = frame.index.astype(str).astype(object)
    return frame


def read_element(path: Path, node: Any) -> Any:
    """Any AnnData element (array, sparse matrix, table) as anndata reads it, whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ad.OldFormatWarning)
        try:
            return ad.io.read_elem(node)
        except Exception as error:  # anndata's errors of unknown encodings are not public
            raise _cannot_read(path, str(node.name).strip("/"), error) from error


def _cannot_read(path: Path, name: str, error: object) -> UnreadableFileError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return UnreadableFileError(
        f"{path}: {name} cannot be read ({said}); if anndata can open the file, write it again, else get it again"
    )


def _compound(table: h5py.Dataset, uns: h5py.Group | None) -> pd.DataFrame:
    """obs or var of files written before anndata 0.7: one structured array, categories in uns/<column>_categories."""
    rows = table[()]
    names = list(rows.dtype.names)
    index = next((n for n in ("index", "_index") if n in names), names[0])
    columns = {n: text(rows[n]) for n in names if n != index}
    for name in columns:
        key = f"{name}_categories"
        if uns is not None and key in uns and isinstance(uns[key], h5py.Dataset):
            columns[name] = pd.Categorical.from_codes(columns[name], text(np.atleast_1d(uns[key][()])))
    return pd.DataFrame(columns, index=text(rows[index]))


def text(values: np.ndarray) -> Any:
    """Bytes as strings; other values as they are."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8").astype(object)
    if values.dtype.kind == "O":
        return np.array([v.decode() if isinstance(v, bytes) else v for v in values], dtype=object)
    return values
