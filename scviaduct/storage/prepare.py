"""prepare: choose the training genes, shuffle all cells, and write them as a view that a loader reads at full speed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import dask.utils
import numpy as np
import zarr
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from zarr.codecs import BloscCodec, Crc32cCodec

from scviaduct.errors import ConfigError, DataError, IncompleteError, OutputExistsError
from scviaduct.storage.atlas import Atlas, DatasetInfo
from scviaduct.storage.columns import DATASET, OBS_DATASET, Column, Tally, view_columns
from scviaduct.storage.genes import normalise, select
from scviaduct.storage.hvg import batches, gene_columns, highly_variable_genes
from scviaduct.storage.manifest import VIEW_MARKER, read_json, sync_directory, sync_tree, tree_digest, write_json_atomic
from scviaduct.storage.shuffle import Buckets, shuffle_keys
from scviaduct.storage.view import FORMAT, View, array_name

log = logging.getLogger(__name__)

_CHUNK, _CHUNKS_PER_SHARD = 65_536, 128
"""Non-zeros decoded at once, about a fifth of a block of 1,024 cells, so that little is decoded in vain."""
_BLOCKS_PER_SHARD = 256


def prepare(
    atlas: str | Path | Atlas,
    *,
    genes: int | str | Path | Sequence[str] = 2000,
    batch_key: str | None = None,
    name: str = "default",
    seed: int = 0,
    block_rows: int = 1024,
    memory: str = "2GB",
    join: Literal["intersection", "union"] = "intersection",
    overwrite: bool = False,
) -> View:
    """Write the training view `name` of an atlas: the chosen genes of all its cells, in one random order.

    `genes` is a number of highly variable genes (found per value of the obs column `batch_key`, by default per data
    set), "all", names, or the path of a text file with one name per line. `join` says which genes are in question:
    those of every data set, or of any (a gene counts as zero where it was not measured). Cells without a count over the
    chosen genes are left out and counted. `memory` bounds the shuffle; it does not change the result.

    A finished view of the same recipe is returned as it is. Raises OutputExistsError when `name` holds another one
    (unless `overwrite`), DataError when genes or batches do not fit the atlas, ConfigError for a wrong option.
    """
    store = Atlas.open(atlas) if isinstance(atlas, str | Path) else atlas
    recipe = {
        "genes": _gene_request(genes),
        "flavor": "seurat_v3",
        "batch_key": batch_key,
        "join": join,
        "seed": int(seed),
        "block_rows": _positive(block_rows, "block_rows"),
        "atlas": store.digest(),
    }
    n_bytes = _parse_memory(memory)
    final = _checked_path(store, name)
    with _locked(final):
        if _same_view(final, recipe, overwrite=overwrite):
            return View.open(store.path, name)
        temporary = final.with_name(f".{name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed: the lock says it is nobody's
        try:
            _build(store, temporary, recipe, n_bytes)
            _publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return View.open(store.path, name)


def _gene_request(genes: int | str | Path | Sequence[str]) -> int | str | list[str]:
    """What the recipe remembers of `genes`: a number, "all" or the names."""
    if isinstance(genes, int | np.integer):
        return _positive(int(genes), "genes")
    if genes == "all":
        return "all"
    if isinstance(genes, str | Path):
        if not Path(genes).is_file():
            raise ConfigError(f"genes must be a number, 'all', names, or the path of a text file; {genes} is no file.")
        lines = Path(genes).read_text().splitlines()
        genes = [line.strip() for line in lines if line.strip()]
    names = normalise(genes)
    twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if twice or not names:
        raise DataError(f"{len(twice)} genes are named twice: {', '.join(twice[:5])}" if twice else "No gene is named.")
    return names


def _positive(value: int, option: str) -> int:
    if value < 1:
        raise ConfigError(f"{option} must be at least 1, not {value}")
    return int(value)


def _parse_memory(memory: str) -> int:
    try:
        return _positive(int(dask.utils.parse_bytes(memory)), "memory")
    except ValueError as error:
        raise ConfigError(f"memory must be a size such as '2GB', not {memory!r}") from error


def _checked_path(atlas: Atlas, name: str) -> Path:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"A view's name consists of letters, digits, '_', '-' and '.': not {name!r}")
    return Path(atlas.path) / "views" / name


@contextlib.contextmanager
def _locked(final: Path) -> Iterator[None]:
    """Only one process makes a view at a time; others wait, then find it made. Nothing is left of the lock."""
    path = final.with_name(f".{final.name}.lock")
    while (lock := _lock(path)) is None:
        pass
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other views are in it
                path.parent.rmdir()


def _lock(path: Path) -> TextIO | None:
    """The lock, taken; None when its holder removed the file, or its folder, while this process waited."""
    path.parent.mkdir(exist_ok=True)
    try:
        file = path.open("w")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_EX)
    if os.fstat(file.fileno()).st_nlink:
        return file
    file.close()
    return None


def _same_view(final: Path, recipe: dict[str, Any], *, overwrite: bool) -> bool:
    if overwrite or not (final / VIEW_MARKER).is_file():
        return False
    made = read_json(final / VIEW_MARKER)["recipe"]
    if made == recipe:
        return True
    different = [key for key in recipe if recipe[key] != made.get(key)]
    what = "the atlas has changed since" if different == ["atlas"] else f"different: {', '.join(different)}"
    raise OutputExistsError(
        f"View {final.name!r} was made by another recipe ({what}). "
        "Choose another --name, or replace it with --overwrite."
    )


def _publish(temporary: Path, final: Path) -> None:
    sync_tree(temporary)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _build(atlas: Atlas, path: Path, recipe: dict[str, Any], memory: int) -> None:
    genes = _choose_genes(atlas, recipe)
    columns, identifiers = view_columns(
        atlas.vocabulary, (atlas.obs(d.id) for d in atlas.datasets), [d.id for d in atlas.datasets]
    )
    if any(c.name == OBS_DATASET for c in columns):
        log.warning("the obs column %r is called %r in views: %r is the data set id", DATASET, OBS_DATASET, DATASET)
    path.mkdir()
    buckets, zero = _spill(atlas, path / "buckets", genes, columns, recipe, memory)
    if not buckets.n_cells:
        raise DataError(f"No cell of {atlas.path} has a count over the {len(genes)} chosen genes.")
    tallies = _write(path, buckets, genes, columns, recipe)
    shutil.rmtree(path / "buckets")
    manifest = {
        "format": FORMAT,
        "recipe": recipe,
        "n_rows": buckets.n_cells,
        "nnz": buckets.nnz,
        "sum": buckets.sum,
        "zero_count_cells": zero,
        "columns": {tally.column.name: tally.to_dict() for tally in tallies},
        "identifiers": identifiers,
        "genes": list(genes),
    }
    # Not over the files: zarrs encodes chunks in parallel, so the same content lies in a shard in any order.
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    write_json_atomic(path / VIEW_MARKER, manifest | {"digest": digest, "files": tree_digest(path)})


def _choose_genes(atlas: Atlas, recipe: dict[str, Any]) -> tuple[str, ...]:
    request, join = recipe["genes"], recipe["join"]
    batches(atlas, recipe["batch_key"])  # a column that is misspelt is refused also when nothing has to be ranked
    if isinstance(request, list):
        return tuple(request)
    available = atlas.genes(join)
    if not available:
        names = "; ".join(f"{d.id}: {', '.join(map(str, atlas.var(d.id).index[:2]))}" for d in atlas.datasets[:4])
        raise DataError(f"The data sets of {atlas.path} have no gene in common ({names}).")
    if request == "all" or request >= len(available):
        return tuple(available)
    ranked = highly_variable_genes(atlas, n_top_genes=request, genes=available, batch_key=recipe["batch_key"])
    return tuple(ranked.index[ranked["highly_variable"]])


def _spill(
    atlas: Atlas, directory: Path, genes: Sequence[str], columns: list[Column], recipe: dict[str, Any], memory: int
) -> tuple[Buckets, dict[str, int]]:
    """All cells with a count over the genes, in buckets; and the number of others in each data set."""
    positions = gene_columns(atlas, genes)
    _refuse_absent(positions, genes, recipe)
    dtype = _record_dtype(columns)
    # 8 bytes a non-zero in memory; one bucket is held about three times while it is sorted
    total = sum(d.nnz * 8 + d.n_obs * dtype.itemsize for d in atlas.datasets)
    buckets = Buckets(directory, n_buckets=max(1, -(-total * 8 // memory)), buffer_bytes=memory // 8)
    zero = {}
    for number, info in enumerate(atlas.datasets):
        obs = _encoded(atlas, info, columns)
        kept = 0
        for first, block in atlas.chunks(info.id, rows=_chunk_rows(info, memory)):
            records, counts = _cells(first, select(block, positions[info.id], len(genes)), dtype)
            records["key"] = shuffle_keys(recipe["seed"], info.id, records["row"])
            records["dataset"] = number
            for field, values in obs.items():
                records[field] = values[records["row"]]
            buckets.add(records, counts)
            kept += len(records)
        zero[info.id] = info.n_obs - kept
    return buckets, zero


def _refuse_absent(positions: dict[str, NDArray[np.int32]], genes: Sequence[str], recipe: dict[str, Any]) -> None:
    if recipe["join"] == "union":
        return
    for id_, columns in positions.items():
        absent = np.setdiff1d(np.arange(len(genes)), columns)
        if len(absent):
            shown = ", ".join(genes[i] for i in absent[:5])
            raise DataError(
                f"Data set {id_!r} lacks {len(absent)} of the {len(genes)} chosen genes (e.g. {shown}). "
                "Leave them out, or use --join union: they then count as zero there."
            )


def _record_dtype(columns: list[Column]) -> np.dtype:
    fields: list[tuple[str, Any]] = [("key", np.uint64), ("dataset", np.int32), ("row", np.int64), ("nnz", np.int64)]
    return np.dtype(fields + [(f"obs{i}", column.dtype) for i, column in enumerate(columns)])


def _encoded(atlas: Atlas, info: DatasetInfo, columns: list[Column]) -> dict[str, NDArray[Any]]:
    frame = atlas.obs(info.id)
    encoded = {}
    for i, column in enumerate(columns):
        if column.name == DATASET:
            code = (column.categories or ()).index(info.id)
            encoded[f"obs{i}"] = np.full(info.n_obs, code, column.dtype)
        else:
            source = DATASET if column.name == OBS_DATASET else column.name
            encoded[f"obs{i}"] = column.encode(frame.get(source), info.n_obs)
    return encoded


def _chunk_rows(info: DatasetInfo, memory: int) -> int:
    # A chunk costs about 16 bytes a non-zero while genes are picked from it; 1/16 of the memory is for that.
    per_row = max(1, info.nnz // max(1, info.n_obs)) * 16
    return int(np.clip(memory // 16 // per_row, 256, 8192))


def _cells(first: int, counts: csr_matrix, dtype: np.dtype) -> tuple[NDArray[Any], csr_matrix]:
    """Records and counts of a chunk's cells that have a count."""
    nnz = np.diff(counts.indptr)
    kept = np.flatnonzero(nnz)
    records = np.zeros(len(kept), dtype)
    records["row"], records["nnz"] = first + kept, nnz[kept]
    return records, counts[kept]


