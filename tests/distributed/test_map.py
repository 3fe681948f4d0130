import os
import warnings
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scviaduct.distributed import knn, transfer
from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.knn import CellIndex
from scviaduct.distributed.map import map
from scviaduct.errors import ConfigError, DataError, OutputExistsError, UnreadableFileError


def test_a_query_gets_embedding_labels_and_uncertainty(run, query_file, map_config, tmp_path):
    summary = map(run, [query_file], map_config(tmp_path / "mapped"))
    row = summary.iloc[0]
    assert (row["status"], row["cells"], row["mapped"], row["genes_matched"]) == ("mapped", 150, 149, 290)
    assert (row["neighbor_recall"], row["nprobe"]) == (1, 0)
    assert 0 < row["epochs"] <= 5 and row["seconds"] > 0
    source, result = ad.read_h5ad(query_file), ad.read_h5ad(tmp_path / "mapped" / "query.h5ad")
    assert result.obs_names.equals(source.obs_names) and result.var_names.equals(source.var_names)
    assert (result.X != source.X).nnz == 0 and result.obs["cell_type"].equals(source.obs["cell_type"])
    latent = result.obsm["X_scVI"]
    assert latent.shape == (150, 5) and np.isnan(latent[7]).all() and np.isfinite(np.delete(latent, 7, 0)).all()
    assert result.obs["cell_type_pred"].iloc[7] == "not mapped" and result.obs["cell_type_uncertainty"].iloc[7] == 1
    assert (result.obs["ref_or_query"] == "query").all()
    assert result.obs["cell_type_uncertainty"].between(0, 1).all()
    accuracy = (result.obs["cell_type_pred"].astype(str) == result.obs["cell_type"].astype(str)).mean()
    assert accuracy > 0.6  # three well separated types, six epochs
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "mapped" / "summary.csv").fillna({"message": ""}), summary, check_dtype=False
    )


