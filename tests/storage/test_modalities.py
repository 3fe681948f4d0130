"""Proteins beside the genes in other files: antibodies of a 10x Genomics h5, and MuData."""

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scviaduct.errors import DataError, NotCountsError, UnreadableFileError
from scviaduct.storage.convert import convert
from scviaduct.storage.h5ad import open_counts
from scviaduct.storage.prepare import prepare
from scviaduct.storage.results import write_result
from scviaduct.storage.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:From 0.4 .update:FutureWarning", "ignore::UserWarning:mudata")

KEY = "protein_expression"
N, GENES, PROTEINS = 40, [f"ENSG{i:011d}" for i in range(9)], ["CD3", "CD4", "CD19"]


def counts(seed: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).poisson(2, (N, width)) + 1


RNA, PROT = counts(0, len(GENES)), counts(1, len(PROTEINS))


def tenx(path: Path, names: list[str] = PROTEINS) -> Path:
    """CellRanger's filtered_feature_bc_matrix.h5 of genes and antibodies."""
    matrix = sp.csr_matrix(np.hstack([RNA, PROT]).astype(np.int32))
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name, values in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
            group[name] = values
        group["shape"] = np.array(matrix.shape[::-1])
        group["barcodes"] = np.array([f"cell{i}-1" for i in range(N)], "S")
        features = group.create_group("features")
        features["id"] = np.array([*GENES, "ab1", "ab2", "ab3"], "S")
        features["name"] = np.array([*(f"G{i}" for i in range(9)), *names], "S")
        features["feature_type"] = np.array(["Gene Expression"] * 9 + ["Antibody Capture"] * 3, "S")
    return path


def multimodal(path: Path, *, order: np.ndarray | None = None, protein: str = "prot", scaled: bool = False) -> Path:
    """A MuData; `order` are the rows of the proteins' modality, `scaled` hides its counts in a layer."""
    mudata = pytest.importorskip("mudata")
    cells = np.array([f"cell{i}" for i in range(N)])
    rna = ad.AnnData(
        sp.csr_matrix(RNA.astype(np.float32)),
        obs=pd.DataFrame({"depth": RNA.sum(1)}, index=cells),
        var=pd.DataFrame(index=GENES),
    )
    rows = np.arange(N) if order is None else order
    part = ad.AnnData(
        PROT[rows].astype(np.float32), obs=pd.DataFrame(index=cells[rows]), var=pd.DataFrame(index=PROTEINS)
    )
    if scaled:
        part.layers["counts"] = part.X
        part.X = np.log1p(part.X)
    data = mudata.MuData({"rna": rna, protein: part})
    data.obs["donor"] = pd.Categorical(["a", "b"] * (data.n_obs // 2) + ["a"] * (data.n_obs % 2))
    data.write(path)
    return path


@pytest.mark.parametrize("make", [tenx, multimodal], ids=lambda f: f.__name__)
def test_proteins_come_as_an_element_of_obsm(tmp_path: Path, make) -> None:
    path = make(tmp_path / "both.h5")
    with open_counts(path) as file:
        assert file.obsm_names() == (KEY,) and file.obsm_columns(KEY) == tuple(PROTEINS)
        np.testing.assert_array_equal(file.obsm_element(KEY), PROT)
        np.testing.assert_array_equal(file.obsm_rows(KEY, 7, 19), PROT[7:19])
        assert file.n_vars == len(GENES) and file.audit().total == RNA.sum()
    atlas = convert([path], out=tmp_path / "atlas.zarr", obsm=[KEY])
    view = prepare(atlas, genes="all", proteins=KEY)
    assert verify(atlas.path).ok
    schema = view.schema(batch_key="dataset", proteins=True)
    assert schema.proteins == tuple(PROTEINS) and schema.measured == ((True,) * 3,)
    assert view.source(schema).read(0).proteins.sum() == PROT.sum()
    write_result(path, tmp_path / "out.h5ad", obsm={"X_model": np.zeros((N, 2), np.float32)}, obs={})
    assert ad.read_h5ad(tmp_path / "out.h5ad").shape == (N, 0)


def test_antibodies_whose_names_repeat_have_their_ids(tmp_path: Path) -> None:
    with open_counts(tenx(tmp_path / "twice.h5", ["CD3", "CD3", "CD4"])) as file:
        assert file.obsm_columns(KEY) == ("ab1", "ab2", "ab3")


def test_cells_of_a_mudata_are_matched_by_name(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(N)
    with open_counts(multimodal(tmp_path / "mixed.h5mu", order=order, protein="adt", scaled=True)) as file:
        np.testing.assert_array_equal(file.obsm_rows(KEY, 3, 30), PROT[3:30])
        assert set(file.obs.columns) == {"depth", "donor"}
        assert list(file.obs["depth"]) == list(RNA.sum(1)) and file.obs["donor"].notna().all()
        assert file.kind == "MuData"


def test_a_mudata_store_is_read_too(tmp_path: Path) -> None:
    mudata = pytest.importorskip("mudata")
    mudata.read(multimodal(tmp_path / "both.h5mu")).write_zarr(tmp_path / "both.zarr")
    with open_counts(tmp_path / "both.zarr") as file:
        np.testing.assert_array_equal(file.obsm_rows(KEY, 0, N), PROT)
        assert file.audit().total == RNA.sum()


def test_what_a_mudata_lacks_is_told(tmp_path: Path) -> None:
    with open_counts(multimodal(tmp_path / "few.h5mu", order=np.arange(N - 4))) as file:
        assert file.audit().n_obs == N  # the RNA alone can be used
        with pytest.raises(
            DataError, match=r"4 of the 40 cells of rna are not in mod/prot, e\.g\. 'cell36'.*intersect"
        ):
            file.obsm_rows(KEY, 0, 1)
    path = multimodal(tmp_path / "norm.h5mu", scaled=True)
    with h5py.File(path, "r+") as file:
        del file["mod/prot/layers/counts"]
    with open_counts(path) as file, pytest.raises(NotCountsError, match="mod/prot holds no raw counts of proteins"):
        file.obsm_rows(KEY, 0, 1)
    with h5py.File(path, "r+") as file:
        file.move("mod/rna", "mod/gex")
    with pytest.raises(UnreadableFileError, match=r"without a modality 'rna' \(it has gex, prot\): rename"):
        open_counts(path)
