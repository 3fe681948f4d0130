"""PoissonVI: Martens et al., Modeling fragment counts improves single-cell ATAC-seq analysis, Nature Methods 2024.

    z ~ N(0, I)                                            latent cell state
    rho = softmax(decoder(z, s))                           expected share of each region
    x | z, s ~ Poisson(total fragments * rho)

SCVI with a Poisson likelihood on fragment counts (not reads: those come in pairs), layer norms instead of batch norms,
LeakyReLU, and widths that follow the number of regions; defaults are those of scvi.external.POISSONVI. The bias of the
decoder's last layer is the regions' factor. `Schema.genes` are the regions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
from torch import Tensor, nn

from scviaduct.models.base import require, require_range
from scviaduct.models.peakvi import LEAKY, require_sizes, sizes
from scviaduct.models.scvi import SCVI, SCVIConfig
from scviaduct.schema import Batch, Schema


@dataclass(frozen=True, kw_only=True)
class PoissonVIConfig:
    """Options of PoissonVI; names and defaults are those of scvi.external.POISSONVI."""

    n_hidden: int | None = None
    """Units of each hidden layer; None for the square root of the number of regions."""
    n_latent: int | None = None
    """Dimensions of the latent space; None for the square root of n_hidden."""
    n_layers: int = 2
    """Hidden layers of the encoder and of the decoder."""
    dropout_rate: float = 0.1
    """Share of hidden units left out in training, encoder only."""
    latent_distribution: str = "normal"
    """"normal", or "ln" for a softmax of it."""
    encode_covariates: bool = False
    """Whether the encoder sees batch and covariates too, not only the decoder."""
    deeply_inject_covariates: bool = True
    """Whether every hidden layer sees the covariates, not only the first."""

    gene_likelihood: ClassVar[str] = "poisson"
    dispersion: ClassVar[str] = "gene"  # a Poisson has none
    use_batch_norm: ClassVar[str] = "none"
    use_layer_norm: ClassVar[str] = "both"
    use_observed_lib_size: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_sizes(self.n_hidden, self.n_latent)
        require_range(self.n_layers, 1, 100, "n_layers")
        require_range(self.dropout_rate, 0.0, 0.99, "dropout_rate")
        require(self.latent_distribution, ("normal", "ln"), "latent_distribution")


class PoissonVI(SCVI):
    """The model; see the module's docstring. `config` holds the widths that were chosen for its regions."""

    Config = PoissonVIConfig  # type: ignore[assignment]
    obsm_key = "X_PoissonVI"
    negative_slope = LEAKY

    def __init__(self, schema: Schema, config: PoissonVIConfig | None = None) -> None:
        c = config or PoissonVIConfig()
        n_hidden, n_latent = sizes(len(schema.genes), c.n_hidden, c.n_latent)
        # SCVI reads options by name: a PoissonVIConfig has all of them, the fixed ones as class variables
        super().__init__(schema, cast(SCVIConfig, replace(c, n_hidden=n_hidden, n_latent=n_latent)))

    def region_factors(self) -> Tensor:
        """(regions,) log factor of each region: scvi-tools' get_region_factors."""
        return cast(nn.Linear, self.decoder.heads["scale"]).bias.detach()

    def accessibility(
        self,
        batch: Batch,
        z: Tensor | None = None,
        *,
        library_size: float | str = 1.0,
        normalize_regions: bool = False,
        transform_batch: int | None = None,
    ) -> Tensor:
        """(cells, regions) expected fragments, at the mean of q(z | x) unless z (cells, n_latent) is given.

        scvi-tools' get_normalized_accessibility.

        Args:
            batch: the cells.
            z: where to decode; under "ln" before the softmax.
            library_size: fragments per cell, or "latent" for the cells' own number.
            normalize_regions: keep the regions' factors, which brings the estimate closer to what is observed.
            transform_batch: code of the batch to decode for; None for the cells' own.
        """
        z = self.encode(batch).mean if z is None else z
        if transform_batch is not None:
            batch = replace(batch, batch_index=np.full(batch.n_cells, transform_batch))
        px = self.expression(batch, z)
        if not normalize_regions:
            px = px._replace(logits=px.logits - self.region_factors())
        return px.rate if library_size == "latent" else px.scale * cast(float, library_size)
