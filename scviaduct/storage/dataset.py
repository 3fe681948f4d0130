"""One file becomes one data set: streamed, every value checked, read back, and there only when it is complete.

It is built at ".<id>.partial" beside its final place. Every half minute a checkpoint says how far it is; whoever
builds it again goes on from there, and the bytes do not tell.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from scipy.sparse import csr_matrix

from scviaduct import __version__
from scviaduct.errors import DataError, IncompleteError
from scviaduct.storage import arrays
from scviaduct.storage.arrays import DICT, ROOT, make_array, make_group, open_array
from scviaduct.storage.audit import Audit
from scviaduct.storage.checkpoints import Checkpoint
from scviaduct.storage.csr import CsrWriter, Sums, read_sums
from scviaduct.storage.h5ad import CountsFile, open_counts
from scviaduct.storage.locks import locked
from scviaduct.storage.manifest import (
    DATASET_MARKER,
    disk_is_full,
    read_json,
    remove_temporaries,
    sync_directory,
    sync_file,
    sync_tree,
    tree_digest,
    write_json_atomic,
)

BLOCK = 2**21
"""Values in a block of cells: larger ones are slower, because fresh memory costs more than the work on it."""
PAUSE = 30.0
"""What a kill can cost at most; a checkpoint holds up to a shard of each array (30 MB), so more often would be felt."""
_COUNTS = "X"

T = TypeVar("T")
Report = Callable[[int], None]


@dataclass(frozen=True)
class DatasetPlan:
    """What becomes of one file."""

    path: Path
    """The file, absolute."""
    given: str
    """Its path as the user gave it."""
    id: str
    """Name of the data set."""
    counts: str | None = None
    """The matrix of raw counts; None: found by looking."""
    obsm: tuple[str, ...] = ()
    """Elements of obsm to keep, where the file has them."""
    layers: tuple[str, ...] = ()
    """Layers to keep, where the file has them."""
    sum_duplicates: bool = False
    """Genes that are named twice are added up."""


def source_facts(path: Path) -> list[int]:
    """[bytes, newest time of change in ns] of a file, or of all files of a Zarr store."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    stats = [file.stat() for file in files]
    return [sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]


def write_dataset(plan: DatasetPlan, folder: Path, *, memory: int, report: Report | None = None) -> dict[str, Any]:
    """Make `folder`/<id> of a file, or go on where a killed process was, and return its manifest.

    `memory` bounds the bytes in use (obs and var aside), `report` is called with the number of cells done. A file that is not a matrix of counts leaves nothing.

    Raises:
        UnreadableFileError, NotCountsError, DataError: the file cannot be used, or changed meanwhile.
        IncompleteError: what was read back is not what was written.
        OSError: the disk is full, …; what was done stays, and the next call goes on.
    """
    final = folder / plan.id
    busy = f"{final} is being made by another process at this moment; wait for it"
    with locked(folder / f".{plan.id}.lock", busy=busy, patience=60):
        if not (final / DATASET_MARKER).is_file():
            before = source_facts(plan.path) if plan.path.exists() else []
            origin = {"plan": asdict(plan) | {"path": str(plan.path)}, "source": before, "version": __version__}
            checkpoint = Checkpoint(folder / f".{plan.id}.checkpoint", origin)
            try:
                with open_counts(plan.path, counts=plan.counts, sum_duplicates=plan.sum_duplicates) as file:
                    _Building(plan, file, final, checkpoint, memory, report or (lambda cells: None)).run()
                if source_facts(plan.path) != before:
                    raise DataError(f"{plan.path} changed while it was converted: convert it again")
            except (DataError, IncompleteError) as error:
                if not disk_is_full(error):
                    forget(folder, plan.id)
                raise
            _publish(final, checkpoint)
        return read_json(final / DATASET_MARKER)


def partial_folder(final: Path) -> Path:
    """Where a data set lies until it is complete."""
    return final.with_name(f".{final.name}.partial")


def forget(folder: Path, dataset_id: str) -> None:
    """Remove what there is of an unfinished data set."""
    (folder / f".{dataset_id}.checkpoint").unlink(missing_ok=True)
    if partial_folder(folder / dataset_id).exists():
        shutil.rmtree(partial_folder(folder / dataset_id))


