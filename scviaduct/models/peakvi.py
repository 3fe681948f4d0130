"""PeakVI: Ashuach et al., PeakVI: A deep generative model for single-cell chromatin accessibility analysis, 2022.

    z ~ N(0, I)                                            latent cell state
    p = sigmoid(decoder(z, s))                             accessibility of each region in batch s
    d = sigmoid(depth encoder(x)), f_r = sigmoid(rho_r)    depth of the cell, factor of the region
    region r is seen ~ Bernoulli(p d f)                    whatever its count is

q(z | x) is a normal whose mean and variance are networks of the counts, which need not be binary: as in scvi-tools only the
likelihood looks no further than x > 0, and `encoder_input="binary"` makes the encoder do the same. Layers, constants and
defaults are scvi-tools'. `Schema.genes` are the regions.

The loss is the negative ELBO per cell. That of scvi-tools is n sum(-log p) + kl_weight sum(KL) for a batch of n cells:
n**2 times ours at kl_weight / n. Its KL divergence therefore weighs 1/128 at its batch size of 128, and another amount at
another size. Here the weight is what the caller says, and a batch may be spread over workers.

On CPUs the first layer multiplies sparse counts, once for both encoders, and no array of (cells, regions) is made: see
bernoulli.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scviaduct.errors import ConfigError
from scviaduct.models.base import COUNTS, Losses, Model, Offer, Quantity, Scores, require, require_range
from scviaduct.models.bernoulli import Factors, bernoulli
from scviaduct.models.counts import Cells
from scviaduct.models.likelihoods import Reconstruction, over_cells
from scviaduct.models.nets import CategoricalLinear, CountsLinear, FCLayers, Gaussian, Given, Hidden, Linear
from scviaduct.models.noise import Noise
from scviaduct.models.scvi import PLACES
from scviaduct.models.training import TrainingPlan
from scviaduct.schema import Batch, Schema

LEAKY = 0.01
"""torch's LeakyReLU."""


PLAN = TrainingPlan(
    max_epochs=500,
    optimizer="AdamW",
    lr=1e-4,
    eps=1e-8,
    weight_decay=1e-3,
    n_epochs_kl_warmup=50,
    early_stopping=True,
    early_stopping_monitor="reconstruction",
    early_stopping_patience=50,
)
"""That of PEAKVI.train, which POISSONVI shares."""


@dataclass(frozen=True, kw_only=True)
class PeakVIConfig:
    """Options of PeakVI; names and defaults are those of scvi.model.PEAKVI."""

    n_hidden: int | None = None
    """Units of each hidden layer; None for the square root of the number of regions."""
    n_latent: int | None = None
    """Dimensions of the latent space; None for the square root of n_hidden."""
    n_layers_encoder: int = 2
    """Hidden layers of the encoder, and of the depth's."""
    n_layers_decoder: int = 2
    """Hidden layers of the decoder."""
    dropout_rate: float = 0.1
    """Share of hidden units left out in training, encoder of z only."""
    model_depth: bool = True
    """Whether each cell has a depth."""
    region_factors: bool = True
    """Whether each region has a factor."""
    use_batch_norm: str = "none"
    """Where to normalise over the batch: "none", "encoder", "decoder" or "both"."""
    use_layer_norm: str = "both"
    """Where to normalise over the units of a cell: "none", "encoder", "decoder" or "both"; the depth's encoder always does."""
    latent_distribution: str = "normal"
    """"normal", or "ln" for a softmax of it."""
    deeply_inject_covariates: bool = False
    """Whether every hidden layer of the decoder sees the covariates, not only the first."""
    encode_covariates: bool = False
    """Whether the encoders see batch and covariates too, not only the decoder."""
    encoder_input: str = "counts"
    """What the encoders see of a region: its "counts", as in scvi-tools, or only whether it has any ("binary")."""

    def __post_init__(self) -> None:
        require_sizes(self.n_hidden, self.n_latent)
        require_range(self.n_layers_encoder, 1, 100, "n_layers_encoder")
        require_range(self.n_layers_decoder, 1, 100, "n_layers_decoder")
        require_range(self.dropout_rate, 0.0, 0.99, "dropout_rate")
        require(self.use_batch_norm, PLACES, "use_batch_norm")
        require(self.use_layer_norm, PLACES, "use_layer_norm")
        require(self.latent_distribution, ("normal", "ln"), "latent_distribution")
        require(self.encoder_input, ("counts", "binary"), "encoder_input")


