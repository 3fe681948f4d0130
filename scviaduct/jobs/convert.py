"""`scviaduct convert`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from scviaduct.jobs.display import Steps, output

Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]
Flag = Annotated[bool, Parameter(negative="")]


def command(
    files: list[Path],
    /,
    *,
    out: Path,
    counts: str | None = None,
    memory: str = "2GB",
    workers: int | None = None,
    append: Flag = False,
    obsm: Names = (),
    layers: Names = (),
    sum_duplicates: Flag = False,
    address: str | None = None,
) -> int:
    """h5ad files become one verified, chunked Zarr atlas.

    AnnData Zarr stores, 10x Genomics h5 files and MuData are taken, too. Every count is checked on the way, and what was
    written is read back. After a kill, or when the disk was full, the same command goes on where it was.

    Args:
        files: Files, one a data set.
        out: The atlas to make, e.g. atlas.zarr.
        counts: Matrix with the raw counts: "X", "raw" or a layer. Default: found by looking.
        memory: Memory to stay below, all processes together, e.g. 2GB.
        workers: Processes. Default: one a core, fewer where memory or files are few.
        append: Add the files to the finished atlas; what it has already stays untouched.
        obsm: Elements of obsm to keep besides, where a file has them, e.g. protein_expression spatial. Proteins of
            10x Genomics h5 files and MuData are called protein_expression.
        layers: Layers to keep besides, where a file has them, e.g. spliced unspliced.
        sum_duplicates: Add up genes that are named twice instead of refusing the file.
        address: Address of a running Ray cluster ("auto", "ray://…") that shares the file system; memory is then that
            of a task.
    """
    from scviaduct.distributed.tasks import executor_at
    from scviaduct.storage.atlas import Atlas
    from scviaduct.storage.convert import convert

    before = {d.id for d in Atlas.open(out).datasets} if append else set()
    with ExitStack() as stack:
        executor = stack.enter_context(executor_at(address, workers))
        steps = stack.enter_context(Steps("convert", unit="cells"))
        atlas = convert(
            files,
            out=out,
            counts=counts,
            memory=memory,
            workers=workers,
            executor=executor,
            append=append,
            obsm=obsm,
            layers=layers,
            sum_duplicates=sum_duplicates,
            on_progress=lambda name, done, n: steps.at(done, name, n),
        )
    there = len(before & {path.stem for path in files})
    told = f" ({there} of {len(files)} files were there already)" if there else ""
    output.print(f"{out}: {atlas.n_obs:,} cells in {len(atlas.datasets)} data sets{told}.")
    output.print(f"Next: scviaduct prepare {out}", style="dim")
    return 0
