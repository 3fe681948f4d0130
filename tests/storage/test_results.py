"""write_result: a copy with what was added and nothing else changed; faults leave no file."""

import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scviaduct.storage.results as module
from scviaduct.errors import DataError, IncompleteError, OutputExistsError, UnreadableFileError
from scviaduct.storage.results import write_result

N_OBS = 25
LATENT = np.random.default_rng(0).normal(size=(N_OBS, 4)).astype(np.float32)
LABELS = pd.Categorical(np.resize(["T", "B", None], N_OBS))
UNCERTAINTY = np.where(np.arange(N_OBS) == 3, np.nan, np.linspace(0, 1, N_OBS))
TEXT = np.resize(np.array(["mapped", "not mapped"], object), N_OBS)
OBS = {"type_pred": LABELS, "type_uncertainty": UNCERTAINTY, "state": TEXT}
KANG = Path(__file__).parents[3] / "shared/data/rna/kang2018_pbmc_4samples_celltypes.h5ad"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    counts = sp.csr_matrix(rng.poisson(1, (N_OBS, 6)).astype(np.float32))
    obs = pd.DataFrame(
        {"z": rng.normal(size=N_OBS), "a": pd.Categorical(np.resize(["x", "y"], N_OBS))},
        index=[f"cell{i}" for i in rng.permutation(N_OBS)],
    )
    data = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=list("fedcba")), layers={"twice": counts * 2})
    data.obsm["X_pca"] = rng.normal(size=(N_OBS, 2))
    data.uns["note"] = "mine"
    data.raw = data
    data.write_h5ad(tmp_path / "source.h5ad", compression="gzip")
    return tmp_path / "source.h5ad"


def contents(path: Path) -> dict[str, object]:
    """Every dataset and attribute of a file, by name."""
    found: dict[str, object] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, node: found.update(
                {name: node[()] if isinstance(node, h5py.Dataset) else None}
                | {f"{name}@{key}": value for key, value in node.attrs.items()}
            )
        )
    return found


def test_the_result_is_added_and_read_by_anndata(source: Path, tmp_path: Path) -> None:
    out = write_result(source, tmp_path / "out.h5ad", obsm={"X_scVI": LATENT}, obs=OBS)
    before, after = ad.read_h5ad(source), ad.read_h5ad(out)
    assert list(after.obs.columns) == ["z", "a", "type_pred", "type_uncertainty", "state"]
    np.testing.assert_array_equal(after.obsm["X_scVI"], LATENT)
    assert after.obs["type_pred"].tolist() == list(LABELS)
    assert after.obs["type_pred"].dtype == "category"
    np.testing.assert_array_equal(after.obs["type_uncertainty"], UNCERTAINTY)
    assert after.obs["state"].tolist() == TEXT.tolist()
    assert after.obs_names.equals(before.obs_names)
    pd.testing.assert_frame_equal(after.obs[["z", "a"]], before.obs)


def test_nothing_else_changes(source: Path, tmp_path: Path) -> None:
    original = source.read_bytes()
    out = write_result(source, tmp_path / "out.h5ad", obsm={"X_scVI": LATENT}, obs=OBS)
    before, after = contents(source), contents(out)
    assert source.read_bytes() == original
    for name, value in before.items():
        if name != "obs@column-order":
            np.testing.assert_array_equal(after[name], value)
    new = {name.split("@")[0] for name in set(after) - set(before)}
    assert all(name.startswith(("obs/type_", "obs/state", "obsm/X_scVI", "uns/scviaduct")) for name in new)


@pytest.mark.parametrize("missing", ["obsm", "uns"])
def test_files_without_a_group_get_one(source: Path, tmp_path: Path, missing: str) -> None:
    with h5py.File(source, "r+") as file:
        del file[missing]
    out = write_result(source, tmp_path / "out.h5ad", obsm={"X_scVI": LATENT}, obs={})
    np.testing.assert_array_equal(ad.read_h5ad(out).obsm["X_scVI"], LATENT)


def test_an_earlier_result_is_replaced(source: Path, tmp_path: Path) -> None:
    first = write_result(source, tmp_path / "first.h5ad", obsm={"X_scVI": LATENT}, obs=OBS)
    again = {"type_pred": pd.Categorical(["New"] * N_OBS)}
    second = ad.read_h5ad(write_result(first, tmp_path / "second.h5ad", obsm={"X_scVI": LATENT[:, :2]}, obs=again))
    assert second.obsm["X_scVI"].shape == (N_OBS, 2)
    assert set(second.obs["type_pred"]) == {"New"}
    assert list(second.obs.columns) == list(ad.read_h5ad(first).obs.columns)
    third = write_result(tmp_path / "second.h5ad", tmp_path / "third.h5ad", obsm={}, obs={"state": TEXT})
    assert third.exists()  # what the first run added is still known as ours


