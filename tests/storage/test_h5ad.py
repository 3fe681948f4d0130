"""h5ad files: any layout read exactly and in order, the right matrix chosen, anything else refused with the fix."""

from __future__ import annotations

import gzip
import warnings
import zipfile
from collections.abc import Callable
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


@pytest.mark.parametrize(
    ("data", "options", "matrix"),
    [
        (adata(X), {}, "X"),
        (adata(X, layers={"counts": OTHER}), {}, "X"),
        (adata(X, layers={"counts": OTHER}), {"counts": "counts"}, "layers/counts"),
        (adata(X, layers={"counts": OTHER}), {"counts": "layers/counts"}, "layers/counts"),
        (adata(LOG, layers={"counts": OTHER}), {}, "layers/counts"),
        (adata(LOG, layers={"umis": LOG, "strange": OTHER}), {}, "layers/strange"),
        (adata(LOG, layers={"Counts": OTHER, "spliced": X}), {}, "layers/Counts"),
        (adata(sp.csr_matrix(X.shape), layers={"counts": OTHER}), {}, "layers/counts"),
        (adata(sp.csr_matrix(X.shape)), {}, "X"),
        (adata(X.tocsc()), {}, "X"),
        (adata(X.toarray()), {}, "X"),
    ],
)
def test_choice(tmp_path: Path, data: ad.AnnData, options: dict[str, str], matrix: str) -> None:
    data.write_h5ad(tmp_path / "a.h5ad")
    with open_counts(tmp_path / "a.h5ad", **options) as file:
        assert (file.matrix, file.id, file.n_obs, file.n_vars) == (matrix, "a", 30, 12)
    wanted = data.X if matrix == "X" else data.layers[matrix.removeprefix("layers/")]
    wanted = wanted.toarray() if sp.issparse(wanted) else wanted
    assert np.array_equal(stack(tmp_path / "a.h5ad", **options), wanted)


def with_raw(x: sp.csr_matrix, raw: sp.csr_matrix, **layers: sp.csr_matrix) -> ad.AnnData:
    data = adata(x, layers=layers)
    data.raw = ad.AnnData(raw, obs=data.obs, var=pd.DataFrame(index=[f"r{i}" for i in range(raw.shape[1])]))
    return data


def test_raw_brings_its_own_genes(tmp_path: Path) -> None:
    raw = counts(30, 20)
    with_raw(LOG, raw).write_h5ad(tmp_path / "a.h5ad")
    for options in ({}, {"counts": "raw"}, {"counts": "raw/X"}):
        with open_counts(tmp_path / "a.h5ad", **options) as file:
            assert (file.matrix, file.n_vars, file.var.index[19]) == ("raw/X", 20, "r19")
    assert np.array_equal(stack(tmp_path / "a.h5ad"), raw.toarray())


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (adata(LOG), {}, ["no matrix holds raw counts (looked at: X)", "X holds 0.69"]),
        (adata(-X), {}, ["X holds -"]),
        (adata(LOG, layers={"scaled": -LOG}), {}, ["looked at: X, layers/scaled", "layers/scaled holds -"]),
        (with_raw(LOG, X, counts=OTHER), {}, ["2 matrices", "raw/X, layers/counts", "--counts raw or --counts counts"]),
        (adata(LOG, layers={"spliced": X, "unspliced": OTHER}), {}, ["--counts spliced or --counts unspliced"]),
    ],
)
def test_no_choice(tmp_path: Path, data: ad.AnnData, options: dict[str, str], words: list[str]) -> None:
    data.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(NotCountsError) as error:
        open_counts(tmp_path / "a.h5ad", **options)
    for word in [str(tmp_path / "a.h5ad"), *words]:
        assert word in str(error.value)


def test_no_such_matrix(tmp_path: Path) -> None:
    adata(LOG, layers={"counts": X}).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(DataError, match="no matrix 'count' of numbers; did you mean 'counts'"):
        open_counts(tmp_path / "a.h5ad", counts="count")


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


def _truncated(path: Path) -> None:
    adata().write_h5ad(path)
    path.write_bytes(path.read_bytes()[:-500])


def _zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.h5ad", "x")


