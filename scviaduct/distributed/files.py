"""Folders that are either whole or absent: written under a temporary name, fsynced, renamed."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scviaduct.storage.manifest import refuse_existing, sync_directory, sync_tree


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
        sync_directory(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
