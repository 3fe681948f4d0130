"""read_query: genes by name, new batches, covariates that must be there, cells that can be mapped."""

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scviaduct.errors import DataError, MissingColumnError, NotCountsError
from scviaduct.schema import MISSING, Covariate, Schema
from scviaduct.storage.query import Query, read_query

GENES = tuple(f"g{i}" for i in range(10))
SCHEMA = Schema(genes=GENES, batch=Covariate("batch", ("r1", "r2")))
SCMIXOLOGY = Path(__file__).parents[3] / "shared/data/rna/scmixology_3celllines_celseq2_dropseq.h5ad"


def cells(
    genes: tuple[str, ...] = GENES, n_obs: int = 30, seed: int = 0, empty: tuple[int, ...] = (), extra: float = 0
) -> ad.AnnData:
    """Cells with counts; those in `empty` have none in the reference's genes, cell 7 has `extra` of the last gene."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(np.resize(["r1", "q1"], n_obs)),
            "donor": np.resize([1.0, 2.0], n_obs),
            "age": rng.integers(20, 80, n_obs),
            "cell_type": pd.Categorical(np.resize(["T", "B", "new"], n_obs)),
        },
        index=[f"cell{i}" for i in range(n_obs)],
    )
    counts = rng.poisson(1, (n_obs, len(genes))).astype(np.float32)
    counts[:, 0] += 1
    counts[list(empty), :10] = 0
    if extra:
        counts[list(empty), 10] = 0
        counts[7, 10] = extra
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list(genes)))


def query(folder: Path, data: ad.AnnData, schema: Schema = SCHEMA, **options: object) -> Query:
    data.write_h5ad(folder / "q.h5ad")
    return read_query(folder / "q.h5ad", schema, **options)


def dense(found: Query) -> np.ndarray:
    batch = found.batch
    return sp.csr_matrix((batch.data, batch.indices, batch.indptr), shape=(batch.n_cells, batch.n_genes)).toarray()


def test_counts_are_in_the_references_gene_order(tmp_path: Path) -> None:
    names = ("extra1", *GENES[:0:-1], "extra2")  # g0 is missing, the others reversed
    data = cells(names)
    found = query(tmp_path, data)
    expected = data.to_df().reindex(columns=list(GENES), fill_value=0).to_numpy()
    kept = np.flatnonzero(expected.sum(1))
    np.testing.assert_array_equal(dense(found), expected[kept])
    assert (found.match.missing, found.match.n_extra, found.match.n_matched) == (("g0",), 2, 9)
    assert found.kept.tolist() == found.batch.rows.tolist() == kept.tolist()
    assert all((np.diff(row) > 0).all() for row in np.split(found.batch.indices, found.batch.indptr[1:-1]))


def test_cells_without_counts_are_left_out_but_stay_in_obs(tmp_path: Path) -> None:
    found = query(tmp_path, cells((*GENES, "extra"), empty=(3, 7), extra=5))
    assert sorted(set(range(30)) - set(found.kept.tolist())) == [3, 7]
    assert (found.n_obs, len(found.obs), found.batch.n_cells) == (30, 30, 28)
    assert found.schema.batch.categories[found.batch.batch_index[3]] == "q:r1"  # row 4 of the file


@pytest.mark.parametrize(
    ("options", "names", "first"),
    [
        ({}, ("r1", "r2", "q1", "q:r1"), "q:r1"),
        ({"reuse_batches": True}, ("r1", "r2", "q1"), "r1"),
        ({"one_batch": True}, ("r1", "r2", "q"), "q"),
        ({"batch_key": "donor"}, ("r1", "r2", "1", "2"), "1"),
        ({"batch_key": "dataset"}, ("r1", "r2", "q"), "q"),
    ],
)
def test_batches_of_the_query(tmp_path: Path, options: dict, names: tuple[str, ...], first: str) -> None:
    found = query(tmp_path, cells(), **options)
    assert found.schema.batch == Covariate("batch", names)
    assert names[found.batch.batch_index[0]] == first


def test_a_reference_by_data_set_makes_the_file_one_batch(tmp_path: Path) -> None:
    schema = Schema(genes=GENES, batch=Covariate("dataset", ("a", "q")))
    found = query(tmp_path, cells(), schema)
    assert found.schema.batch.categories == ("a", "q", "q:q")
    assert set(found.batch.batch_index) == {2}


def test_codes_of_reference_categories_do_not_move(tmp_path: Path) -> None:
    schema = Schema(
        genes=GENES, batch=SCHEMA.batch, categorical=(Covariate("donor", ("2", "7")), Covariate("sex", ("f",)))
    )
    data = cells()
    data.obs["sex"] = "f"
    found = query(tmp_path, data, schema)
    assert [c.categories for c in found.schema.categorical] == [("2", "7", "1"), ("f",)]
    assert found.batch.categorical[:4].tolist() == [[2, 0], [0, 0], [2, 0], [0, 0]]


def test_numbers_and_labels(tmp_path: Path) -> None:
    labels = Covariate("cell_type", ("B", "T"))
    schema = Schema(genes=GENES, batch=SCHEMA.batch, labels=labels, continuous=("age",), size_factor="donor")
    data = cells()
    found = query(tmp_path, data, schema)
    assert (found.batch.labels == MISSING).all()
    assert len(found.batch.labels) == 30
    assert found.schema.labels == labels
    np.testing.assert_array_equal(found.batch.continuous[:, 0], data.obs["age"])
    np.testing.assert_array_equal(found.batch.size_factor, data.obs["donor"])


def test_digest_is_of_the_file(tmp_path: Path) -> None:
    first, again = query(tmp_path, cells()), query(tmp_path, cells())
    assert first.sha256 == again.sha256 != query(tmp_path, cells(seed=1)).sha256


def change(data: ad.AnnData, **columns: object) -> ad.AnnData:
    data.obs = data.obs.assign(**columns)
    return data


HOLES = pd.Categorical([None, "x"] * 15)
AGE = Schema(genes=GENES, batch=SCHEMA.batch, continuous=("age",))
DONOR = Schema(genes=GENES, batch=SCHEMA.batch, categorical=(Covariate("sex", ("f", "m")),))


@pytest.mark.parametrize(
    ("data", "schema", "options", "error", "words"),
    [
        (cells(tuple(f"x{i}" for i in range(10))), SCHEMA, {}, DataError, "has 0 of the reference's 10 genes"),
        (cells(("g0", *(f"x{i}" for i in range(9)))), SCHEMA, {}, DataError, "1 of the reference's 10 .*20%"),
        (cells(tuple(g.upper() for g in GENES)), SCHEMA, {}, DataError, "another organism"),
        (change(cells(), batch=HOLES), SCHEMA, {}, DataError, r"15 cells have no batch \(e.g. cell0\)"),
        (cells(), SCHEMA, {"batch_key": "bach"}, MissingColumnError, "mean 'batch'.*--batch-key COLUMN.*--one-batch"),
        (cells(), DONOR, {}, MissingColumnError, "no column 'sex', a categorical covariate of the reference"),
        (change(cells(), sex=HOLES), DONOR, {}, DataError, "15 cells have no sex"),
        (change(cells(), age=[np.nan, *range(29)]), AGE, {}, DataError, "1 cells have no age"),
        (change(cells(), age="old"), AGE, {}, DataError, "30 cells have no age"),
        (
            change(cells(), age=0), Schema(genes=GENES, batch=SCHEMA.batch, size_factor="age"), {},
            DataError, "30 cells have a age of 0 or less",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_is_refused(
    tmp_path: Path, data: ad.AnnData, schema: Schema, options: dict, error: type, words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        query(tmp_path, data, schema, **options)
    assert "q.h5ad" in str(caught.value)


def test_no_cell_with_counts_is_refused(tmp_path: Path) -> None:
    data = cells((*GENES, "extra"), empty=tuple(range(30)), extra=4)
    with pytest.raises(DataError, match="no cell has a count over the reference's 10 genes"):
        query(tmp_path, data)


def test_one_wrong_value_anywhere_is_refused(tmp_path: Path) -> None:
    data = cells((*GENES, "extra"), extra=1.5)  # in a gene the reference does not use
    with pytest.raises(NotCountsError, match=r"q\.h5ad"):
        query(tmp_path, data)


def test_duplicate_genes_are_refused(tmp_path: Path) -> None:
    data = cells()
    data.var_names = [*GENES[:9], "g0"]
    with pytest.raises(DataError, match="g0"):
        query(tmp_path, data)


def test_duplicate_genes_are_summed_on_request(tmp_path: Path) -> None:
    data = cells()
    whole = data.X.toarray()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata's, of names that are not unique
        data.var_names = [*GENES[:9], "g0"]
    found = query(tmp_path, data, sum_duplicates=True)
    np.testing.assert_array_equal(dense(found)[:, 0], whole[found.kept, 0] + whole[found.kept, 9])
    assert found.match.missing == ("g9",)


@pytest.mark.parametrize("version", [2, 3])
def test_a_zarr_store_is_a_query_as_its_h5ad_is(tmp_path: Path, version: int) -> None:
    data = cells()
    with ad.settings.override(zarr_write_format=version), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata's and zarr's, of the format's version
        data.write_zarr(tmp_path / "q.zarr")
    one, other = query(tmp_path, data), read_query(tmp_path / "q.zarr", SCHEMA)
    np.testing.assert_array_equal(dense(one), dense(other))
    np.testing.assert_array_equal(one.batch.batch_index, other.batch.batch_index)
    assert (one.id, one.schema.batch) == (other.id, other.schema.batch)
    again = read_query(tmp_path / "q.zarr", SCHEMA)
    assert one.sha256 != other.sha256 == again.sha256  # the same store has the same digest


def test_a_floor_may_be_lowered(tmp_path: Path) -> None:
    assert query(tmp_path, cells(("g0", *(f"x{i}" for i in range(9)))), floor=0.1).match.n_matched == 1


@pytest.mark.skipif(not SCMIXOLOGY.exists(), reason="needs the shared data")
def test_scmixology_onto_its_own_genes_with_versions() -> None:
    data = ad.read_h5ad(SCMIXOLOGY)
    genes = tuple(f"{name}.3" for name in data.var_names[::-7] if name.startswith("ENSG"))
    schema = Schema(genes=genes, batch=Covariate("library", ("sc_10x",)))
    found = read_query(SCMIXOLOGY, schema)
    expected = data[:, [g.removesuffix(".3") for g in genes]].X.toarray()[found.kept]
    np.testing.assert_array_equal(dense(found), expected)
    assert found.schema.batch.categories == ("sc_10x", "sc_celseq2", "sc_dropseq")
    assert found.match.missing == ()
