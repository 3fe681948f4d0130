"""Arrays of HDF5 and Zarr files read alike: from front to back, whole chunks at a time, errors in one form."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import h5py
import numpy as np
import zarr
from isal import isal_zlib
from numpy.typing import NDArray

from scviaduct.errors import ScviaductError, UnreadableFileError

Array: TypeAlias = h5py.Dataset | zarr.Array
Group: TypeAlias = h5py.Group | zarr.Group

WORKERS = os.cpu_count() or 1
"""Threads that inflate gzip."""
_POOL = ThreadPoolExecutor(WORKERS, thread_name_prefix="inflate")

T = TypeVar("T")


def guarded(path: Path, read: Callable[[], T]) -> T:
    """The result of `read`; UnreadableFileError when the file cannot give the data.

    Damaged metadata surface in h5py, zarr and anndata as almost any exception (KeyError, TypeError, OverflowError,
    MemoryError, …), so all are caught: `read` is to be one call of such a library, not logic of this package.
    """
    try:
        return read()
    except ScviaductError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UnreadableFileError(
            f"{path}: a part of the file cannot be read ({said}): it is damaged; get it again from its source"
        ) from error


def is_array(node: object) -> bool:
    """An HDF5 dataset or a Zarr array."""
    return isinstance(node, h5py.Dataset | zarr.Array)


def native(values: NDArray[Any]) -> NDArray[Any]:
    """Types that scipy.sparse cannot hold as ones that hold the same values."""
    if values.dtype == np.float16:
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def chunk_shape(array: Array) -> tuple[int, ...] | None:
    """What is read at once at the least: a chunk, in Zarr a shard; None when the values lie in one piece."""
    shape = (array.shards or array.chunks) if isinstance(array, zarr.Array) else array.chunks
    return None if shape is None else tuple(int(n) for n in shape)


def unwritten(array: Array) -> int:
    """Chunks that are not stored, which HDF5 and Zarr read as zeros without a word."""
    if isinstance(array, zarr.Array):
        parts = array.shards or array.chunks  # of a shard that is there zarr counts every chunk, also behind the end
        per_part = prod(parts) // prod(array.chunks)
        wanted = per_part * prod(-(-n // size) for n, size in zip(array.shape, parts, strict=True))
        return int(wanted - array.nchunks_initialized)
    if array.is_virtual or array.external:
        return 0
    if array.chunks is None:
        return int(array.size > 0 and array.id.get_storage_size() == 0)
    wanted = prod(-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True))
    return int(wanted - array.id.get_num_chunks())


class Forward:
    """A 1-D array read from front to back: what is left of a chunk is kept for the next read."""

    def __init__(self, array: Array, path: Path) -> None:
        self._array, self._path = array, path
        self._length = int(array.shape[0])
        self._chunk = (chunk_shape(array) or (1,))[0]
        self._inflate = _inflater(array) if isinstance(array, h5py.Dataset) else None
        self._held = np.empty(0, array.dtype)
        self._start = self._end = 0
        self.dtype = native(self._held).dtype

    def read(self, lo: int, hi: int) -> NDArray[Any]:
        """Values lo to hi; lo must not lie before the previous read's."""
        if hi > self._end:
            guarded(self._path, lambda: self._load(lo, hi))
        return native(self._held[lo - self._start : hi - self._start])

    def _load(self, lo: int, hi: int) -> None:
        """Whole chunks up to `hi`, behind what is held of `lo` and after."""
        begin = self._end if lo < self._end else lo // self._chunk * self._chunk
        end = min(-(-hi // self._chunk) * self._chunk, self._length)
        kept = self._held[lo - self._start :] if lo < self._end else self._held[:0]
        room = len(kept) - (begin - end) // self._chunk * self._chunk  # the last chunk may be longer than the array
        held = np.empty(room, self._array.dtype)
        held[: len(kept)] = kept
        self._fill(begin, end, held[len(kept) :])
        self._held, self._start, self._end = held[: len(kept) + end - begin], begin - len(kept), end

    def _fill(self, begin: int, end: int, out: NDArray[Any]) -> None:
        """Chunks from `begin` into `out`; gzip is inflated in threads, because HDF5 itself only ever uses one."""
        if self._inflate is None:
            out[: end - begin] = self._array[begin:end]
            return
        inflate, starts = self._inflate, range(begin, end, self._chunk)
        share = max(1, -(-len(starts) // WORKERS))

        def fill(part: range) -> None:
            for start in part:
                inflate(start, out[start - begin : start - begin + self._chunk])

        list(_POOL.map(fill, [starts[i : i + share] for i in range(0, len(starts), share)]))


def _inflater(dataset: h5py.Dataset) -> Callable[[int, NDArray[Any]], None] | None:
    """A function that decodes the chunk at an offset into an array, for gzip with or without shuffle; else None.

    HDF5 decodes any other filter (lzf, fletcher32, …) itself.
    """
    if dataset.chunks is None:
        return None
    plan = dataset.id.get_create_plist()
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    if filters not in ([h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE]):
        return None
    shuffled, itemsize = len(filters) == 2, dataset.dtype.itemsize

    def inflate(start: int, out: NDArray[Any]) -> None:
        mask, raw = dataset.id.read_direct_chunk((start,))
        if mask:  # a filter was left out for this chunk
            values = dataset[start : start + len(out)]
            out[: len(values)] = values
            return
        # isal takes a third of zlib's time: 26 us against 79 for a cell of 2,000 genes
        plain = np.frombuffer(isal_zlib.decompress(raw, bufsize=out.nbytes), np.uint8)
        if shuffled and itemsize > 1:
            plain = np.ascontiguousarray(plain.reshape(itemsize, -1).T).reshape(-1)
        out[:] = plain.view(out.dtype)

    return inflate
