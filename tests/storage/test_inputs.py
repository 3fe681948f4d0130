"""Every input a user may have: taken with exactly its counts, or refused with the reason; one row a case.

The numbers are those of a catalogue of bad inputs. For each row `open_counts`, `inspect` and `convert` must agree.
"""

from __future__ import annotations

import fcntl
import gzip
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scviaduct.distributed.inspect import inspect
from scviaduct.errors import DataError, NotCountsError, ScviaductError, UnreadableFileError
from scviaduct.storage.convert import convert
from scviaduct.storage.h5ad import open_counts

N, M = 30, 12
GENES = [f"g{i}" for i in range(M)]


def counts(n: int = N, m: int = M, seed: int = 0) -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(seed).poisson(0.6, (n, m)).astype(np.float32))


X, OTHER = counts(), counts(seed=1)
LOG, DENSE = X.log1p(), X.toarray()


def adata(x: Any = None, obs: pd.DataFrame | None = None, **parts: Any) -> ad.AnnData:
    x = X if x is None else x
    obs = pd.DataFrame(index=[f"c{i}" for i in range(x.shape[0])]) if obs is None else obs
    return ad.AnnData(X=x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(x.shape[1])]), **parts)


def with_raw(x: Any, raw: sp.csr_matrix, **layers: Any) -> ad.AnnData:
    data = adata(x, layers=layers)
    data.raw = ad.AnnData(raw, obs=data.obs, var=pd.DataFrame(index=[f"r{i}" for i in range(raw.shape[1])]))
    return data


Make = Callable[[Path], Path | None]
"""Writes an input at a path without suffix, or beside it, and says where."""


def h5ad(data: ad.AnnData, change: Callable[[h5py.File], object] | None = None, **options: Any) -> Make:
    def make(path: Path) -> Path:
        path = path.with_suffix(".h5ad")
        data.write_h5ad(path, **options)
        if change:
            with h5py.File(path, "a") as file:
                change(file)
        return path

    return make


def store(
    data: ad.AnnData, version: int = 3, change: Callable[[Path], object] | None = None, *, sharded: bool = False
) -> Make:
    def make(path: Path) -> Path:
        path = path.with_suffix(".zarr")
        with ad.settings.override(zarr_write_format=version, auto_shard_zarr_v3=sharded), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata's, of version 2
            data.write_zarr(path)
        if change:
            change(path)
        return path

    return make


def tenx(
    types: list[str] | None = None, ids: list[str] | None = None, genomes: tuple[str, ...] = (), x: Any = X
) -> Make:
    """CellRanger 3 and later; with `genomes` CellRanger 2."""

    def make(path: Path) -> Path:
        path = path.with_suffix(".h5")
        names = ids or [f"ENSG{i:011}" for i in range(x.shape[1])]
        with h5py.File(path, "w") as file:
            for name in genomes or ("matrix",):
                group = file.create_group(name)
                group.update({"data": x.data.astype("i4"), "indices": x.indices.astype("i8")})
                group.update({"indptr": x.indptr.astype("i8"), "shape": np.array(x.shape[::-1], "i4")})
                group["barcodes"] = np.array([f"AC{i}-1" for i in range(x.shape[0])], "S")
                folder = group if genomes else group.create_group("features")
                folder["genes" if genomes else "id"] = np.array(names, "S")
                folder["gene_names" if genomes else "name"] = np.array(["same"] * len(names), "S")
                if not genomes:
                    folder["feature_type"] = np.array(types or ["Gene Expression"] * len(names), "S")
                    folder["genome"] = np.array(["GRCh38"] * len(names), "S")
        return path

    return make


def raw_bytes(content: bytes) -> Make:
    return lambda path: path.with_suffix(".h5ad").write_bytes(content) and None


def hdf5(*groups: str) -> Make:
    def make(path: Path) -> None:
        with h5py.File(path.with_suffix(".h5ad"), "w") as file:
            for group in groups:
                file.create_group(group)

    return make


@dataclass
class Case:
    """An input and what must become of it."""

    number: str
    make: Make
    wanted: Any
    """The counts; or the error."""
    words: str | tuple[str, ...] = ""
    """Of an input that is taken: the matrix. Else patterns in the message."""
    options: dict[str, Any] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    """Lines of `inspect`, as patterns."""
    genes: list[str] | None = None


