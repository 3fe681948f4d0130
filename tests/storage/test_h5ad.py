"""Reading files: any layout exactly and in order, tables of any age, obsm and layers (test_inputs.py has the cases)."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scviaduct.errors import DataError, NotCountsError, UnreadableFileError
from scviaduct.storage.h5ad import open_counts
from scviaduct.storage.matrix import Matrix

REAL = Path(__file__).parents[3] / "shared" / "data"


def counts(n: int = 30, m: int = 12, seed: int = 0) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    return sp.csr_matrix(rng.poisson(0.6, (n, m)).astype(np.float32))


def adata(x: object = None, n: int = 30, m: int = 12, **parts: object) -> ad.AnnData:
    names = {"obs": [f"c{i}" for i in range(n)], "var": [f"g{i}" for i in range(m)]}
    frames = {k: pd.DataFrame(index=v) for k, v in names.items()}
    return ad.AnnData(X=counts(n, m) if x is None else x, **frames, **parts)


def stack(path: Path, **options: object) -> np.ndarray:
    with open_counts(path, **options) as file:
        blocks = list(file.chunks(7))
        firsts = np.cumsum([0, *(b.shape[0] for _, b in blocks)])
        assert [f for f, _ in blocks] == firsts[:-1].tolist()
        assert all(b.shape[0] <= 7 and b.has_sorted_indices and b.data.dtype == np.uint32 for _, b in blocks)
        assert firsts[-1] == file.n_obs
        return np.vstack([b.toarray() for _, b in blocks])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 25)),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(["u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"]),
    layout=st.sampled_from(["csr", "csc", "dense"]),
    chunk=st.sampled_from([None, 1, 3, 17]),
    filters=st.sampled_from(
        [{}, {"compression": "gzip"}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}]
    ),
    rows=st.integers(1, 50),
    memory=st.sampled_from([200, 2**28]),
)
def test_rows_of_any_matrix(
    tmp_path: Path,
    seed,
    shape,
    density,
    dtype,
    layout,
    chunk,
    filters,
    rows,
    memory,
) -> None:
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random(shape) < density, rng.integers(1, 101, shape), 0).astype(dtype)
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:

        def put(name: str, values: np.ndarray) -> None:
            chunks = None if chunk is None else tuple(max(1, min(chunk, s)) for s in values.shape)
            chunks = None if not values.size else chunks
            options = filters if chunks else {}
            file.create_dataset(name, data=values, chunks=chunks, **options)

        if layout == "dense":
            put("X", dense)
        else:
            compressed = (sp.csr_matrix if layout == "csr" else sp.csc_matrix)(dense.astype("f8"))
            put("X/data", compressed.data.astype(dtype))
            put("X/indices", compressed.indices)
            put("X/indptr", compressed.indptr)
    with h5py.File(path) as file:
        blocks = list(Matrix(file, path, "X", layout, *shape).blocks(rows, memory))
    assert [first for first, _ in blocks] == np.cumsum([0, *(b.shape[0] for _, b in blocks)])[:-1].tolist()
    assert max(b.shape[0] for _, b in blocks) <= rows
    assert np.array_equal(np.vstack([b.toarray() for _, b in blocks]), dense)


def test_float16_and_bool(tmp_path: Path) -> None:
    for dtype in (np.float16, bool):
        values = (counts().toarray() > 0).astype(dtype)
        with h5py.File(tmp_path / "m.h5", "w") as file:
            file["X"] = values
        with h5py.File(tmp_path / "m.h5") as file:
            blocks = [b.toarray() for _, b in Matrix(file, tmp_path, "X", "dense", *values.shape).blocks(9)]
        assert np.array_equal(np.vstack(blocks), values)


X = counts()
LOG = X.log1p()
OTHER = counts(seed=1)


def test_what_the_sample_missed_is_found_by_the_audit(tmp_path: Path) -> None:
    n = 20_000
    x = sp.csr_matrix((np.ones(n, np.float32), np.zeros(n, np.int32), np.arange(n + 1)), shape=(n, 2))
    x.data[8_000] = 0.25
    adata(x, n, 2, layers={"counts": x.ceil()}).write_h5ad(tmp_path / "a.h5ad")
    wrong = pytest.raises(NotCountsError, match=r"0\.25 in cell 'c8000', gene 'g0'.*pass --counts counts$")
    with open_counts(tmp_path / "a.h5ad") as file, wrong:
        file.audit()
    with open_counts(tmp_path / "a.h5ad", counts="counts") as file:
        assert file.audit().total == n


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is a directory with 0 h5ad files"),
        (["b.h5ad", "c.h5ad"], r"is a directory with 2 h5ad files \(.*\*\.h5ad names them\)"),
        (["matrix.mtx.gz", "barcodes.tsv.gz"], r"is a 10x matrix directory \(scanpy.read_10x_mtx"),
        (["atlas.json", "zarr.json"], "cannot be read|is an atlas already"),
    ],
)
def test_directories(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "a.h5ad").mkdir()
    for name in names:
        (tmp_path / "a.h5ad" / name).touch()
    with pytest.raises(UnreadableFileError, match=message):
        open_counts(tmp_path / "a.h5ad")


def test_neighbours_of_a_missing_file(tmp_path: Path) -> None:
    adata().write_h5ad(tmp_path / "lung.h5ad")
    with pytest.raises(UnreadableFileError, match=r"does not exist; .* has lung\.h5ad"):
        open_counts(tmp_path / "lnug.h5ad")


def test_damaged_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    adata(counts(500, 40), 500, 40).write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        where = file["X/data"].id.get_chunk_info(0)
    raw = bytearray(path.read_bytes())
    raw[where.byte_offset + where.size // 2 : where.byte_offset + where.size] = bytes(where.size - where.size // 2)
    path.write_bytes(raw)
    with pytest.raises(UnreadableFileError, match="a part of the file cannot be read"):
        stack(path, counts="X")


def test_obs_of_any_type(tmp_path: Path) -> None:
    data = adata(counts(3, 2), 3, 2)
    data.obs = pd.DataFrame(
        {
            "category": pd.Categorical(["x", None, "y"], categories=["y", "x", "unused"], ordered=True),
            "flag": [True, False, True],
            "whole": [1, 2, 3],
            "real": [0.1, np.nan, np.inf],
            "maybe": pd.array([1, None, 3], dtype="Int64"),
        },
        index=["c0", "c1", "c1"],
    )
    data.write_h5ad(tmp_path / "a.h5ad")
    with open_counts(tmp_path / "a.h5ad") as file:
        pd.testing.assert_frame_equal(file.obs, data.obs)


def test_obs_as_before_anndata_07(tmp_path: Path) -> None:
    """One structured array, categories in uns: what many published files still are."""
    path = tmp_path / "old.h5ad"
    obs = np.array([(b"c0", 1, 0.5), (b"c1", 0, 1.5), (b"c2", -1, 2.5)], [("index", "S5"), ("type", "i1"), ("x", "f8")])
    with h5py.File(path, "w") as file:
        file["obs"] = obs
        file["var"] = np.array([(b"g0",), (b"g1",)], [("index", "S5")])
        file["uns/type_categories"] = np.array([b"B", b"T"])
        file["X"] = np.array([[1, 0], [0, 2], [3, 4]], np.float32)
    with open_counts(path) as file:
        wanted = pd.DataFrame(
            {"type": pd.Categorical(["T", "B", None]), "x": [0.5, 1.5, 2.5]}, index=["c0", "c1", "c2"]
        )
        pd.testing.assert_frame_equal(file.obs, wanted)
        assert file.var.index.tolist() == ["g0", "g1"]
        assert file.audit().total == 10


def test_legacy_sparse_and_raw(tmp_path: Path) -> None:
    """h5sparse attributes and "raw.X" beside "X", as anndata 0.6 wrote them."""
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        file["obs"] = np.array([(b"c0",), (b"c1",)], [("index", "S5")])
        file["var"] = np.array([(b"g0",)], [("index", "S5")])
        file["raw.var"] = np.array([(b"r0",), (b"r1",)], [("index", "S5")])
        file["X"] = np.array([[0.5], [0.25]], np.float32)
        group = file.create_group("raw.X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = b"csr", (2, 2)
        group["data"], group["indices"], group["indptr"] = [5.0, 7.0], [1, 0], [0, 1, 2]
    with open_counts(path) as file:
        assert file.var.index.tolist() == ["r0", "r1"]
        assert np.array_equal(next(file.chunks())[1].toarray(), [[0, 5], [7, 0]])


def rich() -> ad.AnnData:
    data = adata(layers={"half": counts() * 0.5, "dense": counts().toarray().astype(np.int16)})
    rng = np.random.default_rng(2)
    data.obsm["pca"] = rng.normal(size=(30, 4)).astype(np.float32)
    data.obsm["csr"], data.obsm["csc"] = sp.random(30, 5, 0.3, "csr", rng=rng), sp.random(30, 5, 0.3, "csc", rng=rng)
    data.obsm["table"] = pd.DataFrame({"u": range(30), "v": list("ab") * 15}, index=data.obs_names)
    return data


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_obsm_and_layers(tmp_path: Path, kind: str) -> None:
    data, path = rich(), tmp_path / f"a.{kind}"
    with ad.settings.override(auto_shard_zarr_v3=False, zarr_write_format=3), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of consolidated metadata
        data.write_h5ad(path) if kind == "h5ad" else data.write_zarr(path)
    with open_counts(path) as file:
        assert set(file.obsm_names()) == {"pca", "csr", "csc", "table"}
        for name in ("pca", "csr", "csc"):
            whole, part = file.obsm_element(name), file.obsm_rows(name, 5, 19)
            wanted = data.obsm[name] if name == "pca" else data.obsm[name].toarray()
            dense = [v if name == "pca" else v.toarray() for v in (whole, part)]
            assert np.array_equal(dense[0], wanted) and np.array_equal(dense[1], wanted[5:19])
            assert whole.dtype == part.dtype == data.obsm[name].dtype
            assert name == "pca" or whole.format == part.format == "csr"
        pd.testing.assert_frame_equal(file.obsm_element("table"), data.obsm["table"], check_dtype=False)
        assert file.obsm_rows("table", 3, 6)["u"].tolist() == [3, 4, 5]
        assert set(file.layer_names()) == {"half", "dense"}
        for name, wanted in (("half", data.layers["half"].toarray()), ("dense", data.layers["dense"])):
            for start in (0, 13):
                blocks = list(file.layer_blocks(name, 7, start=start))
                assert blocks[0][0] == start and {b.dtype for _, b in blocks} == {wanted.dtype}
                assert np.array_equal(np.vstack([b.toarray() for _, b in blocks]), wanted[start:])
        for wrong in (lambda: file.obsm_element("umap"), lambda: list(file.layer_blocks("halve"))):
            with pytest.raises(DataError, match=r"there is no layer|obsm has no"):
                wrong()


def test_layers_follow_the_genes(tmp_path: Path) -> None:
    """Features that are set aside or added up are so in layers; raw has other genes; X is a layer beside one."""
    data = adata(layers={"half": counts() * 0.5})
    data.var["feature_types"] = ["Gene Expression"] * 10 + ["Antibody Capture"] * 2
    data.write_h5ad(tmp_path / "a.h5ad")
    half = data.layers["half"].toarray()[:, :10]
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file["var/_index"][4] = "g1"
    with open_counts(tmp_path / "a.h5ad", sum_duplicates=True) as file:
        found = np.vstack([b.toarray() for _, b in file.layer_blocks("half", 7)])
    half[:, 1] += half[:, 4]
    assert np.array_equal(found, np.delete(half, 4, axis=1))
    data = adata(counts().log1p(), layers={"counts": counts()})
    data.write_h5ad(tmp_path / "b.h5ad")
    with open_counts(tmp_path / "b.h5ad") as file:
        assert file.layer_names() == ("X",)
        assert np.array_equal(next(file.layer_blocks("X", 99))[1].toarray(), data.X.toarray())


def test_more_values_than_32_bits_count(tmp_path: Path) -> None:
    """Pointers beyond 2**31: only the last cell's values are written, the rest of the file is a hole."""
    path, n = tmp_path / "a.h5", 2**31 + 40
    with h5py.File(path, "w") as file:
        for name, dtype in (("data", "u1"), ("indices", "i4")):
            file.create_dataset(f"X/{name}", (n,), dtype, chunks=(2**20,))[-4:] = [3, 5, 7, 9]
        file["X/indptr"] = np.array([0, 2**31 - 1, n - 4, n], np.int64)
        last = list(Matrix(file, path, "X", "csr", 3, 2**31 - 1).blocks(1, start=2))
        assert [(first, block.data.tolist(), block.indices.tolist()) for first, block in last] == [
            (2, [3, 5, 7, 9], [3, 5, 7, 9])
        ]


