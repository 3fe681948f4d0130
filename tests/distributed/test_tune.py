"""Searches: what a recipe may say, what is suggested, one real search with every kind of end, and one that is killed."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
from mlflow import MlflowClient

from scviaduct.distributed.bundle import Bundle
from scviaduct.distributed.config import FitConfig, TrackingConfig, TrainConfig
from scviaduct.distributed.recipe import NOT_SEARCHED, read_recipe, require_options
from scviaduct.distributed.searchstatus import search_status
from scviaduct.distributed.study import Study
from scviaduct.distributed.trialrun import run_trial
from scviaduct.distributed.trials import Trial, best_of, read_trials, table_of
from scviaduct.distributed.tune import as_toml, tune
from scviaduct.distributed.tuneconfig import TuneConfig
from scviaduct.errors import ConfigError, OutputExistsError, ScviaductError, UnreadableFileError
from scviaduct.jobs.__main__ import app
from scviaduct.models import MODELS, model_class

from .conftest import NO_TRACKING, QUICK, SMALL

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture
def written(tmp_path):
    """Writes a recipe's text below [search]; gives its path."""

    def write(text):
        path = tmp_path / "recipe.toml"
        path.write_text(f"[search]\n{text}\n")
        return path

    return write


@pytest.fixture
def search(written, tmp_path):
    """Makes a quick TuneConfig of a recipe's text."""

    def make(text, **changes):
        fit = replace(QUICK, lr=None, **{k: changes.pop(k) for k in list(changes) if k in vars(QUICK)})
        options = {"batch_key": "study", "labels_key": "cell_type", "preset": "scarches", "set": SMALL[:1]}
        options |= {"out": tmp_path / "search", "tracking": NO_TRACKING, "search": written(text), "fit": fit}
        return TuneConfig(**options | changes)

    return make


@pytest.mark.parametrize(
    ("entry", "extremes"),
    [
        ("n_latent = {int = [10, 50]}", (10, 50)),
        ("lr = {log = [1e-4, 1e-2]}", (1e-4, 1e-2)),
        ("dropout_rate = {float = [0, 0.5]}", (0, 0.5)),
        ('gene_likelihood = ["nb", "zinb"]', ("nb", "zinb")),
        ("n_layers = [1, 2, 3]", (1, 2, 3)),
        ("early_stopping = [true, false]", (True, False)),
        ("gradient_clip = [1, 0.5]", (1, 0.5)),
    ],
)
def test_what_a_recipe_may_say(written, entry, extremes):
    recipe = read_recipe(written(f"# a remark\n{entry}"))
    (option,) = recipe.options
    assert (option.extremes, option.line) == (extremes, 3)
    require_options(recipe, TuneConfig(out=recipe.path, search=recipe.path), model_class("scvi"), 1000)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("n_latent = 10", r"line 3: n_latent: write choices as \[1, 2, 3\] or a range"),
        ("n_latent = []", "choices are numbers, words"),
        ("n_latent = [10, true]", "choices are numbers, words"),
        ('n_latent = [10, "20"]', "choices are numbers, words"),
        ("n_latent = [10, 10]", "named twice"),
        ("n_latent = {int = [10]}", "two whole numbers, the smaller first"),
        ("n_latent = {int = [50, 10]}", "the smaller first"),
        ("n_latent = {int = [1.5, 10]}", "two whole numbers"),
        ("n_latent = {integer = [1, 10]}", "int, float or log, not 'integer'"),
        ("n_latent = {int = [1, 10], step = 2}", "write choices as"),
        ("lr = {log = [0, 1]}", "begins above 0"),
        ("n_latnt = [10, 20]", "line 3: n_latnt: SCVI and its fit have no such option; did you mean 'n_latent'"),
        ("learning_rate = [0.1]", "no such option"),
        ("n_latent = {log = [1, 10]}", "it is a whole number: write"),
        ("n_latent = [10.5, 20]", "it is a whole number"),
        ('lr = ["fast"]', "it is a number"),
        ("early_stopping = [1, 0]", "it is a switch"),
        ("gene_likelihood = [1, 2]", "its values are words"),
        ('gene_likelihood = ["nb", "zinbb"]', "line 3: gene_likelihood: .*zinbb"),
        ('optimizer = ["SGD"]', "line 3: optimizer: .*Adam"),
        ("lr = [-1.0]", "line 3: lr: lr must be above 0"),
        ("seed = [1, 2]", "cannot be searched: it decides which cells are held out"),
        ("threads = [1, 2]", "cannot be searched: it changes no result"),
        ("n_hidden = [16, 32]", "given as a fixed option, too"),
        ("batch_size = [32]", "given as a fixed option, too"),
        ("n_latent = 10..", "recipe.toml is not TOML: .*line 3"),
        ("n_latent = [10]\n[fit]\nlr = [0.1]", r"must hold one table, \[search\].*'fit'"),
        ("", "at least one option"),
    ],
)
def test_what_a_recipe_may_not_say(atlas, search, tmp_path, entry, message):
    with pytest.raises((ConfigError, UnreadableFileError), match=message) as refused:
        tune(atlas, search(f"# a remark\n{entry}"))
    assert "recipe.toml" in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.toml"]


