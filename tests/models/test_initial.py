"""What a fresh model is made of, which parity from equal weights does not see: initial weights as scvi-tools'."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from scviaduct.models.peakvi import PeakVI
from scviaduct.models.poissonvi import PoissonVI
from scviaduct.models.scanvi import SCANVI
from scviaduct.models.scvi import SCVI, SCVIConfig
from scviaduct.models.totalvi import TotalVI
from scviaduct.models.upstream_state import upstream_state

TIMES = 12
"""Fresh models of each side; their values are pooled tensor by tensor."""
UNUSED = ("l_encoder", "l_gene", "px_r_decoder", "px_dropout_decoder", "px_r")
"""Parts that scvi-tools has whether or not the options use them; ours have none then, and are written as zeros."""


@pytest.fixture(scope="module")
def modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning and friends warn while they are imported
        return pytest.importorskip("scvi.module")


def makers(modules, schema):
    n_genes, n_batches, n_labels, covariates = len(schema.genes), len(schema.batch), len(schema.labels), [3]
    same = {"n_cats_per_cov": covariates, "n_layers": 2}
    deep = SCVIConfig(n_layers=2, encode_covariates=True)
    leaky = {"activation_fn": torch.nn.LeakyReLU}
    peaks = {"use_batch_norm": "none", "use_layer_norm": "both", "extra_encoder_kwargs": leaky}
    panel = {str(b): np.ones(len(schema.proteins), bool) for b in range(n_batches)}
    return {
        "scvi": (
            lambda: SCVI(schema, deep),
            lambda: modules.VAE(n_genes, n_batches, encode_covariates=True, **same),
        ),
        "scanvi": (
            lambda: SCANVI(schema, SCANVI.Config(n_layers=2)),
            lambda: modules.SCANVAE(n_genes, n_batches, n_labels, **same),
        ),
        "totalvi": (
            lambda: TotalVI(schema),
            lambda: modules.TOTALVAE(
                n_genes,
                len(schema.proteins),
                n_batches,
                n_cats_per_cov=covariates,
                n_panel=n_batches,
                protein_batch_mask=panel,
            ),
        ),
        "peakvi": (
            lambda: PeakVI(schema),
            lambda: modules.PEAKVAE(n_genes, n_batches, n_cats_per_cov=covariates, n_layers_encoder=2),
        ),
        "poissonvi": (
            lambda: PoissonVI(schema),
            lambda: modules.VAE(
                n_genes, n_batches, n_hidden=20, n_latent=4, gene_likelihood="poisson", **same, **peaks
            ),
        ),
    }


@pytest.mark.parametrize("name", ["scvi", "scanvi", "totalvi", "peakvi", "poissonvi"])
def test_initial_weights_are_distributed_as_upstream_s(modules, make_schema, name):
    schema = make_schema(genes=400, batches=4, labels=5, categorical=(3,), proteins=12)
    made = SimpleNamespace(**dict(zip(("ours", "theirs"), makers(modules, schema)[name], strict=True)))
    ours = [upstream_state(made.ours()) for _ in range(TIMES)]
    theirs = [made.theirs().state_dict() for _ in range(TIMES)]
    assert ours[0].keys() == theirs[0].keys()
    compared = 0
    for tensor, first in theirs[0].items():
        mine, other = (torch.stack([s[tensor].float() for s in states]).numpy() for states in (ours, theirs))
        assert mine.shape == other.shape, tensor
        if not mine.any() and any(part in tensor for part in UNUSED):
            continue
        if np.ptp(other) == 0:
            np.testing.assert_array_equal(mine, other, tensor)
            continue
        # of two samples of n uniform numbers the largest differ by a few n-ths of the bound
        bounds, n = (np.abs(mine).max(), np.abs(other).max()), mine.size
        if n > 200 and "px_r" not in tensor:
            assert bounds[0] == pytest.approx(bounds[1], rel=20 / n), f"{tensor} {tuple(first.shape)}"
        assert ks_2samp(mine.ravel(), other.ravel()).pvalue > 1e-5, f"{tensor} {tuple(first.shape)}"
        compared += 1
    assert compared > 8
