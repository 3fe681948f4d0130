"""What mapping found, in a copy of the user's h5ad: everything that was in the file stays as it was.

For a file of another kind (AnnData Zarr, 10x Genomics h5) the result is an h5ad with obs and the results alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem
from numpy.typing import NDArray

from scviaduct.errors import DataError, IncompleteError, UnreadableFileError
from scviaduct.storage.arrays import ROOT
from scviaduct.storage.formats import open_layout
from scviaduct.storage.layouts import H5AD, Layout, close
from scviaduct.storage.manifest import refuse_existing, sync_directory

Values: TypeAlias = NDArray[Any] | pd.Categorical

_OURS = "scviaduct"
"""uns/scviaduct/{obs,obsm} name what was added, so that a second result may replace it but never a user's column;
beside them stands of what the last result was made."""


def write_result(
    source: str | Path,
    out: str | Path,
    *,
    obsm: Mapping[str, NDArray[Any]],
    obs: Mapping[str, Values],
    made_of: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write `out`: a copy of the h5ad `source` with `obsm` (cells, …) and `obs` (cells,) added. Returns its path.

    `made_of` says what the result was made of (model, digests, runs); it becomes part of uns["scviaduct"].

    The copy is made byte for byte under a temporary name, added to, read back, and renamed; X, layers, raw, var and the
    existing columns are never touched. Columns that an earlier result added are replaced. Of a source that is no h5ad
    `out` gets obs and what is added, without genes or counts: those stay where they are.

    Raises OutputExistsError when `out` exists, DataError when a length is not the number of cells or a name is taken by
    the user's own data, UnreadableFileError when `source` cannot be read.
    """
    source, out = Path(source), Path(out)
    refuse_existing(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _begin(source, temporary)
        with _opened(temporary, source, "r+") as file:
            _add(file, source, obsm, obs)
            _remember(file, {"obs": obs, "obsm": obsm}, made_of)
        with _opened(temporary, source, "r") as file:
            _verify(file, out, obsm, obs)
        _publish(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _begin(source: Path, temporary: Path) -> None:
    """What the results are added to."""
    layout = open_layout(source)
    try:
        if layout.kind != H5AD:
            _write_obs(layout, temporary)
    finally:
        close(layout)
    if layout.kind == H5AD:
        shutil.copyfile(source, temporary)


def _write_obs(layout: Layout, path: Path) -> None:
    """An h5ad with the cells of a file and no genes."""
    obs = layout.obs(layout.matrices()[0])
    with h5py.File(path, "w") as file, ad.settings.override(allow_write_nullable_strings=True):
        file.attrs.update(ROOT)
        write_elem(file, "obs", obs)
        write_elem(file, "var", pd.DataFrame(index=pd.Index([], dtype=object)))


def _opened(path: Path, source: Path, mode: str) -> h5py.File:
    try:
        return h5py.File(path, mode)
    except OSError as error:
        raise UnreadableFileError(f"{source} cannot be opened as h5ad: {error}") from error


def _publish(temporary: Path, out: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    refuse_existing(out)  # somebody else may have made it in the meantime
    temporary.rename(out)
    sync_directory(out.parent)


def _add(file: h5py.File, source: Path, obsm: Mapping[str, NDArray[Any]], obs: Mapping[str, Values]) -> None:
    n_obs = _n_obs(file)
    for kind, added in (("obs", obs), ("obsm", obsm)):
        _check_lengths(source, kind, added, n_obs)
        _check_free(file, source, kind, added)
    add_obs = _add_to_table if isinstance(file["obs"], h5py.Dataset) else _add_columns
    add_obs(file, obs)
    if isinstance(file.get("obsm"), h5py.Dataset):
        _add_to_compound(file, "obsm", dict(obsm))
    else:
        _add_elements(_group(file, "obsm"), obsm)


def _n_obs(file: h5py.File) -> int:
    obs = file["obs"]
    return len(obs) if isinstance(obs, h5py.Dataset) else len(obs[obs.attrs["_index"]])


def _check_lengths(source: Path, kind: str, added: Mapping[str, Any], n_obs: int) -> None:
    for name, values in added.items():
        if len(values) != n_obs:
            raise DataError(f"{source} has {n_obs} cells, but {kind}[{name!r}] has {len(values)} rows.")


def _check_free(file: h5py.File, source: Path, kind: str, added: Mapping[str, Any]) -> None:
    ours = _added_before(file, kind)
    there = _names(file, kind)
    taken = [name for name in added if name in there and name not in ours]
    if taken:
        raise DataError(
            f"{source} has {kind}[{taken[0]!r}] already: rename it there, or choose another key for results."
        )


def _names(file: h5py.File, kind: str) -> set[str]:
    if kind not in file:
        return set()
    return set(file[kind].dtype.names) if isinstance(file[kind], h5py.Dataset) else set(file[kind])


def _added_before(file: h5py.File, kind: str) -> set[str]:
    path = f"uns/{_OURS}/{kind}"
    return set(map(str, read_elem(file[path]))) if path in file else set()


def _remember(file: h5py.File, added: Mapping[str, Mapping[str, Any]], made_of: Mapping[str, str]) -> None:
    names = {kind: np.array(sorted(_added_before(file, kind) | set(new)), object) for kind, new in added.items()}
    write_elem(_group(file, "uns"), _OURS, {**made_of, **names})


def _group(file: h5py.File, name: str) -> h5py.Group:
    if name not in file:
        write_elem(file, name, {})
    return file[name]


def _add_elements(group: h5py.Group, added: Mapping[str, Any]) -> None:
    for name, values in added.items():
        write_elem(group, name, values)  # replaces what has that name


def _add_columns(file: h5py.File, added: Mapping[str, Values]) -> None:
    obs = file["obs"]
    _add_elements(obs, {name: _plain(values) for name, values in added.items()})
    order = [_decoded(name) for name in obs.attrs["column-order"]]
    order += [name for name in added if name not in order]
    obs.attrs.create("column-order", order, dtype=h5py.string_dtype())


def _decoded(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _plain(values: Values) -> Values:
    """Text as an object array: numpy's fixed-width strings are not an AnnData element."""
    return values.astype(object) if isinstance(values, np.ndarray) and values.dtype.kind == "U" else values


def _add_to_table(file: h5py.File, added: Mapping[str, Values]) -> None:
    """obs of AnnData before 0.7 is one compound dataset; the categories of a column are in uns/<column>_categories."""
    fields = {}
    for name, values in added.items():
        if isinstance(values, pd.Categorical):
            write_elem(_group(file, "uns"), f"{name}_categories", np.asarray(values.categories, object))
            fields[name] = values.codes
        else:
            fields[name] = values
    _add_to_compound(file, "obs", fields)


def _add_to_compound(file: h5py.File, name: str, added: Mapping[str, NDArray[Any]]) -> None:
    old = file[name][()]
    attrs = dict(file[name].attrs)
    kept = [(n, old.dtype[n]) for n in old.dtype.names if n not in added]
    new = [(n, _field_dtype(values), values.shape[1:]) for n, values in added.items()]
    table = np.empty(old.shape, np.dtype(kept + new))
    for field, _ in kept:
        table[field] = old[field]
    for field, values in added.items():
        table[field] = values
    del file[name]
    file.create_dataset(name, data=table).attrs.update(attrs)


def _field_dtype(values: NDArray[Any]) -> np.dtype:
    return h5py.string_dtype() if values.dtype.kind in "OU" else values.dtype


def _verify(file: h5py.File, out: Path, obsm: Mapping[str, NDArray[Any]], obs: Mapping[str, Values]) -> None:
    """Read back what was added."""
    for kind, added in (("obs", obs), ("obsm", obsm)):
        for name, values in added.items():
            if not _equal(_read_back(file, kind, name), values):
                raise IncompleteError(
                    f"{out}: {kind}[{name!r}] does not read back as it was written; is the disk full?"
                )


def _read_back(file: h5py.File, kind: str, name: str) -> Any:
    if isinstance(file[kind], h5py.Group):
        return read_elem(file[f"{kind}/{name}"])
    values, categories = file[kind][name], f"uns/{name}_categories"
    if kind == "obs" and categories in file and values.dtype.kind in "iu":
        return pd.Categorical.from_codes(values, [_decoded(c) for c in file[categories][()]])
    return np.array([_decoded(v) for v in values], object) if values.dtype.kind == "O" else values


def _equal(found: Any, expected: Values) -> bool:
    if isinstance(expected, pd.Categorical):
        return list(map(str, found)) == list(map(str, expected))
    numbers = expected.dtype.kind in "fc"
    return bool(np.array_equal(np.asarray(found), expected, equal_nan=numbers))
