"""A look at all files before the first is converted: can each be used, do their genes fit, is there room on the disk?"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from scviaduct.errors import DataError, IncompleteError, nearest
from scviaduct.storage.arrays import open_group
from scviaduct.storage.dataset import DatasetPlan, partial_folder
from scviaduct.storage.genes import gene_axis, id_type, normalise
from scviaduct.storage.h5ad import CountsFile, open_counts
from scviaduct.storage.manifest import DATASET_MARKER, read_json

BYTES_A_VALUE = 1.6
"""On disk, of counts. Measured on 16 files: 0.8 to 1.6; 1.4 for 20,000 genes and 2,000 of them in a cell."""
SCRATCH_A_VALUE = 24
"""Bytes of a record (row, column, value) that a CSC matrix becomes while it is turned round."""


@dataclass(frozen=True)
class Look:
    """What was seen of one data set."""

    n_obs: int
    values: int = 0
    """Stored counts, estimated where the matrix is dense."""
    bytes: int = 0
    """What it will take on disk, about; 0 when it is there."""
    scratch: int = 0
    """What it takes besides while it is made."""
    lacking: frozenset[tuple[str, str]] = frozenset()
    """("obsm" or "layers", name) of elements that were asked for and are not in the file."""


class Genes:
    """Which data sets share a gene with another, by var_names."""

    def __init__(self) -> None:
        self._owner: dict[str, str] = {}
        self._examples: dict[str, list[str]] = {}
        self._shared: set[str] = set()

    def add(self, name: str, genes: list[str]) -> None:
        """Count the genes of a data set; `name` is what messages call it."""
        self._examples[name] = genes[:1000]
        for gene in genes:
            other = self._owner.setdefault(gene, name)
            if other != name:
                self._shared |= {name, other}

    def lonely(self) -> list[str]:
        """Data sets that share none."""
        return [name for name in self._examples if name not in self._shared] if len(self._examples) > 1 else []

    def refuse(self, name: str) -> DataError:
        """What is wrong with a lonely one."""
        others = [n for n in self._examples if n != name]
        other = next((n for n in others if n in self._shared), others[0])
        return DataError(
            f"{name} shares no gene with the other files: it has {self._kind(name)}, {other} has {self._kind(other)}. "
            "Give all files the same kind of names in var; other organisms need an own atlas"
        )

    def _kind(self, name: str) -> str:
        genes = self._examples[name]
        return f"{id_type(genes)} names ({', '.join(genes[:3])})"


def look(plans: Sequence[DatasetPlan], out: Path, datasets: Sequence[str] = ()) -> dict[str, Look]:
    """Open every file of `plans`, or read of those that are done; `datasets` are others of the atlas `out`.

    Raises:
        UnreadableFileError, NotCountsError, DataError: a file cannot be used, or shares no gene with the others.
    """
    found, genes = {}, Genes()
    for name in datasets:
        genes.add(f"data set {name!r}", normalise(_stored_var(out, name).index))
    for plan in plans:
        folder = out / "datasets" / plan.id
        if (folder / DATASET_MARKER).is_file():
            manifest = read_json(folder / DATASET_MARKER)
            found[plan.id] = Look(manifest["n_obs"], lacking=_lacking(plan, manifest["obsm"], manifest["layers"]))
            genes.add(str(plan.path), normalise(_stored_var(out, plan.id).index))
            continue
        with open_counts(plan.path, counts=plan.counts, sum_duplicates=plan.sum_duplicates) as file:
            genes.add(str(plan.path), normalise(file.var.index))
            found[plan.id] = _look_at(plan, file)
    _refuse_typos(plans, found)
    if genes.lonely():
        _by_other_names(plans, out, datasets, genes)
    return found


def check_room(out: Path, found: Mapping[str, Look], workers: int) -> None:
    """IncompleteError when what is still to be made will not fit on the disk."""
    existing = next(p for p in [out, *out.absolute().parents] if p.exists())
    done = sum(_size(partial_folder(out / "datasets" / name)) for name in found)
    needed = sum(look.bytes for look in found.values())
    scratch = sum(sorted((look.scratch for look in found.values()), reverse=True)[:workers])
    free = shutil.disk_usage(existing).free
    if needed + scratch - done > free:
        besides = f" and {_readable(scratch)} for turning CSC matrices round" if scratch else ""
        raise IncompleteError(
            f"{out} will take about {_readable(needed)}{besides}, but the disk of {existing} has {_readable(free)} free"
            f"{f' besides {_readable(done)} that are done' if done else ''}: free some space, or name another --out"
        )


def _stored_var(out: Path, dataset_id: str) -> pd.DataFrame:
    return ad.io.read_elem(open_group(out / "datasets" / dataset_id / "var"))


def _look_at(plan: DatasetPlan, file: CountsFile) -> Look:
    size = int(file.stored_values * BYTES_A_VALUE) + 16 * file.n_obs
    for name in set(plan.layers) & set(file.layer_names()):
        first = next(block for _, block in file.layer_blocks(name, 64))
        size += int(first.nnz / first.shape[0] * file.n_obs * (first.dtype.itemsize + 2))
    for name in set(plan.obsm) & set(file.obsm_names()):
        rows = file.obsm_rows(name, 0, min(64, file.n_obs))
        size += int(_in_memory(rows) / rows.shape[0] * file.n_obs)
    size += int(file.obs.memory_usage(index=True).sum() + file.var.memory_usage(index=True).sum())
    scratch = file.nnz * SCRATCH_A_VALUE if file.layout == "csc" else 0
    return Look(file.n_obs, file.stored_values, size, scratch, _lacking(plan, file.obsm_names(), file.layer_names()))


def _lacking(plan: DatasetPlan, obsm: Iterable[str], layers: Iterable[str]) -> frozenset[tuple[str, str]]:
    asked = {*(("obsm", name) for name in plan.obsm), *(("layers", name) for name in plan.layers)}
    return frozenset(asked - {*(("obsm", name) for name in obsm), *(("layers", name) for name in layers)})


def _in_memory(rows: object) -> int:
    if isinstance(rows, pd.DataFrame):
        return int(rows.memory_usage().sum())
    return rows.nbytes if isinstance(rows, np.ndarray) else rows.data.nbytes + rows.indices.nbytes  # type: ignore


def _refuse_typos(plans: Sequence[DatasetPlan], found: Mapping[str, Look]) -> None:
    """Elements of obsm and layers are kept where they are; a name that no file has is a mistake."""
    for option, name in sorted(frozenset.intersection(*(found[p.id].lacking for p in plans))):
        with open_counts(plans[0].path, counts=plans[0].counts, sum_duplicates=True) as file:
            names = file.obsm_names() if option == "obsm" else file.layer_names()
        raise DataError(f"no file has {name!r} in {option}; {nearest(name, names)}")


def _by_other_names(plans: Sequence[DatasetPlan], out: Path, datasets: Sequence[str], genes: Genes) -> None:
    """var_names of some files are of another kind: they fit if a column of var has names that others have."""
    frames = {f"data set {name!r}": _stored_var(out, name) for name in datasets}
    for plan in plans:
        if (out / "datasets" / plan.id / DATASET_MARKER).is_file():
            frames[str(plan.path)] = _stored_var(out, plan.id)
            continue
        with open_counts(plan.path, counts=plan.counts, sum_duplicates=plan.sum_duplicates) as file:
            frames[str(plan.path)] = file.var
    try:
        axis = gene_axis(frames)
    except DataError:
        raise genes.refuse(genes.lonely()[-1]) from None
    fitting = Genes()
    for name, names in axis.names.items():
        fitting.add(name, [gene for gene in names if gene is not None])
    if fitting.lonely():
        raise genes.refuse(fitting.lonely()[-1])


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else 0


def _readable(size: int) -> str:
    return f"{size / 10**9:,.1f} GB" if size >= 10**8 else f"{size / 10**6:,.1f} MB"
