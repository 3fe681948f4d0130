"""Every value is looked at: truth tables of what counts are and what the message says when they are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.sparse import csr_matrix

from scviaduct.errors import DataError, NotCountsError
from scviaduct.storage.audit import Audit, Origin, as_counts, check_counts, check_indptr


def origin(*alternatives: str) -> Origin:
    cells, genes = pd.Index([f"cell{i}" for i in range(20)]), pd.Index([f"gene{i}" for i in range(5)])
    return Origin(Path("a.h5ad"), "X", lambda: cells, lambda: genes, lambda: alternatives)


def block(values: list[float], dtype: str = "f8", width: int = 5) -> csr_matrix:
    """Rows of one entry each, in gene 3."""
    n = len(values)
    return csr_matrix((np.array(values, dtype), np.full(n, 3, np.int32), np.arange(n + 1)), shape=(n, width))


@pytest.mark.parametrize(
    ("values", "dtype", "words"),
    [
        ([1, np.nan], "f4", ["1 are not finite", "e.g. nan in cell 'cell11', gene 'gene3'"]),
        ([np.inf, 1], "f8", ["not finite", "e.g. inf in cell 'cell10'"]),
        ([1, -2], "i4", ["1 are negative", "e.g. -2 in cell 'cell11'", "Scaled?"]),
        ([1, -1.5], "f4", ["1 are negative"]),
        ([-(2**40)], "i8", ["negative"]),
        ([1, 0.5, 2.25], "f8", ["of the 3 stored values in rows 10-12", "2 are not whole", "0.5", "log-transformed?"]),
        ([1 + 2**-40], "f8", ["not whole"]),
        ([2**24], "i8", ["1 are at least 16,777,216", "float32"]),
        ([2**24], "f4", ["at least 16,777,216"]),
        ([2**32 + 5], "i8", ["at least 16,777,216"]),
        ([2**32 + 5], "u8", ["at least 16,777,216"]),
        ([1e30], "f8", ["at least 16,777,216"]),
    ],
)
def test_not_counts(values: list[float], dtype: str, words: list[str]) -> None:
    with pytest.raises(NotCountsError) as error:
        check_counts(block(values, dtype), origin(), first_row=10)
    for word in ["a.h5ad: X does not hold raw counts", "No other matrix", *words]:
        assert word in str(error.value)


def test_the_fix_is_named() -> None:
    with pytest.raises(NotCountsError, match=r"found in counts, raw: pass --counts counts or --counts raw$"):
        check_counts(block([0.5]), origin("counts", "raw"))


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">f4", "?"])
def test_any_type_that_holds_counts(dtype: str) -> None:
    values = [1, 0, 1] if dtype == "?" else [100, 0, 7]
    found = as_counts(np.array(values, dtype))
    assert found is not None
    assert found.dtype == np.uint32
    assert found.tolist() == values


@given(arrays.arrays(np.float64, st.integers(0, 20), elements=st.floats(allow_nan=True, allow_infinity=True, width=32)))
def test_counts_are_what_they_say(values: np.ndarray) -> None:
    truth = all(np.isfinite(v) and 0 <= v < 2**24 and v == int(v) for v in values)
    found = as_counts(values)
    assert (found is not None) == truth
    if found is not None:
        assert np.array_equal(found, values)


@given(st.data())
def test_canonical_form_keeps_the_matrix(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 30))
    row, column = (np.array(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), np.int32) for _ in "rc")
    values = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), np.float32)
    row.sort()
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=5))])
    dense = np.zeros((5, 5))
    np.add.at(dense, (row, column), values)
    distinct = len(set(zip(row.tolist(), column.tolist(), strict=True)))
    found, audit = check_counts(csr_matrix((values, column, indptr), shape=(5, 5)), origin())
    assert np.array_equal(found.toarray(), dense)
    assert all(np.all(np.diff(found.indices[a:b]) > 0) for a, b in zip(found.indptr, found.indptr[1:], strict=False))
    assert (found.data > 0).all()
    assert audit.duplicate_entries == n - distinct
    assert audit.nnz == np.count_nonzero(dense) == found.nnz == distinct - audit.explicit_zeros
    assert (audit.total, audit.largest) == (dense.sum(), dense.max())
    assert audit.zero_count_cells == (dense.sum(1) == 0).sum()


@given(st.data())
def test_columns_are_moved_to_their_genes(data: st.DataObject) -> None:
    """Columns without a gene are left out, wrong values in them too; columns of one gene are summed."""
    lookup = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=5, max_size=5)), np.int32)
    dense = np.array(data.draw(st.lists(st.integers(0, 3), min_size=20, max_size=20)), np.float32).reshape(4, 5)
    wanted = np.zeros((4, 3))
    for column, gene in enumerate(lookup):
        if gene >= 0:
            wanted[:, gene] += dense[:, column]
        else:
            dense[0, column] = 0.5
    found, audit = check_counts(csr_matrix(dense), origin(), 0, lookup, 3)
    assert np.array_equal(found.toarray(), wanted)
    assert (found.has_sorted_indices, found.nnz) == (True, np.count_nonzero(wanted))
    assert (audit.n_vars, audit.total, audit.largest) == (3, wanted.sum(), wanted.max())


def test_duplicates_do_not_hide_what_is_wrong() -> None:
    halves = csr_matrix((np.array([0.5, 0.5]), np.array([1, 1]), np.array([0, 2])), shape=(1, 5))
    with pytest.raises(NotCountsError, match="2 are not whole"):
        check_counts(halves, origin())
    large = csr_matrix((np.full(300, 2**24 - 1), np.full(300, 1), np.array([0, 300])), shape=(1, 5))
    with pytest.raises(NotCountsError, match="at least 16,777,216"):
        check_counts(large, origin())


@pytest.mark.parametrize("index", [-1, 5])
def test_index_outside(index: int) -> None:
    bad = block([1, 1, 1])
    bad.indices[1] = index
    with pytest.raises(DataError, match=rf"1 gene indices outside 0-4, e\.g\. {index} in cell 'cell8'"):
        check_counts(bad, origin(), first_row=7)


@pytest.mark.parametrize(
    ("indptr", "nnz", "message"),
    [
        ([0, 5, 3, 9], 9, r"X/indptr falls from 5 to 3 at position 2 \(1 such places\).*overflowed"),
        ([0, 2**31 - 1, -(2**31) + 7], 10, "falls from 2,147,483,647 to -2,147,483,641"),
        ([0, 3, 5], 9, "runs from 0 to 5, but 9 values are stored"),
        ([1, 3, 5], 5, "runs from 1 to 5"),
        ([], 0, "is empty"),
        ([0, 3, 3, 5], 5, None),
        ([0], 0, None),
    ],
)
def test_indptr(indptr: list[int], nnz: int, message: str | None) -> None:
    if message is None:
        return check_indptr(np.array(indptr, np.int64), nnz, Path("a.h5ad"), "X")
    with pytest.raises(DataError, match=message):
        check_indptr(np.array(indptr, np.int64), nnz, Path("a.h5ad"), "X")


def test_audits_add_up() -> None:
    whole = block([1, 0, 3, 2])
    parts = [check_counts(whole[i : i + 2], origin())[1] for i in (0, 2)]
    assert parts[0] + parts[1] == check_counts(whole, origin())[1]
    assert parts[0] + Audit("X", "float64") == parts[0]
