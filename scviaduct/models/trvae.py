"""trVAE: Lotfollahi et al., Conditional out-of-distribution generation for unpaired data using transfer VAE, 2020.

    z ~ N(0, I)                                            latent cell state
    y = first hidden layer of the decoder(z, s)            s: the condition, here the schema's batch covariate
    rho = softmax(further layers(y))                       expected share of each gene
    x | z, s ~ NB(size * rho, theta_s)                     or ZINB; size: total counts, or the schema's size factor

A conditional VAE whose loss, beside -log p(x | z, s) + kl_weight KL(q(z | x, s) || p(z)), has the maximum mean discrepancy
between the conditions in z or in y, so that conditions overlap where the decoder has not yet told them apart. With
`recon_loss="mse"` values take the place of counts, and their mean is ReLU(further layers(y)).

Layers, constants, initialisation and defaults are those of scArches' trVAE: conditions enter the two first layers, the
decoder's hidden layers have no bias, every condition has a dispersion of its own. With one condition the network is the
same. Further categorical and continuous covariates, which the original has not, enter beside the condition; the MMD does
not compare them. `n_latent`, `dropout_rate`, `use_batch_norm` and `use_layer_norm` are named as in SCVI (scArches:
`latent_dim`, `dr_rate`, `use_bn`, `use_ln`); the other names are scArches'. Its trainer's defaults are not the loop's:
weight decay is 0.04 there, and conditions are drawn equally often.

The MMD is that of the global batch, however it is spread over processes (docs/decisions/0018). In evaluation mode the loss
is without it: its value depends on which cells share a batch, and a validation loss must not.

Surgery (`surgery.extend`) trains the new conditions' rows of the two first layers and of theta, and the MMD goes on between
the query's conditions. Upstream makes the rows of all conditions trainable: its default weight decay shrinks those of the
reference, and those of a condition that is in the query too are trained away. Its batch norms use the statistics of the
query's batches while it trains and the reference's afterwards. Here the reference's rows are no parameters, and batch norms
use the reference's statistics throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from scviaduct.errors import ConfigError
from scviaduct.models.base import COUNTS, GENES, Losses, Model, Quantity, Scores, require, require_range
from scviaduct.models.counts import Cells, Counts
from scviaduct.models.draws import draw_counts
from scviaduct.models.likelihoods import Decoded, Reconstruction, over_cells, reconstruction, squared_errors
from scviaduct.models.mmd import mmd
from scviaduct.models.nets import (
    BatchNorm,
    Blocks,
    CategoricalLinear,
    Columns,
    CountsLinear,
    Gaussian,
    Hidden,
    HiddenLayer,
    Linear,
)
from scviaduct.models.noise import Noise
from scviaduct.models.training import TrainingPlan
from scviaduct.schema import Batch, Schema

_VAR_EPS = 1e-4
_PLACES = ("none", "encoder", "decoder", "both")


@dataclass(frozen=True, kw_only=True)
class TRVAEConfig:
    """Options of TRVAE; defaults are scArches'."""

    hidden_layer_sizes: tuple[int, ...] = (256, 64)
    """Units of the encoder's hidden layers; the decoder has them in reverse."""
    n_latent: int = 10
    """Dimensions of the latent space."""
    dropout_rate: float = 0.05
    """Share of hidden units left out in training, encoder and decoder."""
    recon_loss: str = "nb"
    """What is compared with the data: "nb" or "zinb" likelihood of the counts, or "mse" of log-normalised values."""
    target_sum: float = 10_000.0
    """"mse" only: counts are scaled to this total per cell and log1p-transformed; 0 takes the values as they are."""
    use_mmd: bool = True
    """Whether the MMD between conditions is part of the loss."""
    mmd_on: str = "z"
    """What the MMD compares: "z", the latent state, or "y", the decoder's first hidden layer."""
    mmd_boundary: int | None = None
    """Compare only conditions with a code below this with those from it on, instead of all pairs."""
    beta: float = 1.0
    """Weight of the MMD."""
    use_batch_norm: str = "none"
    """Where to normalise over the batch: "none", "encoder", "decoder" or "both"."""
    use_layer_norm: str = "both"
    """Where to normalise over the units of a cell: "none", "encoder", "decoder" or "both"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_layer_sizes", tuple(self.hidden_layer_sizes))  # JSON has no tuples
        if not self.hidden_layer_sizes:
            raise ConfigError("hidden_layer_sizes is empty; give the units of at least one layer, e.g. 128")
        for width in self.hidden_layer_sizes:
            require_range(width, 1, 100_000, "hidden_layer_sizes")
        require_range(self.n_latent, 1, 100_000, "n_latent")
        require_range(self.dropout_rate, 0.0, 0.99, "dropout_rate")
        require(self.recon_loss, ("nb", "zinb", "mse"), "recon_loss")
        require_range(self.target_sum, 0.0, 1e9, "target_sum")
        require(self.mmd_on, ("z", "y"), "mmd_on")
        if self.mmd_boundary is not None:
            require_range(self.mmd_boundary, 1, 2**24, "mmd_boundary")
        require_range(self.beta, 0.0, 1e6, "beta")
        require(self.use_batch_norm, _PLACES, "use_batch_norm")
        require(self.use_layer_norm, _PLACES, "use_layer_norm")


class _BatchNorm(BatchNorm):
    """With torch's constants, not scvi-tools'."""

    momentum, eps = 0.1, 1e-5


class _ValuesLinear(CountsLinear):
    """The encoder's first layer on values instead of log1p(counts)."""

    target_sum = 0.0

    def seen(self, counts: Counts) -> NDArray[np.float32]:
        """(nnz,) what the encoder sees of the counts."""
        return values(counts, self.target_sum)


