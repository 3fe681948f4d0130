"""Zarr arrays as this package makes them: the same values give the same bytes, and what a kill leaves can be continued.

Metadata files are written in one step. Values go through zarrs with one thread for each array: with more it puts the
chunks of a shard into the file in the order in which they get ready, and two runs would differ.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from scviaduct.storage.manifest import write_atomic

CHUNK = 2**17
"""Values in a chunk, the smallest part that is decoded: about 64 cells of a 20,000-gene data set."""
SHARD = 2**23
"""Values in a shard, one file."""
METADATA = "zarr.json"

Codec: TypeAlias = Literal["zstd", "lz4", "none"]
Attributes: TypeAlias = Mapping[str, Any]

_ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
_ONE_THREAD = {"threading.max_workers": 1, "codec_pipeline.chunk_concurrent_maximum": 1, "async.concurrency": 1}


def open_array(path: Path, mode: Literal["r", "r+"] = "r") -> zarr.Array:
    """Open an array, decoded by zarrs; the setting holds for this array only."""
    with zarr.config.set(_ZARRS):
        return zarr.open_array(path, mode=mode, zarr_format=3)


def open_group(path: Path) -> zarr.Group:
    """Open a Zarr v3 group for reading."""
    return zarr.open_group(path, mode="r", zarr_format=3)


@contextmanager
def deterministic() -> Iterator[None]:
    """Arrays that are made or opened inside the block are written by zarrs with one thread each."""
    with zarr.config.set({"threading.max_workers": 32}):
        zarr.create_group({})  # zarr's pool keeps the first number it meets for good, and one thread would serve all
    with zarr.config.set({**_ZARRS, **_ONE_THREAD}):
        yield


def codecs(codec: Codec) -> list[BloscCodec | Crc32cCodec]:
    """How chunks are compressed: "zstd" for data sets, "lz4" for views, "none" for disks faster than lz4."""
    shuffled = {
        # One block a chunk: blosc's own choice, 32 KB, costs a quarter more to encode and two thirds more to decode.
        "zstd": BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", blocksize=2**18),
        "lz4": BloscCodec(cname="lz4", clevel=3, shuffle="shuffle"),
    }
    return [*([shuffled[codec]] if codec in shuffled else []), Crc32cCodec()]


def make_group(path: Path, attributes: Attributes | None = None) -> None:
    """A group at `path`, whose members stay if it is there already."""
    files: dict[str, Any] = {}
    zarr.create_group(files, zarr_format=3, attributes=dict(attributes or {}))
    _write_metadata(path, files)


def make_array(
    path: Path,
    *,
    shape: tuple[int, ...],
    dtype: np.dtype,
    chunks: tuple[int, ...],
    shards: tuple[int, ...],
    fill: Any,
    codec: Codec = "zstd",
    attributes: Attributes | None = None,
) -> zarr.Array:
    """An array at `path`, open for writing; chunks that are there already stay, and belong to it."""
    files: dict[str, Any] = {}
    zarr.create_array(
        files,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        compressors=codecs(codec),
        fill_value=fill,
        attributes=dict(attributes or {}),
        zarr_format=3,
    )
    _write_metadata(path, files)
    with deterministic():
        return zarr.open_array(path, mode="r+", zarr_format=3)


def _write_metadata(path: Path, files: dict[str, Any]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    write_atomic(path / METADATA, files[METADATA].to_bytes())


class Growing:
    """A 1-D sharded array of unknown length in the folder `path`: whole shards are written, and each once.

    Unsigned values that do not fit make the type wider. While the array grows it lies at "<path>.<type>"; the one of
    a type before it stays until `drop_old`, so that a checkpoint that names it can still be continued from.
    """

    def __init__(self, path: Path, dtype: np.dtype, *, fill: int | float, codec: Codec = "zstd") -> None:
        self._path, self._fill, self._codec = path, fill, codec
        self._whole = self._n = 0  # values in shards on disk, and in the buffer
        self._start(dtype)

    @classmethod
    def resume(cls, path: Path, tail: NDArray[Any], whole: int, *, fill: int | float, codec: Codec = "zstd") -> Growing:
        """Go on where `state` was taken; shards that were written since are thrown away."""
        building = _building(path, tail.dtype)
        if path.exists() and not building.exists():
            path.rename(building)  # it was closed since
        for other in path.parent.glob(f"{path.name}*"):
            if other != building:
                shutil.rmtree(other)
        for file in (building / "c").glob("*"):
            if not file.name.isdecimal() or int(file.name) >= whole // SHARD:
                file.unlink()
        array = cls(path, tail.dtype, fill=fill, codec=codec)
        array._whole, array._n = whole, len(tail)
        array._buffer[: len(tail)] = tail
        return array

    @property
    def state(self) -> tuple[NDArray[Any], int]:
        """(values that are not in a shard yet, number of those that are)."""
        return self._buffer[: self._n], self._whole

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return self._buffer.dtype

    def __len__(self) -> int:
        return self._whole + self._n

    def append(self, values: NDArray[Any]) -> None:
        """Add values at the end."""
        if values.size and self.dtype.kind == "u" and values.dtype != self.dtype:
            self._widen(np.min_scalar_type(values.max()))
        done = 0
        while done < len(values):
            part = values[done : done + SHARD - self._n]
            self._buffer[self._n : self._n + len(part)] = part
            self._n, done = self._n + len(part), done + len(part)
            if self._n == SHARD:
                self._write()

    def close(self) -> None:
        """Write what is left, and take the final name."""
        self._array = self._make(self.dtype, len(self))
        if self._n:
            self._write()
        self.drop_old()
        _building(self._path, self.dtype).rename(self._path)

    def drop_old(self) -> None:
        """Remove the arrays of narrower types."""
        for other in self._path.parent.glob(f"{self._path.name}.*"):
            if other != _building(self._path, self.dtype):
                shutil.rmtree(other)

    def files(self) -> list[Path]:
        """The shards on disk."""
        folder = _building(self._path, self.dtype)
        return [folder / METADATA, *(folder / "c" / str(i) for i in range(self._whole // SHARD))]

    def _start(self, dtype: np.dtype) -> None:
        self._array = self._make(dtype, 2**31 * SHARD)  # no metadata are written again until the length is known
        self._buffer, self._n = np.empty(SHARD, dtype), 0

    def _make(self, dtype: np.dtype, length: int) -> zarr.Array:
        return make_array(
            _building(self._path, dtype),
            shape=(length,),
            dtype=dtype,
            chunks=(CHUNK,),
            shards=(SHARD,),
            fill=self._fill,
            codec=self._codec,
        )

    def _write(self) -> None:
        self._array[self._whole : self._whole + self._n] = self._buffer[: self._n]
        self._whole, self._n = self._whole + self._n, 0

    def _widen(self, dtype: np.dtype) -> None:
        """Copy the shards written so far into an array of a type that holds `dtype`, unless this one does."""
        if dtype.itemsize <= self.dtype.itemsize:
            return
        old, tail, whole = self._array, self._buffer[: self._n], self._whole
        self._start(dtype)
        self._whole = 0
        for start in range(0, whole, SHARD):
            self._buffer[:], self._n = old[start : start + SHARD], SHARD
            self._write()
        self._buffer[: len(tail)], self._n = tail, len(tail)


def _building(path: Path, dtype: np.dtype) -> Path:
    return path.with_name(f"{path.name}.{dtype.str[1:]}")
