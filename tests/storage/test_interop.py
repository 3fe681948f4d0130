"""An atlas in other programs' hands, as one table of all data sets, and in none while it is unfinished."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from anndata.experimental import read_elem_lazy

from scviaduct.errors import IncompleteError
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.convert import convert
from scviaduct.storage.prepare import prepare
from scviaduct.storage.view import View

GENES = [f"g{i:02d}" for i in range(30)]


def study(n: int, seed: int) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(rng.choice(["x", "y"], n)),
            "barcode": [f"{seed}-{i}" for i in range(n)],
            "n": rng.integers(0, 9, n),
        },
        index=[f"c{i}" for i in range(n)],
    )
    counts = sp.csr_matrix(rng.poisson(0.7, (n, 30)).astype(np.float32))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interop")
    a, b, c = study(150, 1), study(90, 2), study(60, 3)
    b.obs["barcode"] = pd.Categorical(b.obs["barcode"])  # names of cells, as categories
    del c.obs["barcode"], c.obs["n"]
    for name, data in {"a": a, "b": b, "c": c}.items():
        data.write_h5ad(folder / f"{name}.h5ad")
    convert([folder / f"{name}.h5ad" for name in "abc"], out=folder / "atlas.zarr")
    prepare(folder / "atlas.zarr", genes="all", block_rows=64)
    return folder


def test_anndata_reads_a_data_set(made: Path) -> None:
    found, wanted = ad.io.read_zarr(made / "atlas.zarr/datasets/b"), ad.read_h5ad(made / "b.h5ad")
    assert (found.X != wanted.X).nnz == 0
    pd.testing.assert_frame_equal(found.obs, wanted.obs)
    pd.testing.assert_frame_equal(found.var, wanted.var)


def test_anndata_reads_a_data_set_lazily(made: Path) -> None:
    x = read_elem_lazy(zarr.open_group(made / "atlas.zarr/datasets/a", mode="r")["X"])
    assert isinstance(x, da.Array)
    assert (x.compute() != ad.read_h5ad(made / "a.h5ad").X).nnz == 0


def test_columns_that_name_cells_are_text_in_the_joined_table(made: Path) -> None:
    """They are not in the vocabulary; a data set without them has them missing."""
    atlas = Atlas.open(made / "atlas.zarr")
    assert atlas.identifiers == ("barcode",) and list(atlas.vocabulary) == ["kind"]
    obs = atlas.lazy(rows=64).obs
    assert list(obs.columns) == ["kind", "barcode", "n", "dataset"]
    assert obs["barcode"].dtype == object
    wanted = [f"1-{i}" for i in range(150)] + [f"2-{i}" for i in range(90)]
    assert obs["barcode"][:240].tolist() == wanted and obs["barcode"][240:].isna().all()
    sources = [ad.read_h5ad(made / f"{name}.h5ad").obs for name in "abc"]
    assert obs["n"][:240].tolist() == [n for s in sources[:2] for n in s["n"]] and obs["n"][240:].isna().all()
    assert obs["kind"].tolist() == [k for s in sources for k in s["kind"]]
    assert obs.index[[0, 150, 240]].tolist() == ["a:c0", "b:c0", "c:c0"]


def test_numbers_keep_their_type_where_all_data_sets_have_them(made: Path) -> None:
    atlas = convert([made / "a.h5ad", made / "b.h5ad"], out=made / "two.zarr")
    assert atlas.lazy().obs["n"].dtype == np.int64


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_dask_reduces_dense_blocks(made: Path, axis: int | None) -> None:
    """Blocks of scipy have no `keepdims`; as arrays they have all Dask needs, one block at a time."""
    x = Atlas.open(made / "atlas.zarr").lazy(rows=64).X
    dense = x.map_blocks(lambda block: block.toarray(), dtype=x.dtype, meta=np.empty((0, 0), x.dtype))
    wanted = sp.vstack([ad.read_h5ad(made / f"{name}.h5ad").X for name in "abc"]).toarray()
    for reduce in ("sum", "max", "mean"):
        found = getattr(dense, reduce)(axis=axis).compute()
        np.testing.assert_allclose(found, getattr(wanted, reduce)(axis=axis), rtol=1e-5)


UNFINISHED = {
    "no atlas.json": lambda p: (p / "atlas.json").unlink(),
    "no manifest": lambda p: (p / "datasets/b/manifest.json").unlink(),
    "no data set": lambda p: shutil.rmtree(p / "datasets/b"),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_every_reader_refuses_an_unfinished_atlas(made: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(made / "atlas.zarr", tmp_path / "atlas.zarr"))
    UNFINISHED[name](path)
    for read in (Atlas.open, lambda p: prepare(p, name="x")):
        with pytest.raises(IncompleteError):
            read(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(b""),
    ],
    ids=["gone", "truncated", "empty"],
)
def test_every_reader_refuses_an_incomplete_data_set(made: Path, tmp_path: Path, damage) -> None:
    path = Path(shutil.copytree(made / "atlas.zarr", tmp_path / "atlas.zarr"))
    damage(path / "datasets/b/X/data/c/0")
    atlas = Atlas.open(path)  # reads JSON only
    readers = {
        "counts": lambda: atlas.counts("b"),
        "chunks": lambda: next(atlas.chunks("b")),
        "obs": lambda: atlas.obs("b"),
        "var": lambda: atlas.var("b"),
        "genes": lambda: atlas.genes(),
        "lazy": lambda: atlas.lazy(),
        "to_adata": lambda: atlas.to_adata(),
    }
    for name, read in readers.items():
        with pytest.raises(IncompleteError, match=r"datasets/b/X/data/c/0 (is missing|has)"):
            read()
            pytest.fail(name)
    assert atlas.obs("a").shape == (150, 3)  # the others can be read


@pytest.mark.parametrize("file", ["view.json", "data/c/0", "indptr/c/0", "obs/kind/c/0", "source/row/c/0"])
def test_no_view_is_opened_that_is_not_whole(made: Path, tmp_path: Path, file: str) -> None:
    path = Path(shutil.copytree(made / "atlas.zarr", tmp_path / "atlas.zarr"))
    (path / "views/default" / file).unlink()
    with pytest.raises(IncompleteError):
        View.open(path)