def _publish(final: Path, checkpoint: Checkpoint) -> None:
    partial = partial_folder(final)
    sync_tree(partial)
    partial.rename(final)
    sync_directory(final.parent)
    checkpoint.remove()


class _Building:
    """One data set on its way to completeness."""

    def __init__(
        self,
        plan: DatasetPlan,
        file: CountsFile,
        final: Path,
        checkpoint: Checkpoint,
        memory: int,
        report: Report,
    ) -> None:
        self._plan, self._file, self._checkpoint = plan, file, checkpoint
        self._memory, self._report = memory, report
        self._path = partial_folder(final)
        self._layers = [name for name in plan.layers if name in file.layer_names()]
        self._obsm = [name for name in plan.obsm if name in file.obsm_names()]
        self._audit = Audit(file.matrix, "", n_vars=file.n_vars)
        self._done: dict[str, Sums] = {}
        self._synced: set[Path] = set()
        self._saved_at = time.monotonic()

    def run(self) -> None:
        """Do what is left, up to the manifest."""
        parts = [_COUNTS, *(f"layers/{name}" for name in self._layers)]
        saved = self._begin(parts)
        if self._layers:
            make_group(self._path / "layers", DICT)
        for part in parts[len(self._done) :]:
            self._write_matrix(part, saved)
            saved = None
        self._write_rest()
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as beside:
            digest = beside.submit(self._file.digest)
            self._verify()
            self._write_manifest(digest.result())

    def _begin(self, parts: list[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """What the checkpoint says of the matrix that was being written; everything that came after it is removed."""
        saved = self._checkpoint.load() if self._path.exists() else None
        if saved is None:
            forget(self._path.parent, self._plan.id)
            make_group(self._path, ROOT)
            return None
        state, _ = saved
        self._audit = Audit(**state["audit"])
        self._done = {part: Sums(**sums) for part, sums in state["done"].items()}
        kept = {self._path / part for part in parts[: len(self._done) + 1]} | {self._path / "layers"}
        for entry in [*self._path.iterdir(), *self._path.glob("layers/*")]:
            if entry not in kept and entry.is_dir():
                shutil.rmtree(entry)
            elif entry not in kept:
                entry.unlink()
        make_group(self._path, ROOT)
        return saved

    def _write_matrix(self, part: str, saved: tuple[dict[str, Any], dict[str, np.ndarray]] | None) -> None:
        shape = self._file.n_obs, self._file.n_vars
        writer = CsrWriter(self._path / part, shape, np.dtype(np.uint8), saved) if saved else None
        for block, audit in _ahead(self._blocks(part, writer.rows if writer else 0)):
            if writer is None:
                dtype = np.dtype(np.uint8) if part == _COUNTS else block.dtype
                writer = CsrWriter(self._path / part, shape, dtype)
            writer.append(block)
            if audit is not None:
                self._audit = replace(self._audit + audit, dtype=audit.dtype)
                self._report(writer.rows)
            if time.monotonic() - self._saved_at >= PAUSE:
                self._save(writer)
        assert writer is not None  # a file has at least one cell
        if self._checkpoint.path.exists():
            self._save(writer)  # what it relies on may go when the matrix is closed
        writer.close()
        self._done[part] = writer.sums

    def _blocks(self, part: str, start: int) -> Iterator[tuple[csr_matrix, Audit | None]]:
        rows, memory = _rows(self._file, self._memory), self._memory // 8
        if part == _COUNTS:
            for _, block, audit in self._file.audited(rows, memory, self._path, start):
                yield block, audit
        else:
            name = part.removeprefix("layers/")
            for _, block in self._file.layer_blocks(name, rows, memory, self._path, start):
                yield block, None

    def _save(self, writer: CsrWriter) -> None:
        files = set(writer.files()) - self._synced
        for path in [*files, *{file.parent for file in files}]:
            sync_file(path)
        self._synced |= files
        state, tails = writer.state()
        done = {name: vars(sums) for name, sums in self._done.items()}
        self._checkpoint.save({"done": done, "audit": asdict(self._audit), **state}, tails)
        writer.drop_old()
        self._saved_at = time.monotonic()

    def _write_rest(self) -> None:
        group = zarr.open_group(self._path, mode="r+", zarr_format=3)
        with ad.settings.override(allow_write_nullable_strings=True):
            arrays = [name for name in self._obsm if not isinstance(self._file.obsm_rows(name, 0, 1), pd.DataFrame)]
            named = {f"{name}_names": self._file.obsm_columns(name) for name in arrays}
            uns = {key: np.array(names, object) for key, names in named.items() if names}
            for name, value in {"obs": self._file.obs, "var": self._file.var, "uns": uns}.items():
                # Columns are small: one file each. anndata warns of a change of its default unless told.
                ad.io.write_elem(group, name, value, dataset_kwargs={"shards": None})
            if self._obsm:
                make_group(self._path / "obsm", DICT)
            for name in self._obsm:
                if isinstance(self._file.obsm_rows(name, 0, 1), np.ndarray):
                    _write_dense(self._path / "obsm" / name, self._file, name)
                else:
                    element = self._file.obsm_element(name)
                    ad.io.write_elem(group, f"obsm/{name}", element, dataset_kwargs={"shards": None})

    def _verify(self) -> None:
        """Read the matrices back from disk and compare them with what was read from the source."""
        for part, wanted in self._done.items():
            found = read_sums(self._path / part)
            if found != wanted:
                raise IncompleteError(
                    f"{self._path / part}: read back {_shown(found)}, but {_shown(wanted)} were written: the disk or "
                    "its file system loses data; nothing was kept of this data set"
                )

    def _write_manifest(self, digest: str) -> None:
        _consolidate(self._path)
        remove_temporaries(self._path)
        file, audit = self._file, self._audit
        manifest = {
            "id": file.id,
            "source": file.path.name,
            "source_path": self._plan.given,
            "source_bytes": file.n_bytes,
            "source_sha256": digest,
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
            "duplicate_obs_names": int(file.obs.index.duplicated().sum()),
            "summed_features": file.summed_features,
            "other_features": file.other_features,
            "obsm": self._obsm,
            "layers": self._layers,
            "files": tree_digest(self._path),
        }
        write_json_atomic(self._path / DATASET_MARKER, manifest)


def _rows(file: CountsFile, memory: int) -> int:
    """Cells a block: two blocks are alive, each value in up to 40 bytes (as read, as checked, as written)."""
    per_row = max(1, file.nnz // file.n_obs)
    return int(np.clip(min(memory // (8 * 40), BLOCK) // per_row, 16, 8192))


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made in a thread while the last is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        pending = pool.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = pool.submit(next, items, None)
            yield item


def _write_dense(path: Path, file: CountsFile, name: str) -> None:
    """An array of obsm, in parts of whole shards; it is read back."""
    first = file.obsm_rows(name, 0, 1)
    rows = max(1, arrays.CHUNK // max(1, int(np.prod(first.shape[1:]))))
    shard = rows * (arrays.SHARD // arrays.CHUNK)
    array = make_array(
        path,
        shape=(file.n_obs, *first.shape[1:]),
        dtype=first.dtype,
        chunks=(rows, *first.shape[1:]),
        shards=(shard, *first.shape[1:]),
        fill=first.dtype.type(),
        attributes={"encoding-type": "array", "encoding-version": "0.2.0"},
    )
    written = hashlib.sha256()
    for start in range(0, file.n_obs, shard):
        values = np.ascontiguousarray(file.obsm_rows(name, start, min(start + shard, file.n_obs)))
        array[start : start + shard] = values
        written.update(values.tobytes())
    found, stored = hashlib.sha256(), open_array(path)
    for start in range(0, file.n_obs, shard):
        found.update(np.asarray(stored[start : start + shard]).tobytes())
    if found.digest() != written.digest():
        raise IncompleteError(f"{path}: read back other values than were written: the disk loses data")


def _shown(sums: Sums) -> str:
    return f"{sums.rows:,} rows with {sums.nnz:,} values (checksums {sums.values:x}, {sums.pointers:x})"


def _consolidate(path: Path) -> None:
    """All metadata of a data set in one file: opened at once, and Zarr has no need to list the directory.

    A listing would find the manifest and warn that it is no part of Zarr.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part in the Zarr format 3")
        zarr.consolidate_metadata(path, zarr_format=3)
