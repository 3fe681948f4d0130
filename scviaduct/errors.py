"""The few errors users meet. Each is a domain error *and* a builtin, so callers may catch either.

A message names the file, the column or matrix, how many values are concerned, one example, and the fix.
The command line prints the message alone and exits with code 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ScviaductError(Exception):
    """Base of every error whose message is meant for the user."""

    def __str__(self) -> str:
        # KeyError would print the repr of its argument; users get the sentence itself.
        return str(self.args[0]) if self.args else self.__class__.__name__


class DataError(ScviaductError, ValueError):
    """The content of an input is wrong (values, genes, covariates)."""


class NotCountsError(DataError):
    """The matrix that should hold raw counts does not."""


class MissingColumnError(DataError, KeyError):
    """An obs column that was asked for does not exist."""


class UnreadableFileError(DataError, OSError):
    """A file is not what its name says: truncated, empty, of another format, or not there."""


class IncompleteError(ScviaductError, OSError):
    """A store, run or bundle lacks its completion marker or disagrees with its manifest."""


class OutputExistsError(ScviaductError, FileExistsError):
    """The output path is taken; nothing was written."""


class NotEnoughMemoryError(ScviaductError, MemoryError):
    """What was asked for does not fit into memory; nothing was read."""


class ConfigError(ScviaductError, ValueError):
    """An option is unknown or its value makes no sense."""


def nearest(name: str, available: Iterable[str], n: int = 3) -> str:
    """One clause that helps after a misspelt name: the closest ones, else the first few."""
    names = [str(x) for x in available]
    close = difflib.get_close_matches(name, names, n=n, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(map(repr, close)) + "?"
    shown = ", ".join(map(repr, names[:12])) + (", …" if len(names) > 12 else "")
    return f"available: {shown or 'none'}"
