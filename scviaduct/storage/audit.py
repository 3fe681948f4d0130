"""Is a matrix raw counts? Every value is looked at, and what is wrong is said with its cell, gene and the fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scviaduct.errors import DataError, NotCountsError
from scviaduct.storage.check import INDEX, LIMIT, UNSORTED, VALUE, check_block


@dataclass(frozen=True)
class Audit:
    """What one look at every value of a counts matrix found; audits of parts add up to the audit of the whole."""

    matrix: str
    """Which matrix of the file: "X", "raw/X" or "layers/<name>"."""
    dtype: str
    """Type of the stored values."""
    n_obs: int = 0
    """Cells."""
    n_vars: int = 0
    """Genes."""
    nnz: int = 0
    """Counts that are not zero."""
    total: int = 0
    """Sum of all counts."""
    largest: int = 0
    """The largest count."""
    zero_count_cells: int = 0
    """Cells without any count."""
    explicit_zeros: int = 0
    """Stored zeros, which are dropped."""
    duplicate_entries: int = 0
    """Entries of a cell that name a gene once more; they are summed."""
    duplicate_obs_names: int = 0
    """Cells whose name an earlier cell of the file has."""

    def __add__(self, other: Audit) -> Audit:
        """The audit of both parts."""
        return replace(
            self,
            n_obs=self.n_obs + other.n_obs,
            nnz=self.nnz + other.nnz,
            total=self.total + other.total,
            largest=max(self.largest, other.largest),
            zero_count_cells=self.zero_count_cells + other.zero_count_cells,
            explicit_zeros=self.explicit_zeros + other.explicit_zeros,
            duplicate_entries=self.duplicate_entries + other.duplicate_entries,
        )


@dataclass(frozen=True)
class Origin:
    """Where a block of counts comes from, so that a message can name the cell and the gene."""

    path: Path
    matrix: str
    cells: Callable[[], pd.Index]
    genes: Callable[[], pd.Index]
    alternatives: Callable[[], tuple[str, ...]] = tuple
    """The file's other matrices that look like counts, by the name `counts=` takes."""


def as_counts(values: NDArray[Any]) -> NDArray[np.uint32] | None:
    """The same values as uint32, or None when one is not a whole number in [0, 2**24)."""
    if not values.size:
        return np.zeros(0, np.uint32)
    with np.errstate(invalid="ignore"):
        # NaN, inf, negative and fractional values change in this cast, so that one comparison finds them all.
        counts = values.astype(np.uint32)
    return counts if counts.max() < LIMIT and np.array_equal(counts, values) else None


def check_counts(
    block: csr_matrix,
    origin: Origin,
    first_row: int = 0,
    lookup: NDArray[np.int32] | None = None,
    n_vars: int | None = None,
) -> tuple[csr_matrix, Audit]:
    """Check every value of raw CSR rows of any numeric type, and give them back canonical, with what was seen.

    The block is used up: its arrays become part of the result. `lookup` gives the gene of each column (-1: none, its
    values are skipped) and `n_vars` the number of genes; without them each column is a gene.

    Canonical means: uint32 counts, sorted gene indices, none twice (such entries are summed), no stored zero.

    Raises:
        NotCountsError: a value is NaN, infinite, negative, fractional or at least 2**24.
        DataError: a gene index lies outside the matrix.
    """
    width = block.shape[1] if n_vars is None else n_vars
    audit = Audit(origin.matrix, str(block.data.dtype), n_obs=block.shape[0], n_vars=width)
    checked = check_block(block.data, block.indices, block.indptr, block.shape[1], lookup)
    if checked.status == INDEX:
        raise _bad_index(block, origin, first_row)
    if checked.status == UNSORTED:
        return _tidy(block, origin, first_row, lookup, audit)
    if checked.status == VALUE:
        raise _not_counts(_over_genes(block, lookup, width), origin, first_row)
    rows = csr_matrix((block.shape[0], width), dtype=np.uint32)
    rows.data, rows.indices, rows.indptr = checked.data, checked.indices, checked.indptr
    rows.has_canonical_format = True
    return rows, replace(
        audit,
        nnz=len(checked.data),
        total=checked.total,
        largest=checked.largest,
        zero_count_cells=int((np.diff(checked.indptr) == 0).sum()),
        explicit_zeros=checked.zeros,
    )


def _tidy(
    block: csr_matrix, origin: Origin, first_row: int, lookup: NDArray[np.int32] | None, audit: Audit
) -> tuple[csr_matrix, Audit]:
    """Rows whose indices do not increase: the entries of a gene are summed."""
    moved = _over_genes(block, lookup, audit.n_vars)
    counts = as_counts(moved.data)
    if counts is None:
        raise _not_counts(moved, origin, first_row)
    # 64 bits: each addend is below 2**24, their sum need not be below 2**32.
    tidy = csr_matrix((counts.astype(np.int64), moved.indices, moved.indptr), shape=moved.shape)
    stored = tidy.nnz
    tidy.sum_duplicates()
    summed = as_counts(tidy.data)
    if summed is None:
        raise _not_counts(tidy, origin, first_row)
    distinct, tidy.data = tidy.nnz, summed
    tidy.eliminate_zeros()
    tidy.has_canonical_format = True
    return tidy, replace(
        audit,
        nnz=tidy.nnz,
        total=int(tidy.data.sum(dtype=np.int64)),
        largest=int(tidy.data.max(initial=0)),
        zero_count_cells=int((np.diff(tidy.indptr) == 0).sum()),
        explicit_zeros=distinct - tidy.nnz,
        duplicate_entries=stored - distinct,
    )


