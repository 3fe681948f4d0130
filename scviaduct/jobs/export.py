"""`scviaduct export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from scviaduct.jobs.display import Steps, output


def command(
    atlas: Path,
    /,
    *,
    out: Path,
    dataset: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    where: str | None = None,
    genes: Path | None = None,
    join: Literal["union", "intersection"] = "union",
) -> int:
    """Write cells of an atlas as an h5ad, in memory that does not grow with their number.

    Args:
        atlas: An atlas made by convert.
        out: The file to write, e.g. b_cells.h5ad.
        dataset: Data sets to take from. Default: all.
        where: Cells to take, e.g. "cell_type == 'B cell' and donor != 'd1'"; names with spaces stand in backticks.
        genes: Text file with one gene per line. Default: see join.
        join: Genes of several data sets to take: those of any, or of all.
    """
    from scviaduct.storage.export import export

    with Steps("export") as steps:
        made = export(
            atlas,
            out,
            datasets=dataset or None,
            where=where,
            genes=genes,
            join=join,
            on_progress=lambda name, done, n: steps.at(done, name, n),
        )
    output.print(f"{out}: {made.n_obs:,} cells x {made.n_vars:,} genes.")
    return 0
