"""Facts about files that must be true before anything is read: JSON written in one step, digests, markers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar, cast

from scviaduct.errors import IncompleteError, OutputExistsError
from scviaduct.storage.places import Place, exists, file_sizes

P = TypeVar("P", Path, Place)
FORMAT = 2
"""Version of the layout of an atlas on disk."""
ATLAS_MARKER = "atlas.json"
"""Written last into an atlas: without it the directory is not an atlas."""
DATASET_MARKER = "manifest.json"
"""Written last into a data set."""
VIEW_MARKER = "view.json"
"""Written last into a training view."""


def write_json_atomic(path: Path, record: object) -> None:
    """Write JSON so that readers, and a machine that loses power, see the whole file or none."""
    write_atomic(path, json_bytes(record))


def json_bytes(record: object) -> bytes:
    """A record as its file holds it."""
    return json.dumps(record, indent=1, ensure_ascii=False).encode()


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that readers, and a machine that loses power, see the whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def remove_temporaries(path: Path) -> None:
    """Remove what `write_atomic` and Zarr leave under a directory when they are killed."""
    for pattern in (".*.tmp", "*.partial"):
        for file in [p for p in path.rglob(pattern) if p.is_file()]:
            file.unlink()


def sync_directory(path: Path) -> None:
    """Make a rename or a new name in this directory survive a power cut."""
    sync_file(path)


def sync_file(path: Path) -> None:
    """Flush a file to disk; of a directory, its names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Flush every file and directory under `path` to disk."""
    for directory, _, names in os.walk(path):
        for name in [*names, ""]:
            sync_file(Path(directory, name))


def refuse_existing(path: P) -> P:
    """The path itself.

    Raises:
        OutputExistsError: something is there already.
    """
    if exists(path):
        raise OutputExistsError(f"{path} exists already; nothing was written. Choose another name or remove it first.")
    return path


def replace_folder(made: Path, final: Path) -> None:
    """Put a folder in the place of another, which goes only then."""
    sync_tree(made)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    made.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a lack of space."""
    while error is not None:
        text = str(error)  # zarrs and h5py tell it in words only
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left" in text or "Disk quota exceeded" in text or "os error 28" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def read_json(path: Place) -> Any:
    """What a JSON file holds; IncompleteError when it is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteError(f"{path} is missing: it was not written to the end") from None
    except ValueError as error:
        raise IncompleteError(f"{path} is damaged: {error}") from error


def file_digest(path: Place) -> str:
    """sha256 of a file's bytes, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def tree_digest(
    directory: Place, *, exclude: tuple[str, ...] = (), pool: Executor | None = None
) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file under a directory, by path relative to it; `exclude` are such paths.

    `pool` reads several files at a time.
    """
    paths = sorted(p for p in directory.rglob("*") if p.is_file())
    files = {p.relative_to(cast(Any, directory)).as_posix(): p for p in paths}
    files = {name: path for name, path in files.items() if name not in exclude}
    digests = (pool.map if pool else map)(file_digest, files.values())
    return {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(files.items(), digests, strict=True)
    }


def check_files(directory: Place, files: dict[str, dict[str, Any]]) -> None:
    """Every file of a manifest is there with its size, else IncompleteError: a missing chunk would read as zeros."""
    sizes = file_sizes(directory, files)
    for name, facts in files.items():
        size = sizes.get(name)
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise IncompleteError(
                f"{directory / name} {found}, its manifest says {facts['bytes']:,} bytes; convert the file again"
            )
