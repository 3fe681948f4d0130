"""Sharded Zarr arrays that are written front to back, and how arrays of an atlas are opened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from scviaduct.errors import IncompleteError

CHUNK = 2**17
"""Values in a chunk, the smallest part that is decoded: about 64 cells of a 20,000-gene data set."""
SHARD = 2**23
"""Values in a shard, one file."""


def open_array(path: Path, mode: Literal["r", "r+"] = "r") -> zarr.Array:
    """Open an array, decoded by zarrs; the setting holds for this array only."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return zarr.open_array(path, mode=mode, zarr_format=3)


def open_group(path: Path) -> zarr.Group:
    """Open a Zarr v3 group for reading."""
    return zarr.open_group(path, mode="r", zarr_format=3)


class Growing:
    """A 1-D sharded array of unknown length: whole shards are written once, and unsigned types widen on demand."""

    def __init__(self, group: zarr.Group, name: str, dtype: np.dtype, fill: int) -> None:
        self._group, self._name, self._fill = group, name, fill
        self._array = self._create(name, dtype)
        self._buffer: list[NDArray[Any]] = []
        self._buffered = 0

    def append(self, values: NDArray[Any]) -> None:
        """Add values at the end."""
        if values.size and self._array.dtype.kind == "u" and values.max() > np.iinfo(self._array.dtype).max:
            self._widen(np.min_scalar_type(values.max()))
        self._buffer.append(values.astype(self._array.dtype))
        self._buffered += len(values)
        if self._buffered >= SHARD:
            whole = self._buffered // SHARD * SHARD
            values = np.concatenate(self._buffer)
            self._write(values[:whole])
            self._buffer, self._buffered = [values[whole:].copy()], len(values) - whole

    def close(self) -> None:
        """Write what is left."""
        if self._buffered:
            self._write(np.concatenate(self._buffer))
        self._buffer, self._buffered = [], 0

    def _write(self, values: NDArray[Any]) -> None:
        start = self._array.shape[0]
        self._array.resize((start + len(values),))
        self._array[start:] = values

    def _create(self, name: str, dtype: np.dtype) -> zarr.Array:
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            return self._group.create_array(
                name,
                shape=(0,),
                dtype=dtype,
                chunks=(CHUNK,),
                shards=(SHARD,),
                compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
                fill_value=self._fill,
            )

    def _widen(self, dtype: np.dtype) -> None:
        """Copy the shards written so far into an array of a wider type, which takes the place of the old one."""
        old, self._array = self._array, self._create(f"{self._name}.wide", dtype)
        for start in range(0, old.shape[0], SHARD):
            self._write(np.asarray(old[start : start + SHARD]).astype(dtype))
        length = self._array.shape
        root = Path(str(self._group.store_path).removeprefix("file://"))
        shutil.rmtree(root / self._name)
        (root / f"{self._name}.wide").rename(root / self._name)
        self._array = open_array(root / self._name, mode="r+")
        if self._array.shape != length:
            raise IncompleteError(f"{root / self._name}: {self._array.shape[0]} values where {length[0]} were written")
