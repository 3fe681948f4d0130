"""`scviaduct import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from scviaduct.jobs.display import output


def command(
    path: Path,
    /,
    *,
    out: Path,
    prefix: str | None = None,
    adata: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)] = (),
    unlabeled_category: str = "Unknown",
    verify: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """A model that scvi-tools or scArches saved becomes a bundle.

    SCVI, SCANVI, TOTALVI, PEAKVI and POISSONVI of scvi-tools from 0.8 on, and trVAE of scArches. The files are read as
    data: nothing in them is executed, and a file that asks for it is refused.

    Args:
        path: The folder the model was saved to, or its model.pt.
        out: The bundle to make.
        prefix: What the names of the model's files begin with.
        adata: Files with the reference's cells: they are embedded, so that labels can be transferred. Default:
            adata.h5ad or mdata.h5mu beside the model.
        unlabeled_category: Label that means unlabelled, for models that do not say.
        verify: Compare with the installed scvi-tools, on the cells or on random counts.
    """
    from scviaduct.distributed.importing import import_model

    bundle = import_model(
        path, out=out, prefix=prefix or "", adata=adata, unlabeled_category=unlabeled_category, verify=verify
    )
    schema, imported, latent = bundle.schema, bundle.facts["imported"], bundle.latent()
    parts = [f"{len(schema.genes):,} genes", f"batches of {schema.batch.key} ({len(schema.batch):,})"]
    if schema.labels:
        parts.append(f"labels of {schema.labels.key} ({len(schema.labels):,})")
    output.print(f"{out}: {bundle.name}, made of a {imported['from']}: {', '.join(parts)}.")
    if imported["largest_difference"] is not None:
        output.print(
            f"Latent means are those of scvi-tools within {imported['largest_difference']:.1g} of the largest."
        )
    if latent is not None:
        output.print(f"{len(latent):,} cells of the reference embedded.")
    elif schema.labels:
        output.print(f"Labels cannot be transferred: {imported['without_reference']} (--adata).")
    output.print(f"Next: scviaduct map {out} QUERY.h5ad --out mapped", style="dim")
    return 0
