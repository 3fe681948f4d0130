"""The proteins of a query in a reference's order: another panel is padded, and what it lacks counts as not measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scviaduct.errors import DataError
from scviaduct.schema import Schema
from scviaduct.storage.h5ad import CountsFile
from scviaduct.storage.panels import Measured, tell_silent
from scviaduct.storage.proteins import ProteinCounts

NONE = "none"
"""Instead of an element's name: map by RNA alone."""


@dataclass(frozen=True)
class ProteinMatch:
    """How a query's panel fits the reference's."""

    matched: int
    """Proteins of both."""
    ignored: int
    """Proteins of the query alone."""


@dataclass(frozen=True, eq=False)
class QueryPanel:
    """The protein counts of some cells of a query."""

    counts: NDArray[np.float32]
    """(cells, reference's proteins), 0 where the cell's batch did not measure the protein."""
    measured: tuple[tuple[bool, ...], ...]
    """For each batch of the extended schema."""
    match: ProteinMatch


def read_proteins(
    file: CountsFile, schema: Schema, key: str | None, kept: NDArray[np.int64], batches: NDArray[np.int64]
) -> QueryPanel:
    """The proteins of the `kept` cells of a query, which lie in these batches of the extended schema.

    Without `key` the element has the reference's name, and a file without it is mapped by RNA alone.

    Raises DataError when the file has no element `key`, none of its names is the reference's, or it is to reuse a batch
    of the reference whose proteins it does not have; NotCountsError when a value is no count.
    """
    n = len(schema.proteins)
    counts, panel, match = np.zeros((len(kept), n), np.float32), np.zeros(n, bool), ProteinMatch(0, 0)
    if key is None and schema.proteins_key in file.obsm_names():
        key = schema.proteins_key
    if key not in (None, NONE):
        stored = ProteinCounts(file, str(key))
        panel = np.array([name in stored.names for name in schema.proteins])
        match = ProteinMatch(int(panel.sum()), len(stored.names) - int(panel.sum()))
        if not match.matched:
            raise DataError(
                f"{file.path}: none of the {len(stored.names)} proteins of obsm[{key!r}] ({_few(stored.names)}) is one of "
                f"the reference's {n} ({_few(schema.proteins)}). Give them the reference's names, or map by RNA alone "
                "with --proteins none"
            )
        counts = _aligned(stored, schema, kept)
    found = Measured(len(schema.batch), n)
    for batch in np.unique(batches):
        here = batches == batch
        found.add(counts[here], batches[here], panel)
    measured = _with_reference(file, schema, found, np.unique(batches), panel)
    return QueryPanel(np.where(np.array(measured)[batches], counts, np.float32(0)), measured, match)


def _aligned(stored: ProteinCounts, schema: Schema, kept: NDArray[np.int64]) -> NDArray[np.float32]:
    at = {name: i for i, name in enumerate(stored.names)}
    ours = [i for i, name in enumerate(schema.proteins) if name in at]
    theirs = [at[schema.proteins[i]] for i in ours]
    pieces = []
    for first, block in stored.blocks():
        part = np.zeros((len(block), len(schema.proteins)), np.float32)
        part[:, ours] = block[:, theirs]
        pieces.append(part[kept[(kept >= first) & (kept < first + len(block))] - first])
    return np.concatenate(pieces)


def _with_reference(
    file: CountsFile, schema: Schema, found: Measured, occurring: NDArray[np.int64], panel: NDArray[np.bool_]
) -> tuple[tuple[bool, ...], ...]:
    """What the batches of the reference measured, and then those of the query."""
    known = schema.measured
    for batch in occurring[occurring < len(known)].tolist():
        lost = np.flatnonzero(np.array(known[batch]) & ~panel)
        if len(lost):
            raise DataError(
                f"{file.path}: its cells of batch {schema.batch.categories[batch]!r} lack {len(lost)} proteins that the "
                f"reference measured in this batch, e.g. {schema.proteins[lost[0]]}. Map it without --reuse-batches"
            )
    tell_silent(found.silent[found.silent[:, 0] >= len(known)], schema.batch.categories, schema.proteins)
    return (*known, *found.table[len(known) :])


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