def values(counts: Counts, target_sum: float) -> NDArray[np.float32]:
    """(nnz,) log1p of the counts scaled to `target_sum` per cell; what is stored where `target_sum` is 0."""
    x = counts.nonzeros
    if target_sum == 0.0:
        return x.counts
    totals = np.repeat(counts.total.cpu().numpy(), np.diff(x.indptr))
    totals[totals == 0] = 1.0  # of zeros that are stored
    return np.log1p(x.counts * (np.float32(target_sum) / totals))


def _layer(linear: nn.Module, width: int, hidden: Hidden) -> HiddenLayer:
    layer = HiddenLayer(linear, replace(hidden, n_hidden=width))
    layer.batch_norm = _BatchNorm(width) if hidden.batch_norm else None
    return layer


class Layers(nn.Module):
    """Hidden layers on top of a given first linear map, the only one that sees the covariates."""

    def __init__(self, first: nn.Module, widths: Sequence[int], hidden: Hidden, *, bias: bool) -> None:
        super().__init__()
        further = [CategoricalLinear(n, m, (), bias=bias) for n, m in pairwise(widths)]
        self.layers = nn.ModuleList(_layer(*pair, hidden) for pair in zip((first, *further), widths, strict=True))

    def forward(self, x: Any, codes: Sequence[Tensor], noise: Noise | None) -> tuple[Tensor, Tensor]:
        """Input of the first map to the first and the last layer's output."""
        first = h = self.layers[0](x, codes, noise)
        for layer in self.layers[1:]:
            h = layer(h, codes, noise)
        return first, h


def _start_as_two(linear: CountsLinear | CategoricalLinear, n_in: int, n_categories: Sequence[int]) -> None:
    """A row per category even of a single one, and the start of two Linears: features and conditions by their own number."""
    linear.columns = Blocks(n_categories, linear.weight.shape[isinstance(linear, CountsLinear)], single=True)
    for name, tensor in linear.named_parameters():
        bound = (len(tensor) if name.startswith("columns") else n_in) ** -0.5
        nn.init.uniform_(tensor, -bound, bound)


