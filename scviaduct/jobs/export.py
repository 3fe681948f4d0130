"""`scviaduct export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from scviaduct.errors import ConfigError
from scviaduct.jobs.display import Steps, output


def command(
    path: Path,
    /,
    *,
    out: Path,
    kind: Annotated[Literal["h5ad", "scvi-tools"] | None, Parameter(name="--format")] = None,
    dataset: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    where: str | None = None,
    genes: Path | None = None,
    join: Literal["union", "intersection"] = "union",
) -> int:
    """Write cells of an atlas as an h5ad, or a model as a folder that scvi-tools loads.

    Cells are written in memory that does not grow with their number. A model is loaded by scvi-tools as
    SCVI.load(OUT, adata), which needs the obs columns that the model was trained with.

    Args:
        path: An atlas made by convert; a run or a bundle.
        out: The file to write, e.g. b_cells.h5ad; of a model the folder.
        kind: What to write. Default: an h5ad of an atlas, scvi-tools' files of a model.
        dataset: Data sets to take from. Default: all.
        where: Cells to take, e.g. "cell_type == 'B cell' and donor != 'd1'"; names with spaces stand in backticks.
        genes: Text file with one gene per line. Default: see join.
        join: Genes of several data sets to take: those of any, or of all.
    """
    if _is_model(path, kind):
        if dataset or where or genes:
            raise ConfigError(
                "--dataset, --where and --genes choose cells and genes of an atlas; a model is written whole."
            )
        from scviaduct.distributed.exporting import export_model, requirements

        output.print(f"{export_model(path, out)}: {requirements(path)}")
        return 0
    from scviaduct.storage.export import export

    with Steps("export") as steps:
        made = export(
            path,
            out,
            datasets=dataset or None,
            where=where,
            genes=genes,
            join=join,
            on_progress=lambda name, done, n: steps.at(done, name, n),
        )
    output.print(f"{out}: {made.n_obs:,} cells x {made.n_vars:,} genes.")
    return 0


def _is_model(path: Path, kind: str | None) -> bool:
    """Whether a model is to be written; ConfigError for a model as cells or cells as a model."""
    model = any((path / name).is_file() for name in ("model.json", "bundle/model.json", "run.json"))
    if model and kind == "h5ad":
        raise ConfigError(f"{path} is a model, which has no h5ad; leave --format out, or name an atlas.")
    return model or kind == "scvi-tools"
