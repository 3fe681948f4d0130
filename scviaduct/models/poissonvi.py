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

from torch import Tensor, nn

from scviaduct.models.base import COUNTS, Offer, Quantity, require, require_range
from scviaduct.models.counts import Cells
from scviaduct.models.nets import Gaussian
from scviaduct.models.noise import Noise
from scviaduct.models.peakvi import LEAKY, PLAN, require_sizes, sizes
from scviaduct.models.scvi import SCVI, SCVIConfig
from scviaduct.schema import Schema


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
    plan = PLAN
    quantities: ClassVar = {"accessibility": Offer("genes", ("library_size", "normalize_regions")), "counts": COUNTS}
    negative_slope = LEAKY

    def __init__(self, schema: Schema, config: PoissonVIConfig | None = None) -> None:
        c = config or PoissonVIConfig()
        n_hidden, n_latent = sizes(len(schema.genes), c.n_hidden, c.n_latent)
        # SCVI reads options by name: a PoissonVIConfig has all of them, the fixed ones as class variables
        super().__init__(schema, cast(SCVIConfig, replace(c, n_hidden=n_hidden, n_latent=n_latent)))

    def region_factors(self) -> Tensor:
        """(regions,) log factor of each region: scvi-tools' get_region_factors."""
        return cast(nn.Linear, self.decoder.heads["scale"]).bias.detach()

    def of_genes(self) -> dict[str, Tensor]:
        """The regions' log factors."""
        return {"region_factor": self.region_factors()}

    def decode(
        self, quantity: Quantity, q: tuple[Gaussian, Gaussian | None], cells: Cells, noise: Noise | None
    ) -> Tensor:
        """Expected fragments: scvi-tools' get_normalized_accessibility; or fragments drawn from p(x | z, s)."""
        if quantity.name == "counts" or quantity.normalize_regions:
            return super().decode(quantity, q, cells, noise)
        px = self.generative(*self._point(q, cells, noise), cells)
        px = px._replace(logits=px.logits - self.region_factors())
        return px.scaled(quantity.library_size)[:, quantity.chosen]