def _write(
    path: Path, buckets: Buckets, genes: Sequence[str], columns: list[Column], recipe: dict[str, Any]
) -> list[Tally]:
    """Write the arrays of the view from the buckets, in shuffled order; returns what the obs columns contain."""
    tallies = [Tally(column) for column in columns]
    writers = _writers(path, buckets, len(genes), columns, recipe["block_rows"])
    writers["indptr"].append(np.zeros(1, np.int64))
    nnz = total = 0
    for records, counts in buckets.read(len(genes)):
        writers["data"].append(counts.data)
        writers["indices"].append(counts.indices)
        writers["indptr"].append(nnz + np.cumsum(records["nnz"]))
        writers["source/dataset"].append(records["dataset"])
        writers["source/row"].append(records["row"])
        for i, tally in enumerate(tallies):
            writers[array_name(tally.column.name)].append(records[f"obs{i}"])
            tally.add(records[f"obs{i}"], records["dataset"], records["row"])
        nnz += counts.nnz
        total += int(counts.data.sum(dtype=np.int64))
    for writer in writers.values():
        writer.close()
    if (nnz, total) != (buckets.nnz, buckets.sum):
        raise IncompleteError(f"{path}: {buckets.nnz - nnz} non-zeros were lost between shuffling and writing.")
    return tallies