def _over_genes(block: csr_matrix, lookup: NDArray[np.int32] | None, n_vars: int) -> csr_matrix:
    """The block with columns moved to their genes; entries of a gene stay apart."""
    if lookup is None:
        return block
    gene = lookup[block.indices]
    kept = np.concatenate([[0], np.cumsum(gene >= 0)])[block.indptr]
    return csr_matrix((block.data[gene >= 0], gene[gene >= 0], kept), shape=(block.shape[0], n_vars))


def check_indptr(indptr: NDArray[Any], nnz: int, path: Path, matrix: str) -> None:
    """Row (or column) pointers start at 0, never fall and end at the number of stored values, else DataError."""
    falls = np.flatnonzero(np.diff(indptr) < 0) if len(indptr) else np.zeros(0, np.int64)
    if len(falls):
        at = int(falls[0])
        raise DataError(
            f"{path}: {matrix}/indptr falls from {indptr[at]:,} to {indptr[at + 1]:,} at position {at + 1:,} "
            f"({len(falls):,} such places): the file is damaged, probably by 32-bit pointers that overflowed in a "
            "matrix of more than 2,147,483,647 values; write it again from its source with a recent anndata"
        )
    if len(indptr) == 0 or indptr[0] != 0 or indptr[-1] != nnz:
        ends = f"runs from {indptr[0]:,} to {indptr[-1]:,}" if len(indptr) else "is empty"
        raise DataError(
            f"{path}: {matrix}/indptr {ends}, but {nnz:,} values are stored: the file is damaged or cut off; "
            "get it again from its source"
        )


def _bad_index(block: csr_matrix, origin: Origin, first_row: int) -> DataError:
    n_columns = block.shape[1]
    bad = np.flatnonzero((block.indices < 0) | (block.indices >= n_columns))
    row = int(np.searchsorted(block.indptr, bad[0], side="right")) - 1
    return DataError(
        f"{origin.path}: {origin.matrix} has {len(bad):,} gene indices outside 0-{n_columns - 1:,}, e.g. "
        f"{block.indices[bad[0]]:,} in cell {_name(origin.cells(), first_row + row)}: the file is damaged; "
        "get it again from its source"
    )


KINDS: tuple[tuple[str, Callable[[NDArray[Any]], NDArray[np.bool_]]], ...] = (
    ("not finite (NaN or infinite)", lambda v: ~np.isfinite(v)),
    ("negative", lambda v: v < 0),
    ("not whole numbers", lambda v: v != np.floor(v)),
    (f"at least {LIMIT:,} (2**24), which float32 cannot hold exactly", lambda v: v >= LIMIT),
)
"""What a value that is no count can be, and which values of an array are."""


def _not_counts(block: csr_matrix, origin: Origin, first_row: int) -> NotCountsError:
    found = [(name, np.flatnonzero(is_bad(block.data))) for name, is_bad in KINDS]
    found = [(name, bad) for name, bad in found if len(bad)]
    example = int(found[0][1][0])
    row = int(np.searchsorted(block.indptr, example, side="right")) - 1
    kinds = " and ".join(f"{len(bad):,} are {name}" for name, bad in found)
    rows = f"rows {first_row:,}-{first_row + block.shape[0] - 1:,}"
    cell, gene = _name(origin.cells(), first_row + row), _name(origin.genes(), int(block.indices[example]))
    return NotCountsError(
        f"{origin.path}: {origin.matrix} does not hold raw counts: of the {block.nnz:,} stored values in {rows}, "
        f"{kinds}, e.g. {block.data[example]!s} in cell {cell}, gene {gene}. {advice(found[0][0], origin)}"
    )


def advice(kind: str, origin: Origin) -> str:
    """One sentence: where the counts are, or what to ask for when no matrix of the file holds any."""
    guess = {"negative": "Scaled? ", "not whole numbers": "Normalised or log-transformed? "}.get(kind, "")
    others = origin.alternatives()
    if others:
        fixes = " or ".join(f"--counts {name}" for name in others)
        return f"{guess}Counts were found in {', '.join(others)}: pass {fixes}"
    return f"{guess}No other matrix of the file (X, raw, layers) looks like counts: get the raw counts from its source"


def _name(names: pd.Index, position: int) -> str:
    return repr(str(names[position])) if 0 <= position < len(names) else f"number {position:,}"
