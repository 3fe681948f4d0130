"""Folders that are either whole or absent, and small files, on a disk and in object stores.

A folder on a disk is written under a temporary name, fsynced and renamed. An object store knows no renaming: files are
uploaded under their names, and a marker last; without it they do not count.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from scviaduct.storage.manifest import json_bytes, refuse_existing, sync_directory, sync_tree, write_json_atomic
from scviaduct.storage.places import Place


@contextmanager
def whole_folder(final: Place, *, marker: str = "") -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and vanishes when it does not.

    `marker` is the file without which `final` does not count; an object store needs one.

    Raises:
        OutputExistsError: `final` exists.
    """
    refuse_existing(final / marker if marker and not isinstance(final, Path) else final)
    if not isinstance(final, Path):
        with tempfile.TemporaryDirectory(prefix="scviaduct-") as folder:
            yield Path(folder)
            upload(Path(folder), final, marker)
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        temporary.rename(final)
        sync_directory(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def upload(folder: Path, to: UPath, marker: str) -> None:
    """Copy a folder's files to an object store, many at once, and its marker when all the others are there."""
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    put(folder, to, [name for name in files if name != marker])
    put(folder, to, [marker])


def put(folder: Path, to: UPath, names: list[str]) -> None:
    """Copy some files of a folder to an object store, many at once."""
    to.fs.put([str(folder / name) for name in names], [f"{to.path}/{name}" for name in names])


def download(place: UPath, to: Path, names: list[str]) -> None:
    """Copy files below an address to a folder, many at once."""
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
    place.fs.get([f"{place.path}/{name}" for name in names], [str(to / name) for name in names])


def remove_folder(folder: Place, *, marker: str = "") -> None:
    """Remove a folder, if there is one; its marker goes first."""
    if not folder.exists():
        return
    if isinstance(folder, Path):
        shutil.rmtree(folder)
        return
    if marker:
        (folder / marker).unlink(missing_ok=True)
    folder.fs.rm(folder.path, recursive=True)


def read_from(file: Place, start: int = 0) -> bytes:
    """A file's bytes from `start` on; of an object that is replaced meanwhile, the old ones or the new ones."""
    if not isinstance(file, Path):  # opening and then reading it would fail between the two
        return bytes(file.fs.cat_file(file.path))[start:]
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read()


def write_json(file: Place, record: object) -> None:
    """Write JSON so that readers see the whole file or none."""
    if isinstance(file, Path):
        write_json_atomic(file, record)
    else:
        file.write_bytes(json_bytes(record))
