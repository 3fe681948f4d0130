"""Counts that a file keeps beside those of its genes and not in obsm, as rows for the cells of the genes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scviaduct.errors import DataError
from scviaduct.storage.matrix import Matrix

PROTEIN_EXPRESSION = "protein_expression"
"""The element of obsm as which proteins are offered."""
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Beside:
    """Proteins of a file: antibodies among the features of a 10x Genomics h5, or a modality of a MuData."""

    names: tuple[str, ...]
    """One a column."""
    matrix: Matrix
    columns: NDArray[np.intp] | None = None
    """The columns of the matrix that are meant; None for all."""
    order: NDArray[np.intp] | None = None
    """(cells,) the row of each cell; None where they are the same. Else the matrix is held whole."""

    def rows(self, first: int, last: int) -> NDArray[Any]:
        """(cells, columns) values of the cells first to last, not checked; DataError when the matrix is damaged."""
        return self._read(first, last) if self.order is None else self._whole[self.order[first:last]]

    @cached_property
    def _whole(self) -> NDArray[Any]:
        return self._read(0, self.matrix.n_obs)

    def _read(self, first: int, last: int) -> NDArray[Any]:
        self.matrix.check_written()
        pieces = [np.zeros((0, len(self.names)), self.matrix.values.dtype)]
        for start, block in self.matrix.blocks(_ROWS, start=first):
            if block.nnz and not 0 <= block.indices.min() <= block.indices.max() < block.shape[1]:
                raise DataError(f"{self.matrix.path}: {self.matrix.name} has indices outside: the file is damaged")
            part = block[: last - start]
            pieces.append((part if self.columns is None else part[:, self.columns]).toarray())
            if start + block.shape[0] >= last:
                break
        return np.concatenate(pieces)
