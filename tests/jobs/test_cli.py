"""The command line as people meet it: what it makes, what it says, what it leaves behind."""

import re
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

import scviaduct
from scviaduct.distributed.config import FitConfig, MapConfig, SurgeryConfig, TrackingConfig
from scviaduct.jobs.__main__ import app

QUICK = "--max-epochs 2 --threads 1"


def listing(folder):
    """Every path below a folder, hidden ones too; of files their size and time of change."""
    facts = {p: p.stat() for p in folder.rglob("*")}
    return {str(p.relative_to(folder)): (s.st_mtime_ns, s.st_size) if p.is_file() else () for p, s in facts.items()}


def words(text):
    """The text without line breaks and the frame that usage errors have."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:sqlalchemy.*", "ignore::DeprecationWarning:mlflow.*")
def test_the_straight_line(place, tmp_path, process, command):
    for name in ("A", "B", "Q1", "Q2"):
        shutil.copy(place / f"{name}.h5ad", tmp_path)
    told = {}
    for line in (
        "convert A.h5ad B.h5ad --out atlas.zarr",
        "prepare atlas.zarr --genes 100 --batch-key study",
        "train atlas.zarr --model scvi --batch-key study --labels-key cell_type --max-epochs 3 --threads 1 "
        "--set n_hidden=16 --set n_latent=4 --out runs/x",
        f"map runs/x Q1.h5ad Q2.h5ad --out mapped {QUICK}",
        "inspect runs/x",
    ):
        code, out, err = process(line, tmp_path, tracking=None)
        assert code == 0, err
        # one line of progress for what takes time, and nothing of other libraries' logs
        assert all(re.match(r"(convert|prepare: [a-z ]+|epoch|query) \d+/\d+ ", told) for told in err.splitlines()), err
        told[line] = out
    convert, prepare, train, mapped, run = told.values()
    atlas, file = (command(f"inspect {name}", tmp_path)[1] for name in ("atlas.zarr", "Q1.h5ad"))
    assert "600 cells in 2 data sets" in convert and "scviaduct prepare atlas.zarr" in convert
    assert "600 cells, 100 genes" in prepare and "scviaduct train atlas.zarr --batch-key study" in prepare
    assert "runs/x/bundle: scvi of 600 cells after 3 epochs" in train and "scviaduct map runs/x" in train
    assert "mapped: 2 of 2 queries mapped" in mapped
    assert "600" in atlas and "view default" in atlas and "sample (6)" in atlas
    assert "study (2)" in run and "cell_type (3)" in run and "n_latent=4" in run
    assert "raw counts; ready to convert or map" in file
    assert {p.name for p in tmp_path.iterdir()} == {
        *("A.h5ad", "B.h5ad", "Q1.h5ad", "Q2.h5ad", "atlas.zarr", "runs", "mapped", "mlflow.db", "mlartifacts")
    }

    assert {p.name for p in (tmp_path / "mapped").iterdir()} == {"Q1.h5ad", "Q2.h5ad", "summary.csv"}
    for name in ("Q1", "Q2"):
        result, source = ad.read_h5ad(tmp_path / f"mapped/{name}.h5ad"), ad.read_h5ad(tmp_path / f"{name}.h5ad")
        assert result.obsm["X_scVI"].shape == (120, 4) and np.isfinite(result.obsm["X_scVI"]).all()
        assert set(result.obs["cell_type_pred"]) <= {"type 00", "type 01", "type 02"}
        assert result.obs["cell_type_uncertainty"].between(0, 1).all()
        assert set(result.obs["ref_or_query"]) == {"query"}
        assert (result.X != source.X).nnz == 0 and result.obs_names.equals(source.obs_names)
    summary = pd.read_csv(tmp_path / "mapped/summary.csv")
    assert summary["query"].tolist() == ["Q1", "Q2"] and summary["status"].tolist() == ["mapped"] * 2
    assert summary["mapped"].tolist() == [120, 120] and summary["genes_matched"].tolist() == [100, 100]

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("scviaduct").experiment_id])
    assert sorted(r.info.run_name for r in runs) == ["map mapped", "query Q1", "query Q2", "train x"]
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert str(client.get_model_version_by_alias("x", "current").version) == "1"
    mapping = next(r for r in runs if r.info.run_name == "map mapped")
    assert [a.path for a in client.list_artifacts(mapping.info.run_id)] == ["summary.csv"]


def test_one_broken_query_stops_no_other(place, tmp_path, process):
    code, out, err = process(f"map run Q1.h5ad normalised.h5ad --out {tmp_path / 'out'} {QUICK}", place)
    assert code == 1 and "1 of 2 queries mapped" in out
    assert "normalised failed: " in err and "no matrix holds raw counts" in err and "Traceback" not in err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"Q1.h5ad", "summary.csv"}
    summary = pd.read_csv(tmp_path / "out/summary.csv").set_index("query")
    assert summary["status"].to_dict() == {"Q1": "mapped", "normalised": "failed"}
    assert "no matrix holds raw counts" in summary.loc["normalised", "message"]


# a line, and pieces of the one message it is answered with: the file or column, and what to do
REFUSED_BY_A_PROCESS = [
    ("convert normalised.h5ad --out new.zarr", ["normalised.h5ad: no matrix holds raw counts", "X", "raw counts from"]),
    ("convrt A.h5ad --out new.zarr", ['Unknown command "convrt"', 'Did you mean "convert"']),
    ("train atlas.zarr --batch-key stduy --out new", ["'stduy'", "did you mean 'study'"]),
    ("map atlas.zarr Q1.h5ad --out new", ["atlas.zarr is not a model", "scviaduct train"]),
    ("map run normalised.h5ad --out new", ["normalised.h5ad: no matrix holds raw counts"]),
    ("inspect truncated.h5ad", ["truncated.h5ad is truncated: it has 60,000 of", "download it again"]),
]
REFUSED = [
    ("convert A.h5ad normalised.h5ad --out new.zarr", ["normalised.h5ad: no matrix holds raw counts"]),
    ("convert truncated.h5ad --out new.zarr", ["truncated.h5ad is truncated: it has 60,000 of", "download it again"]),
    ("convert empty.h5ad --out new.zarr", ["empty.h5ad is empty", "download it again"]),
    ("convert text.h5ad --out new.zarr", ["text.h5ad is a text file", "scanpy.read_text"]),
    ("convert C.h5ad --out new.zarr", ["C.h5ad does not exist", "A.h5ad"]),
    ("convert A.h5ad --out atlas.zarr", ["atlas.zarr exists", "another --out"]),
    ("convert A.h5ad --out B.h5ad/new.zarr", ["B.h5ad: File exists"]),
    ("convert A.h5ad symbols.h5ad --out new.zarr", ["shares no gene", "GENE0", "same kind of names"]),
    ("convert A.h5ad --out new.zarr --counts umi", ["A.h5ad: there is no matrix 'umi'", "available: 'X'"]),
    ("convert A.h5ad --out new.zarr --memory lots", ["memory='lots'", "2GB"]),
    ("convert A.h5ad", ["--out requires an argument"]),
    ("convert A.h5ad --out new.zarr --memroy 1GB", ["Unknown option: --memroy", "Did you mean --memory"]),
    ("prepare bare.zarr --batch-key stduy", ["'stduy'", "did you mean 'study'"]),
    ("prepare bare.zarr --genes genes.txt", ["genes.txt is no file", "'all'"]),
    ("prepare atlas.zarr --genes 50", ["View 'default'", "--overwrite"]),
    ("prepare gaps.zarr --genes 50 --batch-key sample --name new", ["7 cells", "'gaps'", "no sample", "another batch"]),
    ("prepare A.h5ad", ["A.h5ad is a file, not an atlas", "scviaduct convert"]),
    ("train bare.zarr --out new", ["View 'default'", "does not exist", "scviaduct prepare"]),
    ("train nowhere.zarr --out new", ["nowhere.zarr does not exist", "scviaduct convert"]),
    ("train atlas.zarr --out run --batch-key study", ["run exists already", "another name"]),
    ("train atlas.zarr --labels-key celltype --out new", ["'celltype'", "did you mean 'cell_type'"]),
    (
        "train gaps.zarr --batch-key sample --out new",
        ["7 cells have no sample", "study6-cell", "'gaps'", "another column"],
    ),
    ("train atlas.zarr --set n_lattent=3 --out new", ["'n_lattent'", "did you mean 'n_latent'"]),
    ("train atlas.zarr --set n_latent=ten --out new", ["n_latent", "number", "'ten'"]),
    ("train atlas.zarr --model scvii --out new", ["'scvii'", "did you mean 'scvi'"]),
    ("train atlas.zarr --max-epochs 0 --out new", ["max_epochs", "above 0"]),
    ("train atlas.zarr --max-epochs many --out new", ["--max-epochs", "many"]),
    ("train atlas.zarr --resume --out new", ["no run to resume", "--resume"]),
    ("train atlas.zarr --config gone.toml --out new", ["gone.toml does not exist"]),
    ("train atlas.zarr --config bad.toml --out new", ["bad.toml has no table [train]"]),
    ("tune atlas.zarr --out new", ["--search recipe.toml"]),
    ("tune atlas.zarr --search gone.toml --out new", ["gone.toml: No such file", "--search wants a recipe"]),
    (
        "tune atlas.zarr --search bad.toml --batch-key study --out new",
        ["bad.toml, line 2: n_latnt", "did you mean 'n_latent'"],
    ),
    ("tune atlas.zarr --resume --out new", ["no search to resume"]),
    ("map nowhere Q1.h5ad --out new", ["nowhere does not exist", "scviaduct train"]),
    ("map models:/nobody@current Q1.h5ad --out new", ["models:/nobody@current", "--tracking-uri"]),
    (
        "map models:/nobody@current Q1.h5ad --out new --tracking-uri sqlite:///no.db",
        ["models:/nobody@current", "no.db"],
    ),
    ("map run Q1.h5ad --out folder", ["folder exists already", "another name"]),
    ("map run symbols.h5ad --out new", ["symbols.h5ad: has 0 of the reference's 100 genes", "ENSG", "GENE0"]),
    ("map run nostudy.h5ad --out new", ["nostudy.h5ad", "'study'", "--batch-key", "--one-batch"]),
    ("map run Q1.h5ad --batch-key stduy --out new/deep", ["Q1.h5ad", "'stduy'", "did you mean 'study'", "--one-batch"]),
    ("map run gaps.h5ad --batch-key sample --out new", ["gaps.h5ad: 7 cells have no sample", "study6-cell000000"]),
    ("map run Q1.h5ad Q1.h5ad --out new", ["'Q1' occurs 2 times", "rename"]),
    ("map run truncated.h5ad empty.h5ad --out new", ["Not one of 2", "truncated.h5ad is", "empty.h5ad is empty"]),
    ("map run Q1.h5ad --n-neighbors 0 --out new", ["n_neighbors", "above 0"]),
    ("inspect nowhere", ["nowhere does not exist", "h5ad"]),
    ("inspect folder", ["folder is", "no atlas, run or bundle"]),
    ("inspect normalised.h5ad", ["normalised.h5ad: no matrix holds raw counts"]),
]


@pytest.fixture
def untouched(place):
    """The place as it was before and, if a refusal did not come, is again afterwards."""
    before = listing(place)
    yield before
    for name in sorted(listing(place).keys() - before.keys(), reverse=True):
        (place / name).rmdir() if (place / name).is_dir() else (place / name).unlink()


def check_refusal(place, before, run, line, pieces):
    code, out, err = run(line, place)
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err and len(re.findall(r"\bError\b", err)) == 1, err
    assert re.match(r"Error: |╭─ Error ─", err), err  # nothing goes before it
    assert [piece for piece in pieces if piece not in words(err)] == [], err
    assert listing(place) == before


@pytest.mark.parametrize(("line", "pieces"), REFUSED_BY_A_PROCESS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_refusal_is_one_message_and_leaves_nothing(place, untouched, process, line, pieces):
    check_refusal(place, untouched, process, line, pieces)


@pytest.mark.parametrize(("line", "pieces"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_further_refusals(place, untouched, command, line, pieces):
    check_refusal(place, untouched, command, line, pieces)


@pytest.mark.parametrize(
    ("line", "fit"),
    [
        ("", SurgeryConfig()),
        ("--max-epochs 5", SurgeryConfig(max_epochs=5)),
        ("--seed 1 --batch-size 64", SurgeryConfig(seed=1, batch_size=64)),
        ("--no-early-stopping", SurgeryConfig(early_stopping=False)),
    ],
)
def test_one_option_of_map_leaves_the_others_at_the_defaults_of_surgery(line, fit):
    _, bound, _ = app.parse_args(["map", "run", "Q1.h5ad", "--out", "new", *line.split()])
    given = bound.arguments["config"].fit
    assert {name: getattr(given, name) for name in vars(fit)} == vars(fit)


def test_one_option_of_train_leaves_the_others_at_their_defaults():
    _, bound, _ = app.parse_args(
        ["train", "atlas.zarr", "--out", "new", "--lr", "0.1", "--set", "n_latent=4", "--set", "n_hidden=16"]
    )
    config = bound.arguments["config"]
    assert config.fit == FitConfig(lr=0.1) and config.set == ("n_latent=4", "n_hidden=16")


@pytest.mark.parametrize(
    "verb", ["", "convert", "prepare", "train", "tune", "map", "inspect", "verify", "repair", "export", "demo"]
)
def test_help(tmp_path, command, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = command(f"{verb} --help", tmp_path)
    assert (code, err) == (0, "") and f"Usage: scviaduct {verb}" in out and max(map(len, out.splitlines())) <= 100
    assert "--empty-" not in out and "()" not in out and "None" not in out and "False" not in out
    described = re.findall(r"^│ \*? *(--[a-z-]+)(.*)│$", out, re.MULTILINE)
    assert all(len(rest.strip()) > 10 for _, rest in described), "every option has a sentence"


def test_help_of_map_tells_the_defaults_of_surgery(tmp_path, command):
    _, out, _ = command("map --help", tmp_path)
    assert "200" in re.search(r"--max-epochs.*?--batch-size", words(out)).group()
    assert "Exit code 0: all mapped; 1: some failed" in words(out)


def test_names_are_shown_as_they_are(place, tmp_path, command):
    code, out, err = command(f"convert A.h5ad --out {tmp_path}/x[red]:car:.zarr", place)
    assert code == 0 and "x[red]:car:.zarr: 300 cells" in out, err


def test_the_verbs_are_functions(place, tmp_path):
    for name in ("convert", "prepare", "train", "map", "inspect"):
        assert callable(getattr(scviaduct, name)) and name in dir(scviaduct)
    config = MapConfig(
        out=tmp_path / "out",
        fit=SurgeryConfig(max_epochs=1, threads=1),
        tracking=TrackingConfig(tracking_uri="none"),
    )
    summary = scviaduct.map(place / "run", [place / "Q2.h5ad"], config)
    assert summary[["query", "status", "epochs"]].to_numpy().tolist() == [["Q2", "mapped", 1]]
    assert scviaduct.inspect(place / "run").kind == "run"
    assert scviaduct.Bundle.open(place / "run").schema.batch.key == "study"
    assert [d.id for d in scviaduct.Atlas.open(place / "atlas.zarr").datasets] == ["A", "B"]
    with pytest.raises(scviaduct.errors.OutputExistsError, match="exists"):
        scviaduct.convert([place / "A.h5ad"], out=place / "atlas.zarr")