def put(name: str, at: Any, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][at] = value

    return change


def replace(name: str, values: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        if name in file:
            del file[name]
        file[name] = values

    return change


def named_by(*genes: str) -> sp.csr_matrix:
    return counts(4, len(genes))


def repeated(names: list[str], x: sp.csr_matrix) -> ad.AnnData:
    data = adata(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata's, of names that are not unique
        data.var_names = names
    return data


def widths() -> Iterator[Case]:
    for dtype in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ">f4", ">i4", "?"):
        values = X.data.astype(bool).astype(dtype) if dtype == "?" else X.data.astype(dtype)
        dense = (DENSE > 0) * 1 if dtype == "?" else DENSE
        yield Case(f"5 csr of {dtype}", h5ad(adata(), replace("X/data", values)), dense, "X")
        made = dense.astype(dtype)

        def change(file: h5py.File, made: np.ndarray = made) -> None:
            attrs = dict(file["X"].attrs)
            replace("X", made)(file)
            file["X"].attrs.update(attrs)

        yield Case(f"5 dense of {dtype}", h5ad(adata(DENSE), change), dense, "X")
    for dtype, value in (("i8", 2**24), ("f4", 2**24), ("i8", 2**32 + 5), ("u8", 2**63 + 1), ("f8", 1e30)):
        wrong = X.data.astype(dtype)
        wrong[3] = value
        case = h5ad(adata(), replace("X/data", wrong))
        yield Case(f"5 {value:.3g} as {dtype}", case, NotCountsError, "at least 16,777,216", {"counts": "X"})


def layouts() -> Iterator[Case]:
    for name, x in {"csr": X, "csc": X.tocsc(), "dense": DENSE}.items():
        number = {"csr": "30", "csc": "6", "dense": "7"}[name]
        for options in ({}, {"compression": "gzip"}, {"compression": "lzf"}):
            yield Case(f"{number} {name} {options.get('compression', '')}", h5ad(adata(x), **options), DENSE, "X")
        for version in (2, 3):
            yield Case(
                f"{number} {name} in Zarr v{version}", store(adata(x), version), DENSE, "X", told=("AnnData Zarr",)
            )
        yield Case(f"{number} {name} in shards", store(adata(x), sharded=True), DENSE, "X")


CELL, GENE = f"c{np.searchsorted(X.indptr, 60, 'right') - 1}", f"g{X.indices[60]}"
SHUFFLED = X.copy()
for row in range(N):
    part = slice(SHUFFLED.indptr[row], SHUFFLED.indptr[row + 1])
    SHUFFLED.indices[part] = SHUFFLED.indices[part][::-1].copy()
    SHUFFLED.data[part] = SHUFFLED.data[part][::-1].copy()
ZEROS = X.copy()
ZEROS.data[::3] = 0
TWICE = sp.csr_matrix((np.r_[X.data, 5, 1], np.r_[X.indices, 2, 2], np.r_[X.indptr[:-1], X.nnz + 2]), X.shape)
TWICE_DENSE = DENSE.copy()
TWICE_DENSE[-1, 2] += 6
EMPTY_CELLS = DENSE.copy()
EMPTY_CELLS[[0, 7, 29]] = 0
PROTEINS = ["Gene Expression"] * 8 + ["Antibody Capture"] * 3 + ["CRISPR Guide Capture"]


def cite(types: list[str], column: str = "feature_types") -> ad.AnnData:
    data = adata()
    data.var[column] = types
    return data


def values() -> Iterator[Case]:
    """What X, raw and the layers hold."""
    none = "no matrix holds raw counts"
    pay = sp.csr_matrix(X / np.maximum(X.sum(1), 1)).astype("f4")
    two = ("2 matrices", "--counts raw or --counts counts")
    yield Case(
        "1 normalised", h5ad(adata(pay)), NotCountsError, (none, "X holds 0", "raw counts from the data's source")
    )
    yield Case("1 log", h5ad(adata(LOG)), NotCountsError, (none, r"looked at: X\)", "X holds 0.69"))
    yield Case("1 log, in Zarr", store(adata(LOG)), NotCountsError, (none, "X holds 0.69"))
    yield Case("2 X", h5ad(adata(X, layers={"counts": OTHER})), DENSE, "X", told=("other counts +--counts counts",))
    other, raw = OTHER.toarray(), counts(N, 20)
    yield Case("2 layer", h5ad(adata(LOG, layers={"counts": OTHER})), other, "layers/counts", told=("X holds 0.69",))
    yield Case("2 layer of Zarr", store(adata(LOG, layers={"counts": OTHER})), other, "layers/counts")
    yield Case("2 odd name", h5ad(adata(LOG, layers={"umis": LOG, "odd": OTHER})), other, "layers/odd")
    yield Case("2 case", h5ad(adata(LOG, layers={"Counts": OTHER, "spliced": X})), other, "layers/Counts")
    yield Case("2 only zeros in X", h5ad(adata(X * 0, layers={"counts": OTHER})), other, "layers/counts")
    yield Case("2 only zeros at all", h5ad(adata(X * 0)), DENSE * 0, "X", told=("cells without counts +30",))
    yield Case("2 raw", h5ad(with_raw(LOG, raw)), raw.toarray(), "raw/X", genes=[f"r{i}" for i in range(20)])
    yield Case("2 raw of Zarr", store(with_raw(LOG, raw)), raw.toarray(), "raw/X")
    both = with_raw(LOG, X, counts=OTHER)
    yield Case("2 raw or layer", h5ad(both), NotCountsError, ("raw/X, layers/counts", *two))
    yield Case("2 raw or layer, said", h5ad(both), other, "layers/counts", {"counts": "counts"})
    yield Case("2 by its path", h5ad(both), other, "layers/counts", {"counts": "layers/counts"})
    yield Case("2 raw, said", h5ad(both), DENSE, "raw/X", {"counts": "raw"})
    pair = adata(LOG, layers={"spliced": X, "unspliced": OTHER})
    yield Case("2 velocity", h5ad(pair), NotCountsError, "--counts spliced or --counts unspliced")
    misspelt = "no matrix 'count' of numbers; did you mean 'counts'"
    yield Case("2 misspelt", h5ad(adata(LOG, layers={"counts": X})), DataError, misspelt, {"counts": "count"})
    yield Case("3 negative", h5ad(adata(-X)), NotCountsError, (none, "X holds -"))
    yield Case("3 negative, said", h5ad(adata(-X)), NotCountsError, ("negative", "Scaled"), {"counts": "X"})
    for name, value in {"NaN": np.nan, "inf": np.inf}.items():
        words = ("1 are not finite", f"{value} in cell '{CELL}', gene '{GENE}'")
        yield Case(f"4 {name}", h5ad(adata(), put("X/data", 60, value)), NotCountsError, words, {"counts": "X"})
        yield Case(
            f"4 {name}, found", h5ad(adata(), put("X/data", 60, value)), NotCountsError, (none, f"X holds {value}")
        )
    yield Case("21 cells without counts", h5ad(adata(sp.csr_matrix(EMPTY_CELLS))), EMPTY_CELLS, "X")
    yield Case("27 unsorted", h5ad(adata(SHUFFLED)), DENSE, "X")
    yield Case("27 twice", h5ad(adata(TWICE)), TWICE_DENSE, "X", told=(r"repeated entries \(summed\) +2",))
    yield Case("27 zeros", h5ad(adata(ZEROS)), ZEROS.toarray(), "X", told=("explicit zeros",))
    yield Case("27 zeros in CSC", h5ad(adata(ZEROS.tocsc())), ZEROS.toarray(), "X", told=("explicit zeros",))


def genes() -> Iterator[Case]:
    """Features named twice, of other types, and of 10x files."""
    x = named_by("A", "B", "A")
    dense = x.toarray()
    summed = np.stack([dense[:, 0] + dense[:, 2], dense[:, 1]], 1)
    twice, fix = repeated(["A", "B", "A"], x), "--sum-duplicates"
    said = {"sum_duplicates": True}
    for kind, make in {
        "h5ad": h5ad(twice),
        "Zarr": store(twice),
        "CSC": h5ad(repeated(["A", "B", "A"], x.tocsc())),
    }.items():
        yield Case(f"8 {kind}", make, DataError, ("1 gene occurs more than once", "'A' and 'A'", fix))
        yield Case(f"8 {kind} summed", make, summed, "X", said, ("same name +1",), ["A", "B"])
    yield Case("8 10x summed", tenx(ids=["A", "B", "A"], x=x), summed, "matrix", said, genes=["A", "B"])
    versions = repeated(["ENSG00000000003.1", "B", "ENSG00000000003.15"], x)
    yield Case("10 versions", h5ad(versions), DataError, (r"'ENSG00000000003\.1' and 'ENSG00000000003\.15'", fix))
    yield Case("10 versions summed", h5ad(versions), summed, "X", said, (), ["ENSG00000000003.1", "B"])
    y = ["ENSG00000182378.15", "B", "ENSG00000182378.15_PAR_Y"]
    yield Case("10 PAR_Y", h5ad(repeated(y, x)), dense, "X", said, (), y)
    yield Case("10 symbols with dots", h5ad(repeated(["RP11-34P13.7", "B", "RP11-34P13.8"], x)), dense, "X")
    same = replace("obs/_index", ["c"] * N)
    yield Case("9 cells named twice", h5ad(adata(), same), DENSE, "X", told=("cell names +29",))
    left_out = ("left out\\) +3 Antibody Capture, 1 CRISPR Guide Capture",)
    ids = [f"ENSG{i:011}" for i in range(M)]
    yield Case("30 10x of CellRanger 3", tenx(), DENSE, "matrix", told=("10x Genomics h5", "ensembl"), genes=ids)
    yield Case("43 10x with proteins", tenx(PROTEINS), DENSE[:, :8], "matrix", told=left_out, genes=ids[:8])
    alone = {"counts": "Antibody Capture"}
    yield Case("43 proteins alone", tenx(PROTEINS), DENSE[:, 8:11], "matrix", alone, ("8 Gene Expression",))
    yield Case(
        "43 peaks alone", tenx(["Peaks"] * M), NotCountsError, ("no Gene Expression but Peaks", "--counts 'Peaks'")
    )
    wrong = "no feature type 'Peak'; available: 'Gene Expression'"
    yield Case("43 no such type", tenx(), DataError, wrong, {"counts": "Peak"})
    yield Case("30 10x of CellRanger 2", tenx(genomes=("GRCh38",)), DENSE, "GRCh38", genes=ids)
    two = tenx(genomes=("GRCh38", "mm10"))
    yield Case("44 10x of two genomes", two, NotCountsError, ("2 genomes", "--counts GRCh38 or --counts mm10"))
    yield Case("44 10x of two genomes, said", two, DENSE, "mm10", {"counts": "mm10"})
    yield Case("43 h5ad with proteins", h5ad(cite(PROTEINS)), DENSE[:, :8], "X", told=left_out, genes=GENES[:8])
    yield Case("43 Zarr with proteins", store(cite(PROTEINS)), DENSE[:, :8], "X", told=left_out)
    biotypes = ["protein_coding", "lncRNA"] * 6
    yield Case("43 biotypes", h5ad(cite(biotypes, "feature_type")), DENSE, "X", told=(r"genes +12 ",))


def damaged() -> Iterator[Case]:
    """Structure that cannot be."""
    yield Case("26 overflow", h5ad(adata(), put("X/indptr", 5, -(2**31) + 7)), DataError, "falls from .* overflowed")
    yield Case(
        "26 pointers too far", h5ad(adata(), put("X/indptr", 30, 9999)), DataError, "indptr runs from 0 to 9,999"
    )
    short = replace("X/indptr", X.indptr[:-3])
    yield Case("26 too few pointers", h5ad(adata(), short), DataError, "X has 28 row or column pointers where 31")
    outside = r"gene indices outside 0-11, e\.g\. 12 in cell 'c0'"
    yield Case("26 index too large", h5ad(adata(), put("X/indices", 4, 12)), DataError, outside)
    yield Case("26 index negative", h5ad(adata(), put("X/indices", 4, -1)), DataError, r"outside 0-11, e\.g\. -1")
    csc = h5ad(adata(X.tocsc()), put("X/indices", 4, 30))
    yield Case("26 cell index too large", csc, DataError, r"cell indices outside 0-29, e\.g\. 30")
    sizes = "X is 31 x 12, but obs and var name 30 cells and 12 genes"
    yield Case("28 other cells", h5ad(adata(), lambda f: f["X"].attrs.__setitem__("shape", [31, 12])), DataError, sizes)
    nothing = h5ad(adata(sp.csr_matrix((0, M), dtype="f4")))
    yield Case("28 no cells", nothing, DataError, "X has 0 cells and 12 genes")
    yield Case("28 no genes", h5ad(adata(sp.csr_matrix((N, 0), dtype="f4"))), DataError, "30 cells and 0 genes")
    yield Case("28 no features", tenx(x=X[:, :0]), ScviaductError, "")
    future = h5ad(adata(), lambda f: f["obs"].attrs.__setitem__("encoding-type", "from the future"))
    yield Case("28 unknown obs", future, UnreadableFileError, "obs cannot be read .*from the future")
    gone = "1 chunks of X/data are not there and would read as zeros"
    lose = lambda path: shutil.rmtree(path / "X/data/c")  # noqa: E731
    yield Case("34 Zarr chunk gone", store(adata(), 3, lose), UnreadableFileError, gone)
    unwritten = h5ad(adata(), _unwritten)
    yield Case("34 HDF5 chunk never written", unwritten, UnreadableFileError, "of X/data are not there")
    dense = store(adata(DENSE), 3, lambda path: shutil.rmtree(path / "X/c"))
    yield Case("34 dense Zarr without a chunk", dense, DENSE * 0, "X", told=(r"read as zeros\) +1",))


def _unwritten(file: h5py.File) -> None:
    del file["X/data"]
    file["X"].create_dataset("data", (X.nnz,), "f4", chunks=(20,))[:40] = X.data[:40]


def _truncated(path: Path) -> None:
    adata().write_h5ad(path.with_suffix(".h5ad"))
    path.with_suffix(".h5ad").write_bytes(path.with_suffix(".h5ad").read_bytes()[:-500])


def _zipped(path: Path) -> None:
    with zipfile.ZipFile(path.with_suffix(".h5ad"), "w") as archive:
        archive.writestr("a.h5ad", "x")


def _zarr_of(*groups: str) -> Make:
    def make(path: Path) -> Path:
        import zarr

        root = zarr.create_group(path.with_suffix(".zarr"))
        for group in groups:
            root.create_group(group)
        return path.with_suffix(".zarr")

    return make


def formats() -> Iterator[Case]:
    """Files that are something else: the message says what, and the way to convert it."""
    h5 = b"\x89HDF\r\n\x1a\n"
    for number, make, words in (
        ("28 missing", lambda path: None, "does not exist"),
        ("28 empty", raw_bytes(b""), r"is empty \(0 bytes\)"),
        ("29 truncated", _truncated, r"is truncated: it has [\d,]+ of [\d,]+ bytes"),
        ("29 damaged", raw_bytes(h5 + b"\0" * 200), "is a damaged HDF5 file"),
        ("30 zip", _zipped, "is a zip archive, not an h5ad: unzip"),
        ("30 gzipped", raw_bytes(gzip.compress(h5 + b"...")), "is a gzip-compressed HDF5 file.*gunzip"),
        ("30 rds", raw_bytes(gzip.compress(b"X\n\0\0\0\3...")), r"is an R object \(rds\).*writeH5AD"),
        ("30 gzip", raw_bytes(gzip.compress(b"gene,cell\n")), "is a gzip file, not an h5ad: unpack"),
        ("30 broken gzip", raw_bytes(b"\x1f\x8bbroken"), "is a damaged gzip file"),
        ("30 RData", raw_bytes(b"RDX3\nX\n"), "is an R data file"),
        ("30 mtx", raw_bytes(b"%%MatrixMarket matrix"), "is a Matrix Market file.*read_10x_mtx"),
        ("30 text", raw_bytes(b"gene,c1,c2\nA,0,1\n"), r"is a text file \(it begins 'gene,c1"),
        ("30 web page", raw_bytes(b"<!DOCTYPE html>"), "is a web page"),
        ("30 unknown", raw_bytes(b"\0\1\2\3nonsense"), "is no HDF5 file .*00 01 02 03"),
        ("30 loom", hdf5("matrix", "row_attrs", "col_attrs", "layers"), r"is a loom file.*read_loom\(PATH\)"),
        ("30 10x without matrix", hdf5("matrix/barcodes", "matrix/features"), "is a damaged 10x Genomics h5 file"),
        ("30 10x molecules", hdf5("barcode_idx", "umi", "barcodes"), "10x Genomics molecule file.*filtered_feature_bc"),
        ("30 h5mu", hdf5("mod", "obs", "var"), "is a MuData file"),
        ("30 h5Seurat", hdf5("assays", "meta.data"), "is an h5Seurat file"),
        ("30 other HDF5", hdf5("model_weights"), r"without obs and var \(it holds model_weights\)"),
        ("30 MuData Zarr", _zarr_of("mod", "obs", "var"), r"is a MuData store without a modality 'rna'.*zarr/mod/NAME"),
        ("30 SpatialData", _zarr_of("tables", "images"), r"is a SpatialData store.*tables/table"),
        ("30 other Zarr", _zarr_of("weights"), "is a Zarr store without obs and var"),
    ):
        yield Case(number, make, UnreadableFileError, words)


CASES = [*widths(), *layouts(), *values(), *genes(), *damaged(), *formats()]


def refused(case: Case, path: Path, act: Callable[[], object]) -> None:
    with pytest.raises(case.wanted) as error:
        act()
    for word in (case.words,) if isinstance(case.words, str) else case.words:
        assert re.search(word, str(error.value), re.DOTALL), str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.number)
