"""`scviaduct inspect`."""

from __future__ import annotations

from pathlib import Path

from scviaduct.jobs.display import output


def command(path: Path, /) -> int:
    """Say what an h5ad file, an atlas or a run holds, and whether it can be used. Exit code 2: it cannot.

    Args:
        path: FILE.h5ad, atlas.zarr, a run or a bundle.
    """
    from scviaduct.distributed.inspect import inspect

    for line in inspect(path).lines():
        output.print(line, markup=False)
    return 0
