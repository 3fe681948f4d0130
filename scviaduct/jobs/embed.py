"""`scviaduct embed`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from scviaduct.distributed.config import Reading
from scviaduct.jobs.convert import Flag
from scviaduct.jobs.display import Steps, output

if TYPE_CHECKING:
    from scviaduct.distributed.outputs import Written

Shared = Annotated[Reading, Parameter(name="*")]


def command(
    model: str,
    data: Path,
    /,
    *,
    out: Path,
    predict: Flag = False,
    reading: Shared = Reading(),  # noqa: B008 (frozen)
) -> int:
    """Write the latent representation of cells.

    It is in obsm of an h5ad or Zarr store, beside the cells' names and the columns the model knows. Cells of batches
    that the model does not know are mapped instead.

    Args:
        model: A run, a bundle, or a registered model such as models:/kang@current.
        data: An atlas with a view of the model's genes, or an h5ad or another file of counts.
        out: The store to make, e.g. latent.h5ad or latent.zarr.
        predict: Write SCANVI's label of each cell and the labels' probabilities, too.
    """
    from scviaduct.distributed.outputs import embed

    with Steps("embed", unit="cells") as steps:
        made = embed(
            model,
            data,
            out=out,
            predict=predict,
            reading=reading,
            on_progress=lambda done, n: steps.at(done, "", n),
        )
    tell(made, "dimensions")
    return 0


def tell(made: Written, features: str) -> None:
    """One line on a result."""
    left_out = f"; {made.without:,} cells have no count over the model's genes and no result" if made.without else ""
    output.print(f"{made.path}: {made.cells:,} cells x {made.features:,} {features}{left_out}.")
