"""View and ViewSource: blocks hold the source's cells in the schema's codes; damage and wrong columns are refused."""

import json
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from scviaduct.errors import DataError, IncompleteError, MissingColumnError
from scviaduct.schema import MISSING, Batch, Covariate
from scviaduct.storage.convert import convert
from scviaduct.storage.prepare import prepare
from scviaduct.storage.view import View, ViewSource

N_OBS, GENES = 300, [f"g{i}" for i in range(40)]
DATA = Path(__file__).parents[3] / "shared/data/rna"


def cells(seed: int) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.8, (N_OBS, len(GENES))).astype(np.float32)
    counts[:3] = 0
    types = rng.choice(["T", "B", "Unknown", None], N_OBS).astype(object)
    obs = pd.DataFrame(
        {
            "sample": pd.Categorical(
                rng.choice(["s2", "s1", "empty"], N_OBS), categories=["s2", "s1", "empty", "never"]
            ),
            "cell_type": pd.Categorical(types),
            "donor": rng.choice([2, 10, 1], N_OBS),
            "sex": pd.Categorical(["female"] * 5 + [None] * 3 + ["male"] * (N_OBS - 8)),
            "score": rng.normal(size=N_OBS),
            "depth": rng.random(N_OBS) + 0.5,
            "holes": np.where(np.arange(N_OBS) == 7, np.nan, 1.5),
        },
        index=[f"cell{i}" for i in range(N_OBS)],
    )
    obs.loc[obs["sample"] == "empty", "sample"] = "s1"
    obs.iloc[0, 0] = "empty"  # occurs only in a cell that has no counts
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def files() -> dict[str, ad.AnnData]:
    return {"one": cells(0), "two": cells(1)}


@pytest.fixture(scope="module")
def view(files: dict[str, ad.AnnData], tmp_path_factory: pytest.TempPathFactory) -> View:
    folder = tmp_path_factory.mktemp("view")
    for name, data in files.items():
        data.write_h5ad(folder / f"{name}.h5ad")
    atlas = convert([folder / f"{name}.h5ad" for name in files], out=folder / "atlas.zarr")
    return prepare(atlas, genes="all", block_rows=128)


@pytest.fixture
def copy(view: View, tmp_path: Path) -> View:
    """A view that may be damaged; the atlas around it is the marker only."""
    shutil.copytree(view.path, tmp_path / "atlas.zarr/views/default")
    return View.open(tmp_path / "atlas.zarr")