def test_every_input(tmp_path: Path, case: Case) -> None:
    path = case.make(tmp_path / "a") or tmp_path / "a.h5ad"
    acts = {
        "open": lambda: read(path, **case.options),
        "inspect": lambda: list(inspect(path, **case.options).lines()),
        "convert": lambda: convert([path], out=tmp_path / "out" / "atlas.zarr", **case.options),
    }
    if isinstance(case.wanted, type):
        for act in acts.values():
            refused(case, path, act)
        return
    found, matrix, names = acts["open"]()
    assert np.array_equal(found, case.wanted)
    assert matrix == case.words
    assert case.genes is None or names == case.genes
    lines = "\n".join(acts["inspect"]())
    assert f"counts in {matrix} (" in " ".join(lines.split()) and "ready to convert or map" in lines
    assert all(re.search(pattern, lines) for pattern in case.told), lines
    atlas = acts["convert"]()
    assert [d.id for d in atlas.datasets] == ["a"]
    assert np.array_equal(np.vstack([block.toarray() for _, block in atlas.chunks("a")]), case.wanted)


def read(path: Path, **options: Any) -> tuple[np.ndarray, str, list[str]]:
    """The counts, checked for their form; from the beginning and from any later row."""
    with open_counts(path, **options) as file:
        blocks = list(file.chunks(7))
        assert all(b.has_sorted_indices and b.data.dtype == np.uint32 and (b.data > 0).all() for _, b in blocks)
        assert [first for first, _ in blocks] == list(range(0, file.n_obs, 7))
        whole = np.vstack([b.toarray() for _, b in blocks])
        assert whole.shape == (file.n_obs, file.n_vars) == (len(file.obs), len(file.var))
        assert (file.id == "a" and file.stored_values == file.nnz) or file.nnz == np.prod(whole.shape)
        for start in (1, file.n_obs - 1):
            rest = list(file.audited(11, start=start))
            assert rest[0][0] == start
            assert np.array_equal(np.vstack([b.toarray() for _, b, _ in rest]), whole[start:])
        return whole, file.matrix, file.var.index.tolist()


