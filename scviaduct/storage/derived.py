"""What a model made of cells, as an AnnData store that is written block by block: an h5ad or Zarr v3, by its suffix.

Matrices go to disk as their rows come; obs and var are held. Everything is written under a temporary name, read back,
compared and renamed, so a result is whole or absent.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import anndata as ad
import google_crc32c
import h5py
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scviaduct.errors import ConfigError, IncompleteError
from scviaduct.storage.arrays import DICT, ROOT, make_array, make_group, open_array
from scviaduct.storage.csr import CsrWriter, Sums, read_sums
from scviaduct.storage.export import Deflated, compare_sums, flush
from scviaduct.storage.manifest import refuse_existing, sync_directory, sync_tree

_STEP = 2**22  # values of a dense matrix that are written, and read back, at once
_CHUNK = 2**18  # values of a chunk of it
_DENSE = {"encoding-type": "array", "encoding-version": "0.2.0"}
_SPARSE = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0"}


class Rows(Protocol):
    """A matrix that grows by rows."""

    def append(self, values: NDArray[np.float32]) -> None:
        """Add rows at the end, (rows, width)."""
        ...

    def close(self) -> None:
        """Write what is left, and read all of it back; raises IncompleteError when it is not what was written."""
        ...


def free_name(out: str | Path) -> Path:
    """The path, if it can become a store: ConfigError for another suffix, OutputExistsError when something is there."""
    out = Path(out)
    if out.suffix not in (".h5ad", ".zarr"):
        stem = out.stem or "results"
        raise ConfigError(f"{out}: results are an h5ad or a Zarr store; name it {stem}.h5ad or {stem}.zarr")
    return refuse_existing(out)


@contextmanager
def derived(out: str | Path, n_obs: int) -> Iterator[Derived]:
    """A store of results for `n_obs` cells that takes the name `out` when the block ends well, and vanishes otherwise.

    Raises:
        ConfigError: `out` ends in neither .h5ad nor .zarr.
        OutputExistsError: it is there.
        IncompleteError: what was read back is not what was written.
    """
    out = free_name(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with _opened(temporary, n_obs, as_zarr=out.suffix == ".zarr") as made:
            yield made
            made.close()
        sync_tree(temporary) if temporary.is_dir() else flush(temporary)
        free_name(out)  # somebody else may have made it in the meantime
        temporary.rename(out)
        sync_directory(out.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path, n_obs: int, *, as_zarr: bool) -> Iterator[Derived]:
    if as_zarr:
        make_group(path, ROOT)
        yield Derived(zarr.open_group(path, mode="r+", zarr_format=3), path, n_obs)
        return
    with h5py.File(path, "w") as file:
        file.attrs.update(ROOT)
        yield Derived(file, path, n_obs)


class Derived:
    """The store while it is written; matrices first, then `describe` once."""

    def __init__(self, root: h5py.File | zarr.Group, path: Path, n_obs: int) -> None:
        self._root, self._path, self._n_obs = root, path, n_obs
        self._matrices: dict[str, Rows] = {}

    def matrix(self, name: str, width: int, *, sparse: bool = False) -> Rows:
        """A float32 matrix of the cells, such as "X", "obsm/X_scVI" or "layers/draw_0"; `sparse` as CSR."""
        self._group(name)
        shape = (self._n_obs, width)
        made: Rows
        if isinstance(self._root, h5py.File):
            made = _H5Sparse(self._root, name, self._path, shape) if sparse else _H5Dense(self._root, name, shape)
        else:
            made = _ZarrSparse(self._path / name, shape) if sparse else _ZarrDense(self._path / name, shape)
        self._matrices[name] = made
        return made

    def _group(self, name: str) -> None:
        """The group that a matrix lies in."""
        parent = name.rpartition("/")[0]
        if parent and parent not in self._root:
            self._root.create_group(parent).attrs.update(DICT)

    def describe(self, obs: pd.DataFrame, var: pd.DataFrame, uns: Mapping[str, Any]) -> None:
        """Write obs, var and uns; the elements of an AnnData that are missing are empty."""
        options = {} if isinstance(self._root, h5py.File) else {"dataset_kwargs": {"shards": None}}
        with ad.settings.override(allow_write_nullable_strings=True):
            for name, value in {"obs": obs, "var": var, "uns": dict(uns)}.items():
                ad.io.write_elem(self._root, name, value, **options)
        for name in ("obsm", "layers", "varm", "obsp", "varp"):
            self._group(f"{name}/")

    def close(self) -> None:
        """End and check every matrix."""
        for matrix in self._matrices.values():
            matrix.close()


class _Dense:
    """Rows are written in steps of about `_STEP` values; a crc32c of each step is compared when it is read back."""

    def __init__(self, array: Any, name: str, shape: tuple[int, int]) -> None:
        self._array, self._name, self._shape = array, name, shape
        self._step, self._at, self._crcs = rows_per_step(shape[1]), 0, []  # type: ignore[var-annotated]
        self._waiting: list[NDArray[np.float32]] = []

    def append(self, values: NDArray[np.float32]) -> None:
        """Add rows at the end."""
        self._waiting.append(np.asarray(values, np.float32))
        while sum(map(len, self._waiting)) >= self._step:
            rows = np.concatenate(self._waiting)
            self._write(rows[: self._step])
            self._waiting = [rows[self._step :].copy()]

    def close(self) -> None:
        """Write what is left and read everything back."""
        if self._waiting and (rest := np.concatenate(self._waiting)).size:
            self._write(rest)
        if self._at != self._shape[0]:
            raise ValueError(f"{self._name}: {self._at} of {self._shape[0]} rows were written")
        again = self._reopened()
        for number, crc in enumerate(self._crcs):
            start = number * self._step
            if _crc(np.asarray(again[start : start + self._step])) != crc:
                raise IncompleteError(
                    f"{self._name}: rows {start:,} on were not read back as they were written: the disk or its file "
                    "system loses data; nothing was kept"
                )

    def _reopened(self) -> Any:
        return self._array

    def _write(self, rows: NDArray[np.float32]) -> None:
        self._array[self._at : self._at + len(rows)] = rows
        self._crcs.append(_crc(rows))
        self._at += len(rows)


def rows_per_step(width: int) -> int:
    """Rows of a shard: whole chunks of about `_CHUNK` values, `_STEP` values in all."""
    per_chunk = _rows_per_chunk(width)
    return per_chunk * max(1, _STEP // (per_chunk * width))


def _rows_per_chunk(width: int) -> int:
    return int(np.clip(_CHUNK // width, 1, 8192))


def _crc(rows: NDArray[np.float32]) -> int:
    return google_crc32c.value(np.ascontiguousarray(rows, np.float32).tobytes())


class _H5Dense(_Dense):
    def __init__(self, file: h5py.File, name: str, shape: tuple[int, int]) -> None:
        chunks = (min(_rows_per_chunk(shape[1]), shape[0]), shape[1])
        array = file.create_dataset(name, shape, np.float32, chunks=chunks, fillvalue=np.nan)
        array.attrs.update(_DENSE)
        super().__init__(array, name, shape)

    def _reopened(self) -> Any:
        self._array.file.flush()
        return self._array


class _ZarrDense(_Dense):
    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._path = path
        chunks, shards = (_rows_per_chunk(shape[1]), shape[1]), (rows_per_step(shape[1]), shape[1])
        # a chunk that is gone reads as NaN, never as a value
        array = make_array(
            path, shape=shape, dtype=np.dtype(np.float32), chunks=chunks, shards=shards, fill=np.nan, attributes=_DENSE
        )
        super().__init__(array, path.name, shape)

    def _reopened(self) -> Any:
        return open_array(self._path)


class _ZarrSparse:
    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._path, self._writer = path, CsrWriter(path, shape, np.dtype(np.float32), index=np.dtype(np.int32))

    def append(self, values: NDArray[np.float32]) -> None:
        self._writer.append(csr_matrix(values))

    def close(self) -> None:
        self._writer.close()
        if read_sums(self._path) != self._writer.sums:
            raise IncompleteError(f"{self._path} was not read back as it was written; nothing was kept")


class _H5Sparse:
    def __init__(self, file: h5py.File, name: str, path: Path, shape: tuple[int, int]) -> None:
        self._file, self._name, self._path = file, name, path
        self._group = file.create_group(name)
        self._group.attrs.update(_SPARSE)
        self._group.attrs["shape"] = np.array(shape, np.int64)
        self._pool, self._sums = ThreadPoolExecutor(1, "deflate"), Sums()
        types = {"data": np.float32, "indices": np.int32, "indptr": np.int64}
        self._arrays = {name: Deflated(self._group, name, dtype, self._pool) for name, dtype in types.items()}
        self._arrays["indptr"].append(np.zeros(1, np.int64))

    def append(self, values: NDArray[np.float32]) -> None:
        block, first = csr_matrix(values), self._sums.nnz
        indices, pointers = block.indices.astype(np.int32), block.indptr[1:].astype(np.int64) + first
        for name, part in {"data": block.data, "indices": indices, "indptr": pointers}.items():
            self._arrays[name].append(part)
        self._sums.add(block.data, indices)
        self._sums.add_pointers(pointers)

    def close(self) -> None:
        for array in self._arrays.values():
            array.close()
        self._pool.shutdown()
        self._file.flush()
        compare_sums(self._path, {self._name: self._sums})
