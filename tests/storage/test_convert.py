"""Files in, atlas out: value for value, or nothing at all."""

from __future__ import annotations

import fcntl
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scviaduct.errors import (
    ConfigError,
    DataError,
    IncompleteError,
    NotCountsError,
    OutputExistsError,
    ScviaductError,
    UnreadableFileError,
)
from scviaduct.storage import arrays
from scviaduct.storage import dataset as dataset_module
from scviaduct.storage.arrays import Growing
from scviaduct.storage.convert import convert
from scviaduct.storage.manifest import file_digest, tree_digest

REAL = Path(__file__).parents[3] / "shared" / "data"


def adata(n: int = 40, m: int = 15, seed: int = 0, prefix: str = "gene", scale: float = 0.7) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    x = sp.csr_matrix(rng.poisson(scale, (n, m)).astype(np.float32))
    obs = pd.DataFrame(
        {
            "category": pd.Categorical(np.array(["T", None, "B"], object)[rng.integers(0, 3, n)], ["T", "unused", "B"]),
            "flag": rng.random(n) < 0.5,
            "whole": rng.integers(-5, 5, n),
            "small": rng.integers(0, 5, n).astype(np.int8),
            "real": np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n)),
            "single": rng.normal(size=n).astype(np.float32),
            "text": [f"barcode {i}" for i in range(n)],
            "maybe": pd.array([None, *range(n - 1)], dtype="Int64"),
        },
        index=[f"c{i}" for i in range(n)],
    )
    var = pd.DataFrame({"symbol": [f"S{i}" for i in range(m)]}, index=[f"{prefix}{i}" for i in range(m)])
    return ad.AnnData(X=x, obs=obs, var=var)


def write(path: Path, data: ad.AnnData) -> Path:
    data.write_h5ad(path)
    return path


def nothing_left(directory: Path, *names: str) -> bool:
    return sorted(p.name for p in directory.iterdir()) == sorted(names)


def test_a_data_set_equals_its_source(tmp_path: Path) -> None:
    data = adata()
    data.obs.index.name = "barcode"
    source = write(tmp_path / "lung.h5ad", data)
    atlas = convert([source], out=tmp_path / "atlas.zarr")
    found, wanted = ad.io.read_zarr(tmp_path / "atlas.zarr/datasets/lung"), ad.read_h5ad(source)
    assert isinstance(found.X, sp.csr_matrix)
    assert np.array_equal(found.X.toarray(), wanted.X.toarray())
    pd.testing.assert_frame_equal(found.obs, wanted.obs)
    pd.testing.assert_frame_equal(found.var, wanted.var)
    info = atlas.datasets[0]
    assert (info.id, info.source, info.matrix, info.sha256) == ("lung", "lung.h5ad", "X", file_digest(source))
    assert (info.n_obs, info.n_vars, info.nnz, info.sum) == (40, 15, wanted.X.nnz, wanted.X.sum())
    assert nothing_left(tmp_path, "atlas.zarr", "lung.h5ad")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 60), st.integers(1, 300)),
    dtype=st.sampled_from(["u1", "i4", "u2", "i8", "f4", "f8"]),
    layout=st.sampled_from([sp.csr_matrix, sp.csc_matrix, np.asarray]),
    largest=st.sampled_from([1, 255, 256, 65535, 65536, 2**24 - 1]),
    shard=st.sampled_from([64, 256, 2**23]),
    compression=st.sampled_from([None, "gzip", "lzf"]),
)
def test_round_trip(tmp_path: Path, seed, shape, dtype, layout, largest, shard, compression) -> None:
    rng = np.random.default_rng(seed)
    largest = int(min(largest, np.iinfo(dtype).max if dtype[0] in "iu" else largest))
    # The largest count comes late, so that an array already on disk has to widen.
    counts = np.where(rng.random(shape) < 0.3, rng.integers(1, min(largest, 3) + 1, shape), 0)
    counts[-1, -1] = largest
    out, source = tmp_path / "a.zarr", tmp_path / "x.h5ad"
    names = {"obs": [f"c{i}" for i in range(shape[0])], "var": [f"g{i}" for i in range(shape[1])]}
    data = ad.AnnData(layout(counts.astype(dtype)), **{k: pd.DataFrame(index=v) for k, v in names.items()})
    data.write_h5ad(source, compression=compression)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "SHARD", shard)
        patch.setattr(arrays, "CHUNK", min(shard, 64))
        patch.setattr(dataset_module, "BLOCK", 200)
        shutil.rmtree(out, ignore_errors=True)
        atlas = convert([source], out=out)
    x = zarr.open_group(out / "datasets/x/X", mode="r")
    assert x["data"].dtype == np.min_scalar_type(largest)
    assert x["indices"].dtype == np.min_scalar_type(shape[1])
    assert x["indptr"].dtype == np.int64
    assert np.array_equal(np.vstack([b.toarray() for _, b in atlas.chunks("x", 7)]), counts)
    assert np.array_equal(ad.io.read_zarr(out / "datasets/x").X.toarray(), counts)
    info = atlas.datasets[0]
    zero = int((counts.sum(1) == 0).sum())
    assert (info.nnz, info.sum, info.zero_count_cells) == (np.count_nonzero(counts), counts.sum(), zero)


