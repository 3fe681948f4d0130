"""Which matrix of a file holds raw counts: found by looking, or refused when several may be meant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scviaduct.errors import DataError, NotCountsError, nearest
from scviaduct.storage.audit import as_counts
from scviaduct.storage.matrix import Matrix

COUNTS_NAMES = ("counts", "raw_counts", "count", "umi", "umis", "umi_counts", "raw")
"""Layers with these names (in any case), and raw/X, go before other layers that hold whole numbers."""


def named(path: Path, matrices: Sequence[Matrix], counts: str) -> Matrix:
    """The matrix that `counts` ("X", "raw" or a layer) names, else DataError."""
    by_name = {m.name: m for m in matrices}
    wanted = {"X": ("X",), "raw": ("raw/X", "raw.X")}.get(counts, (f"layers/{counts}", counts))
    found = next((by_name[name] for name in wanted if name in by_name), None)
    if found is None:
        options = [option(name) for name in by_name]
        raise DataError(f"{path}: there is no matrix {counts!r} of numbers; {nearest(counts, options)}")
    return found


def option(name: str) -> str:
    """What `counts` takes for a matrix."""
    if name in ("raw/X", "raw.X"):
        return "raw"
    layer = name.removeprefix("layers/")
    return name if layer in ("X", "raw") else layer


def looks_like_counts(matrix: Matrix) -> bool:
    """Whether a sample of the values is whole numbers, and not only zeros."""
    sample = matrix.sample()
    return bool(sample.any()) and as_counts(sample) is not None


def choose(path: Path, matrices: Sequence[Matrix]) -> tuple[Matrix, str]:
    """X if it holds whole numbers, else the one other matrix that does; and why."""
    x = next((m for m in matrices if m.name == "X"), None)
    if x is not None and looks_like_counts(x):
        return x, "X holds whole numbers"
    found = [m for m in matrices if m is not x and looks_like_counts(m)]
    obvious = [m for m in found if option(m.name).removeprefix("layers/").lower() in COUNTS_NAMES]
    best = obvious or found
    why = _why_not(x) if x is not None else "the file has no X"
    if len(best) == 1:
        return best[0], f"{why}; {best[0].name} holds whole numbers"
    if best:
        options = [option(m.name) for m in best]
        raise NotCountsError(
            f"{path}: {why}, and {len(best)} matrices look like raw counts: {', '.join(m.name for m in best)}. "
            f"Say which one with {' or '.join(f'--counts {name}' for name in options)}"
        )
    if x is not None and as_counts(x.sample()) is not None:
        return x, "only zeros were seen, and nothing better is there"
    names = ", ".join(m.name for m in matrices) or "none"
    reasons = "".join(f" {_why_not(m)};" for m in matrices).rstrip(";")
    raise NotCountsError(
        f"{path}: no matrix holds raw counts (looked at: {names}).{reasons}. "
        "Normalised, log-transformed or scaled values cannot be used: get the raw counts from the data's source"
    )


def _why_not(matrix: Matrix) -> str:
    values = matrix.sample()
    with np.errstate(invalid="ignore"):
        bad = values[~((values >= 0) & (values == np.floor(values)) & np.isfinite(values))]
    if not len(bad):
        return f"{matrix.name} holds no counts"
    return f"{matrix.name} holds {bad[0]!s} ({len(bad):,} of {len(values):,} values looked at are not counts)"
