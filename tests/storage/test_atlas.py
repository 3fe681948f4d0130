"""Reading an atlas: exact, lazy, and never zeros for what is gone."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from scviaduct.errors import DataError, IncompleteError, MissingColumnError, UnreadableFileError
from scviaduct.storage.atlas import Atlas, Counts
from scviaduct.storage.convert import convert


def adata(n: int, genes: list[str], seed: int) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    means = np.exp(np.random.default_rng(5).normal(0, 1, len(genes)))
    obs = pd.DataFrame(
        {"type": pd.Categorical(rng.choice(["T", "B"], n)), "depth": rng.normal(size=n)},
        index=[f"c{i}" for i in range(n)],
    )
    x = sp.csr_matrix(rng.poisson(means, (n, len(genes))).astype(np.float32))
    return ad.AnnData(X=x, obs=obs, var=pd.DataFrame({"order": range(len(genes))}, index=genes))


GENES_A = [f"ENSG{i:011d}.{i % 3 + 1}" for i in range(40)]
GENES_B = [f"ENSG{i:011d}" for i in reversed(range(20, 60))]
UNION = [f"ENSG{i:011d}" for i in [*range(40), *reversed(range(40, 60))]]


def make_sources() -> dict[str, ad.AnnData]:
    a, b = adata(50, GENES_A, 1), adata(30, GENES_B, 2)
    b.obs = b.obs.assign(dataset="mine", type=pd.Categorical(["NK"] * 30), donor=[*["d1"] * 29, None])
    b.obs["donor"] = pd.Categorical(b.obs["donor"])
    return {"a": a, "b": b}


@pytest.fixture
def sources() -> dict[str, ad.AnnData]:
    return make_sources()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    for name, data in make_sources().items():
        data.write_h5ad(directory / f"{name}.h5ad")
    convert([directory / "a.h5ad", directory / "b.h5ad"], out=directory / "atlas.zarr")
    return directory


@pytest.fixture
def atlas(made: Path, tmp_path: Path) -> Atlas:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return Atlas.open(tmp_path / "atlas.zarr")


def test_obs_and_var(atlas: Atlas, sources: dict[str, ad.AnnData], tmp_path: Path) -> None:
    for name in sources:
        wanted = ad.read_h5ad(tmp_path / f"{name}.h5ad")
        pd.testing.assert_frame_equal(atlas.obs(name), wanted.obs)
        pd.testing.assert_frame_equal(atlas.var(name), wanted.var)
        pd.testing.assert_frame_equal(atlas.obs(name, ["depth"]), wanted.obs[["depth"]])
    with pytest.raises(MissingColumnError, match="data set 'a' has no column 'tpye'; did you mean 'type'"):
        atlas.obs("a", ["tpye"])
    with pytest.raises(DataError, match="no data set 'c'; available: 'a', 'b'"):
        atlas.obs("c")


def test_genes(atlas: Atlas) -> None:
    assert list(atlas.genes()) == UNION
    assert list(atlas.genes("intersection")) == UNION[20:40]


@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_chunks(atlas: Atlas, sources: dict[str, ad.AnnData], rows: int) -> None:
    blocks = list(atlas.chunks("a", rows))
    assert [first for first, _ in blocks] == list(range(0, 50, rows))
    assert np.array_equal(np.vstack([b.toarray() for _, b in blocks]), sources["a"].X.toarray())


def expected(sources: dict[str, ad.AnnData], genes: list[str]) -> np.ndarray:
    parts = []
    for data in sources.values():
        frame = data.to_df()
        frame.columns = [c.split(".")[0] for c in frame.columns]
        parts.append(frame.reindex(columns=genes, fill_value=0).to_numpy())
    return np.vstack(parts)


@pytest.mark.parametrize(("join", "genes"), [("union", UNION), ("intersection", UNION[20:40])])
def test_lazy(atlas: Atlas, sources: dict[str, ad.AnnData], join: str, genes: list[str]) -> None:
    lazy = atlas.lazy(join, rows=16)
    assert isinstance(lazy.X, da.Array)
    assert lazy.X.chunks[0] == (16, 16, 16, 2, 16, 14)
    assert lazy.var_names.tolist() == genes
    x = lazy.X.compute()
    assert sp.isspmatrix_csr(x)
    assert x.dtype == np.float32
    assert np.array_equal(x.toarray(), expected(sources, genes))
    assert lazy.obs_names[[0, 50]].tolist() == ["a:c0", "b:c0"]
    assert lazy.obs_names.is_unique
    assert lazy.obs["dataset"].tolist() == ["a"] * 50 + ["b"] * 30
    assert lazy.obs["type"].tolist() == [*sources["a"].obs["type"], *["NK"] * 30]
    assert lazy.obs["type"].cat.categories.tolist() == ["B", "NK", "T"]
    assert lazy.obs["donor"].isna().sum() == 51
    assert lazy.obs["obs.dataset"].dropna().tolist() == ["mine"] * 30
    assert np.array_equal(lazy.obs["depth"], np.concatenate([d.obs["depth"] for d in sources.values()]))


def test_names_stay_where_they_are_unique(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        data = adata(5, GENES_A, i)
        data.obs_names = [f"{name}{k}" for k in range(5)]
        data.write_h5ad(tmp_path / f"{name}.h5ad")
    atlas = convert([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], out=tmp_path / "atlas.zarr")
    assert atlas.lazy().obs_names.tolist() == [f"{n}{k}" for n in "ab" for k in range(5)]


def test_scanpy_works_out_of_core(atlas: Atlas, sources: dict[str, ad.AnnData]) -> None:
    lazy = atlas.lazy("intersection", rows=16)
    memory = ad.AnnData(sp.csr_matrix(expected(sources, UNION[20:40])), obs=lazy.obs.copy(), var=lazy.var.copy())
    for data in (lazy, memory):
        sc.pp.calculate_qc_metrics(data, percent_top=None, inplace=True)
        sc.pp.normalize_total(data, target_sum=1e3)
        sc.pp.log1p(data)
        assert isinstance(data.X, da.Array if data is lazy else sp.csr_matrix)
        sc.pp.highly_variable_genes(data, flavor="seurat", n_top_genes=8)
    np.testing.assert_allclose(lazy.X.compute().toarray(), memory.X.toarray(), rtol=1e-6)
    pd.testing.assert_series_equal(lazy.obs["total_counts"], memory.obs["total_counts"], check_dtype=False)
    assert lazy.var["highly_variable"].sum() == 8
    assert lazy.var["highly_variable"].equals(memory.var["highly_variable"])


def test_counts_travel_to_other_processes(atlas: Atlas) -> None:
    counts = pickle.loads(pickle.dumps(atlas.counts("a")))  # noqa: S301
    assert isinstance(counts, Counts)
    assert (counts.rows(3, 9) != atlas.counts("a").rows(3, 9)).nnz == 0


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: shutil.rmtree(p), UnreadableFileError, "does not exist; scviaduct convert"),
        (lambda p: (shutil.rmtree(p), p.touch()), UnreadableFileError, "is a file, not an atlas"),
        (lambda p: (p / "atlas.json").unlink(), IncompleteError, r"has no atlas\.json, which is written last"),
        (lambda p: (p / "atlas.json").write_text("{"), IncompleteError, r"atlas\.json is damaged"),
        (lambda p: (p / "datasets/b/manifest.json").unlink(), IncompleteError, r"b/manifest\.json is missing"),
        (lambda p: (p / "datasets/b/manifest.json").write_text("{}"), IncompleteError, "a manifest lacks 'id'"),
        (
            lambda p: (p / "atlas.json").write_text(json.dumps({"format": 99, "version": "9"})),
            IncompleteError,
            "has the atlas format 99",
        ),
    ],
)
def test_not_an_atlas(atlas: Atlas, damage, error: type[Exception], message: str) -> None:
    damage(atlas.path)
    with pytest.raises(error, match=message) as raised:
        Atlas.open(atlas.path)
    assert str(atlas.path) in str(raised.value)


@pytest.mark.parametrize("name", ["data", "indices"])
def test_missing_shard(atlas: Atlas, name: str) -> None:
    """Zarr reads a file that is gone as zeros; we do not."""
    shard = atlas.path / "datasets/a/X" / name / "c/0"
    opened = Atlas.open(atlas.path)
    before = next(opened.chunks("a"))[1]
    shard.unlink()
    with pytest.raises(
        IncompleteError, match=rf"a/X: cells 0-49 cannot be read \({name}/c/0 is missing\); convert a again"
    ):
        next(opened.chunks("a"))
    with pytest.raises(IncompleteError, match=rf"{name}/c/0 is missing, its manifest says"):
        next(Atlas.open(atlas.path).chunks("a"))
    assert before.nnz


def test_damaged_shard(atlas: Atlas) -> None:
    shard = atlas.path / "datasets/a/X/data/c/0"
    raw = bytearray(shard.read_bytes())
    raw[40] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(
        IncompleteError,
        match=r"datasets/a/X: cells 0-49 cannot be read \(a checksum of data/c/0 is wrong\); convert a again",
    ):
        next(Atlas.open(atlas.path).chunks("a"))
    shard.write_bytes(raw[:-1])
    with pytest.raises(IncompleteError, match=r"X/data/c/0 has [\d,]+ bytes, its manifest says"):
        next(Atlas.open(atlas.path).chunks("a"))


def test_digest(atlas: Atlas) -> None:
    first = atlas.digest()
    assert first == Atlas.open(atlas.path).digest()
    manifest = atlas.path / "datasets/b/manifest.json"
    manifest.write_text(manifest.read_text().replace('"sum": ', '"sum": 1'))
    assert Atlas.open(atlas.path).digest() != first