def test_several_files(tmp_path: Path) -> None:
    a, b = adata(seed=1), adata(25, 30, seed=2)
    b.obs = b.obs.drop(columns="maybe").assign(
        whole=pd.Categorical(["one", "1"] * 12 + ["one"]), new=[None if i % 2 else "x" for i in range(25)]
    )
    b.layers["counts"], b.X = b.X, b.X.log1p()
    b.obs["new"] = pd.Categorical(b.obs["new"])
    b = b[:, ::-1].copy()
    seen = []
    paths = [write(tmp_path / "b.h5ad", b), write(tmp_path / "a.h5ad", a)]
    atlas = convert(paths, out=tmp_path / "x/atlas.zarr", on_progress=lambda *at: seen.append(at))
    assert [(d.id, d.matrix) for d in atlas.datasets] == [("b", "layers/counts"), ("a", "X")]
    assert (seen[-1], atlas.n_obs) == (("a", 65, 65), 65)
    assert ("b", 25, 65) in seen
    assert sorted(atlas.vocabulary) == ["category", "flag", "new", "text", "whole"]
    assert atlas.vocabulary["category"] == ("B", "T")
    assert atlas.vocabulary["flag"] == ("False", "True")
    assert atlas.vocabulary["new"] == ("x",)
    assert atlas.vocabulary["whole"] == tuple(sorted({"one", "1", *map(str, a.obs["whole"])}))
    record = json.loads((tmp_path / "x/atlas.zarr/atlas.json").read_text())
    assert (record["format"], record["datasets"], record["identifiers"]) == (2, ["b", "a"], [])
    assert record["manifests"] == {n: file_digest(tmp_path / f"x/atlas.zarr/datasets/{n}/manifest.json") for n in "ab"}
    assert zarr.open_group(tmp_path / "x/atlas.zarr", mode="r").attrs["scviaduct"] == {"format": 2}


def test_zero_count_cells_and_names_are_kept_and_counted(tmp_path: Path) -> None:
    data = adata(6)
    data.X.data[np.isin(np.repeat(range(6), np.diff(data.X.indptr)), [1, 4])] = 0
    data.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file["obs/_index"][:] = ["x", "x", "y", "z", "x", "w"]
    atlas = convert([tmp_path / "a.h5ad"], out=tmp_path / "atlas.zarr")
    assert atlas.datasets[0].zero_count_cells == 2
    assert atlas.obs("a").index.tolist() == ["x", "x", "y", "z", "x", "w"]
    manifest = json.loads((tmp_path / "atlas.zarr/datasets/a/manifest.json").read_text())
    assert manifest["duplicate_obs_names"] == 2
    assert manifest["explicit_zeros"] == int((data.X.data == 0).sum()) > 0
    assert manifest["files"] == tree_digest(tmp_path / "atlas.zarr/datasets/a", exclude=("manifest.json",))


