"""`scviaduct de`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from scviaduct.distributed.config import Reading
from scviaduct.jobs.convert import Flag, Names
from scviaduct.jobs.display import Steps, output
from scviaduct.jobs.embed import Shared


def command(
    model: str,
    data: Path,
    /,
    *,
    groupby: str,
    out: Path,
    group1: Names = (),
    group2: str | None = None,
    what: str | None = None,
    mode: Literal["change", "vanilla"] = "change",
    delta: float | Literal["auto"] = 0.25,
    fdr: float = 0.05,
    pseudocounts: float | None = None,
    test: Literal["three", "two"] = "three",
    batch_correction: Flag = False,
    transform_batch: Names = (),
    n_samples: int = 5000,
    all_stats: bool = True,
    seed: int = 0,
    reading: Shared = Reading(),  # noqa: B008 (frozen)
) -> int:
    """Compare groups of cells by what a model says of them: differential expression, accessibility, proteins.

    The table has the columns of scvi-tools' differential_expression, one row a comparison and feature, best first.

    Args:
        model: A run, a bundle, or a registered model such as models:/kang@current.
        data: An atlas with a view of the model's genes, or an h5ad or another file of counts.
        groupby: obs column with the groups.
        out: The table to make, e.g. de.csv.
        group1: Groups to compare, one after the other. Default: all.
        group2: Group to compare them with. Default: all other cells that have a group.
        what: expression, accessibility, proteins or foreground. Default: the first that the model has.
        mode: "change": the log2 fold change exceeds delta; "vanilla": group 1 is higher.
        delta: Smallest log2 fold change that counts, or auto to find one from the data.
        fdr: Share of false discoveries to expect among those that is_de_fdr marks.
        pseudocounts: Added to both values of a fold change. Default: estimated from features that are hardly seen.
        test: Whether higher and lower are hypotheses of their own ("three") or one ("two").
        batch_correction: Decode both groups as cells of every batch in turn.
        transform_batch: The batches to correct with. Default: all.
        n_samples: Draws from the posterior of each group.
        all_stats: Add raw means and shares of non-zeros, counted over all cells.
        seed: Decides the draws.
    """
    from scviaduct.distributed.differential import de

    with Steps("comparison") as steps:
        table = de(
            model,
            data,
            groupby=groupby,
            group1=group1,
            group2=group2,
            what=what,
            mode=mode,
            delta=delta,
            fdr=fdr,
            pseudocounts=pseudocounts,
            test=test,
            batch_correction=batch_correction,
            transform_batch=transform_batch,
            n_samples=n_samples,
            all_stats=all_stats,
            seed=seed,
            out=out,
            reading=reading,
            on_progress=lambda done, n: steps.at(done, "", n),
        )
    names = table["comparison"].unique()
    found = f", {int(table[f'is_de_fdr_{fdr}'].sum()):,} differences" if mode == "change" else ""
    output.print(
        f"{out}: {len(names):,} comparison{'s' if len(names) > 1 else ''} of {table.index.nunique():,}{found}."
    )
    return 0