def test_a_locked_file(tmp_path: Path) -> None:
    """31: another process holds it; the way round on file systems without locks is told."""
    path = h5ad(adata())(tmp_path / "a")
    with path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UnreadableFileError, match=r"is locked: another program .*HDF5_USE_FILE_LOCKING=FALSE"):
            open_counts(path)
    assert np.array_equal(read(path)[0], DENSE)


ENSEMBL = [f"ENSG{i:011}" for i in range(M)]
MOUSE = [f"Gene{i}" for i in range(M)]
HUMAN = [name.upper() for name in MOUSE]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (GENES, [f"ENSMUSG{i:011}" for i in range(M)], ("shares no gene", "ensembl names", "symbol names")),
        (ENSEMBL, MOUSE, ("shares no gene", "ENSG00000000000", "Gene0", "same kind of names")),
        (HUMAN, MOUSE, ("shares no gene", "other organisms need an own atlas")),
    ],
    ids=["44 mouse ids", "10 symbols against Ensembl", "44 mouse against human"],
)
def test_files_that_do_not_fit_together(tmp_path: Path, first: list[str], second: list[str], words: tuple) -> None:
    paths = [h5ad(repeated(names, X))(tmp_path / f"f{i}") for i, names in enumerate((first, second))]
    with pytest.raises(DataError) as error:
        convert(paths, out=tmp_path / "atlas.zarr")
    assert all(word in str(error.value) for word in words), error.value


