"""The one vocabulary that storage and models share: what a cell carries (Schema) and a minibatch of them (Batch)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

MISSING = -1
"""Code of a cell that has no value in a categorical column."""


@dataclass(frozen=True)
class Covariate:
    """A categorical obs column and its ordered categories; a cell's code is its position among them."""

    key: str
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.categories)

    def extended(self, new: Sequence[str]) -> Covariate:
        """The same covariate with unseen categories appended: codes of known ones never move."""
        known = set(self.categories)
        return replace(self, categories=self.categories + tuple(c for c in new if c not in known))


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What a model knows of its data: genes in order, and the covariates with their categories."""

    genes: tuple[str, ...]
    batch: Covariate
    labels: Covariate | None = None
    """Cell types; `unlabeled_category` is not among the categories, such cells carry MISSING."""
    unlabeled_category: str = "Unknown"
    categorical: tuple[Covariate, ...] = ()
    """Further categorical covariates, in the order of the model's covariate blocks."""
    continuous: tuple[str, ...] = ()
    """Numeric obs columns, used as they are (not standardised)."""
    size_factor: str | None = None
    """Numeric obs column that replaces the library size."""
    proteins_key: str | None = None
    """obsm element with the protein counts."""
    proteins: tuple[str, ...] = ()
    """Proteins counted beside the genes (CITE-seq), all panels together."""
    measured: tuple[tuple[bool, ...], ...] = ()
    """For each batch, which of the proteins its panel measures; empty when there are no proteins."""

    @property
    def covariates(self) -> tuple[Covariate, ...]:
        """All categorical covariates a network sees: batch first, then the further ones."""
        return (self.batch, *self.categorical)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every obs column the schema needs."""
        named = [c.key for c in self.covariates] + ([self.labels.key] if self.labels else [])
        return (*named, *self.continuous, *([self.size_factor] if self.size_factor else []))

    def added(self, to: Schema) -> list[tuple[Covariate, tuple[str, ...]]]:
        """The covariates of `to` that this schema extends, each with its categories that are new here."""
        pairs = zip(to.covariates, self.covariates, strict=True)
        return [(old, mine.categories[len(old) :]) for old, mine in pairs if len(mine) > len(old)]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` is its inverse."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Schema:
        """Rebuild a schema from `to_dict`."""

        def covariate(c: dict[str, Any]) -> Covariate:
            return Covariate(c["key"], tuple(c["categories"]))

        return cls(
            genes=tuple(record["genes"]),
            batch=covariate(record["batch"]),
            labels=covariate(record["labels"]) if record["labels"] else None,
            unlabeled_category=record["unlabeled_category"],
            categorical=tuple(map(covariate, record["categorical"])),
            continuous=tuple(record["continuous"]),
            size_factor=record["size_factor"],
            proteins_key=record.get("proteins_key"),
            proteins=tuple(record["proteins"]),
            measured=tuple(map(tuple, record["measured"])),
        )

    @property
    def digest(self) -> str:
        """sha256 over the canonical JSON: equal digests mean the same genes and categories in the same order."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def _no_codes() -> NDArray[np.int64]:
    return np.zeros((0, 0), np.int64)


def _no_values() -> NDArray[np.float32]:
    return np.zeros((0, 0), np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A minibatch of cells: raw counts as CSR over the schema's genes, and one code per covariate.

    All arrays are numpy; models turn them into tensors on their own device.
    """

    n_genes: int
    indptr: NDArray[np.int64]
    """(cells + 1,) start of each cell's non-zeros."""
    indices: NDArray[np.integer[Any]]
    """(nnz,) gene index, increasing within a cell; int32, or the type on disk in blocks and in batches for a GPU."""
    data: NDArray[Any]
    """(nnz,) counts, all > 0; float32, or the type on disk."""
    batch_index: NDArray[np.int64]
    """(cells,) code in schema.batch."""
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(cells,) code in schema.labels, MISSING where unlabelled; size 0 when the schema has no labels."""
    categorical: NDArray[np.int64] = field(default_factory=_no_codes)
    """(cells, len(schema.categorical))."""
    continuous: NDArray[np.float32] = field(default_factory=_no_values)
    """(cells, len(schema.continuous))."""
    size_factor: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    """(cells,) or size 0."""
    proteins: NDArray[np.float32] = field(default_factory=_no_values)
    """(cells, len(schema.proteins)) protein counts, 0 where a cell's batch does not measure the protein."""
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(cells,) row of each cell in its source; says which cells a step saw."""
    seeds: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """(cells,) random key of each cell in this epoch; noise is a function of it, not of the process."""
    lanes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(lanes + 1,) borders of the sampler's lanes inside the batch."""
    labelled: Batch | None = None
    """Cells that all have a label and come along for the classifier; only where the model wants such."""
    weight: float = 1.0
    """Of a `labelled` batch: cells of the global batch over labelled cells of the global batch."""

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.indptr) - 1
