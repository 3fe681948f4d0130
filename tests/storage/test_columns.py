"""obs columns as codes: text is the same whatever the type it came in, and what a column holds is counted."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scviaduct.schema import MISSING
from scviaduct.storage.columns import Column, Tally, as_text, view_columns


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pd.Series(["b", "a", None]), ["b", "a", None]),
        (pd.Series(pd.Categorical(["b", None, "a"], categories=["z", "b", "a"])), ["b", None, "a"]),
        (pd.Series([1, 2, 10]), ["1", "2", "10"]),
        (pd.Series([1.0, np.nan, 10.0]), ["1", None, "10"]),
        (pd.Series([1.5, 2.0]), ["1.5", "2"]),
        (pd.Series(["1", 1, 1.0], dtype=object), ["1", "1", "1"]),
        (pd.Series([True, False]), ["True", "False"]),
        (pd.Series([True, None], dtype=object), ["True", None]),
        (pd.Series(pd.array(["x", pd.NA], dtype="string")), ["x", None]),
        (pd.Series(pd.array([3, pd.NA], dtype="Int64")), ["3", None]),
        (pd.Series([], dtype=object), []),
    ],
)
def test_text_of_any_type(values: pd.Series, texts: list[str | None]) -> None:
    text = as_text(values)
    assert [None if pd.isna(v) else v for v in text] == texts
    assert list(text.categories) == sorted({t for t in texts if t is not None})


@pytest.mark.parametrize(
    ("n_categories", "dtype"), [(1, np.int8), (125, np.int8), (126, np.int16), (32_765, np.int16), (32_766, np.int32)]
)
def test_codes_have_the_smallest_type_with_room_for_missing_and_gone(n_categories: int, dtype: type) -> None:
    column = Column("c", tuple(map(str, range(n_categories))))
    assert column.dtype == dtype
    assert np.array([column.fill, MISSING, n_categories - 1]).astype(dtype).tolist() == [-2, -1, n_categories - 1]


def test_values_outside_the_categories_and_absent_columns_are_missing() -> None:
    column = Column("c", ("a", "b"))
    assert column.encode(pd.Series(["b", "x", None, "a"]), 4).tolist() == [1, -1, -1, 0]
    assert column.encode(None, 2).tolist() == [-1, -1]
    assert np.isnan(Column("n").encode(None, 2)).all()


def test_numeric_in_one_data_set_and_text_in_another_is_text() -> None:
    frames = [pd.DataFrame({"d": [1, 2], "n": [0.5, 1]}), pd.DataFrame({"d": ["1", "x"], "n": [1, 2]})]
    columns, identifiers = view_columns({"d": ("1", "2", "x")}, frames, ["one", "two"])
    assert columns == [Column("dataset", ("one", "two")), Column("d", ("1", "2", "x")), Column("n")]
    assert identifiers == []


@pytest.mark.parametrize(
    ("values", "distinct", "minimum", "missing"),
    [
        ([2.0, 1.0, 2.0], [1.0, 2.0], 1.0, 0),
        ([2.0, np.nan], [2.0], 2.0, 1),
        ([0.5, 1.0], None, 0.5, 0),
        ([np.inf, 1.0], None, 1.0, 0),
        (list(range(1001)), None, 0.0, 0),
        ([np.nan], [], None, 1),
    ],
)
def test_tally_of_numbers(values: list[float], distinct: Any, minimum: float | None, missing: int) -> None:
    tally = Tally(Column("n"))
    for part in np.array_split(np.array(values, float), 2):
        tally.add(part, np.zeros(len(part), int), np.arange(len(part)))
    record = tally.to_dict()
    assert (record["values"], record["minimum"], record["missing"]) == (distinct, minimum, missing)


def test_tally_of_categories_adds_up_and_remembers_the_first_gap() -> None:
    tally = Tally(Column("c", ("a", "b", "c")))
    tally.add(np.array([0, 0, 2], np.int8), np.array([0, 0, 0]), np.array([5, 6, 7]))
    tally.add(np.array([-1, 0, -1], np.int8), np.array([1, 1, 1]), np.array([3, 4, 9]))
    assert tally.to_dict() == {
        "categories": ["a", "b", "c"], "counts": [3, 0, 1], "missing": 2, "missing_example": (1, 3)
    }  # fmt: skip
