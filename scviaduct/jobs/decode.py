"""`scviaduct decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from scviaduct.distributed.config import Reading
from scviaduct.jobs.convert import Flag, Names
from scviaduct.jobs.display import Steps
from scviaduct.jobs.embed import Shared, tell


def command(
    model: str,
    data: Path,
    /,
    *,
    out: Path,
    what: str | None = None,
    features: Names = (),
    transform_batch: Names = (),
    library_size: float | Literal["latent"] = 1.0,
    normalize_cells: Flag = False,
    normalize_regions: Flag = False,
    include_background: Flag = False,
    n_samples: int | None = None,
    seed: int = 0,
    reading: Shared = Reading(),  # noqa: B008 (frozen)
) -> int:
    """Write what a model says of the genes, regions or proteins of cells.

    It is X of an h5ad or Zarr store, a row a cell, written as it is made: memory does not grow with it.

    Args:
        model: A run, a bundle, or a registered model such as models:/kang@current.
        data: An atlas with a view of the model's genes, or an h5ad or another file of counts.
        out: The store to make, e.g. expression.zarr.
        what: expression, accessibility, proteins (denoised), foreground (probability of a protein's), or counts and
            protein_counts drawn from the model. Default: the first that the model has.
        features: Genes, regions or proteins to write, or a text file with one per line. Default: all.
        transform_batch: Batches as whose cells all are decoded; values are averaged over several. Default: their own.
        library_size: Total that a cell's expression is scaled to, or latent for the cell's own.
        normalize_cells: Scale accessibility by the cells' depths, which brings it closer to what is observed.
        normalize_regions: Scale accessibility by the regions' factors, which brings it closer to what is observed.
        include_background: Count the proteins' background as well.
        n_samples: Draws from the posterior to average. Default: the posterior's mean is decoded. Drawn counts are
            written one by one, as layers draw_0, draw_1, …
        seed: Decides the draws.
    """
    from scviaduct.distributed.outputs import decode

    with Steps("decode", unit="cells") as steps:
        made = decode(
            model,
            data,
            out=out,
            what=what,
            features=features,
            transform_batch=transform_batch,
            library_size=library_size,
            normalize_cells=normalize_cells,
            normalize_regions=normalize_regions,
            include_background=include_background,
            n_samples=n_samples,
            seed=seed,
            reading=reading,
            on_progress=lambda done, n: steps.at(done, "", n),
        )
    tell(made, "features")
    return 0