def all_blocks(source: ViewSource) -> list[Batch]:
    return [source.read(block) for block in range(-(-source.n_rows // source.block_rows))]


def source_obs(view: View, files: dict[str, ad.AnnData]) -> pd.DataFrame:
    group = zarr.open_group(str(view.path), mode="r")
    frames = [data.obs for data in files.values()]
    rows = zip(group["source/dataset"][:], group["source/row"][:], strict=True)
    return pd.DataFrame([frames[d].iloc[r] for d, r in rows])


def test_blocks_hold_the_source_cells_in_the_schemas_codes(view: View, files: dict[str, ad.AnnData]) -> None:
    schema = view.schema(
        batch_key="sample",
        labels_key="cell_type",
        categorical_covariate_keys=["donor", "dataset"],
        continuous_covariate_keys=["score", "depth"],
        size_factor_key="depth",
    )
    blocks, obs = all_blocks(view.source(schema)), source_obs(view, files)
    assert [b.n_cells for b in blocks] == [128] * (view.n_rows // 128) + [view.n_rows % 128]
    batch, labels = schema.batch.categories, schema.labels.categories
    assert [batch[c] for b in blocks for c in b.batch_index] == obs["sample"].tolist()
    named = [labels[c] if c >= 0 else "Unknown" for b in blocks for c in b.labels]
    assert named == obs["cell_type"].astype(object).fillna("Unknown").tolist()
    further = np.concatenate([b.categorical for b in blocks])
    assert [schema.categorical[0].categories[c] for c in further[:, 0]] == obs["donor"].astype(str).tolist()
    dataset = zarr.open_group(str(view.path), mode="r")["source/dataset"][:]
    assert np.array_equal(further[:, 1], dataset)
    assert schema.categorical[1].categories == ("one", "two")
    np.testing.assert_array_equal(
        np.concatenate([b.continuous for b in blocks]), obs[["score", "depth"]].to_numpy(np.float32)
    )
    np.testing.assert_array_equal(np.concatenate([b.size_factor for b in blocks]), obs["depth"].to_numpy(np.float32))
    assert np.concatenate([b.rows for b in blocks]).tolist() == list(range(view.n_rows))


def test_blocks_hold_the_source_counts(view: View, files: dict[str, ad.AnnData]) -> None:
    blocks = all_blocks(view.source(view.schema(batch_key="dataset")))
    dense = [sp.csr_matrix((b.data, b.indices, b.indptr), shape=(b.n_cells, b.n_genes)).toarray() for b in blocks]
    group = zarr.open_group(str(view.path), mode="r")
    rows = zip(group["source/dataset"][:], group["source/row"][:], strict=True)
    expected = [list(files.values())[d].X[r].toarray()[0] for d, r in rows]
    np.testing.assert_array_equal(np.concatenate(dense), expected)


def test_counts_and_genes_have_the_types_they_are_stored_in(view: View) -> None:
    block = view.source(view.schema(batch_key="sample")).read(0)
    types = {name: getattr(block, name).dtype for name in ("indptr", "indices", "data", "batch_index", "rows")}
    assert types == {
        "indptr": np.int64, "indices": np.uint16, "data": np.uint8, "batch_index": np.int64, "rows": np.int64
    }  # fmt: skip
    assert (block.categorical.shape, block.continuous.shape) == ((128, 0), (128, 0))
    assert block.labels.size == block.size_factor.size == block.seeds.size == block.lanes.size == 0


def test_schema_has_the_categories_that_occur_in_order(view: View) -> None:
    schema = view.schema(batch_key="sample", labels_key="cell_type", categorical_covariate_keys=["donor"])
    assert schema.genes == tuple(GENES)
    assert schema.batch == Covariate("sample", ("s1", "s2"))  # "empty" has no cell with counts, "never" no cell
    assert schema.labels == Covariate("cell_type", ("B", "T"))
    assert schema.categorical == (Covariate("donor", ("1", "2", "10")),)
    assert view.schema(batch_key="dataset").batch.categories == ("one", "two")
    assert view.schema(batch_key="sample", labels_key="cell_type", unlabeled_category="B").labels.categories == (
        "T", "Unknown",
    )  # fmt: skip
    assert view.excluded == 6


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_key": "smaple"}, MissingColumnError, "did you mean 'sample'"),
        ({"batch_key": "sample", "labels_key": "celltype"}, MissingColumnError, "did you mean 'cell_type'"),
        ({"batch_key": "sex"}, DataError, r"cells have no sex \(e.g. cell\d+ of data set"),
        ({"batch_key": "sample", "categorical_covariate_keys": ["sex"]}, DataError, "have no sex"),
        ({"batch_key": "sample", "continuous_covariate_keys": ["holes"]}, DataError, "2 cells have no holes .*cell7"),
        ({"batch_key": "sample", "continuous_covariate_keys": ["sex"]}, DataError, "categorical .* not numeric"),
        ({"batch_key": "score"}, DataError, "continuous"),
        ({"batch_key": "sample", "labels_key": "score"}, DataError, "continuous"),
        ({"batch_key": "sample", "size_factor_key": "score"}, DataError, "above 0"),
    ],
)
def test_columns_that_cannot_serve_are_refused(view: View, options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        view.schema(**options)


def test_a_schema_of_other_genes_or_without_a_category_is_refused(view: View) -> None:
    schema = view.schema(batch_key="sample")
    with pytest.raises(DataError, match="genes that are not the model's"):
        view.source(replace(schema, genes=schema.genes[::-1]))
    with pytest.raises(DataError, match="no category 's2'"):
        view.source(replace(schema, batch=Covariate("sample", ("s1",))))


def test_a_schema_with_more_categories_keeps_its_codes(view: View) -> None:
    schema = view.schema(batch_key="sample")
    wider = replace(schema, batch=Covariate("sample", ("elsewhere", "s2", "s1")))
    narrow, wide = view.source(schema).read(0).batch_index, view.source(wider).read(0).batch_index
    assert np.array_equal(np.array([2, 1])[narrow], wide)


def test_labels_the_schema_does_not_know_are_missing(view: View) -> None:
    schema = view.schema(batch_key="sample", labels_key="cell_type")
    only = replace(schema, labels=Covariate("cell_type", ("T",)))
    all_labels, some = view.source(schema).read(0).labels, view.source(only).read(0).labels
    assert np.array_equal(some, np.where(all_labels == 1, 0, MISSING))


def read_first(source: ViewSource) -> float:
    return float(source.read(0).data.sum())


def test_source_is_pickled_without_handles_and_read_in_another_process(view: View) -> None:
    source = view.source(view.schema(batch_key="sample"))
    expected = read_first(source)
    assert len(pickle.dumps(source)) < 20_000  # the manifest, no arrays
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(read_first, source).result() == expected


def test_threads_may_read_at_once(view: View) -> None:
    source = view.source(view.schema(batch_key="sample"))
    alone = [source.read(b).data.sum() for b in range(4)]
    fresh = pickle.loads(pickle.dumps(source))  # noqa: S301
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda b: fresh.read(b).data.sum(), [0, 1, 2, 3] * 5)) == alone * 5


@pytest.mark.parametrize("block", [-1, 5, 1000])
def test_blocks_that_do_not_exist_raise(view: View, block: int) -> None:
    with pytest.raises(IndexError):
        view.source(view.schema(batch_key="sample")).read(block)


def test_a_view_without_its_marker_is_refused(copy: View) -> None:
    (copy.path / "view.json").unlink()
    with pytest.raises(IncompleteError, match=r"was not finished. Make it with: scviaduct prepare .* --name default"):
        View.open(copy.atlas_path)


def test_a_view_that_does_not_exist_names_those_that_do(copy: View) -> None:
    with pytest.raises(IncompleteError, match=r"does not exist \(did you mean 'default'"):
        View.open(copy.atlas_path, "defualt")


@pytest.mark.parametrize("name", ["data/c/0", "indices/c/0", "indptr/zarr.json", "obs/sample/c/0"])
@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_lost_or_cut_files_are_noticed_at_open(copy: View, name: str, damage: str) -> None:
    file = copy.path / name
    content = file.read_bytes()
    file.unlink()
    if damage == "shorter":
        file.write_bytes(content[:-1])
    with pytest.raises(IncompleteError, match=rf"{name} .*--overwrite"):
        View.open(copy.atlas_path)


@pytest.mark.parametrize("name", ["data", "indices", "indptr", "obs/sample", "obs/score"])
def test_files_lost_after_opening_never_read_as_zeros(copy: View, name: str) -> None:
    schema = copy.schema(batch_key="sample", continuous_covariate_keys=["score"])
    (copy.path / name / "c/0").unlink()
    with pytest.raises(IncompleteError, match=f"a chunk of {name} is missing"):
        copy.source(schema).read(0)


def test_a_flipped_bit_is_noticed(copy: View) -> None:
    file = copy.path / "data/c/0"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    view = View.open(copy.atlas_path)  # same size: only the checksums know
    with pytest.raises(IncompleteError, match="data/c/0 is damaged"):
        view.verify()
    with pytest.raises(IncompleteError, match="rows 0 to 127 cannot be read"):
        view.source(view.schema(batch_key="dataset")).read(0)


def test_arrays_of_another_length_are_refused(copy: View) -> None:
    manifest = json.loads((copy.path / "view.json").read_text())
    (copy.path / "view.json").write_text(json.dumps(manifest | {"nnz": manifest["nnz"] + 1}))
    view = View.open(copy.atlas_path)
    with pytest.raises(IncompleteError, match="entries instead of"):
        view.source(view.schema(batch_key="sample")).read(0)


def test_strata_are_the_codes_of_a_column(view: View, files: dict[str, ad.AnnData]) -> None:
    source, obs = view.source(view.schema(batch_key="dataset")), source_obs(view, files)
    categories = list(view.categories["cell_type"])
    named = [categories[c] if c >= 0 else None for c in source.strata("cell_type")]
    assert named == obs["cell_type"].astype(object).where(obs["cell_type"].notna(), None).tolist()
    donors = source.strata("donor")  # numeric, whole numbers
    assert [[1, 2, 10][c] for c in donors] == obs["donor"].tolist()
    assert donors.dtype.itemsize == source.strata("cell_type").dtype.itemsize == 1
    with pytest.raises(DataError, match="'score' is continuous"):
        source.strata("score")
    with pytest.raises(MissingColumnError, match="did you mean 'donor'"):
        source.strata("doner")


@pytest.mark.skipif(not DATA.exists(), reason="needs the shared data")
def test_kang(tmp_path: Path) -> None:
    atlas = convert([DATA / "kang2018_pbmc_4samples_celltypes.h5ad"], out=tmp_path / "atlas.zarr")
    view = prepare(atlas, genes=500, batch_key="sample_id")
    schema = view.schema(batch_key="sample_id", labels_key="cluster_id")
    assert schema.batch.categories == ("ctrl101", "ctrl107", "stim101", "stim107")
    assert len(schema.labels) == 5
    data = ad.read_h5ad(DATA / "kang2018_pbmc_4samples_celltypes.h5ad")
    sums = data[:, list(view.genes)].X.sum(1).A1
    blocks = all_blocks(view.source(schema))
    found = np.concatenate([np.add.reduceat(b.data, b.indptr[:-1]) for b in blocks])
    assert sorted(found.tolist()) == sorted(sums[sums > 0].tolist())
    counted = np.bincount(np.concatenate([b.labels for b in blocks]))
    assert counted.tolist() == data.obs["cluster_id"][sums > 0].value_counts().sort_index().tolist()


@pytest.mark.skipif(not DATA.exists(), reason="needs the shared data")
def test_hlca(tmp_path: Path) -> None:
    atlas = convert([DATA / "hlca_subset_2studies_100genes.h5ad"], out=tmp_path / "atlas.zarr")
    view = prepare(atlas, genes="all")
    schema = view.schema(batch_key="sample", labels_key="scanvi_label", unlabeled_category="unlabeled")
    assert "unlabeled" not in schema.labels.categories
    with pytest.raises(DataError, match="'bmi' is continuous"):
        view.schema(batch_key="bmi")
    assert view.schema(batch_key="obs.dataset").batch.categories == ("Krasnow_2020", "Nawijn_2021")
    assert view.schema(batch_key="dataset").batch.categories == ("hlca_subset_2studies_100genes",)
