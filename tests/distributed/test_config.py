import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest

from scviaduct.distributed.config import FitConfig, MapConfig, TrainConfig
from scviaduct.distributed.options import model_config
from scviaduct.errors import ConfigError
from scviaduct.models import MODELS, model_class
from scviaduct.models.scanvi import SCANVI
from scviaduct.models.scvi import SCVI
from scviaduct.models.training import TrainingPlan
from scviaduct.models.trvae import TRVAE


@pytest.mark.parametrize(("n", "epochs"), [(100, 400), (20_000, 400), (40_000, 200), (1_000_000, 8), (100_000_000, 1)])
def test_epochs_follow_scvi_tools_rule(n, epochs):
    assert FitConfig().plan(SCVI.plan, n).max_epochs == epochs
    assert FitConfig(max_epochs=3).plan(SCVI.plan, n).max_epochs == 3


@pytest.mark.parametrize(("n", "epochs"), [(100, 10), (400_000, 7), (1_000_000, 3), (100_000_000, 2)])
def test_a_scanvi_that_starts_with_an_scvi_trains_for_fewer_epochs(n, epochs):
    assert FitConfig().plan(SCANVI.plan, n, refines=True).max_epochs == epochs
    assert FitConfig(max_epochs=50).plan(SCANVI.plan, n, refines=True).max_epochs == 50
    assert FitConfig().plan(SCANVI.plan, 100).max_epochs == FitConfig().plan(SCVI.plan, 100, refines=True).max_epochs


@pytest.mark.parametrize(
    ("options", "epoch", "step", "weight"),
    [
        ({}, 0, 0, 0.0),
        ({}, 100, 9999, 0.25),
        ({}, 999, 0, 1.0),
        ({"n_epochs_kl_warmup": 0}, 0, 0, 1.0),
        ({"n_steps_kl_warmup": 10}, 50, 5, 0.5),
        ({"n_steps_kl_warmup": 10}, 0, 20, 1.0),
        ({"min_kl_weight": 0.2, "max_kl_weight": 0.6}, 200, 0, 0.4),
        ({"max_kl_weight": 0.5, "n_epochs_kl_warmup": 0}, 0, 0, 0.5),
    ],
)
def test_kl_warm_up(options, epoch, step, weight):
    assert FitConfig(**options).plan(SCVI.plan, 1000).kl_weight(epoch, step) == weight


def test_a_warm_up_in_epochs_replaces_a_default_in_steps():
    default = TrainingPlan(kl_warmup_steps_per_cell=0.75)
    assert FitConfig().plan(default, 1000).n_steps_kl_warmup == 750
    assert FitConfig(n_steps_kl_warmup=9).plan(default, 1000).n_steps_kl_warmup == 9
    assert FitConfig(n_epochs_kl_warmup=4).plan(default, 1000).kl_weight(2, 1) == 0.5


MODELS_UPSTREAM = {"scvi": "SCVI", "scanvi": "SCANVI", "totalvi": "TOTALVI", "peakvi": "PEAKVI"}
OF_TRAIN = {"max_epochs", "lr", "batch_size", "weight_decay", "eps", "early_stopping", "early_stopping_patience"}
OF_TRAIN |= {"n_epochs_kl_warmup", "reduce_lr_on_plateau"}


@pytest.mark.parametrize(("name", "upstream"), MODELS_UPSTREAM.items())
def test_defaults_are_those_of_scvi_tools(name, upstream):
    """Of the arguments of the model's train, its training plan and its trainer, in this order."""
    scvi = pytest.importorskip("scvi")
    kind = getattr(scvi.model, upstream)
    theirs = {}
    for function in (scvi.train.Trainer.__init__, kind._training_plan_cls.__init__, kind.train):
        theirs |= {p.name: p.default for p in inspect.signature(function).parameters.values()}
    plan = model_class(name).plan
    for field in OF_TRAIN & theirs.keys():
        if field == "max_epochs" and theirs[field] is None:
            assert plan.max_epochs is None
        elif field != "n_epochs_kl_warmup" or theirs[field] is not None:
            assert getattr(plan, field) == theirs[field], field
        else:
            assert plan.kl_warmup_steps_per_cell == 0.75