@pytest.mark.parametrize("filters", [{"fletcher32": True}, {"compression": "gzip", "fletcher32": True}])
def test_checksums_of_hdf5(tmp_path: Path, filters: dict[str, object]) -> None:
    """Filters that this package does not decode itself are HDF5's: right values, and damage is seen."""
    path, values = tmp_path / "a.h5ad", counts(500, 40)
    adata(values, 500, 40).write_h5ad(path)
    with h5py.File(path, "a") as file:
        for name in ("data", "indices"):
            del file[f"X/{name}"]
            file["X"].create_dataset(name, data=getattr(values, name), chunks=(1000,), **filters)
        where = file["X/data"].id.get_chunk_info(1)
    assert np.array_equal(stack(path), values.toarray())
    raw = bytearray(path.read_bytes())
    raw[where.byte_offset + 100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UnreadableFileError, match="a part of the file cannot be read"):
        stack(path, counts="X")


def test_text_that_hdf5_would_read_for_ever(tmp_path: Path) -> None:
    """A hole in a global heap, as an unfinished download leaves it."""
    path = tmp_path / "a.h5ad"
    adata().write_h5ad(path)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"GCOL")
    raw[at + 48 : at + 80] = bytes(32)
    path.write_bytes(raw)
    with pytest.raises(UnreadableFileError, match=f"the text at byte {at:,} is damaged"):
        open_counts(path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data are not here")
@pytest.mark.parametrize(
    "path", sorted(REAL.glob("rna/*.h5ad")) + sorted(REAL.glob("*/*cells.h5ad")), ids=lambda p: p.stem
)
def test_real_files(path: Path) -> None:
    if path.stem == "pancreas_3tech_296genes":
        with pytest.raises(NotCountsError, match=r"no matrix holds raw counts .*X holds .*layers/logcounts holds"):
            open_counts(path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old formats, and of names that are not unique
        wanted = ad.read_h5ad(path)
    x = wanted.X.toarray() if sp.issparse(wanted.X) else wanted.X
    assert np.array_equal(stack(path), x)