class TRVAE(Model):
    """The model; see the module's docstring."""

    Config = TRVAEConfig
    obsm_key = "X_trVAE"
    plan = TrainingPlan(
        max_epochs=400,
        weight_decay=0.04,
        n_epochs_kl_warmup=0,
        early_stopping=True,
        early_stopping_patience=21,
        reduce_lr_on_plateau=True,
        lr_factor=0.1,
        lr_patience=13,
    )
    quantities: ClassVar = {"expression": GENES, "counts": COUNTS}
    config: TRVAEConfig

    def __init__(self, schema: Schema, config: TRVAEConfig | None = None) -> None:
        super().__init__(schema, config or TRVAEConfig())
        c, n_genes = self.config, len(schema.genes)
        n_continuous, n_categories = len(schema.continuous), tuple(map(len, schema.covariates))
        widths = c.hidden_layer_sizes
        kind = _ValuesLinear if c.recon_loss == "mse" else CountsLinear
        first = kind(n_genes, widths[0], n_continuous, n_categories)
        _start_as_two(first, n_genes + n_continuous, n_categories)
        if isinstance(first, _ValuesLinear):
            first.target_sum = c.target_sum
        self.encoder = Layers(first, widths, self._hidden("encoder"), bias=True)
        self.mean_and_log_var = Linear(widths[-1], 2 * c.n_latent)
        n_in = c.n_latent + n_continuous
        second = CategoricalLinear(n_in, widths[-1], n_categories, bias=False)
        _start_as_two(second, n_in, n_categories)
        self.decoder = Layers(second, widths[::-1], self._hidden("decoder"), bias=False)
        heads = ["mean"] + ["zi"] * (c.recon_loss == "zinb")
        self.heads = nn.ModuleDict({name: Linear(widths[0], n_genes) for name in heads})
        self.px_r = None if c.recon_loss == "mse" else Columns(0, len(schema.batch), n_genes, single=True)
        if self.px_r is not None:
            self.px_r.weight = nn.Parameter(torch.randn(len(schema.batch), n_genes))

    def _hidden(self, where: str) -> Hidden:
        """What all layers share; their widths are their own."""
        c = self.config
        return Hidden(
            n_hidden=1,
            n_layers=len(c.hidden_layer_sizes),
            dropout_rate=c.dropout_rate,
            batch_norm=c.use_batch_norm in (where, "both"),
            layer_norm=c.use_layer_norm in (where, "both"),
            n_categories=(),
            deep=False,
        )

    @property
    def compares_conditions(self) -> bool:
        """Whether the MMD is part of the training loss."""
        return self.config.use_mmd and self.config.beta > 0 and len(self.schema.batch) > 1

    @property
    def couples_cells(self) -> bool:
        """Whether a cell's training loss depends on the others of its batch (MMD or batch normalisation)."""
        return self.compares_conditions or super().couples_cells

    def inference(self, cells: Cells, noise: Noise | None) -> Gaussian:
        """q(z | x, s)."""
        _, h = self.encoder(cells, cells.codes, noise)
        mean, log_var = self.mean_and_log_var(h).chunk(2, dim=1)
        return Gaussian(mean, torch.sqrt(torch.exp(log_var) + _VAR_EPS))

    def generative(self, z: Tensor, cells: Cells, noise: Noise | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Y, (cells, width), and each head's (cells, genes) logits, from z (cells, n_latent)."""
        if self.schema.continuous:
            z = torch.cat([z, cells.continuous], 1)
        y, h = self.decoder(z, cells.codes, noise)
        return y, {name: head(h) for name, head in self.heads.items()}

    def _px(self, heads: dict[str, Tensor], cells: Cells) -> Decoded:
        """p(x | z, s) of counts."""
        assert self.px_r is not None
        library = torch.log(cells.size_factor if self.schema.size_factor else cells.counts.total)
        px_r = self.px_r.add(heads["mean"].new_zeros(1), cells.codes)
        return Decoded(heads["mean"], library, px_r, heads.get("zi"))

    def _reconstruction(self, heads: dict[str, Tensor], cells: Cells) -> Reconstruction:
        c = self.config
        if c.recon_loss != "mse":
            return reconstruction(c.recon_loss, cells.counts, self._px(heads, cells))
        return squared_errors(heads["mean"], cells.counts.scattered(values(cells.counts, c.target_sum)))

    def forward(self, batch: Batch, kl_weight: float = 1.0, noise: Noise | None = None) -> Losses:
        """The negative ELBO of a batch, plus in training the weighted MMD; "mse" has squared errors for -log p(x | z)."""
        c, cells = self.config, Cells.of(batch, self.schema, self.device)
        noise = noise or Noise(batch.seeds, self.device)
        qz = self.inference(cells, noise)
        z = qz.sample(noise)
        y, heads = self.generative(z, cells, noise)
        rec, kl = self._reconstruction(heads, cells), qz.kl()
        loss = rec.mean + kl_weight * over_cells(kl)
        if not (self.training and self.compares_conditions):
            return Losses(loss, rec.total, kl.detach().sum(), batch.n_cells)
        discrepancy = c.beta * mmd(z if c.mmd_on == "z" else y, cells.codes[0], c.mmd_boundary)
        return Losses(
            loss + discrepancy,
            rec.total,
            kl.detach().sum(),
            batch.n_cells,
            {"mmd": discrepancy.detach() * batch.n_cells},
        )

    def encode(self, batch: Batch) -> Gaussian:
        """q(z | x, s) of each cell, (cells, n_latent)."""
        with self.evaluating():
            return self.inference(Cells.of(batch, self.schema, self.device), None)

    def expression(self, batch: Batch) -> Decoded:
        """p(x | z, s) of each cell, at the mean of q(z | x, s).

        Raises:
            ConfigError: the model was trained on squared errors, which are no distribution of counts.
        """
        if self.px_r is None:
            raise ConfigError('recon_loss="mse" has no distribution of counts; decode() gives its values')
        with self.evaluating():
            cells = Cells.of(batch, self.schema, self.device)
            return self._px(self.generative(self.inference(cells, None).mean, cells, None)[1], cells)

    def decode(self, quantity: Quantity, q: Gaussian, cells: Cells, noise: Noise | None) -> Tensor:
        """Expected counts (without extra zeros), or counts drawn from p(x | z, s); under "mse" the values it predicts.

        Raises:
            ConfigError: under "mse", counts or a library size other than 1 are wanted.
        """
        z = q.mean if noise is None else q.sample(noise)
        _, heads = self.generative(z, cells, None)
        if self.px_r is None:
            if quantity.name == "counts" or quantity.library_size != 1.0:
                raise ConfigError('recon_loss="mse" has no distribution of counts; it gives expression as it is')
            return F.relu(heads["mean"])[:, quantity.chosen]
        px = self._px(heads, cells)
        if quantity.name == "counts" and noise is not None:
            return draw_counts(self.config.recon_loss, px, noise)[:, quantity.chosen]
        return px.scaled(quantity.library_size)[:, quantity.chosen]

    def score(self, q: Gaussian, cells: Cells, noise: Noise) -> Scores:
        """log p(x | z, s), under "mse" minus the squared error, and the KL divergence of z; without the MMD."""
        z = q.sample(noise)
        log_likelihood = -self._reconstruction(self.generative(z, cells, None)[1], cells).per_cell
        defined = torch.tensor(torch.nan if self.px_r is None else 0.0, device=self.device)
        return Scores(log_likelihood, q.kl(), log_likelihood + q.log_ratio(z) + defined)
