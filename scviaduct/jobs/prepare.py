"""`scviaduct prepare`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from scviaduct.jobs.display import Steps, output

if TYPE_CHECKING:
    from scviaduct.storage.view import View


def command(
    atlas: Path,
    /,
    *,
    genes: str = "2000",
    flavor: Literal["seurat_v3", "seurat", "cell_ranger"] = "seurat_v3",
    batch_key: str | None = None,
    name: str = "default",
    join: Literal["intersection", "union"] = "intersection",
    min_counts: int = 0,
    min_genes: int = 0,
    max_mito: float | None = None,
    is_primary_data: Annotated[bool, Parameter(negative="")] = False,
    proteins: str | None = None,
    seed: int = 0,
    codec: Literal["lz4", "zstd", "none"] = "lz4",
    memory: str = "2GB",
    workers: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
) -> int:
    """Choose genes and write the shuffled view that training reads.

    After a kill, or when the disk was full, the same command goes on where it was. After data sets were appended to
    the atlas it adds their cells to the view, whose genes stay.

    Args:
        atlas: An atlas made by convert.
        genes: Number of highly variable genes, "all", or a text file with one gene per line.
        flavor: How highly variable genes are found, as in scanpy.
        batch_key: obs column; genes are ranked within its batches. Default: within the data sets.
        name: Name of the view; an atlas can have several.
        join: Genes to choose from: those of all data sets, or of any.
        min_counts: Leave out cells with fewer counts.
        min_genes: Leave out cells with counts of fewer genes.
        max_mito: Leave out cells with a higher share of mitochondrial counts, in per cent.
        is_primary_data: Leave out cells whose obs column is_primary_data is not true.
        proteins: obsm element with the protein counts (CITE-seq), kept by convert --obsm; totalvi needs them.
        seed: Decides the order of the cells on disk.
        codec: Compression of the view: fast, small (for slow disks), or none.
        memory: Memory to stay below, e.g. 2GB.
        workers: Threads, or tasks on a cluster. Default: one a core.
        address: Address of a running Ray cluster ("auto", "ray://…") that shares the file system; memory is then that
            of this process.
        overwrite: Replace a view of this name, and choose its genes anew.
    """
    from scviaduct.distributed.tasks import executor_at
    from scviaduct.storage.prepare import prepare
    from scviaduct.storage.qc import Filters

    with ExitStack() as stack:
        executor = stack.enter_context(executor_at(address, workers))
        view = prepare(
            atlas,
            genes=int(genes) if genes.isdigit() else genes,
            flavor=flavor,
            batch_key=batch_key,
            name=name,
            join=join,
            filters=Filters(min_counts, min_genes, max_mito, is_primary_data),
            proteins=proteins,
            seed=seed,
            codec=codec,
            memory=memory,
            workers=workers,
            executor=executor,
            overwrite=overwrite,
            on_progress=stack.enter_context(_Phases()).at,
        )
    output.print(
        f"View {view.name!r} of {atlas}: {view.n_rows:,} cells, {len(view.genes):,} genes{_proteins(view)}{_left_out(view)}."
    )
    chosen, datasets = view.manifest["genes_chosen_from"], view.manifest["datasets"]
    if chosen and len(chosen) < len(datasets):
        output.print(
            f"Its genes were chosen from the first {len(chosen)} of {len(datasets)} data sets; "
            "--overwrite chooses them anew."
        )
    options = (f" --view {name}" if name != "default" else "") + (f" --batch-key {batch_key}" if batch_key else "")
    output.print(f"Next: scviaduct train {atlas}{options} --out runs/first", style="dim")
    return 0


def _proteins(view: View) -> str:
    """How many proteins the view has, and how many data sets count any."""
    if view.panels is None:
        return ""
    panels = view.panels.datasets.values()
    return f", {len(view.panels.names):,} proteins of {sum(map(bool, panels)):,} of {len(panels):,} data sets"


def _left_out(view: View) -> str:
    """How many cells are not in the view, and why."""
    filtered: dict[str, int] = {}
    for failed in view.manifest["filtered_cells"].values():
        for reason, n in failed.items():
            filtered[f"fail {reason}"] = filtered.get(f"fail {reason}", 0) + n
    reasons = filtered | {"have no count over these genes": sum(view.manifest["zero_count_cells"].values())}
    told = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items() if n)
    return f" (left out: {told})" if told else ""


class _Phases(ExitStack):
    """One bar after the other."""

    _phase, _steps = "", None

    def at(self, phase: str, done: int, cells: int) -> None:
        """Stand at `done` of `cells` in a phase."""
        if phase != self._phase or self._steps is None:
            self.close()
            self._phase, self._steps = phase, self.enter_context(Steps(f"prepare: {phase}", unit="cells"))
        self._steps.at(done, "", cells)
