"""embed, decode, evaluate and de on the command line."""

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest


def test_what_a_model_gives(place, tmp_path, command):
    told = {}
    for line in (
        f"embed run atlas.zarr --out {tmp_path / 'z.h5ad'}",
        f"decode run A.h5ad --out {tmp_path / 'x.h5ad'} --library-size latent --n-samples 2",
        f"decode run A.h5ad --out {tmp_path / 'counts.h5ad'} --what counts",
        "evaluate run A.h5ad --n-mc-samples 5",
        f"de run atlas.zarr --groupby cell_type --delta auto --n-samples 50 --out {tmp_path / 'de.csv'}",
    ):
        code, out, err = command(line, place)
        assert code == 0, err
        told[line.split()[0]] = out
    assert f"{tmp_path / 'z.h5ad'}: 600 cells x 4 dimensions." in told["embed"]
    assert "300 cells x 100 features." in told["decode"]
    assert re.search(
        r"300 cells: elbo -[\d.,]+, reconstruction error [\d.,]+, kl [\d.]+, log likelihood -", told["evaluate"]
    )
    assert re.search(r"de.csv: 3 comparisons of 100, \d+ differences", told["de"])
    assert ad.read_h5ad(tmp_path / "z.h5ad").obsm["X_scVI"].shape == (600, 4)
    x, counts = ad.read_h5ad(tmp_path / "x.h5ad"), ad.read_h5ad(tmp_path / "counts.h5ad")
    totals = counts.X.sum(1).A1 if hasattr(counts.X.sum(1), "A1") else np.asarray(counts.X.sum(1)).ravel()
    assert np.corrcoef(np.asarray(x.X).sum(1), totals)[0, 1] > 0.8
    assert len(pd.read_csv(tmp_path / "de.csv")) == 300


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        (
            "embed run Q1.h5ad --out new.h5ad",
            ["'study'", "unknown to the model, e.g. 'study 8'", "scviaduct map MODEL"],
        ),
        ("embed run atlas.zarr --out new.csv", ["name it new.h5ad or new.zarr"]),
        ("embed run atlas.zarr --out new.h5ad --predict", ["SCVI has no classifier"]),
        ("decode run atlas.zarr --out new.h5ad --what expresion", ["'expresion'", "did you mean 'expression'"]),
        ("decode run atlas.zarr --out new.h5ad --library-size many", ["--library-size"]),
        ("decode run bare.zarr --out new.h5ad", ["View 'default'", "scviaduct prepare"]),
        ("evaluate run nostudy.h5ad", ["no batch column 'study'", "--batch-key"]),
        ("de run atlas.zarr --groupby celltype --out new.csv", ["'celltype'", "did you mean 'cell_type'"]),
        ("de run atlas.zarr --groupby cell_type --group1 B --out new.csv", ["No cell has 'B'", "'type 00'"]),
    ],
)
def test_what_is_refused(place, command, line, pieces):
    code, _, err = command(line, place)
    text = re.sub(r"[\s│╭╮╰╯─]+", " ", err)
    assert code == 2 and "Traceback" not in err
    assert all(piece in text for piece in pieces), text
    assert not list(place.glob("new*")) and not list(place.glob(".new*"))
