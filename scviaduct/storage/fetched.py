"""Groups of an object store as Zarr groups in memory: every file of a table in one round of requests."""

from __future__ import annotations

from typing import Any

import zarr
from zarr.core.buffer import Buffer, cpu
from zarr.storage import MemoryStore

from scviaduct.errors import IncompleteError
from scviaduct.storage.places import Place, Span, read_spans


def fetch_group(root: Place, group: str, files: dict[str, dict[str, Any]]) -> zarr.Group:
    """The group `group` below `root`, such as "obs"; `files` are those of its manifest, with their "bytes".

    Zarr by itself would ask for one small file after the other: some 100 requests for an obs of 20 columns.

    Raises IncompleteError when a file is gone or has another size.
    """
    names = [name for name in files if name.startswith(f"{group}/")]
    try:
        contents = read_spans(root, [Span(name, 0, files[name]["bytes"]) for name in names])
    except (OSError, ValueError) as error:
        raise IncompleteError(f"{root}/{group} cannot be read ({error}); convert {root.name} again") from error
    held: dict[str, Buffer] = {
        name: cpu.Buffer.from_bytes(content.tobytes()) for name, content in zip(names, contents, strict=True)
    }
    return zarr.open_group(MemoryStore(held), path=group, mode="r", zarr_format=3)
