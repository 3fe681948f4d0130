"""A query data set made ready for mapping: audited counts in the reference's genes, covariates in its codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from scviaduct.errors import DataError, MissingColumnError, nearest
from scviaduct.schema import MISSING, Batch, Covariate, Schema
from scviaduct.storage.columns import DATASET, OBS_DATASET, as_text
from scviaduct.storage.genes import GeneMatch, match, mismatch_hint, select
from scviaduct.storage.h5ad import CountsFile, open_counts
from scviaduct.storage.querypanel import ProteinMatch, read_proteins


@dataclass(frozen=True, eq=False)
class Query:
    """One query file, ready for surgery."""

    id: str
    batch: Batch
    """The mapped cells over the reference's genes; `rows` are their rows in the file, labels are all MISSING."""
    schema: Schema
    """The reference's schema with the query's new categories appended."""
    match: GeneMatch
    proteins: ProteinMatch | None
    """Of the reference's proteins; None when it has none."""
    kept: NDArray[np.int64]
    """Rows of the file that are mapped: those with a count over the reference's genes."""
    obs: pd.DataFrame
    """obs of all cells of the file."""
    n_obs: int
    sha256: str


def read_query(
    source: str | Path,
    schema: Schema,
    *,
    batch_key: str | None = None,
    one_batch: bool = False,
    reuse_batches: bool = False,
    counts: str | None = None,
    sum_duplicates: bool = False,
    floor: float = 0.2,
    proteins: str | None = None,
) -> Query:
    """Read a file (an h5ad, an AnnData Zarr store, a 10x Genomics h5 or a MuData) as a query for a model with `schema`; only the reference's genes are kept in memory.

    `batch_key` is the file's batch column (default: the reference's name for it); with `one_batch` the file is one
    batch, named by its stem. A query's batches are new ones even when a reference batch has the same name
    ("<query>:<name>" then), unless `reuse_batches`. `counts` says which matrix holds them, and `sum_duplicates` adds up
    genes that are named twice, as in `open_counts`. `proteins` is the obsm element with the protein counts (default: the
    reference's name for it, where the file has that; "none" for none): its panel may be any part of the reference's.

    Raises DataError when fewer than `floor` of the reference's genes are found or cells lack a covariate,
    MissingColumnError for a missing covariate column, NotCountsError and UnreadableFileError as `open_counts` does.
    """
    with open_counts(source, counts=counts, sum_duplicates=sum_duplicates) as file:
        found = _match_genes(file, schema.genes, floor)
        one_batch = one_batch or (batch_key or schema.batch.key) == DATASET
        names = _batch_names(file, schema, batch_key, one_batch=one_batch)
        names, batch = _extend_batch(file.id, names, schema.batch, reuse=reuse_batches)
        cells = _read_cells(file, found)
        kept = np.flatnonzero(np.diff(cells.indptr))
        if not len(kept):
            raise DataError(f"{file.path}: no cell has a count over the reference's {len(schema.genes)} genes.")
        values = [_column(file, c.key, "categorical covariate") for c in schema.categorical]
        further = [c.extended(v.categories) for c, v in zip(schema.categorical, values, strict=True)]
        extended = replace(schema, batch=batch, categorical=tuple(further))
        codes = [_codes(v, c)[kept] for v, c in zip(values, further, strict=True)]
        of_batch = _codes(names, batch)[kept]
        whole = _batch(file, extended, cells[kept], kept, of_batch, codes)
        panel = read_proteins(file, extended, proteins, kept, of_batch) if schema.proteins else None
        if panel:
            whole, extended = replace(whole, proteins=panel.counts), replace(extended, measured=panel.measured)
        return Query(
            id=file.id,
            batch=whole,
            schema=extended,
            match=found,
            proteins=panel.match if panel else None,
            kept=kept,
            obs=file.obs,
            n_obs=file.n_obs,
            sha256=file.digest(),
        )


def _match_genes(file: CountsFile, genes: Sequence[str], floor: float) -> GeneMatch:
    found = match(genes, file.var, where=str(file.path))
    if found.n_matched == 0 or found.share < floor:
        raise DataError(
            f"{file.path}: has {found.n_matched} of the reference's {found.n_reference} genes "
            f"({found.share:.0%}; at least {floor:.0%} are needed). {mismatch_hint(genes, file.var)}"
        )
    return found


