"""Cells of an atlas outside of it: in memory or as an h5ad, value for value those of the sources."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from scviaduct.errors import (
    ConfigError,
    DataError,
    IncompleteError,
    MissingColumnError,
    NotEnoughMemoryError,
    OutputExistsError,
    UnreadableFileError,
)
from scviaduct.storage import export as module
from scviaduct.storage import ram, selection
from scviaduct.storage.atlas import Atlas
from scviaduct.storage.convert import convert
from scviaduct.storage.export import export
from scviaduct.storage.selection import Selection
from scviaduct.storage.where import Where

GENES_A = [f"ENSG{i:011d}.{i % 3 + 1}" for i in range(40)]
GENES_B = [f"ENSG{i:011d}" for i in reversed(range(20, 60))]
SHARED = [f"ENSG{i:011d}" for i in range(20, 40)]


def study(n: int, genes: list[str], seed: int) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "cell type": pd.Categorical(rng.choice(["B cell", "T cell"], n), categories=["T cell", "B cell", "never"]),
            "donor": pd.Categorical(rng.choice([f"d{seed}", "d9"], n)),
            "n": rng.integers(0, 9, n).astype(np.int32),
            "depth": rng.normal(size=n).astype(np.float32),
            "primary": rng.random(n) > 0.5,
            "barcode": [f"{seed}-{i}" for i in range(n)],
        },
        index=[f"c{i}" for i in range(n)],
    )
    obs.loc[obs.index[:3], "depth"] = np.nan
    counts = sp.csr_matrix(rng.poisson(0.6, (n, len(genes))).astype(np.float32))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame({"symbol": [f"s{g[:15]}" for g in genes]}, index=genes))


@pytest.fixture(scope="module")
def sources() -> dict[str, ad.AnnData]:
    a, b = study(150, GENES_A, 1), study(90, GENES_B, 2)
    b.obs["dataset"] = "mine"
    b.obs["only here"] = range(90)
    return {"a": a, "b": b}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, ad.AnnData]) -> Atlas:
    folder = tmp_path_factory.mktemp("export")
    for name, data in sources.items():
        data.write_h5ad(folder / f"{name}.h5ad")
    return convert([folder / "a.h5ad", folder / "b.h5ad"], out=folder / "atlas.zarr")


def equal(found: ad.AnnData, wanted: ad.AnnData) -> None:
    """Value for value: counts, names, obs and var with their types and the order of categories."""
    assert found.shape == wanted.shape
    assert sp.isspmatrix_csr(found.X) and found.X.dtype == np.float32 and found.X.has_sorted_indices
    assert (sp.csr_matrix(wanted.X) != found.X).nnz == 0
    pd.testing.assert_frame_equal(found.obs, wanted.obs)
    pd.testing.assert_frame_equal(found.var, wanted.var)


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_data_set_is_its_source(atlas: Atlas, tmp_path: Path, name: str) -> None:
    source = ad.read_h5ad(atlas.path.parent / f"{name}.h5ad")
    seen: list[tuple[str, int, int]] = []
    made = export(atlas, tmp_path / "x.h5ad", datasets=name, on_progress=lambda *facts: seen.append(facts))
    assert (made.n_obs, made.n_vars) == source.shape
    equal(ad.read_h5ad(made.path), source)
    equal(atlas.to_adata(datasets=[name]), source)
    assert seen[-1] == (name, source.n_obs, source.n_obs)
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5ad"]


def test_an_export_converts_to_the_same_counts(atlas: Atlas, tmp_path: Path) -> None:
    export(atlas, tmp_path / "a.h5ad", datasets="a")
    again = convert([tmp_path / "a.h5ad"], out=tmp_path / "again.zarr")
    assert (again.counts("a").rows(0, 150) != atlas.counts("a").rows(0, 150)).nnz == 0


@pytest.mark.parametrize("join", ["union", "intersection"])
@pytest.mark.parametrize("step", [7, 10_000])
def test_several_are_what_lazy_says(
    atlas: Atlas, tmp_path: Path, join: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 512)  # several chunks, the last one not full
    monkeypatch.setattr(selection, "BLOCK", step * 24)
    wanted = atlas.lazy(join).to_memory()
    equal(atlas.to_adata(join=join), wanted)
    found = ad.read_h5ad(export(atlas.path, tmp_path / "x.h5ad", join=join).path)
    assert (found.X != wanted.X).nnz == 0
    assert (
        found.obs_names.tolist() == wanted.obs_names.tolist() and found.var_names.tolist() == wanted.var_names.tolist()
    )
    pd.testing.assert_frame_equal(found.obs, wanted.obs)
    with h5py.File(tmp_path / "x.h5ad") as file:
        assert file["X/data"].chunks == (512,) and file["X/data"].compression == "gzip"


QUERIES = {
    "`cell type` == 'B cell'": lambda o: o["cell type"] == "B cell",
    "`cell type` == 'B cell' and donor != 'd9'": lambda o: (o["cell type"] == "B cell") & (o["donor"] != "d9"),
    "`cell type` == 'B cell' & donor != 'd9'": lambda o: (o["cell type"] == "B cell") & (o["donor"] != "d9"),
    "donor in ['d1', 'd2'] or n > 6": lambda o: o["donor"].isin(["d1", "d2"]) | (o["n"] > 6),
    "not donor.isin(['d9'])": lambda o: ~o["donor"].isin(["d9"]),
    "3 <= n < 5": lambda o: o["n"].between(3, 4),
    "n.between(3, 4) and primary": lambda o: o["n"].between(3, 4) & (o["primary"] == "True"),
    "~primary": lambda o: o["primary"] == "False",
    "depth.isna()": lambda o: o["depth"].isna(),
    "depth > -n / 2 + 1": lambda o: o["depth"] > -o["n"] / 2 + 1,
    "dataset == 'b'": lambda o: o["dataset"] == "b",
    "`obs.dataset` == 'mine' and n == 1": lambda o: (o["obs.dataset"] == "mine") & (o["n"] == 1),
    "`only here` < 10": lambda o: o["only here"] < 10,
    "barcode == '2-5'": lambda o: o["barcode"] == "2-5",
    'donor == "d`9" or donor == "d1"': lambda o: o["donor"] == "d1",
}


@pytest.mark.parametrize("where", QUERIES)
def test_where(atlas: Atlas, where: str) -> None:
    whole = atlas.lazy().to_memory()
    wanted = whole[QUERIES[where](whole.obs).to_numpy(bool)]
    found = atlas.to_adata(where=where)
    cells = {(d, c) for d, c in zip(wanted.obs["dataset"], wanted.obs["barcode"], strict=True)}
    assert len(cells) == found.n_obs == wanted.n_obs
    genes = wanted[:, found.var_names]
    assert (found.X != genes.X).nnz == 0
    assert found.obs["barcode"].tolist() == wanted.obs["barcode"].tolist()


def test_where_leaves_no_unused_categories(atlas: Atlas) -> None:
    found = atlas.to_adata(where="`cell type` == 'B cell'")
    assert found.obs["cell type"].cat.categories.tolist() == ["B cell"]
    assert found.obs["dataset"].cat.categories.tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("cell_tpye == 'B'", MissingColumnError, "no data set has an obs column 'cell_tpye'; did you mean 'cell type'"),
        ("n == ", ConfigError, "cannot be understood"),
        ("n = 3", ConfigError, "cannot be understood"),
        ("", ConfigError, "cannot be understood"),
        ("`n == 3", ConfigError, "cannot be understood"),
        ("1 == 1", ConfigError, "names no obs column"),
        ("@n == 3", ConfigError, "cannot be understood"),
        ("n.__class__ == 3", ConfigError, "__class__ is not allowed"),
        ("n.values", ConfigError, r"\.values is not allowed"),
        ("__import__('os').system('true') == 0", ConfigError, "only the methods"),
        ("print(n)", ConfigError, "only the methods"),
        ("n.apply('print')", ConfigError, "only the methods"),
        ("n.isin(values=[1])", ConfigError, "only the methods"),
        ("[x for x in n]", ConfigError, "listcomp has no place"),
        ("n[0] == 1", ConfigError, "subscript has no place"),
        ("(lambda: n)() == 1", ConfigError, "only the methods|lambda"),
        ("n ** n == 1", ConfigError, "pow has no place"),
        ("f'{n}' == 'x'", ConfigError, "has no place"),
        ("n", DataError, "says nothing true or false of a cell .n is numeric"),
        ("n + 1", DataError, "says nothing true or false"),
        ("donor < 'd2'", DataError, "does not fit the columns: .*donor is text such as 'd1'"),
        ("`cell type` == 'NK'", DataError, "is true of no cell; cell type has 'B cell', 'T cell'"),
        ("n > 100", DataError, "is true of no cell$"),
    ],
)
def test_a_query_that_is_none_is_refused(atlas: Atlas, where: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        atlas.to_adata(where=where)
    assert type(raised.value) is error


@settings(max_examples=200)
@given(st.text(st.sampled_from(list("ab`'\" =<>().,_@[]&|~+:0")), max_size=25))
@example("`a`.a(`b`)")
def test_no_query_does_anything_else(text: str) -> None:
    """Whatever is typed is a comparison of columns or is refused with one of our errors."""
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": pd.Categorical(["x", "y"])})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # '1 is' and the like
        try:
            where = Where.parse(text)
            if set(where.columns.values()) <= {"a", "b"}:
                assert set(where.rows(frame)) <= {0, 1}
        except (ConfigError, DataError):
            pass


def test_genes_in_the_order_asked_for(atlas: Atlas, sources: dict[str, ad.AnnData], tmp_path: Path) -> None:
    wanted = [SHARED[3], SHARED[0], "ENSG00000000055.7"]
    (tmp_path / "genes.txt").write_text("\n".join(wanted) + "\n\n")
    plain = [name.partition(".")[0] for name in wanted]
    for genes in (wanted, tmp_path / "genes.txt"):
        found = atlas.to_adata(genes=genes)
        assert found.var_names.tolist() == plain
        assert (found.X != atlas.lazy().to_memory()[:, plain].X).nnz == 0
    one = atlas.to_adata(datasets="a", genes=SHARED[:2][::-1])
    names = [next(g for g in GENES_A if g.startswith(s)) for s in SHARED[:2][::-1]]
    assert one.var_names.tolist() == names  # of one data set, as in its source
    assert (one.X != sources["a"][:, names].X).nnz == 0
    assert one.var["symbol"].tolist() == sources["a"].var.loc[names, "symbol"].tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"genes": ["NOPE"]}, DataError, "1 of 1 genes are in none of the data sets"),
        ({"genes": []}, DataError, "no gene is named"),
        ({"genes": [SHARED[0], SHARED[0] + ".4"]}, DataError, "1 genes are named twice"),
        ({"genes": "genes.txt"}, UnreadableFileError, "is no file: give the path"),
        ({"genes": ["ENSG00000000001"], "join": "intersection"}, DataError, "'b' lacks 1 of the genes"),
        ({"datasets": "c"}, DataError, "no data set 'c'; available: 'a', 'b'"),
        ({"datasets": []}, DataError, "no data set is chosen"),
        ({"join": "outer"}, ConfigError, "must be 'union' or 'intersection'"),
        ({"memory": "much"}, ConfigError, "not an amount of memory"),
    ],
)
def test_a_choice_that_is_none_is_refused(atlas: Atlas, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        atlas.to_adata(**options)


def test_what_does_not_fit_is_refused_before_anything_is_read(atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Selection, "counts", None)
    with pytest.raises(NotEnoughMemoryError, match=r"240 cells x 60 genes would take about .*1\.00 kiB are allowed"):
        atlas.to_adata(memory="1KiB")
    monkeypatch.setattr(ram, "available", lambda: 2**10)
    with pytest.raises(
        NotEnoughMemoryError, match=r"free here\. Choose fewer cells .*lazy\(\).* memory=\"0\.0GB\""
    ) as raised:
        atlas.to_adata()
    assert isinstance(raised.value, MemoryError)


def test_the_estimate_is_about_right(atlas: Atlas) -> None:
    for options in ({}, {"datasets": "a"}, {"where": "n > 3"}, {"genes": SHARED[:10]}):
        chosen = Selection.of(atlas, **options)
        data = atlas.to_adata(**options, memory="1GB")
        assert data.X.nnz <= chosen.nnz <= 1.3 * data.X.nnz
        counts = data.X.data.nbytes + data.X.indices.nbytes + data.X.indptr.nbytes
        assert counts <= chosen.bytes <= counts + data.n_obs * 400


def test_free_memory_is_what_the_process_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = ram.available()
    assert 2**20 < free < 2**50
    for name, text in {
        "memory.max": "2000",
        "memory.current": "900",
        "memory.stat": "anon 1\ninactive_file 300",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(ram, "_CGROUP", tmp_path)
    assert ram.available() == 1400
    (tmp_path / "memory.max").write_text("max")
    monkeypatch.setattr("resource.getrlimit", lambda _: (0, 0))
    assert ram.available() == 0


def test_an_export_is_whole_or_not_there(atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"name it .*x\.h5ad"):
        export(atlas, tmp_path / "x.zarr")
    (tmp_path / "x.h5ad").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists; name another"):
        export(atlas, tmp_path / "x.h5ad")
    monkeypatch.setattr(module, "_deflate", lambda v: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        export(atlas, tmp_path / "x.h5ad", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5ad"] and (tmp_path / "x.h5ad").read_text() == "mine"
    monkeypatch.undo()
    assert ad.read_h5ad(export(atlas, tmp_path / "x.h5ad", overwrite=True).path).n_obs == 240


def test_what_the_disk_loses_is_noticed(atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = module._deflate

    def lossy(values: np.ndarray) -> bytes:
        if values.dtype == np.float32:
            values = values.copy()
            values[[3, 4]] = values[[4, 3]] + 1
        return plain(values)

    monkeypatch.setattr(module, "_deflate", lossy)
    with pytest.raises(IncompleteError, match="the disk or its file system loses data; nothing was kept"):
        export(atlas, tmp_path / "x.h5ad")
    assert not list(tmp_path.iterdir())


def test_obsm_and_layers_come_along(tmp_path: Path) -> None:
    source = study(80, GENES_A, 4)
    rng = np.random.default_rng(0)
    source.obsm["spatial"] = rng.normal(size=(80, 2))
    source.obsm["scores"] = pd.DataFrame({"x": rng.normal(size=80)}, index=source.obs_names)
    source.layers["scaled"] = source.X * np.float32(0.5)
    source.write_h5ad(tmp_path / "s.h5ad")
    atlas = convert([tmp_path / "s.h5ad"], out=tmp_path / "a.zarr", obsm=["spatial", "scores"], layers=["scaled"])
    genes = [GENES_A[5].partition(".")[0], GENES_A[2].partition(".")[0]]
    few = source[(source.obs["n"] > 3).to_numpy(), [GENES_A[5], GENES_A[2]]].copy()
    for options, wanted in (({}, source), ({"where": "n > 3", "genes": genes}, few)):
        path = export(atlas, tmp_path / "x.h5ad", **options, overwrite=True).path
        for found in (ad.read_h5ad(path), atlas.to_adata(**options)):
            assert (found.X != wanted.X).nnz == 0
            assert (found.layers["scaled"] != wanted.layers["scaled"]).nnz == 0
            assert found.layers["scaled"].dtype == np.float32
            assert np.array_equal(found.obsm["spatial"], wanted.obsm["spatial"])
            pd.testing.assert_frame_equal(found.obsm["scores"], wanted.obsm["scores"])


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=8)


@st.composite
def tables(draw: st.DrawFn, n: int) -> pd.DataFrame:
    """obs with columns of many kinds."""
    kinds = {
        "ints": st.lists(st.integers(-(2**40), 2**40), min_size=n, max_size=n),
        "floats": st.lists(st.floats(allow_nan=True, width=32), min_size=n, max_size=n),
        "bools": st.lists(st.booleans(), min_size=n, max_size=n),
        "texts": st.lists(texts, min_size=n, max_size=n),
    }
    columns: dict[str, object] = {name: draw(values) for name, values in kinds.items() if draw(st.booleans())}
    levels = draw(st.lists(texts, min_size=1, max_size=4, unique=True))
    codes = draw(st.lists(st.integers(-1, len(levels) - 1), min_size=n, max_size=n))
    columns["kind"] = pd.Categorical.from_codes(codes, levels, ordered=draw(st.booleans()))
    names = draw(st.lists(texts, min_size=n, max_size=n))
    return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_any_data_set_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("any")
    n, genes = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))
    values = data.draw(st.lists(st.sampled_from([0, 0, 1, 2, 300, 70_000]), min_size=n * genes, max_size=n * genes))
    counts = np.array(values, np.float32).reshape(n, genes)
    counts[0, 0] = 1  # a matrix of zeros has no counts
    layout = data.draw(st.sampled_from([sp.csr_matrix, sp.csc_matrix, np.asarray]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names of cells that are not unique
        source = ad.AnnData(
            layout(counts), obs=data.draw(tables(n)), var=pd.DataFrame(index=[f"g{i}" for i in range(genes)])
        )
        source.write_h5ad(folder / "s.h5ad")
        atlas = convert([folder / "s.h5ad"], out=folder / "atlas.zarr")
        wanted = ad.read_h5ad(folder / "s.h5ad")
        equal(ad.read_h5ad(export(atlas, folder / "x.h5ad").path), wanted)
        equal(atlas.to_adata(), wanted)
