"""`scviaduct prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from scviaduct.jobs.display import output


def command(
    atlas: Path,
    /,
    *,
    genes: str = "2000",
    batch_key: str | None = None,
    name: str = "default",
    join: Literal["intersection", "union"] = "intersection",
    seed: int = 0,
    memory: str = "2GB",
    overwrite: bool = False,
) -> int:
    """Choose genes and write the shuffled view that training reads.

    Args:
        atlas: An atlas made by convert.
        genes: Number of highly variable genes, "all", or a text file with one gene per line.
        batch_key: obs column; genes are ranked within its batches. Default: within the data sets.
        name: Name of the view; an atlas can have several.
        join: Genes to choose from: those of all data sets, or of any.
        seed: Decides the order of the cells on disk.
        memory: Memory to stay below, e.g. 2GB.
        overwrite: Replace a view of this name that was made otherwise.
    """
    from scviaduct.storage.prepare import prepare

    view = prepare(
        atlas,
        genes=int(genes) if genes.isdigit() else genes,
        batch_key=batch_key,
        name=name,
        join=join,
        seed=seed,
        memory=memory,
        overwrite=overwrite,
    )
    output.print(f"View {view.name!r} of {atlas}: {view.n_rows:,} cells, {len(view.genes):,} genes.")
    options = (f" --view {name}" if name != "default" else "") + (f" --batch-key {batch_key}" if batch_key else "")
    output.print(f"Next: scviaduct train {atlas}{options} --out runs/first", style="dim")
    return 0
