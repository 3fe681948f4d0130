import json
from pathlib import Path

import pytest

from scviaduct.distributed.config import FitConfig, MapConfig, TrainConfig
from scviaduct.distributed.options import model_config
from scviaduct.errors import ConfigError
from scviaduct.models.scvi import SCVI
from scviaduct.models.trvae import TRVAE


@pytest.mark.parametrize(("n", "epochs"), [(100, 400), (20_000, 400), (40_000, 200), (1_000_000, 8), (100_000_000, 1)])
def test_epochs_follow_scvi_tools_rule(n, epochs):
    assert FitConfig().epochs_for(n) == epochs and FitConfig(max_epochs=3).epochs_for(n) == 3


@pytest.mark.parametrize(
    ("options", "epoch", "step", "weight"),
    [
        ({}, 0, 0, 0.0),
        ({}, 100, 9999, 0.25),
        ({}, 999, 0, 1.0),
        ({"n_epochs_kl_warmup": 0}, 0, 0, 1.0),
        ({"n_epochs_kl_warmup": None}, 0, 0, 1.0),
        ({"n_steps_kl_warmup": 10}, 50, 5, 0.5),
        ({"n_steps_kl_warmup": 10}, 0, 20, 1.0),
    ],
)
def test_kl_warm_up(options, epoch, step, weight):
    assert FitConfig(**options).kl_weight(epoch, step) == weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FitConfig(lr=0), "lr must be above 0, not 0"),
        (lambda: FitConfig(validation_size=1), "validation_size must lie in"),
        (lambda: FitConfig(max_epochs=-1), "max_epochs must be above 0"),
        (lambda: FitConfig(validation_size=0.0, validation_stratify_by="x"), "needs a validation_size above 0"),
        (lambda: TrainConfig(out=Path("x"), workers=17), "17 workers need --n-lanes 17"),
        (lambda: TrainConfig(out=Path("x"), workers=8, fit=FitConfig(batch_size=16)), "too small for 8 workers"),
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