def _wrong(change: Callable[[ad.AnnData], object]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        data = adata()
        change(data)
        write(path, data)

    return make


def _value(value: float) -> Callable[[ad.AnnData], None]:
    def change(data: ad.AnnData) -> None:
        data.X.data[100] = value

    return change


def _cut(path: Path) -> None:
    write(path, adata())
    path.write_bytes(path.read_bytes()[:-100])


def _same_name(path: Path) -> None:
    write(path, adata())
    with h5py.File(path, "a") as file:
        file["var/_index"][3] = "gene7"


BAD: list[tuple[Callable[[Path], object], type[ScviaductError], str]] = [
    (lambda path: None, UnreadableFileError, r"bad\.h5ad does not exist"),
    (lambda path: path.touch(), UnreadableFileError, r"bad\.h5ad is empty"),
    (_cut, UnreadableFileError, r"bad\.h5ad is truncated"),
    (_wrong(lambda d: setattr(d, "X", d.X.log1p())), NotCountsError, r"bad\.h5ad: no matrix holds raw counts"),
    (_wrong(_value(-1)), NotCountsError, r"bad\.h5ad: .*X holds -1"),
    (_wrong(_value(np.nan)), NotCountsError, r"bad\.h5ad: .*X holds nan"),
    (_wrong(_value(2**24)), NotCountsError, r"bad\.h5ad: "),
    (_same_name, DataError, r"bad\.h5ad: 1 gene occurs more than once .*'gene7' and 'gene7'"),
    (lambda path: write(path, adata(prefix="ENSMUSG0000000")), DataError, r"bad\.h5ad shares no gene .*symbol .*gene0"),
    (lambda path: write(path, adata()[:0].copy()), DataError, r"bad\.h5ad: X has 0 cells"),
    (lambda path: write(path, adata()[:, :0].copy()), DataError, r"bad\.h5ad: X has 40 cells and 0 genes"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_file_among_good_ones(
    tmp_path: Path, make: Callable[[Path], object], error: type[ScviaductError], message: str
) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in/bad.h5ad")
    good = [write(tmp_path / f"in/{name}.h5ad", adata(seed=i)) for i, name in enumerate("ab")]
    with pytest.raises(error, match=message):
        convert([good[0], tmp_path / "in/bad.h5ad", good[1]], out=tmp_path / "atlas.zarr")
    assert nothing_left(tmp_path, "in")


def test_value_that_only_the_audit_sees(tmp_path: Path) -> None:
    """The choice of the matrix looks at a sample only; conversion at every value."""
    data = adata(2000, 50)
    data.X.data[25_000] += 0.5
    write(tmp_path / "a.h5ad", data)
    with pytest.raises(NotCountsError, match=r"1 are not whole numbers, e\.g\. \d\.5 in cell 'c\d+', gene 'gene\d+'"):
        convert([tmp_path / "a.h5ad"], out=tmp_path / "atlas.zarr")
    assert nothing_left(tmp_path, "a.h5ad")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memory": "lots"}, ConfigError, "memory='lots' is not an amount"),
        ({"memory": "10MB"}, ConfigError, "512MiB is the least"),
        ({"counts": "umi"}, DataError, "no matrix 'umi' of numbers; available: 'X'"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, str], error: type[ScviaductError], message: str) -> None:
    write(tmp_path / "a.h5ad", adata())
    with pytest.raises(error, match=message):
        convert([tmp_path / "a.h5ad"], out=tmp_path / "atlas.zarr", **options)
    assert nothing_left(tmp_path, "a.h5ad")


def test_names_of_data_sets(tmp_path: Path) -> None:
    for name in ("one/a", "two/A", "two/__b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.h5ad", adata())
    with pytest.raises(DataError, match=r"would both become the data set 'A'.*rename one"):
        convert([tmp_path / "one/a.h5ad", tmp_path / "two/A.h5ad"], out=tmp_path / "x.zarr")
    with pytest.raises(DataError, match="'__b' cannot name a data set"):
        convert([tmp_path / "two/__b.h5ad"], out=tmp_path / "x.zarr")
    with pytest.raises(DataError, match="no files"):
        convert([], out=tmp_path / "x.zarr")
    assert nothing_left(tmp_path, "one", "two")


def test_output_is_taken(tmp_path: Path) -> None:
    source, out = write(tmp_path / "a.h5ad", adata()), tmp_path / "atlas.zarr"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(OutputExistsError, match="exists"):
        convert([tmp_path / "not even looked at"], out=out)
    (out / "precious").unlink()
    convert([source], out=out)  # an empty folder is no obstacle
    before = tree_digest(out)
    with pytest.raises(OutputExistsError, match="name another --out, or add to it with --append"):
        convert([source], out=out)
    assert tree_digest(out) == before
    assert nothing_left(tmp_path, "a.h5ad", "atlas.zarr")


def test_equal_data_have_equal_digests(tmp_path: Path) -> None:
    source = write(tmp_path / "a.h5ad", adata())
    assert convert([source], out=tmp_path / "1").digest() == convert([source], out=tmp_path / "2").digest()


def test_two_processes_do_not_mix(tmp_path: Path) -> None:
    source = write(tmp_path / "a.h5ad", adata())
    with (tmp_path / ".atlas.zarr.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputExistsError, match="another process is making"):
            convert([source], out=tmp_path / "atlas.zarr")


def test_what_is_read_back_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that puts one wrong value on disk is found out, and nothing is left."""
    source = write(tmp_path / "a.h5ad", adata())
    write_values = Growing._write

    def spoil(self: Growing) -> None:
        if self._path.name == name:
            values = self._buffer[[3, 4]]
            self._buffer[[3, 4]] = values + [1, -1] if name != "data" else values[::-1]
        write_values(self)

    monkeypatch.setattr(Growing, "_write", spoil)
    for name in ("data", "indices", "indptr"):  # noqa: B007
        with pytest.raises(IncompleteError, match="were written"):
            convert([source], out=tmp_path / "atlas.zarr")
        assert nothing_left(tmp_path, "a.h5ad")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data are not here")
def test_real_files(tmp_path: Path) -> None:
    """Immune cells of two studies and symbols against Ensembl ids: what really comes."""
    paths = [REAL / "rna" / f"{name}.h5ad" for name in ("kang2018_pbmc_4samples_celltypes", "kang2018_pbmc_ifnb_2000")]
    atlas = convert(paths, out=tmp_path / "kang.zarr")
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = ad.read_h5ad(path)
        found = ad.io.read_zarr(tmp_path / "kang.zarr/datasets" / path.stem)
        assert (found.X != wanted.X).nnz == 0
        pd.testing.assert_frame_equal(found.obs, wanted.obs)
        pd.testing.assert_frame_equal(found.var, wanted.var)
    assert atlas.n_obs == 3556
    other = REAL / "rna/pbmc_facs_zheng2017.h5ad"
    # one has symbols as names and Ensembl ids in a column, the other the reverse
    mixed = convert([paths[0], other], out=tmp_path / "mixed.zarr")
    assert len(mixed.genes("intersection")) == 1259
    with pytest.raises(NotCountsError):
        convert([REAL / "rna/pancreas_3tech_296genes.h5ad"], out=tmp_path / "pancreas.zarr")
    assert nothing_left(tmp_path, "kang.zarr", "mixed.zarr")
