"""A check that HDF5 does not make: damaged global heaps, on which the library runs in a circle for ever.

Names of cells and all text of variable length lie in global heap collections. When a block of one is zeros, as in an
unfinished download, HDF5 never returns and cannot be interrupted (HDFGroup/hdf5 issue 1707; seen with HDF5 2.0.0). So
whatever lies between the chunks of large arrays is searched for collections, and each is walked once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import h5py

from scviaduct.errors import UnreadableFileError

_LARGE = 2**20
"""Bytes from which an array's place is looked up, so that it need not be searched."""
_PIECE = 2**24
"""Bytes read at once."""
_HEADER = struct.Struct("<4sB3xQ")
"""Signature, version and size of a collection."""
_OBJECT = struct.Struct("<HHxxxxQ")
"""Index, uses and size of an object; index 0 is the free space at the end."""


def check_heaps(path: Path, file: h5py.File) -> None:
    """UnreadableFileError when an object of a global heap has a size that cannot be."""
    if file.id.get_create_plist().get_sizes() != (8, 8):
        return  # other widths, which neither h5py nor R writes
    with path.open("rb") as raw:
        for start, end in _between(path, file):
            for at in _collections(raw, start, end):
                if not _sound(raw, at):
                    raise UnreadableFileError(
                        f"{path}: the text at byte {at:,} is damaged (names of cells or genes may lie there): "
                        "copy or download the file again"
                    )


def _between(path: Path, file: h5py.File) -> Iterator[tuple[int, int]]:
    """Parts of the file without large arrays."""
    taken: list[tuple[int, int]] = []

    def add(_: str, node: object) -> None:
        if not isinstance(node, h5py.Dataset) or node.id.get_storage_size() < _LARGE:
            return
        if node.chunks is not None:
            node.id.chunk_iter(lambda c: taken.append((c.byte_offset, c.byte_offset + c.size)))
        elif (offset := node.id.get_offset()) is not None:
            taken.append((offset, offset + node.id.get_storage_size()))

    file.visititems(add)
    edges = sorted([(0, file.userblock_size), *taken, (path.stat().st_size,) * 2])
    reached = 0
    for (_, end), (start, _) in pairwise(edges):
        reached = max(reached, end)
        if start - reached > _HEADER.size:
            yield reached, start


def _collections(raw: BinaryIO, start: int, end: int) -> Iterator[int]:
    for begin in range(start, end, _PIECE):
        raw.seek(begin)
        piece = raw.read(min(_PIECE + 3, end - begin))
        at = piece.find(b"GCOL")
        while at >= 0:
            yield begin + at
            at = piece.find(b"GCOL", at + 1)


def _sound(raw: BinaryIO, at: int) -> bool:
    """Whether the objects of a collection fill it; True for bytes that only look like one."""
    raw.seek(at)
    head = raw.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return True
    _, version, size = _HEADER.unpack(head)
    if version != 1 or head[5:8] != bytes(3) or not 4096 <= size < 2**40:
        return True
    body = raw.read(size - _HEADER.size)
    reached = 0
    while reached + _OBJECT.size <= len(body):
        index, _, length = _OBJECT.unpack_from(body, reached)
        if index == 0:
            return reached + length == len(body)
        reached += _OBJECT.size + -(-length // 8) * 8
    return reached <= len(body)