def require_sizes(n_hidden: int | None, n_latent: int | None) -> None:
    """Raise ConfigError unless the widths are None or at least 1."""
    for name, value in (("n_hidden", n_hidden), ("n_latent", n_latent)):
        if value is not None:
            require_range(value, 1, 100_000, name)


def sizes(n_regions: int, n_hidden: int | None, n_latent: int | None) -> tuple[int, int]:
    """The n_hidden and n_latent to use: the square root of the regions, and of that, where they are None."""
    n_hidden = n_hidden or math.isqrt(n_regions)
    return n_hidden, n_latent or math.isqrt(n_hidden)


class PeakVI(Model):
    """The model; see the module's docstring. `config` holds the widths that were chosen for its regions."""

    Config = PeakVIConfig
    obsm_key = "X_PeakVI"
    plan = replace(PLAN, max_kl_weight=1 / 128)  # what upstream's sum over cells makes of 1 at its batch size
    quantities: ClassVar = {"accessibility": Offer("genes", ("normalize_cells", "normalize_regions")), "counts": COUNTS}
    config: PeakVIConfig

    def __init__(self, schema: Schema, config: PeakVIConfig | None = None) -> None:
        c, n_regions = config or PeakVIConfig(), len(schema.genes)
        n_hidden, n_latent = sizes(n_regions, c.n_hidden, c.n_latent)
        super().__init__(schema, replace(c, n_hidden=n_hidden, n_latent=n_latent))
        n_continuous = len(schema.continuous)
        encoder, decoder = self._hidden("encoder", n_hidden), self._hidden("decoder", n_hidden)
        seen, both = n_continuous * c.encode_covariates, n_hidden * (1 + c.model_depth)
        self.input = CountsLinear(n_regions, both, seen, encoder.n_categories, c.encoder_input)
        self.encoder = FCLayers(Given(), encoder)
        self.mean_and_log_var = Linear(n_hidden, 2 * n_latent)
        self.depth_encoder = FCLayers(Given(), self._hidden("depth", n_hidden)) if c.model_depth else None
        self.depth_output = Linear(n_hidden, 1) if c.model_depth else None
        first = CategoricalLinear(n_latent + n_continuous, n_hidden, decoder.n_categories)
        self.decoder = FCLayers(first, decoder)
        self.output = nn.Linear(n_hidden, n_regions)
        self.region_logits = nn.Parameter(torch.zeros(n_regions)) if c.region_factors else None

    def _hidden(self, where: str, n_hidden: int) -> Hidden:
        """Layers of the encoder, of the decoder, or of the depth's encoder, which has options of its own."""
        c, encodes = self.config, where != "decoder"
        seen = self.schema.covariates if c.encode_covariates or not encodes else ()
        return Hidden(
            n_hidden=n_hidden,
            n_layers=c.n_layers_encoder if encodes else c.n_layers_decoder,
            dropout_rate=c.dropout_rate if where == "encoder" else 0.0,
            batch_norm=where != "depth" and c.use_batch_norm in (where, "both"),
            layer_norm=where == "depth" or c.use_layer_norm in (where, "both"),
            n_categories=tuple(len(covariate) for covariate in seen),
            deep=where == "encoder" or (where == "decoder" and c.deeply_inject_covariates),
            negative_slope=LEAKY,
        )

    def inference(self, cells: Cells, noise: Noise | None) -> tuple[Gaussian, Tensor | None]:
        """q(z | x), and the (cells,) logit of the depth where it is modelled."""
        h, *rest = self.input(cells, cells.codes).chunk(1 + self.config.model_depth, dim=1)
        h = self.encoder(h.contiguous(), cells.codes, noise)
        mean, log_var = self.mean_and_log_var(h).chunk(2, dim=1)
        qz = Gaussian(mean, torch.exp(0.5 * log_var))
        if self.depth_encoder is None or self.depth_output is None:
            return qz, None
        return qz, self.depth_output(self.depth_encoder(rest[0].contiguous(), cells.codes, None)).squeeze(1)

    def generative(self, z: Tensor, cells: Cells) -> Tensor:
        """(cells, n_hidden) what `output` turns into the regions' logits, from z (cells, n_latent)."""
        if self.config.latent_distribution == "ln":
            z = torch.softmax(z, 1)
        if self.schema.continuous:
            z = torch.cat([z, cells.continuous], 1)
        return self.decoder(z, cells.codes, None)

    def _reconstruction(self, z: Tensor, depth: Tensor | None, cells: Cells) -> Reconstruction:
        """-log p(x | z, s)."""
        factors = Factors(depth, cast("Tensor | None", self.region_logits))
        return bernoulli(cells.counts, self.generative(z, cells), self.output.weight, self.output.bias, factors)

    def forward(self, batch: Batch, kl_weight: float = 1.0, noise: Noise | None = None) -> Losses:
        """The negative ELBO of a batch."""
        cells = Cells.of(batch, self.schema, self.device)
        noise = noise or Noise(batch.seeds, self.device)
        qz, depth = self.inference(cells, noise)
        rec, kl = self._reconstruction(qz.sample(noise), depth, cells), qz.kl()
        return Losses(rec.mean + kl_weight * over_cells(kl), rec.total, kl.detach().sum(), batch.n_cells)

    def encode(self, batch: Batch) -> Gaussian:
        """q(z | x) of each cell, (cells, n_latent); under "ln" the normal before its softmax."""
        with self.evaluating():
            return self.inference(Cells.of(batch, self.schema, self.device), None)[0]

    def decode(
        self, quantity: Quantity, q: tuple[Gaussian, Tensor | None], cells: Cells, noise: Noise | None
    ) -> Tensor:
        """Probability that a region is accessible (scvi-tools' get_normalized_accessibility), or 0 and 1 drawn with p d f.

        Under "ln" scvi-tools' decoder gets the mean without the softmax, ours with it.
        """
        qz, depth = q
        h = self.generative(qz.mean if noise is None else qz.sample(noise), cells)
        p = torch.sigmoid(F.linear(h, self.output.weight[quantity.chosen], self.output.bias[quantity.chosen]))
        drawn = quantity.name == "counts"
        if (drawn or quantity.normalize_cells) and depth is not None:
            p = p * torch.sigmoid(depth).unsqueeze(1)
        if (drawn or quantity.normalize_regions) and self.region_logits is not None:
            p = p * self.region_factors()[quantity.chosen]
        return _drawn(p, quantity, noise) if drawn and noise is not None else p

    def score(self, q: tuple[Gaussian, Tensor | None], cells: Cells, noise: Noise) -> Scores:
        """log p(x | z, s), and the KL divergence of z."""
        qz, depth = q
        z = qz.sample(noise)
        log_likelihood = -self._reconstruction(z, depth, cells).per_cell
        return Scores(log_likelihood, qz.kl(), log_likelihood + qz.log_ratio(z))

    def of_cells(self, batch: Batch) -> dict[str, Tensor]:
        """The cells' depths, where they are modelled."""
        return {"depth": self.depths(batch)} if self.config.model_depth else {}

    def of_genes(self) -> dict[str, Tensor]:
        """The regions' factors, where they are modelled."""
        return {"region_factor": self.region_factors()} if self.config.region_factors else {}

    def depths(self, batch: Batch) -> Tensor:
        """(cells,) depth of each cell, in (0, 1): scvi-tools' get_library_size_factors.

        Raises:
            ConfigError: the model has none.
        """
        with self.evaluating():
            depth = self.inference(Cells.of(batch, self.schema, self.device), None)[1]
        if depth is None:
            raise ConfigError("This PeakVI has no depths; train one with model_depth=True")
        return torch.sigmoid(depth)

    def region_factors(self) -> Tensor:
        """(regions,) factor of each region, in (0, 1): scvi-tools' get_region_factors.

        Raises:
            ConfigError: the model has none.
        """
        if self.region_logits is None:
            raise ConfigError("This PeakVI has no region factors; train one with region_factors=True")
        return torch.sigmoid(self.region_logits.detach())


def _drawn(p: Tensor, quantity: Quantity, noise: Noise) -> Tensor:
    """0 and 1, (cells, regions); a region's draw is the same whichever others are wanted."""
    position = torch.arange(p.shape[1]) if quantity.features is None else torch.tensor(quantity.features)
    uniform = noise.uniform(int(position.max()) + 1)[:, position.to(p.device)]
    return (uniform < p).to(p.dtype)