def _batch_names(file: CountsFile, schema: Schema, batch_key: str | None, *, one_batch: bool) -> pd.Categorical:
    if one_batch:
        return pd.Categorical.from_codes(np.zeros(file.n_obs, np.int8), categories=[file.id])
    key = batch_key or schema.batch.key
    if key not in file.obs.columns and key != OBS_DATASET:
        raise MissingColumnError(
            f"{file.path}: obs has no batch column {key!r} ({nearest(key, file.obs.columns)}). "
            "Name the column with --batch-key COLUMN, or map the file as one batch with --one-batch."
        )
    return _column(file, key, "batch")


def _extend_batch(
    query_id: str, names: pd.Categorical, reference: Covariate, *, reuse: bool
) -> tuple[pd.Categorical, Covariate]:
    """The query's batches under names that are new to the reference (all of them, unless `reuse`)."""
    known = set(reference.categories)
    if not reuse:
        renamed = [f"{query_id}:{name}" if name in known else name for name in names.categories]
        again = sorted(known.intersection(renamed))
        if again or len(set(renamed)) < len(renamed):
            raise DataError(
                f"Query {query_id!r}: its batches cannot be told from the reference's ({', '.join(again or renamed)}). "
                "Rename the file, or map it with --reuse-batches if they are the same batches."
            )
        names = names.rename_categories(renamed)
    return names, reference.extended(list(names.categories))


def _column(file: CountsFile, key: str, what: str) -> pd.Categorical:
    """An obs column of the file as text; every cell must have a value."""
    text = as_text(_values(file, key, what))
    _refuse_missing(file, key, text.codes == MISSING)
    return text


def _values(file: CountsFile, key: str, what: str) -> pd.Series:
    name = DATASET if key == OBS_DATASET else key
    if name not in file.obs.columns:
        raise MissingColumnError(
            f"{file.path}: obs has no column {name!r}, a {what} of the reference: {nearest(name, file.obs.columns)}"
        )
    return file.obs[name]


def _refuse_missing(file: CountsFile, key: str, missing: NDArray[np.bool_]) -> None:
    if missing.any():
        raise DataError(
            f"{file.path}: {missing.sum()} cells have no {key} (e.g. {file.obs.index[missing.argmax()]}). "
            "Give them a value, or take these cells out."
        )


def _read_cells(file: CountsFile, found: GeneMatch) -> csr_matrix:
    """All cells of the file over the reference's genes."""
    columns, n_genes = found.columns(file.n_vars), found.n_reference
    blocks = [select(block, columns, n_genes) for _, block in file.chunks()]
    return vstack(blocks, format="csr") if blocks else csr_matrix((0, n_genes), dtype=np.uint32)


def _codes(values: pd.Categorical, covariate: Covariate) -> NDArray[np.int64]:
    return pd.Index(covariate.categories).get_indexer(values.categories)[values.codes].astype(np.int64)


def _number(file: CountsFile, key: str, what: str) -> NDArray[np.float32]:
    values = pd.to_numeric(_values(file, key, what), errors="coerce").to_numpy(np.float32, na_value=np.nan)
    _refuse_missing(file, key, ~np.isfinite(values))
    return values


def _size_factor(file: CountsFile, key: str) -> NDArray[np.float32]:
    values = _number(file, key, "size factor")
    if (values <= 0).any():
        cell = file.obs.index[int((values <= 0).argmax())]
        raise DataError(f"{file.path}: {(values <= 0).sum()} cells have a {key} of 0 or less (e.g. {cell}).")
    return values


def _batch(
    file: CountsFile,
    schema: Schema,
    cells: csr_matrix,
    kept: NDArray[np.int64],
    batch_index: NDArray[np.int64],
    categorical: list[NDArray[np.int64]],
) -> Batch:
    n = len(kept)
    numbers = [_number(file, key, "continuous covariate")[kept] for key in schema.continuous]
    return Batch(
        n_genes=len(schema.genes),
        indptr=cells.indptr.astype(np.int64),
        indices=cells.indices.astype(np.int32),
        data=cells.data.astype(np.float32),
        batch_index=batch_index,
        labels=np.full(n, MISSING, np.int64) if schema.labels else np.zeros(0, np.int64),
        categorical=np.stack(categorical, axis=1) if categorical else np.zeros((n, 0), np.int64),
        continuous=np.stack(numbers, axis=1) if numbers else np.zeros((n, 0), np.float32),
        size_factor=_size_factor(file, schema.size_factor)[kept] if schema.size_factor else np.zeros(0, np.float32),
        rows=kept,
    )
