"""`scviaduct demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from scviaduct.jobs.display import console, output

if TYPE_CHECKING:
    from scviaduct.distributed.demo import Demo


def command(*, out: Path = Path("demo"), seed: int = 0, workers: int = 2) -> int:
    """Simulate studies and run the whole line on them.

    One of the queries is broken on purpose, to show what happens then.

    Args:
        out: Folder for data, atlas, run, results and picture; must not exist.
        seed: Decides the data and the training.
        workers: Queries mapped at the same time; more than 1 uses Ray.
    """
    from scviaduct.distributed.demo import demo

    made = demo(out, seed=seed, workers=workers, say=lambda line: console.print(f"· {line}", soft_wrap=True))
    output.print(_table(made))
    for row in made.table.itertuples():
        if row.status == "failed":
            output.print(f"{row.query} (broken on purpose): {row.message}\n")
    output.print("seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in made.seconds.items()))
    output.print(f"results: {out}/mapped/*.h5ad and summary.csv   model: {out}/run/bundle   picture: {out}/umap.png")
    output.print(f"MLflow:  .venv/bin/mlflow ui --backend-store-uri {made.tracking_uri}   then http://127.0.0.1:5000")
    return 0


def _table(made: Demo) -> Table:
    title = f"\nQueries mapped onto {made.bundle.facts['training']['cells']:,} reference cells"
    table = Table(
        title=title, box=SIMPLE_HEAD, padding=(0, 1), title_justify="left", pad_edge=False, collapse_padding=True
    )
    for name in ("query", "status", "cells", "genes", "accuracy", "F1", "uncert.", "unseen", "s"):
        table.add_column(name, justify="left" if name in {"query", "status"} else "right", no_wrap=True)
    for r in made.table.itertuples():
        genes = f"{r.genes_matched}/{r.genes}" if r.genes else "–"
        unseen = f"{r.unseen_uncertainty:.2f} ({r.unseen_cells:.0f})" if r.unseen_cells > 0 else "–"
        numbers = [f"{x:.3f}" if x == x else "–" for x in (r.accuracy, r.macro_f1, r.uncertainty)]
        table.add_row(
            r.query.removeprefix("query_"),
            r.status,
            f"{r.cells:,}" if r.cells else "–",
            genes,
            *numbers,
            unseen,
            f"{r.seconds:.1f}",
        )
    return table