@pytest.mark.parametrize(
    ("obsm", "obs", "words"),
    [
        ({}, {"a": UNCERTAINTY}, r"obs\['a'\] already"),
        ({"X_pca": LATENT}, {}, r"obsm\['X_pca'\] already"),
        ({"X_scVI": LATENT[:-1]}, {}, r"has 25 cells, but obsm\['X_scVI'\] has 24 rows"),
        ({}, {"p": UNCERTAINTY[:3]}, r"obs\['p'\] has 3 rows"),
    ],
)
def test_the_users_data_are_not_replaced_and_lengths_must_fit(
    source: Path, tmp_path: Path, obsm: dict, obs: dict, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        write_result(source, tmp_path / "out.h5ad", obsm=obsm, obs=obs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.h5ad"]


def test_an_existing_output_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5ad"
    out.write_text("precious")
    with pytest.raises(OutputExistsError):
        write_result(source, out, obsm={"X_scVI": LATENT}, obs={})
    assert out.read_text() == "precious"


@pytest.mark.parametrize("where", ["_add_columns", "_remember", "_verify", "_publish", "write_elem"])
def test_a_failure_in_the_middle_leaves_no_file(
    source: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, where, fail)
    with pytest.raises(OSError, match="No space"):
        write_result(source, tmp_path / "out.h5ad", obsm={"X_scVI": LATENT}, obs=OBS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.h5ad"]


def test_what_reads_back_differently_is_not_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.write_elem
    monkeypatch.setattr(module, "write_elem", lambda g, k, v: real(g, k, v * 0 if k == "X_scVI" else v))
    with pytest.raises(IncompleteError, match=r"obsm\['X_scVI'\] does not read back"):
        write_result(source, tmp_path / "out.h5ad", obsm={"X_scVI": LATENT}, obs={})
    assert not (tmp_path / "out.h5ad").exists()


def test_what_is_no_h5ad_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("no")
    with pytest.raises(UnreadableFileError, match=r"text\.h5ad is a text file"):
        write_result(tmp_path / "text.h5ad", tmp_path / "out.h5ad", obsm={}, obs={})
    with pytest.raises(UnreadableFileError, match="does not exist"):
        write_result(tmp_path / "none.h5ad", tmp_path / "out.h5ad", obsm={}, obs={})


def other_kind(folder: Path, kind: str) -> Path:
    """A source that is no h5ad."""
    counts = sp.csr_matrix(np.random.default_rng(1).poisson(1, (N_OBS, 6)).astype(np.float32))
    if kind == "zarr":
        obs = pd.DataFrame({"a": pd.Categorical(np.resize(["x", None], N_OBS))}, index=[f"c{i}" for i in range(N_OBS)])
        data = ad.AnnData(counts, obs=obs, obsm={"X_pca": np.zeros((N_OBS, 2))})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # anndata's and zarr's, of the format's version
            data.write_zarr(folder / "source.zarr")
        return folder / "source.zarr"
    with h5py.File(folder / "source.h5", "w") as file:
        group = file.create_group("matrix")
        group.update({"data": counts.data.astype("i4"), "indices": counts.indices, "indptr": counts.indptr})
        group.update({"shape": [6, N_OBS], "barcodes": np.array([f"c{i}" for i in range(N_OBS)], "S")})
        group["features/id"] = np.array([f"g{i}" for i in range(6)], "S")
    return folder / "source.h5"


@pytest.mark.parametrize("kind", ["zarr", "10x"])
def test_other_kinds_of_files_get_an_h5ad_of_cells_and_results(tmp_path: Path, kind: str) -> None:
    source = other_kind(tmp_path, kind)
    out = write_result(source, tmp_path / "out.h5ad", obsm={"X_scVI": LATENT}, obs=OBS)
    result = ad.read_h5ad(out)
    columns = ["a"] if kind == "zarr" else []
    assert list(result.obs.columns) == [*columns, "type_pred", "type_uncertainty", "state"]
    assert result.obs_names.tolist() == [f"c{i}" for i in range(N_OBS)]
    assert result.shape == (N_OBS, 0) and result.X is None and set(result.obsm) == {"X_scVI"}
    np.testing.assert_array_equal(result.obsm["X_scVI"], LATENT)
    assert result.obs["type_pred"].tolist() == list(LABELS)
    if kind == "zarr":
        assert result.obs["a"].isna().tolist() == np.resize([False, True], N_OBS).tolist()
        with pytest.raises(DataError, match=r"obs\['a'\] already"):
            write_result(source, tmp_path / "again.h5ad", obsm={}, obs={"a": UNCERTAINTY})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out.h5ad", source.name])


def write_old_style(path: Path, *, text: np.dtype) -> None:
    """A file as anndata before 0.7 wrote it: obs, var and obsm are compound datasets, categories are in uns."""
    obs = np.zeros(N_OBS, [("index", text), ("batch", np.int8), ("size", np.float32)])
    obs["index"] = [f"cell{i}".encode() for i in range(N_OBS)]
    obs["batch"], obs["size"] = np.resize([1, 0], N_OBS), np.arange(N_OBS)
    var = np.zeros(6, [("index", "S3")])
    var["index"] = [f"g{i}".encode() for i in range(6)]
    obsm = np.zeros(N_OBS, [("X_pca", np.float64, (2,))])
    obsm["X_pca"] = np.arange(2 * N_OBS).reshape(N_OBS, 2)
    with h5py.File(path, "w") as file:
        file["X"] = np.arange(6 * N_OBS, dtype=np.float32).reshape(N_OBS, 6)
        file["obs"], file["var"], file["obsm"] = obs, var, obsm
        file["uns/batch_categories"] = np.array([b"left", b"right"])


@pytest.mark.parametrize("text", [np.dtype("S8"), h5py.string_dtype()], ids=["fixed", "variable"])
def test_files_older_than_anndata_0_7(tmp_path: Path, text: np.dtype) -> None:
    source, out = tmp_path / "old.h5ad", tmp_path / "out.h5ad"
    write_old_style(source, text=text)
    labels = pd.Categorical(np.resize(["T", "B"], N_OBS))
    write_result(source, out, obsm={"X_scVI": LATENT}, obs={"type_pred": labels, "p": UNCERTAINTY, "state": TEXT})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, after = ad.read_h5ad(source), ad.read_h5ad(out)
    assert list(after.obs.columns) == ["batch", "size", "type_pred", "p", "state"]
    assert after.obs["batch"].tolist() == before.obs["batch"].tolist() == np.resize(["right", "left"], N_OBS).tolist()
    assert after.obs_names.tolist() == before.obs_names.tolist()
    assert after.obs["type_pred"].tolist() == list(labels)
    np.testing.assert_array_equal(after.obs["p"], UNCERTAINTY)
    assert after.obs["state"].tolist() == TEXT.tolist()
    np.testing.assert_array_equal(after.obsm["X_scVI"], LATENT)
    np.testing.assert_array_equal(after.obsm["X_pca"], before.obsm["X_pca"])
    np.testing.assert_array_equal(after.X, before.X)


def write_0_7_style(source: Path) -> None:
    """obs as anndata 0.7 wrote it: codes in place, categories in obs/__categories by reference."""
    with h5py.File(source, "r+") as file:
        obs = file["obs"]
        codes, categories = obs["a/codes"][()], obs["a/categories"][()]
        del obs["a"]
        obs["__categories/a"] = categories
        obs["a"] = codes
        obs["a"].attrs["categories"] = obs["__categories/a"].ref
        obs.attrs["encoding-version"] = "0.1.0"


def test_files_of_anndata_0_7(source: Path, tmp_path: Path) -> None:
    write_0_7_style(source)
    out = write_result(source, tmp_path / "out.h5ad", obsm={"X_scVI": LATENT}, obs=OBS)
    with pytest.warns(ad.OldFormatWarning):
        after = ad.read_h5ad(out)
    assert after.obs["a"].tolist() == np.resize(["x", "y"], N_OBS).tolist()
    assert after.obs["type_pred"].tolist() == list(LABELS)
    assert list(after.obs.columns) == ["z", "a", "type_pred", "type_uncertainty", "state"]


@pytest.mark.skipif(not KANG.exists(), reason="needs the shared data")
def test_a_real_file_keeps_every_byte_of_its_counts(tmp_path: Path) -> None:
    n_obs = 1556
    labels = pd.Categorical(np.resize(["A", "B"], n_obs))
    out = write_result(KANG, tmp_path / "out.h5ad", obsm={"X_scVI": np.zeros((n_obs, 10))}, obs={"pred": labels})
    before, after = contents(KANG), contents(out)
    for name, value in before.items():
        if name != "obs@column-order":
            np.testing.assert_array_equal(after[name], value)
