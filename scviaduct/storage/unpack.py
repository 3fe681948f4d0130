"""Many chunks of blosc decoded by one call, in which the interpreter's lock is not held (docs/decisions/0026).

A chunk takes 40 us to decode. Giving up the lock for each and waiting for it again costs two threads as much.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import numba
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray


def _decompress_ctx() -> Any:
    """blosc_decompress_ctx of the C library inside numcodecs; None where its module does not export it."""
    try:
        function = ctypes.CDLL(blosc.__file__).blosc_decompress_ctx
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)  # from, to, its size, threads
    function.restype = ctypes.c_int  # bytes that were written
    return function


DECOMPRESS = _decompress_ctx()


def unpack(
    content: NDArray[np.uint8], starts: list[int], chunk: int, at: int, out: NDArray[np.uint8], *, compressed: bool
) -> None:
    """Decode the chunks of `chunk` bytes that begin at `starts` of `content`, the first to byte `at` of `out`.

    What falls outside of `out` is left out: `at` may be negative, and the last chunk longer than what is left.

    Raises RuntimeError when a chunk is not one of blosc, or has another size.
    """
    if compressed and DECOMPRESS is not None:
        whole = _unpack(DECOMPRESS, content, np.array(starts), at, out, np.empty(chunk, np.uint8))
    else:
        places = range(at, at + len(starts) * chunk, chunk)
        one = partial(_unpack_one, chunk=chunk, out=out, compressed=compressed)
        whole = all(one(content[start:], at=place) for start, place in zip(starts, places, strict=True))
    if not whole:
        raise RuntimeError("a chunk cannot be decoded")


def _unpack_one(content: NDArray[np.uint8], *, chunk: int, at: int, out: NDArray[np.uint8], compressed: bool) -> bool:
    values = np.frombuffer(blosc.decompress(content), np.uint8) if compressed else content[:chunk]
    if len(values) != chunk:
        return False
    low, high = max(at, 0), min(at + chunk, out.size)
    out[low:high] = values[low - at : high - at]
    return True


@numba.njit(nogil=True, cache=True)
def _unpack(decompress, content, starts, at, out, edge):  # type: ignore[no-untyped-def]  # pragma: no cover
    chunk = edge.size
    for start in starts:
        inside = at >= 0 and at + chunk <= out.size
        to = out[at : at + chunk] if inside else edge
        if decompress(content[start:].ctypes, to.ctypes, chunk, 1) != chunk:
            return False
        if not inside:
            low, high = max(at, 0), min(at + chunk, out.size)
            out[low:high] = edge[low - at : high - at]
        at += chunk
    return True