def test_the_line_is_the_option_s_own(written):
    text = "lr = {log = [1e-4, 1e-2]}  # n_latent = 3\n[search.n_latent]\nint = [1, 2]"
    assert [(o.name, o.line) for o in read_recipe(written(text)).options] == [("lr", 2), ("n_latent", 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": None}, "--search recipe.toml"),
        ({"objective": "scib", "labels_key": None}, "--labels-key"),
        ({"validation_size": 0.0}, "validation_size must be above 0"),
        ({"parallel": 0}, "parallel must be at least 1"),
        ({"reduction_factor": 1}, "reduction_factor must be at least 2"),
    ],
)
def test_searches_that_make_no_sense(search, changes, message):
    with pytest.raises(ConfigError, match=message):
        search("n_latent = [4, 5]", **changes)


def test_what_is_missing_is_said_before_anything_is_written(atlas, search, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scib_metrics", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "scviaduct\[scib\]"'):
        tune(atlas, search("n_latent = [4, 5]", objective="scib"))
    with pytest.raises(ConfigError, match="no search to resume"):
        tune(atlas, TuneConfig(out=tmp_path / "nothing", resume=True))
    with pytest.raises(UnreadableFileError, match=r"gone\.toml: No such file"):
        tune(atlas, search("n_latent = [4, 5]", search=tmp_path / "gone.toml"))
    with pytest.raises(OutputExistsError):
        tune(atlas, search("n_latent = [4, 5]", out=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize("model", MODELS)
def test_an_option_is_of_the_fit_or_of_the_model(model):
    assert not vars(FitConfig()).keys() & model_class(model).Config.__dataclass_fields__.keys()
    assert NOT_SEARCHED.keys() <= vars(FitConfig()).keys()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "scanvi", "set": ("n_latent=4", "gene_likelihood=nb"), "labels_key": 'a "b"', "workers": 2},
        {"fit": FitConfig(lr=1e-05, early_stopping=False, seed=3), "categorical_covariate_keys": ("a", "b")},
    ],
)
def test_best_toml_is_read_back_as_it_was(tmp_path, changes):
    config = TrainConfig(out=tmp_path / "run", **changes)
    (tmp_path / "best.toml").write_text(as_toml(config))
    words = ["train", "atlas.zarr", "--config", str(tmp_path / "best.toml"), "--out", str(config.out)]
    _, bound, _ = app.parse_args(words)
    assert bound.arguments["config"] == config
    _, bound, _ = app.parse_args([*words, "--lr", "0.5"])  # a flag comes first
    assert bound.arguments["config"] == replace(config, fit=replace(config.fit, lr=0.5))


def test_the_table_has_the_best_first():
    trials = [
        Trial(0, {"n": 1}, "done", 3.0),
        Trial(1, {"n": 2}, "failed", message="no"),
        Trial(2, {"n": 3}, "done", 2.0),
        Trial(3, {"n": 4}, "stopped", 1.0),
        Trial(4, {"n": 5}, "done", 2.0),
    ]
    assert table_of(trials, highest=False)["trial"].tolist() == [2, 4, 0, 3, 1]
    assert best_of(trials, highest=False).number == 2 and best_of(trials, highest=True).number == 0
    assert best_of(trials[1:2], highest=False) is None


def studied(out, recipe, n_trials, known=()):
    return Study(out, recipe, seed=0, n_trials=n_trials, highest=False, curve=None, known=known)