def _hdf5(*groups: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for group in groups:
                file.create_group(group)

    return make


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


FORMATS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, "does not exist"),
    (lambda path: path.mkdir(), "is a directory with 0 h5ad files"),
    (lambda path: (path.mkdir(), (path / "zarr.json").touch()), "is a Zarr store .*read_zarr"),
    (lambda path: path.touch(), r"is empty \(0 bytes\)"),
    (_truncated, r"is truncated: it has [\d,]+ of [\d,]+ bytes"),
    (_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 200), "is a damaged HDF5 file"),
    (_zipped, "is a zip archive, not an h5ad: unzip"),
    (_bytes(gzip.compress(b"\x89HDF\r\n\x1a\n...")), "is a gzip-compressed HDF5 file.*gunzip"),
    (_bytes(gzip.compress(b"X\n\0\0\0\3...")), r"is an R object \(rds\).*writeH5AD"),
    (_bytes(gzip.compress(b"gene,cell\n")), "is a gzip file, not an h5ad: unpack"),
    (_bytes(b"\x1f\x8bbroken"), "is a damaged gzip file"),
    (_bytes(b"RDX3\nX\n"), "is an R data file"),
    (_bytes(b"%%MatrixMarket matrix"), "is a Matrix Market file.*read_10x_mtx"),
    (_bytes(b"gene,c1,c2\nA,0,1\n"), r"is a text file \(it begins 'gene,c1"),
    (_bytes(b"<!DOCTYPE html>"), "is a web page"),
    (_bytes(b"\0\1\2\3nonsense"), "is no HDF5 file .*00 01 02 03"),
    (_hdf5("matrix", "row_attrs", "col_attrs", "layers"), r"is a loom file.*read_loom\(PATH\)"),
    (_hdf5("matrix/barcodes", "matrix/features"), r"is a 10x Genomics h5 file.*read_10x_h5\(PATH\)\.write_h5ad\('a"),
    (_hdf5("GRCh38/barcodes"), "is a 10x Genomics h5 file"),
    (_hdf5("mod", "obs", "var"), "is a MuData file"),
    (_hdf5("assays", "meta.data"), "is an h5Seurat file"),
    (_hdf5("model_weights"), r"without obs and var \(it holds model_weights\)"),
]


@pytest.mark.parametrize(("make", "message"), FORMATS)
def test_what_it_is_when_it_is_no_h5ad(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "a.h5ad")
    with pytest.raises(UnreadableFileError, match=message) as error:
        open_counts(tmp_path / "a.h5ad")
    assert str(tmp_path / "a.h5ad") in str(error.value)


def test_neighbours_of_a_missing_file(tmp_path: Path) -> None:
    adata().write_h5ad(tmp_path / "lung.h5ad")
    with pytest.raises(UnreadableFileError, match=r"does not exist; .* has lung\.h5ad"):
        open_counts(tmp_path / "lnug.h5ad")


def edit(path: Path, change: Callable[[h5py.File], object], data: ad.AnnData | None = None) -> Path:
    (adata() if data is None else data).write_h5ad(path, compression="gzip")
    with h5py.File(path, "a") as file:
        change(file)
    return path


def _resize_indptr(file: h5py.File) -> None:
    values = file["X/indptr"][:-3]
    del file["X/indptr"]
    file["X/indptr"] = values


def _set(name: str, at: int, value: int) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("X/indptr", 5, 0), "X/indptr falls from .* to 0 at position 5"),
        (_set("X/indptr", 30, 9999), "indptr runs from 0 to 9,999"),
        (_resize_indptr, "X has 28 row or column pointers where 31"),
        (_set("X/indices", 4, 12), r"gene indices outside 0-11, e\.g\. 12 in cell 'c0'"),
        (_set("X/indices", 4, -1), r"gene indices outside 0-11, e\.g\. -1"),
        (
            lambda f: f["X"].attrs.__setitem__("shape", [31, 12]),
            "X is 31 x 12, but obs and var name 30 cells and 12 genes",
        ),
        (lambda f: f["X"].attrs.__setitem__("shape", [0, 12]), "X has 0 cells and 12 genes"),
    ],
)
def test_damaged_matrix(tmp_path: Path, change: Callable[[h5py.File], object], message: str) -> None:
    path = edit(tmp_path / "a.h5ad", change)
    with pytest.raises(DataError, match=message):
        stack(path)


def test_damaged_bytes(tmp_path: Path) -> None:
    path = edit(tmp_path / "a.h5ad", lambda f: None, adata(counts(500, 40), 500, 40))
    with h5py.File(path) as file:
        where = file["X/data"].id.get_chunk_info(0)
    raw = bytearray(path.read_bytes())
    raw[where.byte_offset + where.size // 2 : where.byte_offset + where.size] = bytes(where.size - where.size // 2)
    path.write_bytes(raw)
    with pytest.raises(UnreadableFileError, match="a part of the file cannot be read"):
        stack(path, counts="X")


@pytest.mark.parametrize(
    ("names", "example"),
    [
        (["A", "B", "A"], "'A' and 'A'"),
        (["ENSG00000000003.1", "ENSG00000000003.2", "B"], r"'ENSG00000000003\.1' and '"),
    ],
)
def test_genes_named_twice(tmp_path: Path, names: list[str], example: str) -> None:
    data = adata(counts(4, 3), 4, 3)
    data.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file["var/_index"][:] = names
    with pytest.raises(DataError, match=f"1 genes occur more than once in var_names .*{example}"):
        open_counts(tmp_path / "a.h5ad")


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


def test_unreadable_obs(tmp_path: Path) -> None:
    path = edit(tmp_path / "a.h5ad", lambda f: f["obs"].attrs.__setitem__("encoding-type", "from the future"))
    with pytest.raises(UnreadableFileError, match="obs cannot be read"):
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
