from collections.abc import Callable

import numpy as np
import pytest
import torch

from scviaduct.schema import Batch, Covariate, Schema

MakeSchema = Callable[..., Schema]
MakeBatch = Callable[..., Batch]


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.fixture
def make_schema() -> MakeSchema:
    def make(*, genes=40, batches=3, categorical=(), continuous=0, labels=0, size_factor=False, proteins=0) -> Schema:
        return Schema(
            genes=tuple(f"gene{g}" for g in range(genes)),
            batch=Covariate("sample", tuple(f"s{i}" for i in range(batches))),
            labels=Covariate("type", tuple(f"t{i}" for i in range(labels))) if labels else None,
            categorical=tuple(Covariate(f"c{k}", tuple(map(str, range(n)))) for k, n in enumerate(categorical)),
            continuous=tuple(f"x{k}" for k in range(continuous)),
            size_factor="sf" if size_factor else None,
            proteins=tuple(f"p{k}" for k in range(proteins)),
            measured=((True,) * proteins,) * batches if proteins else (),
        )

    return make


@pytest.fixture
def make_batch() -> MakeBatch:
    """Random sparse counts with one large value; every covariate of the schema; codes may be limited."""

    def make(schema: Schema, cells: int = 24, seed: int = 0, batches: range | None = None, largest: int = 500) -> Batch:
        rng = np.random.default_rng(seed)
        x = rng.poisson(rng.gamma(0.5, 2.0, (cells, len(schema.genes)))).astype(np.float32)
        x[:, 0] += 1
        x[0, 1] = largest
        codes = batches or range(len(schema.batch))
        columns = [rng.integers(0, len(c), cells) for c in schema.categorical]
        return Batch(
            n_genes=len(schema.genes),
            indptr=np.concatenate([[0], np.cumsum((x > 0).sum(1))]).astype(np.int64),
            indices=np.nonzero(x)[1].astype(np.int32),
            data=x[x > 0],
            batch_index=rng.integers(codes.start, codes.stop, cells),
            labels=rng.integers(0, len(schema.labels), cells) if schema.labels else np.zeros(0, np.int64),
            categorical=np.stack(columns, 1) if columns else np.zeros((cells, 0), np.int64),
            continuous=rng.normal(size=(cells, len(schema.continuous))).astype(np.float32),
            size_factor=rng.uniform(5, 20, cells).astype(np.float32) if schema.size_factor else np.zeros(0, np.float32),
            proteins=rng.poisson(rng.gamma(1.0, 30.0, (cells, len(schema.proteins)))).astype(np.float32),
            rows=np.arange(cells),
            seeds=rng.integers(0, 2**63, cells).astype(np.uint64),
        )

    return make


@pytest.fixture
def dense() -> Callable[[Batch], np.ndarray]:
    def make(batch: Batch) -> np.ndarray:
        x = np.zeros((batch.n_cells, batch.n_genes), np.float32)
        x[np.repeat(np.arange(batch.n_cells), np.diff(batch.indptr)), batch.indices] = batch.data
        return x

    return make


@pytest.fixture
def rows_of() -> Callable[[Batch, slice], Batch]:
    """The cells of a slice, with all that belongs to them."""

    def take(b: Batch, rows: slice) -> Batch:
        first, last, _ = rows.indices(b.n_cells)
        part = slice(b.indptr[first], b.indptr[last])
        per_cell = {
            k: getattr(b, k)[rows]
            for k in ("batch_index", "labels", "categorical", "continuous", "size_factor", "proteins")
        }
        indptr = b.indptr[first : last + 1] - b.indptr[first]
        return Batch(
            n_genes=b.n_genes, indptr=indptr, indices=b.indices[part], data=b.data[part],
            rows=b.rows[rows], seeds=b.seeds[rows], **per_cell,
        )  # fmt: skip

    return take
