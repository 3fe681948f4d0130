"""`evaluate`: how well a trained model explains cells, streamed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scviaduct.distributed.config import Reading
from scviaduct.distributed.outputs import Columns, OnProgress, record_of
from scviaduct.distributed.population import open_model, open_population, seeds
from scviaduct.errors import ConfigError
from scviaduct.models.base import Model
from scviaduct.models.counts import Cells
from scviaduct.models.noise import Noise
from scviaduct.schema import Batch
from scviaduct.storage.derived import derived, free_name
from scviaduct.storage.places import Place


@dataclass(frozen=True)
class Evaluation:
    """Means over the cells, in nats."""

    cells: int
    elbo: float
    """log p(x | z) - KL, a lower bound of log p(x); a run's history has its negative."""
    reconstruction_error: float
    """-log p(x | z)."""
    kl: float
    """KL(q(z | x) || p(z)), unweighted, with what else the model counts as KL."""
    log_likelihood: float | None = None
    """log p(x) by importance sampling, when it was asked for."""


def evaluate(
    model: str | Path,
    data: str | Place,
    *,
    n_samples: int = 1,
    n_mc_samples: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    on_progress: OnProgress = lambda done, n: None,
) -> Evaluation:
    """ELBO, reconstruction error and marginal log-likelihood of cells: scvi-tools' get_elbo and its sisters.

    `n_samples` draws of the latent variables are averaged for ELBO and reconstruction error. With `n_mc_samples`, say
    1000, log p(x) is estimated as the log of the mean of p(x, z) / q(z | x) over so many draws. `out`, an h5ad or Zarr
    store, gets the numbers of each cell in obs.

    Raises as `embed`; ConfigError when a number of samples is below 1, or the model defines no p(x).
    """
    out = free_name(out) if out is not None else None
    for name, value in (("n_samples", n_samples), ("n_mc_samples", n_mc_samples)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    net, bundle = open_model(model, reading)
    population = open_population(data, net.schema, reading)
    columns, sums, n_cells = Columns(population), dict[str, float](), population.source.n_rows
    for batch in population.blocks(len(net.schema.genes)):
        for name, values in scores(net, batch, seed, n_samples, n_mc_samples).items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
            if out is not None:
                columns.put(name, batch, values)
        on_progress(int(batch.rows[-1]) + 1, n_cells)
    if out is not None:
        with derived(out, population.n_obs) as store:
            uns = record_of(bundle, population) | {
                "n_samples": n_samples,
                "n_mc_samples": n_mc_samples or 0,
                "seed": seed,
            }
            store.describe(columns.table(), pd.DataFrame(index=pd.Index([], dtype=object)), {"scviaduct": uns})
    return Evaluation(n_cells, **{name: total / n_cells for name, total in sums.items()})


def scores(
    model: Model, batch: Batch, seed: int, n_samples: int, n_mc_samples: int | None = None
) -> dict[str, NDArray[np.float64]]:
    """(cells,) values by the names of Evaluation's fields.

    Raises ConfigError when the model defines no p(x) and it is asked for.
    """
    n_cells, n_draws = batch.n_cells, max(n_samples, n_mc_samples or 0)
    log_likelihood, log_sum = np.zeros(n_cells), np.full(n_cells, -np.inf)
    kl = np.zeros(n_cells)
    with model.evaluating():
        cells = Cells.of(batch, model.schema, model.device)
        q = model.inference(cells, None)
        for draw in range(n_draws):
            found = model.score(q, cells, Noise(seeds(batch, seed, draw), model.device))
            by_cell = [values.cpu().double().numpy() for values in found]
            if draw < n_samples:
                log_likelihood += by_cell[0] / n_samples
                kl += by_cell[1] / n_samples
            log_sum = np.logaddexp(log_sum, by_cell[2])
    made = {"elbo": log_likelihood - kl, "reconstruction_error": -log_likelihood, "kl": kl}
    if n_mc_samples is None:
        return made
    if np.isnan(log_sum).any():
        raise ConfigError(
            f"{type(model).__name__} with these options defines no likelihood of the counts; leave out n_mc_samples"
        )
    # where more draws were averaged for the ELBO they count here as well
    return made | {"log_likelihood": log_sum - np.log(n_draws)}
