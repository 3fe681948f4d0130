import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import scviaduct
from scviaduct.distributed.config import FitConfig, TrackingConfig, TrainConfig
from scviaduct.jobs.__main__ import main
from scviaduct.storage.simulate import Biology

SMALL = ("n_hidden=16", "n_latent=4")


def write_inputs(folder):
    """Good files A, B, Q1, Q2, and files that are each wrong in one way."""
    biology = Biology.make(n_types=3, n_genes=300, n_lineages=3, seed=3)
    for number, name in enumerate(("A", "B")):
        biology.study(number, 300).write_h5ad(folder / f"{name}.h5ad")
    for number, name in ((8, "Q1"), (9, "Q2")):
        biology.study(number, 120).write_h5ad(folder / f"{name}.h5ad")
    data = biology.study(7, 60)
    data.X = data.X.multiply(1e4 / data.X.sum(1)).tocsr().log1p()
    data.write_h5ad(folder / "normalised.h5ad")
    data = biology.study(6, 60)
    sample = data.obs["sample"].astype(object)
    sample.iloc[:7] = np.nan
    data.obs["sample"] = pd.Categorical(sample)
    data.write_h5ad(folder / "gaps.h5ad")
    data = biology.study(5, 60)
    data.var_names = [f"GENE{i}" for i in range(data.n_vars)]
    data.write_h5ad(folder / "symbols.h5ad")
    data = biology.study(5, 60)
    del data.obs["study"]
    data.write_h5ad(folder / "nostudy.h5ad")
    (folder / "truncated.h5ad").write_bytes((folder / "A.h5ad").read_bytes()[:60_000])
    (folder / "empty.h5ad").touch()
    (folder / "text.h5ad").write_text("gene,cell\n1,2\n")
    (folder / "folder").mkdir()
    (folder / "bad.toml").write_text("[search]\nn_latnt = [5, 10]\n")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder as a user has it: files, an atlas with a view, one without, one with gaps in a column, a run."""
    folder = tmp_path_factory.mktemp("place")
    write_inputs(folder)
    atlas = folder / "atlas.zarr"
    scviaduct.convert([folder / "A.h5ad", folder / "B.h5ad"], out=atlas)
    shutil.copytree(atlas, folder / "bare.zarr")
    scviaduct.prepare(atlas, genes=100, batch_key="study")
    scviaduct.convert([folder / "gaps.h5ad", folder / "Q1.h5ad"], out=folder / "gaps.zarr")
    scviaduct.prepare(folder / "gaps.zarr", genes=100)
    config = TrainConfig(
        out=folder / "run",
        batch_key="study",
        labels_key="cell_type",
        set=SMALL,
        fit=replace(FitConfig(), max_epochs=2, threads=1),
        tracking=TrackingConfig(tracking_uri="none"),
    )
    scviaduct.train(atlas, config)
    return folder


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs a command line in this process; gives (exit code, stdout, stderr)."""

    def run(line, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
        monkeypatch.setattr(sys, "argv", ["scviaduct", *line.split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def process(monkeypatch):
    """Runs a command line as a process; gives (exit code, stdout, stderr)."""

    def run(line, cwd, tracking="none"):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        if tracking:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
        arguments = [sys.executable, "-m", "scviaduct.jobs", *line.split()]
        done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    return run