def test_the_same_file_twice(tmp_path: Path) -> None:
    """42"""
    path = h5ad(adata())(tmp_path / "a")
    with pytest.raises(DataError, match="would both become the data set 'a'"):
        convert([path, path], out=tmp_path / "atlas.zarr")


def test_other_order_of_genes(tmp_path: Path) -> None:
    """11, 12, 13: files are put together by name."""
    order = [3, 0, 11, 7, 5, 1]
    one = h5ad(adata())(tmp_path / "one")
    two = h5ad(repeated([GENES[i] for i in order], sp.csr_matrix(DENSE[:, order])))(tmp_path / "two")
    atlas = convert([one, two], out=tmp_path / "atlas.zarr")
    both = atlas.lazy(join="intersection")
    names = sorted(both.var_names)
    found = both[:, names].to_memory().X.toarray()
    wanted = DENSE[:, [GENES.index(name) for name in names]]
    assert sorted(names) == sorted(GENES[i] for i in order)
    assert np.array_equal(found, np.vstack([wanted, wanted]))


def test_columns_of_any_type(tmp_path: Path) -> None:
    """15, 16, 17, 18: one vocabulary of text; 1, 1.0 and "1" are one category, missing is none."""
    n = np.arange(N)
    first = {
        "mixed": pd.Categorical(np.resize(["1", "b", None], N)),
        "donor": np.resize([1, 2], N),
        "flag": np.resize([True, False], N),
        "same": pd.Categorical(np.resize(["x", "y"], N), categories=["y", "x", "unused"]),
        "only": np.resize(["p", "q"], N).astype(object),
        "half": pd.array(np.where(n % 3 == 0, None, n % 2), dtype="Int64"),
    }
    second = {
        "mixed": pd.Categorical(np.resize([1.0, 2.5, np.nan], N)),
        "donor": pd.Categorical(np.resize(["2", "3"], N)),
        "flag": pd.array(np.resize([True, None], N), dtype="boolean"),
        "same": np.resize(["y", "z"], N).astype(object),
        "half": pd.Categorical(np.resize([0, 1], N)),
    }
    paths = []
    for i, columns in enumerate((first, second)):
        index = pd.Index([f"c{j}" for j in range(N)])
        paths.append(h5ad(adata(X, pd.DataFrame(columns, index=index)))(tmp_path / f"f{i}"))
    atlas = convert(paths, out=tmp_path / "atlas.zarr")
    vocabulary = {name: list(values) for name, values in atlas.vocabulary.items()}
    assert vocabulary == {
        "mixed": ["1", "2.5", "b"],
        "donor": ["1", "2", "3"],
        "flag": ["False", "True"],
        "same": ["x", "y", "z"],
        "only": ["p", "q"],
        "half": ["0", "1"],
    }
    for path in paths:
        lines = "\n".join(inspect(path).lines())
        assert "mixed (2 values, 10 missing)" in lines
