"""A training view: the chosen genes of all cells, shuffled on disk, read one block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from scviaduct.errors import DataError, IncompleteError, MissingColumnError, nearest
from scviaduct.schema import MISSING, Batch, Covariate, Schema
from scviaduct.storage.columns import DATASET
from scviaduct.storage.manifest import VIEW_MARKER, read_json, tree_digest
from scviaduct.storage.memory import Recycled
from scviaduct.storage.panels import Measured, Panels, tell_silent
from scviaduct.storage.places import Place, exists, file_sizes, place
from scviaduct.storage.shards import Arrays, Slice
from scviaduct.storage.tasks import cores

FORMAT = 1
VALUES = ("data", "indices")
"""The arrays with one entry a non-zero."""
PROTEINS = "proteins"
"""The array of protein counts, a cell's after the other's."""
_REMOTE_BYTES = 256 << 20  # of blocks that are on their way from an object store
_STRATA_ROWS = 1 << 20
_PROTEIN_VALUES = 1 << 24

Result = TypeVar("Result")


def array_name(column: str) -> str:
    """Where a view keeps an obs column; a slash in its name must not become a folder."""
    return "obs/" + column.replace("%", "%25").replace("/", "%2F")


class View:
    """A prepared training view of an atlas; opening it reads `view.json` and nothing else."""

    def __init__(self, atlas_path: Place, name: str, manifest: dict[str, Any]) -> None:
        self.atlas_path, self.name, self.manifest = atlas_path, name, manifest
        self.path = atlas_path / "views" / name
        self.genes: tuple[str, ...] = tuple(manifest["genes"])
        self.n_rows: int = manifest["n_rows"]
        self.block_rows: int = manifest["recipe"]["block_rows"]
        self.panels = Panels.of(manifest.get("proteins"))
        """The proteins, where the view was prepared with any."""
        self.excluded: int = sum(manifest["zero_count_cells"].values())
        """Cells left out because they have no count over the chosen genes."""

    @classmethod
    def open(cls, atlas_path: str | Place, name: str = "default") -> View:
        """Open the view `name` of the atlas.

        Raises IncompleteError when it does not exist, was not finished, or its files are not those it was written with,
        UnreadableFileError when `atlas_path` is no atlas.
        """
        atlas_path = place(atlas_path)
        path = atlas_path / "views" / name
        if not exists(path / VIEW_MARKER):
            if not (atlas_path / "views").exists():
                from scviaduct.storage.atlas import Atlas  # readers of a view need neither anndata nor dask

                Atlas.open(atlas_path)  # tells what is there when it is no atlas at all
            made = sorted(p.parent.name for p in atlas_path.glob(f"views/[!.]*/{VIEW_MARKER}"))
            there = "was not finished" if path.exists() else f"does not exist ({nearest(name, made)})"
            raise IncompleteError(
                f"View {name!r} of {atlas_path} {there}. Make it with: scviaduct prepare {atlas_path} --name {name}"
            )
        view = cls(atlas_path, name, read_json(path / VIEW_MARKER))
        view._check_files()
        return view

    @property
    def categories(self) -> dict[str, tuple[str, ...]]:
        """The categories of each categorical column, those without a cell in the view included."""
        return {name: tuple(c["categories"]) for name, c in self.manifest["columns"].items() if "categories" in c}

    @property
    def numeric(self) -> tuple[str, ...]:
        """The numeric columns."""
        return tuple(name for name, c in self.manifest["columns"].items() if "categories" not in c)

    @property
    def digest(self) -> str:
        """sha256 that identifies the content: equal digests mean the same cells with the same counts in the same order."""
        return self.manifest["digest"]

    def schema(
        self,
        *,
        batch_key: str,
        labels_key: str | None = None,
        unlabeled_category: str = "Unknown",
        categorical_covariate_keys: Sequence[str] = (),
        continuous_covariate_keys: Sequence[str] = (),
        size_factor_key: str | None = None,
        proteins: bool = False,
    ) -> Schema:
        """The schema of a model over this view; a category that no cell of the view has is not in it.

        With `proteins` it has the view's proteins, and says of each batch which of them it measured, for which all
        protein counts are read once.

        Raises MissingColumnError when a column does not exist, DataError when cells have no value in a column that
        needs one (labels do not), a column is of the wrong kind, or there are no proteins.
        """
        schema = Schema(
            genes=self.genes,
            batch=self._covariate(batch_key),
            labels=self._labels(labels_key, unlabeled_category) if labels_key else None,
            unlabeled_category=unlabeled_category,
            categorical=tuple(map(self._covariate, categorical_covariate_keys)),
            continuous=tuple(map(self._number, continuous_covariate_keys)),
            size_factor=self._size_factor(size_factor_key) if size_factor_key else None,
        )
        return self._with_proteins(schema) if proteins else schema

    def _with_proteins(self, schema: Schema) -> Schema:
        panels = self.panels
        if panels is None:
            raise DataError(
                f"View {self.name!r} of {self.atlas_path} holds no proteins. Make one that does: scviaduct prepare "
                f"{self.atlas_path} --name NAME --proteins KEY, where KEY is the obsm element with the protein counts"
            )
        found = ViewSource(self, schema).measured()
        tell_silent(found.silent, schema.batch.categories, panels.names)
        return replace(schema, proteins_key=panels.key, proteins=panels.names, measured=found.table)

    def source(self, schema: Schema) -> ViewSource:
        """The view's cells as the schema's codes, in blocks.

        Raises DataError when the schema has other genes, or lacks a category that cells of the view have.
        """
        if schema.genes != self.genes:
            raise DataError(
                f"View {self.name!r} of {self.atlas_path} holds {len(self.genes)} genes that are not the model's "
                f"{len(schema.genes)}: prepare a view of the model's genes."
            )
        for covariate in schema.covariates:
            new = set(self._covariate(covariate.key).categories) - set(covariate.categories)
            if new:
                raise DataError(f"Column {covariate.key!r}: the model has no category {min(new)!r} ({len(new)} such).")
        if schema.proteins and (self.panels is None or schema.proteins != self.panels.names):
            raise DataError(
                f"View {self.name!r} of {self.atlas_path} does not hold the model's {len(schema.proteins)} proteins: "
                f"prepare a view of the same panels with --proteins {schema.proteins_key}."
            )
        return ViewSource(self, schema)

    def verify(self) -> None:
        """Recompute the checksum of every file; raises IncompleteError naming the first file that differs."""
        found = tree_digest(self.path)
        for name, expected in self.manifest["files"].items():
            if found.get(name) != expected:
                raise IncompleteError(f"View {self.name!r} of {self.atlas_path}: {name} is damaged. {self.remedy}")

    @property
    def remedy(self) -> str:
        """What to do when a file is damaged or gone."""
        return f"Make the view again: scviaduct prepare {self.atlas_path} --name {self.name} --overwrite"

    def _check_files(self) -> None:
        if self.manifest.get("format") != FORMAT:
            raise IncompleteError(f"View {self.path} has format {self.manifest.get('format')}, not {FORMAT}.")
        sizes = file_sizes(self.path, self.manifest["files"])
        for name, expected in self.manifest["files"].items():
            size = sizes.get(name)
            if size != expected["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes instead of {expected['bytes']}"
                raise IncompleteError(f"View {self.name!r} of {self.atlas_path}: {name} {state}. {self.remedy}")

    def column(self, key: str) -> dict[str, Any]:
        """What `view.json` says of a column; raises MissingColumnError."""
        columns = self.manifest["columns"]
        if key in self.manifest["identifiers"]:
            raise DataError(f"Column {key!r} has more values than half the cells: it names cells, it is no covariate.")
        if key not in columns:
            raise MissingColumnError(f"{self.atlas_path} has no obs column {key!r}: {nearest(key, columns)}")
        return columns[key]

    def _covariate(self, key: str) -> Covariate:
        record = self.column(key)
        self._refuse_missing(key, record)
        if "categories" not in record and record["values"] is None:
            raise DataError(
                f"Column {key!r} is continuous, so it cannot be a batch or a categorical covariate. "
                "Use it as a continuous covariate."
            )
        return Covariate(key, occurring(record))

    def _labels(self, key: str, unlabeled_category: str) -> Covariate:
        record = self.column(key)
        if "categories" not in record and record["values"] is None:
            raise DataError(f"Column {key!r} is continuous, so it cannot be the labels.")
        labels = tuple(c for c in occurring(record) if c != unlabeled_category)
        if not labels:
            raise DataError(f"Column {key!r} labels no cell: each is missing or {unlabeled_category!r}.")
        return Covariate(key, labels)

    def _number(self, key: str) -> str:
        record = self.column(key)
        if "categories" in record:
            raise DataError(f"Column {key!r} is categorical ({', '.join(occurring(record)[:3])}, …), not numeric.")
        self._refuse_missing(key, record)
        return key

    def _size_factor(self, key: str) -> str:
        self._number(key)
        minimum = self.column(key)["minimum"]
        if minimum is not None and minimum <= 0:
            raise DataError(f"Column {key!r} has values as low as {minimum:g}: a size factor must be above 0.")
        return key

    def _refuse_missing(self, key: str, record: dict[str, Any]) -> None:
        if not record["missing"]:
            return
        from scviaduct.storage.atlas import Atlas

        dataset, row = record["missing_example"]
        id_ = self.manifest["columns"]["dataset"]["categories"][dataset]
        cell = Atlas.open(self.atlas_path).obs(id_).index[row]
        raise DataError(
            f"{record['missing']} cells have no {key} (e.g. {cell} of data set {id_!r}). "
            "Give them a value in the h5ad files and convert again, or use another column."
        )


def occurring(record: dict[str, Any]) -> tuple[str, ...]:
    """The categories that cells of the view have; of a numeric column, its whole numbers as text, by size."""
    if "categories" in record:
        return tuple(c for c, n in zip(record["categories"], record["counts"], strict=True) if n)
    return tuple(str(int(value)) for value in record["values"] or ())


class _Codes:
    """Turns a stored column into the codes of a covariate."""

    def __init__(self, record: dict[str, Any], covariate: Covariate) -> None:
        self.values = None if "categories" in record else np.asarray(record["values"])
        stored = record["categories"] if self.values is None else occurring(record)
        code = {category: i for i, category in enumerate(covariate.categories)}
        self.lookup = np.array([*(code.get(c, MISSING) for c in stored), MISSING], np.int64)

    def __call__(self, stored: NDArray[Any]) -> NDArray[np.int64]:
        if self.values is None:
            return self.lookup[stored]  # MISSING = -1 takes the last entry
        position = np.searchsorted(self.values, stored)  # NaN sorts after all values: the last entry again
        return self.lookup[position]


class ViewSource:
    """The cells of a view, a block at a time: a BlockSource.

    A source can be pickled and sent to workers; `read` may be called from any thread.
    """

    def __init__(self, view: View, schema: Schema) -> None:
        self.view, self.schema = view, schema
        self.n_genes, self.n_rows, self.block_rows = len(view.genes), view.n_rows, view.block_rows
        covariates = [*schema.covariates, *([schema.labels] if schema.labels else [])]
        self._codes = {c.key: _Codes(view.column(c.key), c) for c in covariates}
        self._numbers = dict.fromkeys([*schema.continuous, *([schema.size_factor] if schema.size_factor else [])])
        self._measured = np.array(schema.measured, bool)
        self._arrays, self._checked = Arrays(view.path, Recycled(), scattered=True), False

    def __reduce__(self) -> tuple[type[ViewSource], tuple[View, Schema]]:
        return ViewSource, (self.view, self.schema)  # neither the indexes of shards nor locks travel

    @property
    def readers(self) -> int:
        """How many blocks to read at once: on a disk a few more than cores; on an object store as many as hide its latency."""
        if isinstance(self.view.path, Path):
            return min(4, 2 * cores())
        block = self.view.manifest["nnz"] / self.n_rows * self.block_rows * 4  # bytes
        return int(np.clip(_REMOTE_BYTES / block, 4, 32))

    def read(self, block: int) -> Batch:
        """Rows [block · block_rows, min(n_rows, (block + 1) · block_rows)) in stored order; seeds and lanes are empty.

        Counts and gene indices have the types they are stored in.

        Raises IncompleteError when a file of the view is damaged or missing.
        """
        rows = slice(block * self.block_rows, min(self.n_rows, (block + 1) * self.block_rows))
        if not 0 <= rows.start < rows.stop:
            raise IndexError(f"block {block} of a view of {self.n_rows} rows in blocks of {self.block_rows}")
        return self._guarded(self._read, rows)

    def strata(self, key: str) -> NDArray[Any]:
        """(rows,) code of each cell in an obs column, -1 where it has no value; for a split by its categories.

        Raises MissingColumnError; DataError when the column is continuous; IncompleteError as `read`.
        """
        record = self.view.column(key)
        if "categories" not in record and record["values"] is None:
            raise DataError(f"Column {key!r} is continuous: cells cannot be split by its values.")
        rows = slice(0, self.n_rows)
        if "categories" in record:
            return self._guarded(self._column, key, rows)
        return self._coded(key, _Codes(record, Covariate(key, occurring(record))), len(record["values"]))

    def labels(self) -> NDArray[np.integer[Any]]:
        """(rows,) code of each cell in the schema's labels, MISSING where it has none; a byte or two a cell.

        Raises IncompleteError as `read`.
        """
        labels = self.schema.labels
        if labels is None:
            return np.full(self.n_rows, MISSING, np.int8)
        return self._coded(labels.key, self._codes[labels.key], len(labels))

    def _coded(self, key: str, codes: _Codes, n_codes: int) -> NDArray[Any]:
        """A whole column as codes, in the smallest type that holds them."""
        small = np.min_scalar_type(-n_codes - 1)
        parts = [slice(a, min(a + _STRATA_ROWS, self.n_rows)) for a in range(0, self.n_rows, _STRATA_ROWS)]
        return np.concatenate([codes(self._guarded(self._column, key, part)).astype(small) for part in parts])

    def measured(self) -> Measured:
        """What each batch measured of the view's proteins: one pass over their counts; raises IncompleteError as `read`."""
        panels = self.view.panels
        assert panels is not None
        counted = panels.counted(self.view.categories[DATASET])
        found = Measured(len(self.schema.batch), len(panels.names))
        step = max(1, _PROTEIN_VALUES // len(panels.names))
        for first in range(0, self.n_rows, step):
            rows = slice(first, min(first + step, self.n_rows))
            counts = self._guarded(self._proteins, rows)
            datasets, batches = (self._guarded(self._column, key, rows) for key in (DATASET, self.schema.batch.key))
            batches = self._codes[self.schema.batch.key](batches)
            for number in np.unique(datasets):
                here = datasets == number
                found.add(counts[here], batches[here], counted[number])
        return found

    def _proteins(self, rows: slice) -> NDArray[Any]:
        """(cells, proteins) counts in the stored type."""
        n = len(self.view.panels.names) if self.view.panels else 0
        return self._arrays.read(Slice(PROTEINS, rows.start * n, rows.stop * n))[0].reshape(-1, n)

    def _guarded(self, read: Callable[..., Result], *arguments: Any) -> Result:
        try:
            return read(*arguments)
        except (RuntimeError, OSError, ValueError) as error:  # numcodecs raises RuntimeError for bytes it cannot decode
            rows = arguments[-1]
            raise IncompleteError(
                f"View {self.view.name!r} of {self.view.atlas_path}: rows {rows.start} to {rows.stop - 1} "
                f"cannot be read ({error}). {self.view.remedy}"
            ) from error

    def _read(self, rows: slice) -> Batch:
        schema, n = self.schema, rows.stop - rows.start
        if not self._checked:
            self._check_lengths()
        named = [*self._codes, *self._numbers]
        indptr, *columns = self._arrays.read(
            Slice("indptr", rows.start, rows.stop + 1), *(Slice(array_name(k), rows.start, rows.stop) for k in named)
        )
        data, indices = self._arrays.read(*(Slice(name, int(indptr[0]), int(indptr[-1])) for name in VALUES))
        stored = dict(zip(named, columns, strict=True))
        codes = {key: lookup(stored[key]) for key, lookup in self._codes.items()}
        further = [codes[c.key] for c in schema.categorical]
        numbers = [stored[key] for key in schema.continuous]
        size_factor = stored[schema.size_factor] if schema.size_factor else np.zeros(0)
        return Batch(
            n_genes=self.n_genes,
            indptr=indptr - indptr[0],
            indices=indices,
            data=data,
            batch_index=codes[schema.batch.key],
            labels=codes[schema.labels.key] if schema.labels else np.zeros(0, np.int64),
            categorical=np.stack(further, axis=1) if further else np.zeros((n, 0), np.int64),
            continuous=np.stack(numbers, axis=1).astype(np.float32) if numbers else np.zeros((n, 0), np.float32),
            size_factor=size_factor.astype(np.float32),
            proteins=self._masked(rows, codes[schema.batch.key]) if schema.proteins else np.zeros((0, 0), np.float32),
            rows=np.arange(rows.start, rows.stop),
        )

    def _masked(self, rows: slice, batches: NDArray[np.int64]) -> NDArray[np.float32]:
        """(cells, proteins) counts, 0 where the cell's batch does not count as having measured the protein."""
        return np.where(self._measured[batches], self._proteins(rows), 0).astype(np.float32)

    def _column(self, key: str, rows: slice) -> NDArray[Any]:
        return self._arrays.read(Slice(array_name(key), rows.start, rows.stop))[0]

    def _check_lengths(self) -> None:
        nnz = self.view.manifest["nnz"]
        expected = {"data": nnz, "indices": nnz, "indptr": self.n_rows + 1}
        if self.schema.proteins:
            expected[PROTEINS] = self.n_rows * len(self.schema.proteins)
        columns = [array_name(key) for key in (*self._codes, *self._numbers)]
        for layout in self._arrays.layouts([*expected, *columns]):
            wanted = expected.get(layout.name, self.n_rows)
            if layout.length != wanted:
                raise ValueError(f"{layout.name} has {layout.length} entries instead of {wanted}")
        self._checked = True
