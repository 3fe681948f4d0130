"""Any cells and genes of an atlas as an AnnData: in memory where they fit, or as an h5ad that is written block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from scviaduct.errors import ConfigError, IncompleteError, OutputExistsError
from scviaduct.storage.arrays import ROOT
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.csr import Sums
from scviaduct.storage.genes import Join
from scviaduct.storage.manifest import sync_directory
from scviaduct.storage.ram import refuse_beyond
from scviaduct.storage.selection import BLOCK, Block, Selection
from scviaduct.storage.tasks import cores, in_order

CHUNK = 2**16
"""Values of a compressed chunk."""
Progress = Callable[[str, int, int], None]


def to_adata(
    atlas: Atlas,
    *,
    datasets: str | Sequence[str] | None = None,
    where: str | None = None,
    genes: str | Path | Sequence[str] | None = None,
    join: Join = "union",
    memory: str | None = None,
) -> ad.AnnData:
    """The chosen cells and genes in memory; X is CSR float32. The choice is that of `export`.

    Raises NotEnoughMemoryError, before anything is read, when they take more than `memory` (default: what is free).
    """
    chosen = Selection.of(atlas, datasets=datasets, where=where, genes=genes, join=join)
    instead = (
        "Choose fewer cells (datasets=, where=) or genes, work block by block on atlas.lazy(), or export to a file"
    )
    refuse_beyond(chosen.bytes, memory, f"{chosen.n_obs:,} cells x {len(chosen.genes):,} genes", instead)
    layers = {name: vstack([chosen.layer(name, b) for b in chosen.blocks()], "csr") for name in chosen.layers()}
    return ad.AnnData(_in_memory(chosen), obs=chosen.obs(), var=chosen.var(), obsm=chosen.obsm(), layers=layers)


def _in_memory(chosen: Selection) -> csr_matrix:
    """The counts; room is asked for once, and what is not used is given back, so there is no second copy."""
    most = sum(part.nnz for part in chosen.cells)
    index = np.int32 if most < 2**31 else np.int64
    data, indices = np.empty(most, np.float32), np.empty(most, index)
    lengths, at = [], 0
    with ThreadPoolExecutor(cores(), thread_name_prefix="counts") as pool:
        for block in in_order(pool, chosen.counts, chosen.blocks(), ahead=cores() + 1):
            data[at : at + block.nnz], indices[at : at + block.nnz] = block.data, block.indices
            lengths.append(np.diff(block.indptr))
            at += block.nnz
    data.resize(at, refcheck=False)
    indices.resize(at, refcheck=False)
    indptr = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum(dtype=np.int64).astype(index)
    x = csr_matrix((data, indices, indptr), shape=(chosen.n_obs, len(chosen.genes)), copy=False)
    x.has_canonical_format = True
    return x


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    path: Path
    n_obs: int
    """Its cells."""
    n_vars: int
    """Its genes."""


def export(
    atlas: str | Path | Atlas,
    out: str | Path,
    *,
    datasets: str | Sequence[str] | None = None,
    where: str | None = None,
    genes: str | Path | Sequence[str] | None = None,
    join: Join = "union",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Exported:
    """Write cells and genes of an atlas as an h5ad, in memory that does not grow with the counts (obs and var do).

    `datasets` are ids (default: all). `where` is a query over obs in the syntax of pandas.DataFrame.query, such as
    "cell_type == 'B cell' and donor != 'd1'"; names with spaces stand in backticks, and "dataset" is the id of the data
    set. `genes` are names or a text file with one per line; `join` says which genes when several data sets are written.
    One data set comes as its source had it (obs, var, names, obsm, counts as float32); several come as in `Atlas.lazy`.
    The file is read back and compared before it gets its name. `on_progress` gets (data set, cells done, all).

    Raises:
        DataError, MissingColumnError, ConfigError: as Selection.of.
        OutputExistsError: `out` is there, and not `overwrite`.
        IncompleteError: what was read back is not what was written.
    """
    store = Atlas.open(atlas) if isinstance(atlas, str | Path) else atlas
    target = Path(out)
    if target.suffix != ".h5ad":
        raise ConfigError(f"{target}: an export is an h5ad file; name it {target.with_suffix('.h5ad')}")
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{target} exists; name another --out, or remove it first")
    chosen = Selection.of(store, datasets=datasets, where=where, genes=genes, join=join)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        _write(temporary, chosen, on_progress or (lambda *_: None))
        flush(temporary)
        temporary.replace(target)
        sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(target, chosen.n_obs, len(chosen.genes))


def _write(path: Path, chosen: Selection, report: Progress) -> None:
    """The whole file, and a look at what it holds."""
    with h5py.File(path, "w") as file, ThreadPoolExecutor(cores(), thread_name_prefix="export") as pool:
        file.attrs.update(ROOT)
        written = {"X": _write_matrix(file.create_group("X"), chosen, chosen.counts, np.float32, pool, report)}
        empty: dict[str, Any] = {"layers": {}, "varm": {}, "obsp": {}, "varp": {}, "uns": {}}
        with ad.settings.override(allow_write_nullable_strings=True):
            for name, value in {"obs": chosen.obs(), "var": chosen.var(), "obsm": chosen.obsm(), **empty}.items():
                ad.io.write_elem(file, name, value)
        for name in chosen.layers():
            group, read = file.create_group(f"layers/{name}"), partial(chosen.layer, name)
            dtype = read((chosen.cells[0], 0, 1)).dtype
            written[f"layers/{name}"] = _write_matrix(group, chosen, read, dtype, pool, lambda *_: None)
    compare_sums(path, written)


def _write_matrix(
    group: h5py.Group,
    chosen: Selection,
    read: Callable[[Block], csr_matrix],
    dtype: Any,
    pool: Executor,
    report: Progress,
) -> Sums:
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    group.attrs["shape"] = np.array([chosen.n_obs, len(chosen.genes)], np.int64)
    data, indices = Deflated(group, "data", dtype, pool), Deflated(group, "indices", np.int32, pool)
    blocks, lengths, done, sums = list(chosen.blocks()), [], 0, Sums()
    for (part, _, _), block in zip(blocks, in_order(pool, read, blocks, ahead=cores() + 1), strict=True):
        data.append(block.data)
        indices.append(block.indices.astype(np.int32, copy=False))
        sums.add(block.data, block.indices)
        lengths.append(np.diff(block.indptr))
        done += block.shape[0]
        report(part.id, done, chosen.n_obs)
    data.close()
    indices.close()
    indptr = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum(dtype=np.int64)
    index = np.int32 if indptr[-1] < 2**31 else np.int64
    pointers = Deflated(group, "indptr", index, pool)
    pointers.append(indptr.astype(index))
    pointers.close()
    sums.add_pointers(indptr[1:])
    return sums


class Deflated:
    """A 1-D HDF5 dataset that grows by gzip chunks; they are compressed in threads, as HDF5 itself uses only one."""

    def __init__(self, group: h5py.Group, name: str, dtype: Any, pool: Executor) -> None:
        self._dataset = group.create_dataset(
            name, (0,), dtype, maxshape=(None,), chunks=(CHUNK,), compression="gzip", compression_opts=1, shuffle=True
        )
        self._pool, self._rest, self._length = pool, np.empty(0, dtype), 0

    def append(self, values: NDArray[Any]) -> None:
        """Add values at the end; whole chunks are written."""
        values = np.concatenate([self._rest, values])
        whole = len(values) // CHUNK * CHUNK
        self._put(values[:whole])
        self._rest = values[whole:].copy()

    def close(self) -> None:
        """Write what is left."""
        length, padding = len(self._rest), np.zeros(-len(self._rest) % CHUNK, self._rest.dtype)
        self._put(np.concatenate([self._rest, padding]))
        self._dataset.resize((self._length - len(padding) if length else self._length,))

    def _put(self, values: NDArray[Any]) -> None:
        if not len(values):
            return
        self._dataset.resize((self._length + len(values),))
        chunks = (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
        for chunk in in_order(self._pool, _deflate, chunks, ahead=4 * cores()):
            self._dataset.id.write_direct_chunk((self._length,), chunk)
            self._length += CHUNK


def _deflate(values: NDArray[Any]) -> bytes:
    """A chunk as HDF5's filters shuffle and gzip make it."""
    shuffled = np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T)
    return isal_zlib.compress(shuffled, 1)


def compare_sums(path: Path, written: dict[str, Sums]) -> None:
    """Read the matrices of an h5ad back as HDF5 decodes them; raises IncompleteError when they are not as written."""
    with h5py.File(path) as file:
        for name, wanted in written.items():
            x, found = file[name], Sums()
            for start in range(0, x["data"].shape[0], BLOCK):
                found.add(x["data"][start : start + BLOCK], x["indices"][start : start + BLOCK])
            found.add_pointers(x["indptr"][1:].astype(np.int64))
            if found != wanted:
                raise IncompleteError(
                    f"{path}: {name} was read back as {found.rows:,} cells with {found.nnz:,} values; {wanted.rows:,} "
                    f"with {wanted.nnz:,} were written, or their checksums differ: the disk or its file system loses "
                    "data; nothing was kept"
                )


def flush(path: Path) -> None:
    """Flush a file to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