def test_a_study_suggests_the_same_however_often_it_is_resumed(written, tmp_path):
    recipe = read_recipe(
        written('lr = {log = [1e-4, 1e-2]}\nn_latent = {int = [5, 50]}\ngene_likelihood = ["nb", "zinb"]')
    )
    runs = []
    for name, every in (("a", 100), ("b", 4)):
        out = tmp_path / name
        (out / "trials").mkdir(parents=True)
        for n in range(30):
            if n % every == 0:
                study = studied(out, recipe, 30, read_trials(out))
            trial = study.next()
            study.end(replace(trial, state="done", value=abs(trial.params["n_latent"] - 33.0)))
        assert study.next() is None and study.left == 0
        runs.append([(t.number, t.params) for t in read_trials(out)])
    assert runs[0] == runs[1]
    far = [abs(params["n_latent"] - 33) for _, params in runs[0]]
    assert sum(far[20:]) < 0.7 * sum(far[:10]), "TPE looks where the values are low"


def test_a_trial_that_was_running_comes_first_and_as_it_was(written, tmp_path):
    recipe = read_recipe(written("n_latent = {int = [5, 50]}"))
    (tmp_path / "trials").mkdir()
    study = studied(tmp_path, recipe, 3)
    first, second = study.next(), study.next()
    study.end(replace(second, state="failed", message="x"))
    again = studied(tmp_path, recipe, 3, read_trials(tmp_path))
    assert again.left == 2
    assert again.next() == first
    assert again.next().number == 2


def test_asha_knows_what_trials_before_it_reached(ray_cluster):
    from types import SimpleNamespace

    from scviaduct.distributed.raytune import Rungs

    def decision(curves, value):
        asha = Rungs(grace=2, factor=2, most=8).scheduler(curves)
        trial = SimpleNamespace(trial_id="new")
        asha.on_trial_add(None, trial)
        assert asha.on_trial_result(None, trial, {"epoch": 1, "compared": 1e9}) == "CONTINUE"  # grace
        return asha.on_trial_result(None, trial, {"epoch": 2, "compared": value})

    known = [(0, [9.0, 5.0, 4.0]), (1, [9.0, 6.0])]
    assert decision([], 100.0) == decision(known, 4.0) == "CONTINUE"
    assert decision(known, 100.0) == "STOP"


def settled(out, atlas, config, params):
    """A search's folder as it is when its first trial begins."""
    (out / "trials").mkdir(parents=True)
    settings = {"config": config.to_dict(), "atlas": str(atlas), "goal": {"curve": "elbo_validation", "scib": False}}
    (out / "tune.json").write_text(json.dumps(settings))
    Trial(0, params).save(out)


def test_a_view_that_changed_meanwhile_is_refused(atlas, search, tmp_path):
    config, out = search("n_latent = [4, 5]"), tmp_path / "search"
    settled(out, atlas, config, {"n_latent": 4})
    (out / "search.toml").write_text(config.search.read_text())
    begun = json.loads((out / "tune.json").read_text())
    (out / "tune.json").write_text(json.dumps(begun | {"view_digest": "another", "mlflow_run": None}))
    told = f"The view 'default' of {atlas} is not the one the search in {out} was started on."
    with pytest.raises(ConfigError, match=re.escape(told)):
        tune(atlas, TuneConfig(out=out, resume=True, tracking=NO_TRACKING))


