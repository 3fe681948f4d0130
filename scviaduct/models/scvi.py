"""scVI: Lopez et al., Deep generative modeling for single-cell transcriptomics, Nature Methods 2018.

    z ~ N(0, I)                                            latent cell state
    l = log total counts, or l ~ N(mean_s, var_s)          library size (observed, or latent with a prior per batch s)
    rho = softmax(decoder(z, s))                           expected share of each gene
    x | z, l, s ~ ZINB(exp(l) rho, theta, pi)              or NB, Poisson, Normal

q(z | x) is a normal whose mean and variance are networks of log1p(x). Training maximises the ELBO

    E_q log p(x | z, l, s) - kl_weight KL(q(z | x) || p(z)) - KL(q(l | x) || p(l)),

in which only the first KL is warmed up. Defaults, initialisation and constants are scvi-tools'. Differences: heads that
a likelihood does not use do not exist, covariates are look-ups instead of one-hots, and normalisation statistics are
those of the global batch. `SCARCHES` is the architecture for reference mapping of Lotfollahi et al., Nature Biotechnology 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from scviaduct.errors import ConfigError
from scviaduct.models.base import COUNTS, GENES, Losses, Model, Quantity, Scores, require, require_range
from scviaduct.models.counts import Cells
from scviaduct.models.draws import draw_counts
from scviaduct.models.likelihoods import KINDS, Decoded, over_cells, reconstruction
from scviaduct.models.nets import Columns, Decoder, Encoder, Gaussian, Hidden
from scviaduct.models.noise import Noise
from scviaduct.schema import Batch, Schema

DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")
PLACES = ("none", "encoder", "decoder", "both")

SCARCHES: dict[str, Any] = {
    "n_layers": 2,
    "encode_covariates": True,
    "deeply_inject_covariates": False,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
}
"""Options recommended for references that queries will be mapped onto."""

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "scarches": SCARCHES}
"""Named sets of options: `SCVI.Config(**PRESETS["scarches"])`."""


@dataclass(frozen=True, kw_only=True)
class SCVIConfig:
    """Options of SCVI; names and defaults are those of scvi.model.SCVI."""

    n_hidden: int = 128
    """Units of each hidden layer."""
    n_latent: int = 10
    """Dimensions of the latent space."""
    n_layers: int = 1
    """Hidden layers of the encoder and of the decoder."""
    dropout_rate: float = 0.1
    """Share of hidden units left out in training, encoder only."""
    dispersion: str = "gene"
    """Inverse dispersion per "gene", "gene-batch", "gene-label" or "gene-cell"."""
    gene_likelihood: str = "zinb"
    """Distribution of the counts: "zinb", "nb", "poisson" or "normal"."""
    latent_distribution: str = "normal"
    """"normal", or "ln" for a softmax of it."""
    encode_covariates: bool = False
    """Whether the encoder sees batch and covariates too, not only the decoder."""
    deeply_inject_covariates: bool = True
    """Whether every hidden layer sees the covariates, not only the first."""
    use_batch_norm: str = "both"
    """Where to normalise over the batch: "none", "encoder", "decoder" or "both"."""
    use_layer_norm: str = "none"
    """Where to normalise over the units of a cell: "none", "encoder", "decoder" or "both"."""
    use_observed_lib_size: bool = True
    """Whether the library size is the observed total; otherwise it is a latent variable with a prior per batch."""

    def __post_init__(self) -> None:
        for name in ("n_hidden", "n_latent", "n_layers"):
            require_range(getattr(self, name), 1, 100_000, name)
        require_range(self.dropout_rate, 0.0, 0.99, "dropout_rate")
        require(self.dispersion, DISPERSIONS, "dispersion")
        require(self.gene_likelihood, tuple(KINDS), "gene_likelihood")
        require(self.latent_distribution, ("normal", "ln"), "latent_distribution")
        require(self.use_batch_norm, PLACES, "use_batch_norm")
        require(self.use_layer_norm, PLACES, "use_layer_norm")


def library_prior(library: ArrayLike, batch_index: ArrayLike, n_batches: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of log total counts per batch; 0 and 1 for a batch without cells.

    Args:
        library: (cells,) total counts; a cell without counts enters with log 0 := 0, as in scvi-tools.
        batch_index: (cells,) batch codes.
        n_batches: number of batches.
    """
    totals, codes = np.asarray(library, np.float64), np.asarray(batch_index)
    logs = np.log(np.where(totals > 0, totals, 1.0))
    groups = [logs[codes == s] for s in range(n_batches)]
    means = [float(g.mean()) if len(g) else 0.0 for g in groups]
    variances = [float(g.var()) if len(g) else 1.0 for g in groups]
    return torch.tensor(means), torch.tensor(variances)


