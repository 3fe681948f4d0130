"""Zarr arrays as this package makes them: the same values give the same bytes, and what a kill leaves can be continued.

Metadata files are written in one step. 1-D shards are encoded here, chunk after chunk (docs/decisions/0011). zarrs reads.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import google_crc32c
import numpy as np
import zarr
from numcodecs import Blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from scviaduct.storage.manifest import write_atomic

CHUNK = 2**17
"""Values in a chunk, the smallest part that is decoded: about 64 cells of a 20,000-gene data set."""
SHARD = 2**23
"""Values in a shard, one file."""
METADATA = "zarr.json"
ROOT = {"encoding-type": "anndata", "encoding-version": "0.1.0"}
"""Attributes of an AnnData, in Zarr and HDF5 alike."""
DICT = {"encoding-type": "dict", "encoding-version": "0.1.0"}
"""Attributes of obsm, layers and uns."""

Codec: TypeAlias = Literal["zstd", "lz4", "none"]
Attributes: TypeAlias = Mapping[str, Any]

# One block a chunk: blosc's own choice, 32 KB, costs a quarter more to encode and two thirds more to decode.
_BLOSC: dict[str, dict[str, Any]] = {
    "zstd": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 2**18},
    "lz4": {"cname": "lz4", "clevel": 3, "shuffle": "shuffle", "blocksize": 0},
}

_ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
_PYTHON = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
_CONFIG = threading.Lock()
"""Zarr's settings are of the process: two threads that change them at once get each other's."""
_ABSENT = 2**64 - 1
"""Offset and size of a chunk that is not in a shard."""


def open_array(path: Path) -> zarr.Array:
    """Open an array for reading, decoded by zarrs; the setting holds for this array only."""
    with _CONFIG, zarr.config.set(_ZARRS):
        return zarr.open_array(path, mode="r", zarr_format=3)


def open_group(path: Path) -> zarr.Group:
    """Open a Zarr v3 group for reading."""
    return zarr.open_group(path, mode="r", zarr_format=3)


def codecs(codec: Codec) -> list[BloscCodec | Crc32cCodec]:
    """How chunks are compressed: "zstd" for data sets, "lz4" for views, "none" for disks faster than lz4."""
    return [*([BloscCodec(**_BLOSC[codec])] if codec in _BLOSC else []), Crc32cCodec()]


def encode_shard(values: NDArray[Any], *, chunk: int, per_shard: int, fill: Any, codec: Codec = "zstd") -> list[bytes]:
    """The parts of a shard of a 1-D array: chunks of `chunk` values, the last one filled up, then their index."""
    options = _BLOSC.get(codec)
    blosc = options and Blosc(options["cname"], options["clevel"], Blosc.SHUFFLE, options["blocksize"])
    index, parts, offset = np.full((per_shard, 2), _ABSENT, "<u8"), [], 0
    for number, start in enumerate(range(0, len(values), chunk)):
        part = values[start : start + chunk]
        if len(part) < chunk:
            part = np.concatenate([part, np.full(chunk - len(part), fill, part.dtype)])
        parts.append(_checked(blosc.encode(part) if blosc else part.tobytes()))
        index[number] = offset, len(parts[-1])
        offset += len(parts[-1])
    return [*parts, _checked(index.tobytes())]


def write_parts(path: Path, parts: list[bytes]) -> None:
    """Write a file of its parts, which are not joined in memory first."""
    with path.open("wb") as file:
        file.writelines(parts)


def _checked(content: bytes) -> bytes:
    return content + google_crc32c.value(content).to_bytes(4, "little")


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
    """An array at `path`, open for writing by zarr-python itself; chunks that are there stay, and belong to it."""
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
    with _CONFIG, zarr.config.set(_PYTHON):
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
        """Go on where `state` was taken; shards that were written since are written again."""
        building = _building(path, tail.dtype)
        if path.exists() and not building.exists():
            path.rename(building)  # it was closed since
        for other in path.parent.glob(f"{path.name}*"):
            if other != building:
                shutil.rmtree(other)
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
        self._make(self.dtype, len(self))
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
        self._make(dtype, 2**31 * SHARD)  # no metadata are written again until the length is known
        self._buffer, self._n = np.empty(SHARD, dtype), 0

    def _make(self, dtype: np.dtype, length: int) -> None:
        make_array(
            _building(self._path, dtype),
            shape=(length,),
            dtype=dtype,
            chunks=(CHUNK,),
            shards=(SHARD,),
            fill=self._fill,
            codec=self._codec,
        )

    def _write(self) -> None:
        content = encode_shard(
            self._buffer[: self._n], chunk=CHUNK, per_shard=SHARD // CHUNK, fill=self._fill, codec=self._codec
        )
        file = _building(self._path, self.dtype) / "c" / str(self._whole // SHARD)
        file.parent.mkdir(exist_ok=True)
        write_parts(file, content)
        self._whole, self._n = self._whole + self._n, 0

    def _widen(self, dtype: np.dtype) -> None:
        """Copy the shards written so far into an array of a type that holds `dtype`, unless this one does."""
        if dtype.itemsize <= self.dtype.itemsize:
            return
        old, tail, whole = open_array(_building(self._path, self.dtype)), self._buffer[: self._n], self._whole
        self._start(dtype)
        self._whole = 0
        for start in range(0, whole, SHARD):
            self._buffer[:], self._n = old[start : start + SHARD], SHARD
            self._write()
        self._buffer[: len(tail)], self._n = tail, len(tail)


def _building(path: Path, dtype: np.dtype) -> Path:
    return path.with_name(f"{path.name}.{dtype.str[1:]}")