def test_a_trial_goes_on_from_its_checkpoint_and_tells_its_epochs_again(atlas, search, tmp_path):
    class Killed(BaseException):
        pass

    def reporting(into, until=None):
        def report(record):
            into.append(record)
            if record.get("epoch") == until:
                raise Killed

        return report

    config = search("n_latent = [4, 5]", max_epochs=4, checkpoint_every="1steps")
    for name in ("whole", "killed"):
        settled(tmp_path / name, atlas, config, {"n_latent": 4, "lr": 0.002})
    whole, before, after = [], [], []
    run_trial(tmp_path / "whole", 0, reporting(whole))
    with pytest.raises(Killed):
        run_trial(tmp_path / "killed", 0, reporting(before, until=3))
    run_trial(tmp_path / "killed", 0, reporting(after))
    assert [r["epoch"] for r in whole] == [1, 2, 3, 4] and before == whole[:3] and after == whole
    assert "value" in whole[-1] and not any("value" in r for r in whole[:-1])
    history = (tmp_path / "killed/trials/000/history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in history] in ([0, 1, 2, 3], [0, 1, 2, 2, 3]), "no epoch from the start"


def test_a_trial_that_fails_says_why(atlas, search, tmp_path):
    told = []
    settled(tmp_path, atlas, search("n_latent = [4, 5]"), {"n_latent": 4, "lr": 1e30})
    run_trial(tmp_path, 0, told.append)
    assert told[-1].keys() == {"failed"} and "The loss became nan" in told[-1]["failed"]


@pytest.fixture(scope="module")
def found(atlas, ray_cluster, tmp_path_factory):
    """(search, configuration, what was told) of a real search with one trial of each kind of end."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "recipe.toml").write_text("[search]\nlr = [0.003, 1e-7, 1e30]\nn_latent = [4, 5]\n")
    config = TuneConfig(
        out=folder / "search",
        search=folder / "recipe.toml",
        n_trials=4,
        parallel=1,
        grace_epochs=1,
        batch_key="study",
        labels_key="cell_type",
        set=SMALL[:1],
        fit=replace(QUICK, lr=None, max_epochs=2, seed=6),  # whose first five rates are good, mad, slow, good, slow
        tracking=TrackingConfig(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", experiment="tuned"),
    )
    told = []
    made = tune(atlas, config, on_progress=lambda trials, best, n: told.append(([t.state for t in trials], best)))
    return made, config, told


def test_a_search_ends_with_every_trial_accounted_for(found):
    search, config, told = found
    trials = read_trials(config.out)
    assert [t.state for t in trials] == ["done", "failed", "stopped", "done"]
    assert [t.params["lr"] for t in trials] == [0.003, 1e30, 1e-7, 0.003]
    assert [t.epochs for t in trials] == [2, 0, 1, 2] and "The loss became" in trials[1].message
    stopped = (config.out / "trials/002/history.jsonl").read_text().splitlines()
    assert len(stopped) == 1 and not (config.out / "trials/002/bundle").exists(), "the loop waits for ASHA"
    assert search.best == min((t for t in trials if t.state == "done"), key=lambda t: t.value)
    history = search.bundle.facts["training"]["history"]
    assert search.best.value == history[-1]["elbo_validation"]
    assert told[0] == (["running"], None) and told[-1] == ([t.state for t in trials], search.best)
    table = pd.read_csv(config.out / "trials.csv")
    assert table["trial"].tolist()[0] == search.best.number and sorted(table["trial"]) == [0, 1, 2, 3]
    assert not list(config.out.rglob("*.pkl")) and not list(config.out.rglob(".*"))
    assert {p.name for p in config.out.iterdir()} == {"trials", "search.toml", "tune.json", "trials.csv", "best.toml"}


def test_every_trial_is_a_child_run_and_the_best_is_registered(found):
    search, config, _ = found
    client = MlflowClient(config.tracking.tracking_uri)
    experiment = client.get_experiment_by_name("tuned").experiment_id
    (parent,) = client.search_runs([experiment], "tags.objective = 'monitored'")
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    states = {run.data.tags["trial"]: run.info.status for run in children}
    assert parent.info.status == "FINISHED"
    assert states == {"0": "FINISHED", "1": "FAILED", "2": "KILLED", "3": "FINISHED"}
    child = next(run for run in children if run.data.tags["trial"] == str(search.best.number))
    assert child.data.params["lr"] == "0.003" and child.data.metrics["value"] == search.best.value
    curve = client.get_metric_history(child.info.run_id, "elbo_validation")
    assert [m.step for m in curve] == [0, 1]
    version = client.get_model_version_by_alias("search", "current")
    assert version.run_id == child.info.run_id and str(version.version) == "1"


def test_best_toml_gives_the_best_model_again(found, atlas, tmp_path):
    search, config, _ = found
    line = ["train", str(atlas), "--config", str(config.out / "best.toml"), "--out", str(tmp_path / "again")]
    assert app([*line, "--tracking-uri", "none"], result_action="return_value") == 0
    one, other = search.bundle.weights(), Bundle.open(tmp_path / "again").weights()
    assert one.keys() == other.keys() and all(bool((one[k] == other[k]).all()) for k in one)


def test_more_trials_know_the_earlier_ones(found, atlas):
    search, config, _ = found
    resumed = TuneConfig(out=config.out, resume=True, n_trials=5, tracking=config.tracking)
    before = {p: p.stat().st_mtime_ns for p in config.out.rglob("history.jsonl")}
    again = tune(atlas, resumed)
    assert again.table.set_index("trial")["state"].to_dict() == dict(
        enumerate(["done", "failed", "stopped", "done", "stopped"])
    ), "ASHA measures the slow rate by what the others reached in the first search"
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())
    versions = MlflowClient(config.tracking.tracking_uri).search_model_versions("name = 'search'")
    assert len(versions) == 1 and again.best == search.best
    with pytest.raises(ConfigError, match="batch_key: the run has study, now sample"):
        tune(atlas, replace(resumed, batch_key="sample"))
    with pytest.raises(ConfigError, match="is not the recipe it began with"):
        (config.search.with_name("other.toml")).write_text("[search]\nlr = [0.1]\n")
        tune(atlas, replace(resumed, search=config.search.with_name("other.toml")))


def test_nothing_but_failures_is_an_error(atlas, search, ray_cluster):
    made = search("lr = [1e30]", n_trials=1)
    with pytest.raises(ScviaductError, match=r"Not one of 1 trials came to its end:\n  trial 0: The loss became"):
        tune(atlas, made)
    assert pd.read_csv(made.out / "trials.csv")["state"].tolist() == ["failed"]


@pytest.mark.slow
def test_a_trial_may_be_many_processes(atlas, search, ray_cluster):
    made = search("n_latent = [4]", n_trials=1, workers=2, max_epochs=2)
    best = tune(atlas, made).best
    assert (best.state, best.epochs) == ("done", 2)
    assert json.loads((made.out / "trials/000/run.json").read_text())["config"]["workers"] == 2
    with pytest.raises(ConfigError, match="A trial needs 9 cores"):
        tune(atlas, replace(made, out=made.out.with_name("wide"), workers=8))
    assert not made.out.with_name("wide").exists()


@pytest.mark.slow
def test_a_killed_search_goes_on(atlas, search, ray_cluster, tmp_path):
    """SIGKILL of the driver while trial 1 runs: trial 0 is kept, trial 1 goes on from its checkpoint."""
    made = search("n_latent = [4, 5]", n_trials=3, parallel=1, max_epochs=12, grace_epochs=12)
    options = {"batch-key": "study", "labels-key": "cell_type", "preset": "scarches", "set": SMALL[0], "threads": 1}
    options |= {"max-epochs": 12, "batch-size": 8, "n-epochs-kl-warmup": 100, "checkpoint-every": "1steps"}
    options |= {"n-trials": 3, "parallel": 1, "grace-epochs": 12, "out": made.out, "search": made.search}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    line = [sys.executable, "-m", "scviaduct.jobs", "tune", str(atlas), "--tracking-uri", "none", *words]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    epochs, end = made.out / "trials/001/history.jsonl", time.monotonic() + 200
    while not (epochs.exists() and len(epochs.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    found = tune(atlas, TuneConfig(out=made.out, resume=True, tracking=NO_TRACKING))
    assert found.table["state"].tolist() == ["done"] * 3 and found.table["epochs"].tolist() == [12] * 3
    starts = [json.loads((made.out / f"trials/{n:03d}/attempts.json").read_text()) for n in range(3)]
    assert [n if isinstance(n, int) else len(n) for n in starts] == [1, 2, 1]
    history = [json.loads(line)["epoch"] for line in epochs.read_text().splitlines()]
    assert sorted(set(history)) == list(range(12)) and len(history) <= 13, "it went on from its checkpoint"


def test_status_of_a_search(tmp_path, atlas, search, capsys):
    out = tmp_path / "search"
    settled(out, atlas, search("n_latent = [4, 5]", n_trials=3), {"n_latent": 4})
    Trial(1, {"n_latent": 5}, "done", 12.5, epochs=3).save(out)
    Trial(2, {"n_latent": 5}, "failed", message="x").save(out)
    now = (out / "trials/000.json").stat().st_mtime
    found = search_status(out, now=now + 5)
    assert (found.state, found.best.number, found.running) == ("running", 1, {0: (0, None)})
    assert found.counts == {"running": 1, "done": 1, "failed": 1}
    assert search_status(out, now=now + 1000).state == "stopped"
    Trial(0, {"n_latent": 4}, "stopped", 99.0, epochs=1).save(out)
    assert search_status(out, now=now + 1000).state == "finished"
    assert app(["status", str(out)], result_action="return_value") == 0
    told = capsys.readouterr().out
    assert "search for scvi, finished; 1 stopped, 1 done, 1 failed of 3 trials" in told
    assert "best so far: trial 1, elbo_validation 12.5: n_latent=5" in told
    app(["status", str(out), "--as-json"], result_action="return_value")
    assert json.loads(capsys.readouterr().out)["best"]["value"] == 12.5
