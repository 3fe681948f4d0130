"""Cells chosen by a sentence over obs, in the syntax of pandas' `DataFrame.query`; what is not a comparison is refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scviaduct.errors import ConfigError, DataError

METHODS = ("between", "isin", "isna", "notna")
"""Methods of a column that may be called."""
_HOW = (
    "Write comparisons of obs columns, joined by and, or, not: "
    "\"cell_type == 'B cell' and n_genes > 500\", \"donor in ['d1', 'd2']\", \"`cell type`.notna()\""
)
_ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Invert, ast.USub, ast.UAdd, ast.BinOp),
    *(ast.BitAnd, ast.BitOr, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Mod, ast.Compare, ast.cmpop, ast.Name, ast.Load),
    *(ast.Constant, ast.List, ast.Tuple),
)
# a text is matched first, so that a backtick in it does not begin a name
_PIECES = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|`([^`]*)`""")


@dataclass(frozen=True)
class Where:
    """A checked query: its text with plain names in place of backticks, and the column each name means."""

    text: str
    query: str
    columns: dict[str, str]
    """Name in `query` to obs column."""

    @classmethod
    def parse(cls, text: str) -> Where:
        """Raises ConfigError for what is no comparison of columns: nothing else ever reaches pandas."""
        names: dict[str, str] = {}

        def plain(found: re.Match[str]) -> str:
            if found[2] is None:
                return found[1]
            name = f"_column_{len(names)}_{'_' * text.count('_column_')}"  # never a name that the text has
            names[name] = found[2]
            return name

        query = _PIECES.sub(plain, text.strip())
        try:
            tree = ast.parse(query, mode="eval")
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"where={text!r} cannot be understood ({error.args[0]}). {_HOW}") from None
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            _refuse_other(node, called, text)
        used = dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        if not used:
            raise ConfigError(f"where={text!r} names no obs column. {_HOW}")
        return cls(text, query, {name: names.get(name, name) for name in used})

    def rows(self, frame: pd.DataFrame) -> NDArray[np.int64]:
        """Rows of `frame` (which has the columns) for which the query is true; where it is missing it is not.

        Raises DataError when the comparison makes no sense for the columns' types, or is no comparison at all.
        """
        values = pd.DataFrame({name: frame[column].array for name, column in self.columns.items()})
        try:
            found = values.eval(self.query, engine="python")
        except Exception as error:
            raise DataError(
                f"where={self.text!r} does not fit the columns: {error} ({_kinds(frame)}). {_HOW}"
            ) from error
        if not isinstance(found, pd.Series) or not pd.api.types.is_bool_dtype(found):
            raise DataError(f"where={self.text!r} says nothing true or false of a cell ({_kinds(frame)}). {_HOW}")
        return np.flatnonzero(found.to_numpy(bool, na_value=False))


def _refuse_other(node: ast.AST, called: set[int], text: str) -> None:
    if isinstance(node, ast.Call):
        method = node.func.attr if isinstance(node.func, ast.Attribute) else None
        if method in METHODS and not node.keywords:
            return
        what = "only the methods " + ", ".join(f".{m}()" for m in METHODS) + " of a column can be called"
    elif isinstance(node, ast.Attribute):
        if id(node) in called:
            return
        what = f".{node.attr} is not allowed; a column with a dot in its name is written in backticks"
    elif isinstance(node, _ALLOWED):
        return
    else:
        what = f"{type(node).__name__.lower()} has no place in it"
    raise ConfigError(f"where={text!r}: {what}. {_HOW}")


def _kinds(frame: pd.DataFrame) -> str:
    return "; ".join(f"{name} is {_kind(frame[name])}" for name in frame.columns)


def _kind(column: pd.Series) -> str:
    if pd.api.types.is_bool_dtype(column):
        return "true or false"
    if pd.api.types.is_numeric_dtype(column):
        return "numeric"
    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column.dropna().unique()
    return "text such as " + shown(values) if len(values) else "empty"


def shown(values: Sequence[object], n: int = 3) -> str:
    """The first few values, as text."""
    return ", ".join(repr(str(value)) for value in values[:n])
