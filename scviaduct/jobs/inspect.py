"""`scviaduct inspect`."""

from __future__ import annotations

from pathlib import Path

from scviaduct.jobs.display import output


def command(path: Path, /) -> int:
    """Say what a file, an atlas or a run holds, and whether it can be used.

    Exit code 0: it can; 2: it cannot, and why.

    Args:
        path: FILE.h5ad, atlas.zarr, a run or a bundle.
    """
    from scviaduct.distributed.inspect import inspect

    for line in inspect(path).lines():
        output.print(line)
    return 0