class SCVI(Model):
    """The model; see the module's docstring."""

    Config = SCVIConfig
    obsm_key = "X_scVI"
    quantities: ClassVar = {"expression": GENES, "counts": COUNTS}
    negative_slope: ClassVar[float] = 0.0
    """Of the networks' activation: ReLU."""
    config: SCVIConfig
    library_log_means: Tensor
    library_log_vars: Tensor

    def __init__(self, schema: Schema, config: SCVIConfig | None = None) -> None:
        super().__init__(schema, config or SCVIConfig())
        c, n_genes = self.config, len(schema.genes)
        n_continuous = len(schema.continuous) * c.encode_covariates
        self.z_encoder = Encoder(n_genes, n_continuous, c.n_latent, self._hidden("encoder", c.n_layers))
        self.l_encoder: Encoder | None = None
        if self.models_library:
            self.l_encoder = Encoder(n_genes, n_continuous, 1, self._hidden("encoder", 1))
            self.register_buffer("library_log_means", torch.full((len(schema.batch),), torch.nan))
            self.register_buffer("library_log_vars", torch.full((len(schema.batch),), torch.nan))
        self.px_r = self._dispersion()
        heads = ["scale"] + ["zi"] * (c.gene_likelihood == "zinb") + ["px_r"] * self._has_px_r("gene-cell")
        n_in = c.n_latent + len(schema.continuous)
        self.decoder = Decoder(n_in, n_genes, self._hidden("decoder", c.n_layers), heads)

    @property
    def models_library(self) -> bool:
        """Whether the library size is a latent variable, so that `set_library_prior` must be called."""
        return not self.config.use_observed_lib_size and self.schema.size_factor is None

    def _has_px_r(self, dispersion: str) -> bool:
        return self.config.gene_likelihood != "poisson" and self.config.dispersion == dispersion

    def _hidden(self, where: str, n_layers: int) -> Hidden:
        c, encoder = self.config, where == "encoder"
        seen = self.schema.covariates if c.encode_covariates or not encoder else ()
        return Hidden(
            n_hidden=c.n_hidden,
            n_layers=n_layers,
            dropout_rate=c.dropout_rate if encoder else 0.0,
            batch_norm=c.use_batch_norm in (where, "both"),
            layer_norm=c.use_layer_norm in (where, "both"),
            n_categories=tuple(len(covariate) for covariate in seen),
            deep=c.deeply_inject_covariates,
            negative_slope=self.negative_slope,
        )

    def _dispersion(self) -> nn.Module | nn.Parameter | None:
        n_genes, labels = len(self.schema.genes), self.schema.labels
        if self._has_px_r("gene"):
            return nn.Parameter(torch.randn(n_genes))
        if self._has_px_r("gene-batch"):
            columns = Columns(0, len(self.schema.batch), n_genes, single=True)
            columns.weight = nn.Parameter(torch.randn(len(self.schema.batch), n_genes))
            return columns
        if self._has_px_r("gene-label"):
            if labels is None:
                raise ConfigError('dispersion="gene-label" needs labels; name them with labels_key, or use "gene"')
            return nn.Parameter(torch.randn(len(labels) + 1, n_genes))  # the last row: cells without a label
        return None

    def set_library_prior(self, log_means: Tensor, log_vars: Tensor) -> None:
        """Give the library's prior, (batches,) each, to the batches that have none yet: all, or a query's new ones.

        Raises:
            ConfigError: the numbers are not as many as the batches without a prior.
        """
        unknown = torch.isnan(self.library_log_means)
        if len(log_means) != int(unknown.sum()) or len(log_vars) != len(log_means):
            raise ConfigError(f"{int(unknown.sum())} batches lack a library prior, {len(log_means)} were given")
        self.library_log_means[unknown] = log_means.to(self.library_log_means)
        self.library_log_vars[unknown] = log_vars.to(self.library_log_vars)

    def inference(self, cells: Cells, noise: Noise | None) -> tuple[Gaussian, Gaussian | None]:
        """q(z | x) and, where it is modelled, q(l | x)."""
        return self.z_encoder(cells, noise), self.l_encoder(cells, noise) if self.l_encoder is not None else None

    def generative(self, z: Tensor, library: Tensor, cells: Cells) -> Decoded:
        """p(x | z, l, s) from z (cells, latent) and the log library (cells,)."""
        if self.config.latent_distribution == "ln":
            z = torch.softmax(z, 1)
        if self.schema.continuous:
            z = torch.cat([z, cells.continuous], 1)
        heads = self.decoder(z, cells.codes)
        px_r = heads.get("px_r", self._px_r(cells))
        return Decoded(heads["scale"], library, px_r, heads.get("zi"), self.schema.size_factor is not None)

    def _px_r(self, cells: Cells) -> Tensor | None:
        """Log inverse dispersion: (genes,) or (cells, genes)."""
        table = self.px_r.table() if isinstance(self.px_r, Columns) else cast("Tensor | None", self.px_r)
        if table is None or table.dim() == 1:
            return table
        codes = cells.codes[0] if isinstance(self.px_r, Columns) else cells.labels
        return F.embedding(torch.where(codes < 0, len(table) - 1, codes), table)

    def _observed_library(self, cells: Cells) -> Tensor:
        """(cells,) log of the size factor, or of the total counts (-inf for a cell without any)."""
        return torch.log(cells.size_factor if self.schema.size_factor else cells.counts.total)

    def _library_prior(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """(cells, 1) mean and standard deviation of the log library."""
        mean, var = self.library_log_means[cells.codes[0]], self.library_log_vars[cells.codes[0]]
        if torch.isnan(mean).any():
            raise ConfigError("The library's prior is unknown for a batch; call set_library_prior before training")
        return mean.unsqueeze(1), var.sqrt().unsqueeze(1)

    def _library_kl(self, ql: Gaussian, cells: Cells) -> Tensor:
        return ql.kl(*self._library_prior(cells))

    def _point(self, q: tuple[Gaussian, Gaussian | None], cells: Cells, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """Z (cells, latent) and the log library (cells,): a draw from the posterior, or its means."""
        qz, ql = q
        z = qz.mean if noise is None else qz.sample(noise)
        if ql is None:
            return z, self._observed_library(cells)
        return z, (ql.mean if noise is None else ql.sample(noise)).squeeze(1)

    def forward(self, batch: Batch, kl_weight: float = 1.0, noise: Noise | None = None) -> Losses:
        """The negative ELBO of a batch."""
        cells = Cells.of(batch, self.schema, self.device)
        noise = noise or Noise(batch.seeds, self.device)
        qz, ql = self.inference(cells, noise)
        px = self.generative(*self._point((qz, ql), cells, noise), cells)
        rec, kl_z = reconstruction(self.config.gene_likelihood, cells.counts, px), qz.kl()
        loss, kl = rec.mean + kl_weight * over_cells(kl_z), kl_z.detach().sum()
        if ql is None:
            return Losses(loss, rec.total, kl, batch.n_cells)
        kl_l = self._library_kl(ql, cells)
        return Losses(loss + over_cells(kl_l), rec.total, kl + kl_l.detach().sum(), batch.n_cells)

    def encode(self, batch: Batch) -> Gaussian:
        """q(z | x) of each cell, (cells, n_latent); under "ln" the normal before its softmax."""
        with self.evaluating():
            return self.z_encoder(Cells.of(batch, self.schema, self.device), None)

    def expression(self, batch: Batch) -> Decoded:
        """p(x | z, l, s) of each cell, at the mean of q(z | x) and of q(l | x)."""
        with self.evaluating():
            cells = Cells.of(batch, self.schema, self.device)
            return self.generative(*self._point(self.inference(cells, None), cells, None), cells)

    def decode(
        self, quantity: Quantity, q: tuple[Gaussian, Gaussian | None], cells: Cells, noise: Noise | None
    ) -> Tensor:
        """Normalised expression: rho (scvi-tools' get_normalized_expression); or counts drawn from p(x | z, l, s)."""
        px = self.generative(*self._point(q, cells, noise), cells)
        if quantity.name == "counts" and noise is not None:
            return draw_counts(self.config.gene_likelihood, px, noise)[:, quantity.chosen]
        return px.scaled(quantity.library_size)[:, quantity.chosen]

    def score(self, q: tuple[Gaussian, Gaussian | None], cells: Cells, noise: Noise) -> Scores:
        """log p(x | z, l, s), and the KL divergences of z and of l where it is modelled."""
        qz, ql = q
        z, library = self._point(q, cells, noise)
        rec = reconstruction(self.config.gene_likelihood, cells.counts, self.generative(z, library, cells))
        kl, ratio = qz.kl(), qz.log_ratio(z)
        if ql is not None:
            prior = self._library_prior(cells)
            kl, ratio = kl + ql.kl(*prior), ratio + ql.log_ratio(library.unsqueeze(1), *prior)
        return Scores(-rec.per_cell, kl, ratio - rec.per_cell)
