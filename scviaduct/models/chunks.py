"""Rows cut into chunks for threads: by their number alone, so that no result depends on how many threads there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scviaduct.models.counts import use_threads

_MOST, _ROWS = 16, 128

Kernel = tuple[Callable[..., None], Callable[..., None]]
"""A function for one thread and the same for several; its last argument is the number of chunks."""


def chunks_of(rows: int) -> int:
    """Into how many chunks to cut rows: a power of 2, so that two or four threads have equally many."""
    return min(_MOST, 1 << max(0, (rows // _ROWS).bit_length() - 1))


def run(kernel: Kernel, *arguments: Any) -> None:
    """Call a kernel, its parallel version where there are several chunks and threads."""
    chunks = arguments[-1]
    kernel[0 if chunks == 1 or use_threads(chunks * _ROWS) == 1 else 1](*arguments)