def test_the_table_of_defaults_is_true():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    lines = text.partition("## Each model's defaults")[2].partition("\n## ")[0].splitlines()
    table = [[c.strip(" `") for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    names, rows = table[0][1:], table[2:]
    assert set(names) == set(MODELS) and len(rows) > 10
    for option, *cells in rows:
        for name, said in zip(names, cells, strict=True):
            plan = model_class(name).plan
            in_words = {"max_epochs": "by cells"}.get(option) if getattr(plan, option) is None else None
            if option == "n_epochs_kl_warmup" and plan.kl_warmup_steps_per_cell:
                in_words = "in steps"
            assert said == (in_words or str(getattr(plan, option))), (option, name)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_decided_stays_decided(name):
    """A resumed run has the options that were decided when it began; other defaults must not move them."""
    plan = FitConfig(seed=3).plan(model_class(name).plan, 12_345)
    decided = FitConfig(seed=3).decided(plan)
    other = TrainingPlan(lr=9, optimizer="AdamW", batch_size=7, eps=2, max_epochs=77, early_stopping=True)
    again = decided.plan(replace(other, kl_warmup_steps_per_cell=None), 999)
    assert again == replace(plan, refining_epochs=None, kl_warmup_steps_per_cell=None) and decided.seed == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_kl_weight": 0.5, "max_kl_weight": 0.1}, "0 <= min_kl_weight <= max_kl_weight"),
        ({"lr_factor": 1.5}, "lr_factor must lie between 0 and 1, not 1.5"),
        ({"optimizer": "SGD"}, "optimizer='SGD' is not one of Adam, AdamW"),
        ({"early_stopping_monitor": "elb"}, "did you mean 'elbo'"),
    ],
)
def test_plans_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FitConfig(**options).plan(SCVI.plan, 1000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FitConfig(lr=0), "lr must be above 0, not 0"),
        (lambda: FitConfig(validation_size=1), "validation_size must lie in"),
        (lambda: FitConfig(max_epochs=-1), "max_epochs must be above 0"),
        (lambda: FitConfig(validation_size=0.0, validation_stratify_by="x"), "needs a validation_size above 0"),
        (lambda: TrainConfig(out=Path("x"), workers=17), "17 workers need --n-lanes 17"),
        (lambda: MapConfig(out=Path("x"), max_uncertainty=2), "must lie in"),
    ],
)
def test_values_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_configuration_survives_json():
    config = TrainConfig(out=Path("a/b"), set=("n_latent=3",), fit=FitConfig(max_epochs=2), workers=2)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_model_options():
    made = model_config(
        SCVI, "scarches", ["n_latent=20", "dropout_rate=0.2", "gene_likelihood=nb", "use_layer_norm=none"]
    )
    assert (made.n_latent, made.dropout_rate, made.gene_likelihood, made.n_layers) == (20, 0.2, "nb", 2)
    assert made.encode_covariates and made.use_layer_norm == "none"  # what --set says comes last
    assert model_config(SCVI, "default", ["encode_covariates=true"]).encode_covariates is True
    assert model_config(TRVAE, "default", ["hidden_layer_sizes=32,8"]).hidden_layer_sizes == (32, 8)
    assert model_config(TRVAE, "default", ["hidden_layer_sizes=32"]).hidden_layer_sizes == (32,)
    with pytest.raises(ConfigError, match="wants a number, not '8x'"):
        model_config(TRVAE, "default", ["hidden_layer_sizes=32,8x"])
    with pytest.raises(ConfigError, match="preset scarches is not for TRVAE"):
        model_config(TRVAE, "scarches", [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_latent", "wants name=value"),
        ("n_latents=3", "no option 'n_latents'; did you mean 'n_latent'"),
        ("n_latent=many", "wants a number, not 'many'"),
        ("encode_covariates=1", "wants true or false"),
        ("gene_likelihood=gamma", "gamma"),
    ],
)
def test_model_options_that_do_not_exist(text, message):
    with pytest.raises(ConfigError, match=message):
        model_config(SCVI, "default", [text])


@pytest.mark.parametrize(
    ("workers", "fewest", "most"), [(1, 1, 1), (4, 4, 4), ("4", 4, 4), ("1..4", 1, 4), ("2..2", 2, 2)]
)
def test_workers_are_a_number_or_a_range(workers, fewest, most):
    config = TrainConfig(out=Path("run"), workers=workers)
    assert (config.fewest_workers, config.most_workers) == (fewest, most)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("workers", [0, -1, "0..2", "4..1", "many", "1..", "..3", "1...3", "1..2..3", ""])
def test_what_is_no_number_of_workers_is_refused(workers):
    with pytest.raises(ConfigError, match=r"workers must be a number above 0, or a range like 1\.\.4, not"):
        TrainConfig(out=Path("run"), workers=workers)


def test_a_range_needs_a_lane_for_each_of_the_most_workers():
    with pytest.raises(ConfigError, match="17 workers need --n-lanes 17"):
        TrainConfig(out=Path("run"), workers="1..17")