def test_a_query_in_a_zarr_store(run, query_file, map_config, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata's and zarr's, of the format's version
        ad.read_h5ad(query_file).write_zarr(tmp_path / "query.zarr")
    for name, query in (("one", query_file), ("other", tmp_path / "query.zarr")):
        map(run, [query], map_config(tmp_path / name))
    one, other = (ad.read_h5ad(tmp_path / name / "query.h5ad") for name in ("one", "other"))
    assert np.array_equal(one.obsm["X_scVI"], other.obsm["X_scVI"], equal_nan=True)
    assert other.n_vars == 0 and list(one.obs.columns) == list(other.obs.columns)
    assert one.obs["cell_type_pred"].equals(other.obs["cell_type_pred"])


def broken(path, biology, how):
    data = biology.study(20, 60)
    if how == "normalised":
        data.X = data.X.multiply(1e4 / data.X.sum(1)).tocsr()
    elif how == "genes":
        data.var_names = [f"mouse{k}" for k in range(data.n_vars)]
    elif how == "batch":
        data.obs = data.obs.rename(columns={"study": "studie"})
    data.write_h5ad(path)
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    if how == "empty":
        path.write_bytes(b"")
    return path


FAULTS = {
    "normalised": "ount",
    "genes": "genes",
    "batch": "--batch-key COLUMN",
    "truncated": "runcated",
    "empty": "empty",
}


def test_broken_queries_are_reported_and_the_others_finish(run, query_file, biology, map_config, tmp_path):
    files = [broken(tmp_path / f"{how}.h5ad", biology, how) for how in FAULTS]
    told = []
    summary = map(run, [*files[:3], query_file, *files[3:]], map_config(tmp_path / "mapped"), on_result=told.append)
    assert list(summary["query"]) == ["normalised", "genes", "batch", "query", "truncated", "empty"]
    assert list(summary["status"]) == ["failed"] * 3 + ["mapped"] + ["failed"] * 2
    for how, message in FAULTS.items():
        assert message in summary.set_index("query")["message"][how], how
    assert [t.query for t in told] == list(summary["query"])
    assert sorted(p.name for p in (tmp_path / "mapped").iterdir()) == ["query.h5ad", "summary.csv"]


@pytest.mark.parametrize("how", FAULTS)
def test_a_single_broken_query_is_an_error_and_leaves_nothing(run, biology, map_config, tmp_path, how):
    file = broken(tmp_path / f"{how}.h5ad", biology, how)
    with pytest.raises(DataError, match=FAULTS[how]):
        map(run, [file], map_config(tmp_path / "mapped"))
    assert not (tmp_path / "mapped").exists()


def test_usage_errors(run, query_file, map_config, tmp_path):
    with pytest.raises(UnreadableFileError, match="not a model"):
        map(tmp_path, [query_file], map_config(tmp_path / "mapped"))
    with pytest.raises(ConfigError, match="'query' occurs 2 times"):
        map(run, [query_file, query_file], map_config(tmp_path / "mapped"))
    with pytest.raises(ConfigError, match="at least one query"):
        map(run, [], map_config(tmp_path / "mapped"))
    (tmp_path / "mapped").mkdir()
    with pytest.raises(OutputExistsError):
        map(run, [query_file], map_config(tmp_path / "mapped"))


def test_uncertain_cells_are_called_unknown(run, query_file, map_config, tmp_path):
    map(run, [query_file], map_config(tmp_path / "mapped", max_uncertainty=0.0))
    obs = ad.read_h5ad(tmp_path / "mapped" / "query.h5ad").obs
    mapped = obs[obs["cell_type_pred"] != "not mapped"]
    np.testing.assert_array_equal(mapped["cell_type_pred"] == "Unknown", mapped["cell_type_uncertainty"] > 0)


def test_how_neighbours_were_searched_is_told(run, query_file, map_config, tmp_path, monkeypatch):
    """As in a reference of more than 200,000 cells, for a query of more than 256."""
    monkeypatch.setattr(transfer, "CellIndex", partial(CellIndex, all_pairs=0))
    monkeypatch.setattr(knn, "_SAMPLE", 100)
    monkeypatch.setattr(knn, "_EIGHTH", 1)
    monkeypatch.setattr(knn, "_FEWEST", 1)
    for name, exact in (("lists", False), ("exact", True)):
        row = map(run, [query_file], map_config(tmp_path / name, exact_neighbors=exact)).iloc[0]
        told = ad.read_h5ad(tmp_path / name / "query.h5ad").uns["scviaduct"]
        assert (float(told["neighbor_recall"]), int(told["nprobe"])) == (row["neighbor_recall"], row["nprobe"])
        assert 0.999 <= row["neighbor_recall"] <= 1 and (row["nprobe"] == 0) == exact


def test_reusing_the_reference_s_batches_trains_nothing(run, studies, map_config, tmp_path):
    summary = map(run, [studies[0]], map_config(tmp_path / "mapped", reuse_batches=True))
    assert summary["epochs"][0] == 0
    # the reference's own cells, as its own batch: the same latent as in the reference
    latent = ad.read_h5ad(tmp_path / "mapped" / "study_0.h5ad").obsm["X_scVI"]
    reference = Bundle.open(run).latent()
    assert all(np.abs(reference - z).max(1).min() < 1e-4 for z in latent[:20])


def test_ray_tasks_give_what_one_process_gives(
    run, query_file, biology, map_config, tmp_path, ray_cluster, monkeypatch
):
    made = []
    monkeypatch.setattr(transfer, "CellIndex", lambda *args, **options: made.append(1) or CellIndex(*args, **options))
    other = tmp_path / "second.h5ad"
    biology.study(11, 80).write_h5ad(other)
    files = [query_file, broken(tmp_path / "normalised.h5ad", biology, "normalised"), other]
    one = map(run, files, map_config(tmp_path / "one"))
    two = map(run, files, map_config(tmp_path / "two", workers=2))
    columns = ["query", "status", "cells", "mapped", "genes_matched", "message", "epochs"]
    pd.testing.assert_frame_equal(one[columns], two[columns])
    for name in ("query", "second"):
        a, b = (ad.read_h5ad(tmp_path / side / f"{name}.h5ad") for side in ("one", "two"))
        np.testing.assert_array_equal(a.obsm["X_scVI"], b.obsm["X_scVI"])
        pd.testing.assert_frame_equal(a.obs, b.obs)
    assert len(made) == 2  # the reference's index is made once a mapping, not once a query
