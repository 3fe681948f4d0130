"""Files that are either whole or absent: written under a temporary name, fsynced, renamed."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scviaduct.errors import OutputExistsError


def refuse_existing(path: Path) -> Path:
    """The path itself.

    Raises:
        OutputExistsError: something is there already.
    """
    if path.exists():
        raise OutputExistsError(f"{path} exists already; nothing was written. Choose another name or remove it first.")
    return path


def sync_tree(root: Path) -> None:
    """Push a folder and everything below it to the disk."""
    for path in [*root.rglob("*"), root]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its name when the block ends well, and vanishes when it does not.

    Raises:
        OutputExistsError: `final` exists.
    """
    refuse_existing(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, record: Any) -> None:
    """Replace `path` by the record, at once."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with temporary.open("w") as stream:
        json.dump(record, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The record in a JSON file."""
    return json.loads(path.read_text())
