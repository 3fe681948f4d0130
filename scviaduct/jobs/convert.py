"""`scviaduct convert`."""

from __future__ import annotations

from pathlib import Path

from scviaduct.jobs.display import Steps, output


def command(files: list[Path], /, *, out: Path, counts: str | None = None, memory: str = "2GB") -> int:
    """h5ad files become one verified, chunked Zarr atlas.

    Every count is checked on the way, and what was written is read back.

    Args:
        files: h5ad files, one a data set.
        out: The atlas to make, e.g. atlas.zarr.
        counts: Matrix with the raw counts: "X", "raw" or a layer. Default: found by looking.
        memory: Memory to stay below, e.g. 2GB.
    """
    from scviaduct.storage.convert import convert

    with Steps("convert") as steps:
        atlas = convert(
            files, out=out, counts=counts, memory=memory, on_progress=lambda name, done, n: steps.at(done, name, n)
        )
    output.print(f"{out}: {atlas.n_obs:,} cells in {len(atlas.datasets)} data sets.")
    output.print(f"Next: scviaduct prepare {out}", style="dim")
    return 0
