"""MuData files (h5mu) and stores: the modality "rna" is read like an AnnData, and its proteins as an element of obsm."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import pandas as pd

from scviaduct.errors import DataError, NotCountsError, UnreadableFileError
from scviaduct.storage.beside import PROTEIN_EXPRESSION, Beside
from scviaduct.storage.chunks import Group, guarded
from scviaduct.storage.frames import read_frame
from scviaduct.storage.layouts import AnnDataLayout
from scviaduct.storage.matrix import Matrix

MUDATA = "MuData"
RNA, PROTEINS = "rna", ("prot", "protein", "adt", "cite")
"""Names of the modalities that are read: the genes', and what the proteins' is called."""


class MuDataLayout(AnnDataLayout):
    """A MuData as an AnnData of its RNA.

    Raises UnreadableFileError when there is no modality "rna".
    """

    def __init__(self, path: Path, root: Group) -> None:
        self.path, self._all, self.kind = path, root, MUDATA
        node: Any = guarded(path, lambda: root["mod"])
        names = guarded(path, lambda: list(map(str, node)))
        if RNA not in names:
            what, part = ("file", "") if isinstance(root, h5py.Group) else ("store", f", or pass {path}/mod/NAME")
            raise UnreadableFileError(
                f"{path} is a MuData {what} without a modality {RNA!r} (it has {', '.join(names) or 'none'}): rename the "
                f"one with the genes{part}"
            )
        self.root: Any = guarded(path, lambda: node[RNA])
        self._protein_modality = next((name for name in PROTEINS if name in names), None)

    def obs(self, matrix: Matrix) -> pd.DataFrame:
        """obs of the RNA, and what only the obs of the whole has: batches often stand there."""
        own, whole = super().obs(matrix), read_frame(self.path, self._all, "obs")
        further = [c for c in whole.columns if c not in own.columns and ":" not in str(c)]
        return own.join(whole[further]) if further and whole.index.is_unique else own

    def names(self, kind: str) -> tuple[str, ...]:
        """Names in obsm or layers of the RNA, and the proteins."""
        found = super().names(kind)
        offered = kind == "obsm" and self._protein_modality is not None and PROTEIN_EXPRESSION not in found
        return (*found, PROTEIN_EXPRESSION) if offered else found

    def columns(self, name: str) -> tuple[str, ...] | None:
        """Names of the columns of an element of obsm."""
        beside = self.beside(name)
        return beside.names if beside else super().columns(name)

    def beside(self, name: str) -> Beside | None:
        """The proteins, by their name in obsm; None for what stands there."""
        return self._proteins if name == PROTEIN_EXPRESSION and name not in super().names("obsm") else None

    @cached_property
    def _proteins(self) -> Beside | None:
        """The proteins' modality, its cells matched by name with those of the RNA.

        Raises DataError when cells of the RNA have no proteins.
        """
        if self._protein_modality is None:
            return None
        where = f"mod/{self._protein_modality}"
        part = AnnDataLayout(self.path, guarded(self.path, lambda: self._all[where]))
        try:
            matrix, _ = part.matrix(None)
        except NotCountsError as error:
            raise NotCountsError(f"{self.path}: {where} holds no raw counts of proteins: {error}") from error
        wanted, cells = read_frame(self.path, self.root, "obs").index, part.obs(matrix).index
        names = tuple(map(str, part.var(matrix).index))
        if cells.equals(wanted):
            return Beside(names, matrix)
        if not cells.is_unique:
            raise DataError(f"{self.path}: {where} names cells twice, so they cannot be matched with those of {RNA}")
        order = cells.get_indexer(wanted)
        if (order < 0).any():
            example = wanted[int((order < 0).argmax())]
            raise DataError(
                f"{self.path}: {(order < 0).sum():,} of the {len(wanted):,} cells of {RNA} are not in {where}, e.g. "
                f"{example!r}. Keep the cells of both (muon.pp.intersect_obs), or leave the proteins out"
            )
        return Beside(names, matrix, order=order)
