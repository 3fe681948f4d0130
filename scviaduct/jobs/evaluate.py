"""`scviaduct evaluate`."""

from __future__ import annotations

from pathlib import Path

from scviaduct.distributed.config import Reading
from scviaduct.jobs.display import Steps, output
from scviaduct.jobs.embed import Shared


def command(
    model: str,
    data: Path,
    /,
    *,
    n_samples: int = 1,
    n_mc_samples: int | None = None,
    out: Path | None = None,
    seed: int = 0,
    reading: Shared = Reading(),  # noqa: B008 (frozen)
) -> int:
    """Say how well a model explains cells: ELBO, reconstruction error, KL divergence, in nats a cell.

    Args:
        model: A run, a bundle, or a registered model such as models:/kang@current.
        data: An atlas with a view of the model's genes, or an h5ad or another file of counts.
        n_samples: Draws of the latent variables to average.
        n_mc_samples: Draws to estimate the marginal log-likelihood with, e.g. 1000. Default: it is left out.
        out: Store for the numbers of each cell, e.g. evaluation.h5ad.
        seed: Decides the draws.
    """
    from scviaduct.distributed.evaluate import evaluate

    with Steps("evaluate", unit="cells") as steps:
        found = evaluate(
            model,
            data,
            n_samples=n_samples,
            n_mc_samples=n_mc_samples,
            out=out,
            seed=seed,
            reading=reading,
            on_progress=lambda done, n: steps.at(done, "", n),
        )
    told = {"elbo": found.elbo, "reconstruction error": found.reconstruction_error, "kl": found.kl}
    if found.log_likelihood is not None:
        told["log likelihood"] = found.log_likelihood
    output.print(f"{found.cells:,} cells: " + ", ".join(f"{name} {value:,.3f}" for name, value in told.items()))
    return 0
