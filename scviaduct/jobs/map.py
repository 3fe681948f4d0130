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
    """Map query files onto a trained model: embedding, labels and their uncertainty, one result file a query.

    Exit code 0: all mapped; 1: some failed, see summary.csv; 2: none could be.

    Args:
        model: A run, a bundle, or a registered model such as models:/kang@current.
        queries: h5ad files.
    """
    from scviaduct.distributed.map import map

    done = 0

    def told(result: Mapped) -> None:
        nonlocal done
        done += 1
        steps.at(done, result.query)
        if result.status == "failed" and len(queries) > 1:
            console.print(f"{result.query}: {result.message}", markup=False, soft_wrap=True)

    with Steps("query", len(queries)) as steps:
        summary = map(model, queries, config, on_result=told)
    failed = int((summary["status"] != "mapped").sum())
    output.print(f"{config.out}: {len(summary) - failed} of {len(summary)} queries mapped; see summary.csv.")
    return 1 if failed else 0
