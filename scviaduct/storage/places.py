"""Where a store lies: a folder of this machine, or a prefix of an object store (s3://, gs://, …), read by the same code.

Objects are only read, by ranges and many at once. What an object store needs to know besides the address (keys, region,
endpoint) is taken from the environment, as its own tools do.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from scviaduct.errors import ConfigError, UnreadableFileError
from scviaduct.storage.memory import Allocate

Place: TypeAlias = Path | UPath

IN_FLIGHT = 64
"""Requests that one process has under way at most."""

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(?=[^/])", re.IGNORECASE)  # a scheme of one letter is a drive of Windows
_DRIVERS = {"s3": "'scviaduct[s3]'", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"max_pool_connections": IN_FLIGHT}}}  # botocore's is 10


def place(path: str | Path | UPath) -> Place:
    """The path of a local folder as it is, or the UPath of an address such as s3://bucket/atlas.zarr.

    A pathlib.Path made of an address has lost one of its slashes ("s3:/bucket"); it is understood all the same.

    Raises ConfigError when the address is of no known kind, or its driver is not installed.
    """
    if isinstance(path, UPath) and not isinstance(path, Path):
        return path
    text = str(path)
    found = _URL.match(text)
    if not found:
        return Path(path)
    scheme, rest = found[1].lower(), text[found.end() :]
    if scheme == "file":
        return Path("/" + rest)
    try:
        # objects change behind our back: no listing is remembered
        there = UPath(f"{scheme}://{rest}", use_listings_cache=False, **_OPTIONS.get(scheme, {}))
        _ = there.fs
    except ImportError as error:
        raise ConfigError(
            f"Reading {text} needs a driver: pip install {_DRIVERS.get(scheme, str(error))}, or copy it here first."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{text} is neither a local path nor the address of a known object store: {error}.") from None
    return there


def is_remote(path: str | Path | UPath) -> bool:
    """Whether a path is the address of an object store."""
    return not isinstance(place(path), Path)


def local(path: str | Path | UPath, what: str) -> Path:
    """A path of this machine; ConfigError for an address, because `what` ("The atlas") must be written or kept here."""
    found = place(path)
    if isinstance(found, Path):
        return found
    raise ConfigError(
        f"{what} cannot be {found}: but for runs of train, object stores are only read. Use a local path, and copy "
        f"what must go there (aws s3 sync LOCAL {found}, s5cmd, gcloud storage rsync)."
    )


def absolute(path: str | Path | UPath) -> Place:
    """The place, independent of the current folder."""
    found = place(path)
    return found.absolute() if isinstance(found, Path) else found


def exists(path: Place) -> bool:
    """Whether there is something at a place; UnreadableFileError when its object store does not answer."""
    if isinstance(path, Path):
        return path.exists()
    try:
        return path.exists()
    except Exception as error:
        # each store's driver has errors of its own; most are about keys, names or the network
        raise UnreadableFileError(
            f"{path} cannot be reached: {type(error).__name__}: {error}. Check the address and the environment "
            "(for S3: AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL; public data: FSSPEC_S3_ANON=true)."
        ) from error


def file_sizes(directory: Place, names: Iterable[str]) -> dict[str, int]:
    """Bytes of those of the named files that exist; object stores are listed once."""
    if isinstance(directory, Path):
        files = {name: directory / name for name in names}
        return {name: file.stat().st_size for name, file in files.items() if file.is_file()}
    prefix = directory.path.rstrip("/") + "/"
    listed: dict[str, dict[str, Any]] = directory.fs.find(prefix, detail=True)
    found = {path.removeprefix(prefix): int(facts["size"]) for path, facts in listed.items()}
    return {name: found[name] for name in names if name in found}


class Span(NamedTuple):
    """Bytes [start, stop) of a file below some folder; to its end where `stop` is None; from its end where start < 0."""

    name: str
    start: int
    stop: int | None = None


class Folder:
    """The files below a folder of this machine. Safe to use from any thread.

    `held` is for many small reads here and there: so many files stay open, because opening, asking for the size and
    closing give up the interpreter's lock three times for a read that needs it once, and every time it is waited for
    costs more than the call. The system is told to read nothing but what is asked for: its guesses were a third of
    the bytes. A held file that is removed or replaced is read as it was.
    """

    def __init__(self, root: Path, held: int = 0) -> None:
        self._opened = lru_cache(held)(lambda name: _File(root, name, scattered=held > 0))

    def read(self, span: Span, allocate: Allocate) -> NDArray[np.uint8]:
        """The bytes of a span; raises as `read_spans`."""
        return self._opened(span.name).read(span, allocate)


class _File:
    """A file that is open until nobody refers to it."""

    def __init__(self, root: Path, name: str, *, scattered: bool) -> None:
        try:
            self._descriptor = os.open(root / name, os.O_RDONLY)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "is missing", name) from error
        if scattered and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, span: Span, allocate: Allocate) -> NDArray[np.uint8]:
        start, stop = span.start, span.stop
        if stop is None:
            stop = os.fstat(self._descriptor).st_size
            start = max(0, stop + start) if start < 0 else start
        buffer = allocate(max(0, stop - start), np.uint8)
        got = os.preadv(self._descriptor, [buffer.data], start) if buffer.size else 0
        _require_length(span, got, -span.start if span.start < 0 else stop - start)
        return buffer


def read_spans(root: Place | Folder, spans: Sequence[Span], allocate: Allocate = np.empty) -> list[NDArray[np.uint8]]:
    """The bytes of all spans; from an object store they are requested at once.

    Raises FileNotFoundError, with the span's name as its filename, when a file is gone; ValueError when it is too
    short; and what the store's driver raises.
    """
    if isinstance(root, Path):
        root = Folder(root)
    if isinstance(root, Folder):
        return [root.read(span, allocate) for span in spans]
    if not spans:
        return []
    paths = [f"{root.path}/{span.name}" for span in spans]
    starts, stops = [s.start for s in spans], [s.stop for s in spans]
    found = root.fs.cat_ranges(paths, starts, stops, batch_size=IN_FLIGHT)  # errors come in the places of contents
    return [_as_array(span, content) for span, content in zip(spans, found, strict=True)]


def _as_array(span: Span, content: bytes | Exception) -> NDArray[np.uint8]:
    if isinstance(content, FileNotFoundError):
        raise FileNotFoundError(errno.ENOENT, "is missing", span.name) from content
    if isinstance(content, Exception):
        raise content
    wanted = -span.start if span.start < 0 else len(content) if span.stop is None else span.stop - span.start
    _require_length(span, len(content), wanted)
    return np.frombuffer(content, np.uint8)


def _require_length(span: Span, has: int, wanted: int) -> None:
    if has != wanted:
        raise ValueError(f"{span.name} is too short: {has:,} bytes where {wanted:,} are expected")
