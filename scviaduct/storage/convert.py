"""h5ad files become one verified atlas: streamed, every value checked, read back, and there only when it is complete."""

from __future__ import annotations

import errno
import fcntl
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from dask.utils import parse_bytes
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scviaduct import __version__
from scviaduct.errors import ConfigError, DataError, IncompleteError, OutputExistsError
from scviaduct.storage.arrays import Growing, open_group
from scviaduct.storage.atlas import Atlas, Counts
from scviaduct.storage.audit import Audit
from scviaduct.storage.columns import as_text
from scviaduct.storage.genes import id_type, normalise
from scviaduct.storage.h5ad import CountsFile, open_counts
from scviaduct.storage.manifest import (
    ATLAS_MARKER,
    DATASET_MARKER,
    FORMAT,
    file_digest,
    sync_directory,
    sync_tree,
    tree_digest,
    write_json_atomic,
)

BLOCK = 2**21
"""Values in a block of cells: larger ones are slower, because fresh memory costs more than the work on it."""
LEAST_MEMORY = 512 * 2**20
"""The interpreter with its libraries and one shard of each array need about this much."""

T = TypeVar("T")
Progress = Callable[[str, int, int], None]


def convert(
    files: Sequence[str | Path],
    *,
    out: str | Path,
    counts: str | None = None,
    memory: str = "2GB",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Atlas:
    """Make an atlas of h5ad files, one data set each, named by the files' stems.

    Every count is checked, and what was written is read back. All files are looked at before the first is
    converted; whatever goes wrong, nothing is left at `out`. `counts` says which matrix holds the raw counts ("X",
    "raw" or a layer; default: found by looking), `memory` is a bound that does not depend on the size of the files
    (obs and var aside), `on_progress` is called with (data set, cells done, cells of all files).

    Raises:
        OutputExistsError: `out` is taken (with `overwrite`: by something that is not an atlas).
        UnreadableFileError, NotCountsError, DataError: a file cannot be used; the message names it and the fix.
        IncompleteError: the disk is full, or what was read back is not what was written.
    """
    paths = [Path(f) for f in ([files] if isinstance(files, str | Path) else files)]
    target, budget = Path(out), _bytes(memory)
    _refuse_existing(target, overwrite=overwrite)
    _check_ids(paths)
    n_obs = _probe(paths, counts)
    with _building(target, overwrite=overwrite) as partial:
        zarr.create_group(partial, zarr_format=3, attributes={"scviaduct": {"format": FORMAT}}).create_group("datasets")
        done, numeric = 0, dict[str, bool]()
        for path in paths:
            with open_counts(path, counts=counts) as file:
                report = _offset(on_progress, file.id, done, n_obs)
                _write_dataset(file, partial / "datasets" / file.id, budget, report)
                done += file.n_obs
                for name, column in file.obs.items():
                    numeric[str(name)] = numeric.get(str(name), True) and _is_numeric(column)
        ids = [path.stem for path in paths]
        vocabulary = _vocabulary(partial / "datasets", ids, [name for name in numeric if not numeric[name]])
        record = {"format": FORMAT, "version": __version__, "datasets": ids, "vocabulary": vocabulary}
        sync_tree(partial)
        write_json_atomic(partial / ATLAS_MARKER, record)
    return Atlas.open(target)


def _bytes(memory: str) -> int:
    try:
        budget = parse_bytes(memory)
    except ValueError:
        raise ConfigError(f"memory={memory!r} is not an amount of memory; write it like 2GB or 800MB") from None
    if budget < LEAST_MEMORY:
        raise ConfigError(f"memory={memory!r} is too little: {LEAST_MEMORY // 2**20}MiB is the least conversion needs")
    return budget


def _refuse_existing(out: Path, *, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputExistsError(f"{out} exists; name another --out, or remove it first")
    if not (out / ATLAS_MARKER).is_file():
        raise OutputExistsError(f"{out} exists and is not an atlas, so it is not overwritten; name another --out")


def _check_ids(paths: list[Path]) -> None:
    """Stems become names of directories: they must differ, also where case is ignored, and be valid in Zarr."""
    if not paths:
        raise DataError("no files to convert: name one h5ad or more")
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(path.stem.lower(), path)
        if other is not path:
            raise DataError(
                f"{other} and {path} would both become the data set {path.stem!r}: data sets are named by their "
                "files; rename one of them (or link it under another name)"
            )
        if path.stem.startswith("__") or not path.stem.strip("."):
            raise DataError(f"{path}: {path.stem!r} cannot name a data set; rename the file")


def _probe(paths: list[Path], counts: str | None) -> int:
    """Open every file once, so that a bad one is found before hours of work; number of cells in all."""
    n_obs, genes = 0, []
    for path in paths:
        with open_counts(path, counts=counts) as file:
            n_obs += file.n_obs
            genes.append(normalise(file.var.index))
    uses: dict[str, int] = {}
    for names in genes:
        for name in set(names):
            uses[name] = uses.get(name, 0) + 1
    for i, names in reversed(list(enumerate(genes))):
        if len(paths) > 1 and all(uses[name] == 1 for name in names):
            other = 0 if i else 1
            raise DataError(
                f"{paths[i]} shares no gene with the other files: it has {_kind(names)}, {paths[other]} has "
                f"{_kind(genes[other])}. Give all files the same kind of names in var; other organisms need an own atlas"
            )
    return n_obs


def _kind(names: list[str]) -> str:
    return f"{id_type(names)} names ({', '.join(names[:3])})"


def _offset(on_progress: Progress | None, dataset_id: str, done: int, n_obs: int) -> Callable[[int], None]:
    return lambda cells: on_progress(dataset_id, done + cells, n_obs) if on_progress else None


@contextmanager
def _building(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` at the end, or vanishes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    with _alone(out):
        _remove(partial)
        try:
            partial.mkdir()
            yield partial
            _refuse_existing(out, overwrite=overwrite)
            _remove(old)
            if out.exists():
                out.rename(old)
            partial.rename(out)
            sync_directory(out.parent)
        except Exception as error:
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise IncompleteError(f"the disk of {out} is full; nothing was kept: free some space") from error
            raise
        finally:
            _remove(partial)
        _remove(old)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Nobody else builds `out` meanwhile: two processes in one directory would mix their data."""
    path = out.with_name(f".{out.name}.lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputExistsError(f"another process is making {out} at this moment; wait for it") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _write_dataset(file: CountsFile, path: Path, memory: int, report: Callable[[int], None]) -> None:
    """One data set, its manifest last."""
    group = zarr.create_group(path, zarr_format=3)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    with ad.settings.override(allow_write_nullable_strings=True):
        for name, value in {"obs": file.obs, "var": file.var, "uns": {}}.items():
            # Columns are small: one file each. anndata warns of a change of its default unless told.
            ad.io.write_elem(group, name, value, dataset_kwargs={"shards": None})
    written = _write_counts(file, group.create_group("X"), memory, path.parent, report)
    _verify(path, written)
    _consolidate(path)
    audit = replace(written.audit, duplicate_obs_names=int(file.obs.index.duplicated().sum()))
    manifest = {
        "id": file.id,
        "source": file.path.name,
        "source_bytes": file.path.stat().st_size,
        "source_sha256": file_digest(file.path),
        "n_obs": audit.n_obs,
        "n_vars": audit.n_vars,
        "nnz": audit.nnz,
        "sum": audit.total,
        "largest": audit.largest,
        "matrix": audit.matrix,
        "dtype": audit.dtype,
        "zero_count_cells": audit.zero_count_cells,
        "explicit_zeros": audit.explicit_zeros,
        "duplicate_entries": audit.duplicate_entries,
        "duplicate_obs_names": audit.duplicate_obs_names,
        "files": tree_digest(path),
    }
    write_json_atomic(path / DATASET_MARKER, manifest)


def _consolidate(path: Path) -> None:
    """All metadata of a data set in one file: opened at once, and Zarr has no need to list the directory.

    A listing would find the manifest and warn that it is no part of Zarr.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part in the Zarr format 3")
        zarr.consolidate_metadata(path, zarr_format=3)


@dataclass(frozen=True)
class _Written:
    """What must be found again when the data set is read."""

    audit: Audit
    checksum: int
    """`_checksum` of all values."""
    indptr: NDArray[np.int64]
    """Row pointers."""


def _write_counts(
    file: CountsFile, group: zarr.Group, memory: int, scratch: Path, report: Callable[[int], None]
) -> _Written:
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    group.attrs["shape"] = [file.n_obs, file.n_vars]
    # The fill values are ones that are never stored, so that a chunk that is gone can be told from data.
    index = np.min_scalar_type(file.n_vars)
    data = Growing(group, "data", np.dtype(np.uint8), fill=0)
    indices = Growing(group, "indices", index, fill=int(np.iinfo(index).max))
    indptr = Growing(group, "indptr", np.dtype(np.int64), fill=-1)
    total, checksum, pointers = Audit(file.matrix, "", n_vars=file.n_vars), 0, [np.zeros(1, np.int64)]
    for first, block, audit in _ahead(file.audited(_rows(file, memory), memory // 8, scratch)):
        checksum = _checksum(block, total.nnz, checksum)
        data.append(block.data)
        indices.append(block.indices)
        pointers.append(block.indptr[1:] + np.int64(total.nnz))
        total = replace(total + audit, dtype=audit.dtype)
        report(first + block.shape[0])
    indptr.append(np.concatenate(pointers))
    for array in (data, indices, indptr):
        array.close()
    return _Written(total, checksum, np.concatenate(pointers))


def _rows(file: CountsFile, memory: int) -> int:
    """Cells a block: two blocks are alive, each value in up to 40 bytes (as read, as checked, as written)."""
    per_row = max(1, file.nnz // file.n_obs)
    return int(np.clip(min(memory // (8 * 40), BLOCK) // per_row, 16, 8192))


def _checksum(block: csr_matrix, position: int, checksum: int) -> int:
    """Sum of count · (gene index + position among all values) modulo 2**64: tells lost, changed and swapped values."""
    for start in range(0, block.nnz, 2**15):  # parts that stay in the processor's cache
        part = slice(start, start + 2**15)
        weight = block.indices[part].astype(np.uint64)
        weight += np.arange(position + start, position + start + len(weight), dtype=np.uint64)
        checksum += int(np.dot(block.data[part].astype(np.uint64), weight))
    return checksum % 2**64


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made in a thread while the last is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        pending = pool.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = pool.submit(next, items, None)
            yield item


def _verify(path: Path, written: _Written) -> None:
    """Read the data set back from disk and compare it with what was read from the source."""
    counts, audit = Counts(path), written.audit
    nnz = total = checksum = 0
    for _, block in counts.blocks(max(16, BLOCK * counts.n_obs // max(1, audit.nnz))):
        checksum = _checksum(block, nnz, checksum)
        nnz, total = nnz + block.nnz, total + int(block.data.sum(dtype=np.int64))
    found, wanted = (nnz, total, checksum), (audit.nnz, audit.total, written.checksum)
    if found != wanted or not np.array_equal(counts.indptr, written.indptr):
        raise IncompleteError(
            f"{path}: read back (non-zeros, sum, checksum) {found}, but {wanted} were written: "
            "the disk or its file system loses data; nothing was kept"
        )


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _vocabulary(datasets: Path, ids: list[str], columns: list[str]) -> dict[str, list[str]]:
    """Values that occur in each column, as sorted text; obs is taken from what was written."""
    found: dict[str, set[str]] = {column: set() for column in columns}
    for name in ids:
        obs = open_group(datasets / name / "obs")
        columns_here: Any = obs.attrs["column-order"]
        for column in found.keys() & set(columns_here):
            found[column].update(as_text(pd.Series(ad.io.read_elem(obs[column]))).categories)
    return {column: sorted(values) for column, values in found.items()}