class _Writer:
    """Appends to a 1-D array in whole shards."""

    def __init__(self, array: zarr.Array) -> None:
        self.array, self.position = array, 0
        self._waiting: list[NDArray[Any]] = []

    def append(self, values: NDArray[Any]) -> None:
        """Take values; whole shards of them are written."""
        self._waiting.append(values)
        shard = self.array.shards[0]  # type: ignore[index]
        whole = sum(map(len, self._waiting)) // shard * shard
        if whole:
            self._flush(whole)

    def close(self) -> None:
        """Write the rest; raises IncompleteError when values are missing."""
        self._flush(sum(map(len, self._waiting)))
        if self.position != self.array.shape[0]:
            raise IncompleteError(f"{self.array.path}: {self.position} of {self.array.shape[0]} values were written.")

    def _flush(self, n: int) -> None:
        values = np.concatenate(self._waiting)
        self.array[self.position : self.position + n] = values[:n].astype(self.array.dtype)
        self._waiting, self.position = [values[n:]], self.position + n


def _writers(path: Path, buckets: Buckets, n_genes: int, columns: list[Column], block_rows: int) -> dict[str, _Writer]:
    """One writer for each array of a view. No stored value equals its array's fill value."""
    data, index = np.min_scalar_type(buckets.largest), np.min_scalar_type(max(n_genes, 256))
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        group = zarr.create_group(str(path), zarr_format=3, overwrite=False)

        def array(name: str, length: int, dtype: np.dtype, fill: float, chunk: int, per_shard: int) -> _Writer:
            created = group.create_array(
                name,
                shape=(length,),
                dtype=dtype,
                chunks=(chunk,),
                shards=(chunk * per_shard,),
                compressors=[BloscCodec(cname="lz4", clevel=3, shuffle="shuffle"), Crc32cCodec()],
                fill_value=fill,
            )
            return _Writer(created)

        def cells(name: str, dtype: np.dtype, fill: float) -> _Writer:
            return array(name, buckets.n_cells, dtype, fill, block_rows, _BLOCKS_PER_SHARD)

        int64 = np.dtype(np.int64)
        return {
            "data": array("data", buckets.nnz, data, 0, _CHUNK, _CHUNKS_PER_SHARD),
            "indices": array("indices", buckets.nnz, index, np.iinfo(index).max, _CHUNK, _CHUNKS_PER_SHARD),
            "indptr": array("indptr", buckets.n_cells + 1, int64, -1, block_rows, _BLOCKS_PER_SHARD),
            "source/dataset": cells("source/dataset", np.dtype(np.int32), -1),
            "source/row": cells("source/row", int64, -1),
            **{array_name(c.name): cells(array_name(c.name), c.dtype, c.fill) for c in columns},
        }
