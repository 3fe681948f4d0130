"""`scviaduct map`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from scviaduct.distributed.config import MapConfig
from scviaduct.jobs.display import Steps, console, output

if TYPE_CHECKING:
    from scviaduct.distributed.map import Mapped


def command(model: str, queries: list[Path], /, *, config: Annotated[MapConfig, Parameter(name="*")]) -> int:
    """Map query files onto a trained model: embedding, labels, uncertainty.

    Each query becomes OUT/<query>.h5ad: the h5ad as it was, with the results in obsm and obs; of another kind of file
    obs and the results.

    Exit code 0: all mapped; 1: some failed, see summary.csv; 2: none could be.

    Args:
        model: A run, a bundle, or a registered model such as models:/kang@current.
        queries: h5ad files, AnnData Zarr stores, 10x Genomics h5 files or MuData.
    """
    from scviaduct.distributed.map import map

    results: list[Mapped] = []
    untold: list[str] = []

    def told(result: Mapped) -> None:
        results.append(result)
        steps.at(len(results), result.query)
        if result.status == "failed":
            untold.append(f"{result.query} failed: {result.message}")
        # until one query is mapped this may be all that happens, and then the error at the end says it
        if any(r.status == "mapped" for r in results):
            while untold:
                console.print(untold.pop(0), soft_wrap=True)

    with Steps("query", len(queries)) as steps:
        summary = map(model, queries, config, on_result=told)
    failed = int((summary["status"] != "mapped").sum())
    output.print(f"{config.out}: {len(summary) - failed} of {len(summary)} queries mapped; see summary.csv there.")
    return 1 if failed else 0
