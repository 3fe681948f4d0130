"""totalVI: Gayoso et al., Joint probabilistic modeling of single-cell multi-omic data with totalVI, Nature Methods 2021.

    z ~ N(0, I)                                            latent cell state
    x | z, s ~ NB(l softmax(f(z, s)), theta)               RNA counts, l the cell's total (or ZINB)
    log b_p ~ N(alpha_ps, beta_ps)                         background of protein p in batch s
    y_p | z, b_p, s ~ pi NB(e_ps b_p, phi) + (1 - pi) NB(e_ps b_p r, phi)
                                                           protein counts: background, or foreground r(z, s) >= 1 times
                                                           as high; e_ps is the batch's efficiency for the protein

q(z | x, y) and q(b | z, s) are networks. Training maximises the ELBO; as in scvi-tools the proteins' likelihood is weighted
by kl_weight as well, 1e-3 of -log P(foreground) is added, and the efficiencies have a log-normal prior.

Proteins that a batch did not measure (`Schema.measured`) take no part in that batch's loss and are 0 in the encoder's
input, and an adversary keeps z from telling the panels apart (`models.adversary`). Defaults are scvi-tools'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from scviaduct.errors import ConfigError
from scviaduct.models.adversary import Adversary
from scviaduct.models.base import COUNTS, GENES, Losses, Model, Offer, Quantity, Scores, require, require_range
from scviaduct.models.counts import Cells
from scviaduct.models.draws import draw_counts
from scviaduct.models.gaussians import draw_and_kl
from scviaduct.models.likelihoods import Decoded, over_cells, reconstruction
from scviaduct.models.nets import Affine, Blocks, CategoricalLinear, Columns, FCLayers, Gaussian, Hidden, Linear, reset
from scviaduct.models.noise import Noise
from scviaduct.models.proteins import PerBatch, Proteins, background_kl, drawn, losses, mixture_nll
from scviaduct.models.scvi import PLACES
from scviaduct.models.training import TrainingPlan
from scviaduct.schema import Batch, Schema

_VAR_EPS = 1e-4


@dataclass(frozen=True, kw_only=True)
class TotalVIConfig:
    """Options of totalVI; names and defaults are those of scvi.model.TOTALVI."""

    n_hidden: int = 256
    """Units of each hidden layer."""
    n_latent: int = 20
    """Dimensions of the latent space."""
    n_layers_encoder: int = 2
    """Hidden layers of the encoder."""
    n_layers_decoder: int = 1
    """Hidden layers of each of the four decoders."""
    dropout_rate_encoder: float = 0.2
    """Share of the encoder's hidden units left out in training."""
    dropout_rate_decoder: float = 0.2
    """Share of the decoders' hidden units left out in training."""
    gene_likelihood: str = "nb"
    """Distribution of the RNA counts: "nb" or "zinb"."""
    gene_dispersion: str = "gene"
    """Inverse dispersion of genes per "gene" or "gene-batch"."""
    protein_dispersion: str = "protein"
    """Inverse dispersion of proteins per "protein" or "protein-batch"."""
    encode_covariates: bool = True
    """Whether the encoder sees batch and covariates too, not only the decoders."""
    use_batch_norm: str = "both"
    """Where to normalise over the batch: "none", "encoder", "decoder" or "both"."""
    use_layer_norm: str = "none"
    """Where to normalise over the units of a cell: "none", "encoder", "decoder" or "both"."""
    encoder_input: str = "log1p_share"
    """What the encoder sees: log1p of the counts over (1 + their mean in the cell), or "log1p" as scvi-tools before 1.3.1."""
    background_std: str = "softplus"
    """How the background's standard deviation becomes positive: "softplus", or "exp" as in scvi-tools before 1.2."""
    empirical_protein_background_prior: bool | None = None
    """Start the background's prior at what the cells look like. Default: with more than 10 proteins."""
    adversarial_classifier: bool | None = None
    """Train a classifier that tells the batch from z, and z to fool it. Default: when a batch lacks proteins."""

    def __post_init__(self) -> None:
        for name in ("n_hidden", "n_latent", "n_layers_encoder", "n_layers_decoder"):
            require_range(getattr(self, name), 1, 100_000, name)
        for name in ("dropout_rate_encoder", "dropout_rate_decoder"):
            require_range(getattr(self, name), 0.0, 0.99, name)
        require(self.gene_likelihood, ("nb", "zinb"), "gene_likelihood")
        require(self.gene_dispersion, ("gene", "gene-batch"), "gene_dispersion")
        require(self.protein_dispersion, ("protein", "protein-batch"), "protein_dispersion")
        require(self.use_batch_norm, PLACES, "use_batch_norm")
        require(self.use_layer_norm, PLACES, "use_layer_norm")
        require(self.encoder_input, ("log1p_share", "log1p"), "encoder_input")
        require(self.background_std, ("softplus", "exp"), "background_std")


class TotalVIInput(Affine):
    """The encoder's first layer, on log1p of counts that may be shares (`encoder_input`); genes sparse, proteins dense."""

    def __init__(
        self, schema: Schema, width: int, n_continuous: int, n_categories: Sequence[int], encoder_input: str
    ) -> None:
        super().__init__()
        self.shares = encoder_input == "log1p_share"
        self.weight = nn.Parameter(torch.empty(len(schema.genes), width))
        self.proteins = nn.Parameter(torch.empty(len(schema.proteins), width))
        self.continuous = nn.Parameter(torch.empty(n_continuous, width)) if n_continuous else None
        self.bias = nn.Parameter(torch.empty(width))
        self.columns = Blocks(n_categories, width)
        reset(self, len(schema.genes) + len(schema.proteins) + n_continuous, self.columns)

    def product(self, cells: Cells) -> Tensor:
        """Cells to (cells, width)."""
        x, y = cells.counts, cells.proteins
        if self.shares:
            y = y / (1.0 + y.mean(1, keepdim=True))
        h = x.product(x.log1p_share_values if self.shares else x.log1p_values, self.weight)
        h = torch.addmm(h, torch.log1p(y), self.proteins).to(h.dtype)
        return h if self.continuous is None else torch.addmm(h, cells.continuous, self.continuous).to(h.dtype)


class Branch(nn.Module):
    """One of the four decoders: hidden layers, then linear heads that see the hidden units, z and the covariates."""

    def __init__(self, n_in: int, hidden: Hidden, heads: dict[str, int]) -> None:
        super().__init__()
        self.hidden = FCLayers(CategoricalLinear(n_in, hidden.n_hidden, hidden.n_categories), hidden)
        width = hidden.n_hidden + n_in
        self.heads = nn.ModuleDict({k: CategoricalLinear(width, n, hidden.n_categories) for k, n in heads.items()})

    def forward(self, z: Tensor, codes: Sequence[Tensor], noise: Noise | None) -> dict[str, Tensor]:
        """(cells, n_in) to one tensor per head."""
        both = torch.cat([self.hidden(z, codes, noise), z], 1)
        return {name: head(both, codes) for name, head in self.heads.items()}


class TotalVI(Model):
    """The model; see the module's docstring."""

    Config = TotalVIConfig
    obsm_key = "X_totalVI"
    uses_proteins = True
    plan = TrainingPlan(
        batch_size=256, lr=4e-3, kl_warmup_steps_per_cell=0.75, early_stopping=True, reduce_lr_on_plateau=True
    )
    quantities: ClassVar = {
        "expression": GENES,
        "proteins": Offer("proteins", ("include_background",)),
        "foreground": Offer("proteins"),
        "counts": COUNTS,
        "protein_counts": Offer("proteins", drawn=True),
    }
    config: TotalVIConfig
    measured: Tensor

    def __init__(self, schema: Schema, config: TotalVIConfig | None = None) -> None:
        super().__init__(schema, config or TotalVIConfig())
        if not schema.proteins:
            raise ConfigError(
                "totalVI needs protein counts; prepare a view with --proteins, e.g. --proteins protein_expression"
            )
        c, n_genes, n_proteins = self.config, len(schema.genes), len(schema.proteins)
        n_in = c.n_latent + len(schema.continuous)
        encoder, decoder = self._hidden("encoder", c.n_layers_encoder), self._hidden("decoder", c.n_layers_decoder)
        n_continuous = len(schema.continuous) * c.encode_covariates
        first = TotalVIInput(schema, c.n_hidden, n_continuous, encoder.n_categories, c.encoder_input)
        self.encoder = FCLayers(first, encoder)
        self.mean_and_log_var = Linear(c.n_hidden, 2 * c.n_latent)
        self.rna = Branch(n_in, decoder, {"scale": n_genes})
        self.background = Branch(n_in, decoder, {"log_alpha": n_proteins, "log_beta": n_proteins})
        self.foreground = Branch(n_in, decoder, {"scale": n_proteins})
        zi = {"zi": n_genes} if c.gene_likelihood == "zinb" else {}
        self.mixing = Branch(n_in, decoder, {"background": n_proteins} | zi)
        self.px_r = self._table("batch" in c.gene_dispersion, torch.randn, n_genes)
        self.py_r = self._table("batch" in c.protein_dispersion, lambda *shape: 2 * torch.rand(*shape), n_proteins)
        self.background_mean = self._per_batch(3.0)
        self.background_log_std = self._per_batch(0.0)
        self.log_efficiency = self._per_batch(0.0)
        self._tell_panels()
        self.adversary = self._adversary()

    def _tell_panels(self) -> None:
        """(batches, proteins) what was measured: the schema's word, so no part of the saved weights."""
        told = torch.tensor(self.schema.measured, dtype=torch.bool, device=self.device)
        self.register_buffer("measured", told, persistent=False)

    def _adversary(self) -> Adversary | None:
        """The classifier of batches, as wide as scvi-tools' whatever the model's options; normalised where they are."""
        c, n_batches = self.config, len(self.schema.batch)
        wanted = not bool(self.measured.all()) if c.adversarial_classifier is None else c.adversarial_classifier
        if not wanted or n_batches < 2:
            return None
        return Adversary(c.n_latent, n_batches, batch_norm=c.use_batch_norm != "none")

    @property
    def opponent(self) -> Adversary | None:
        """The classifier of batches."""
        return self.adversary

    def _hidden(self, where: str, n_layers: int) -> Hidden:
        c, encoder = self.config, where == "encoder"
        seen = self.schema.covariates if c.encode_covariates or not encoder else ()
        return Hidden(
            n_hidden=c.n_hidden,
            n_layers=n_layers,
            dropout_rate=c.dropout_rate_encoder if encoder else c.dropout_rate_decoder,
            batch_norm=c.use_batch_norm in (where, "both"),
            layer_norm=c.use_layer_norm in (where, "both"),
            n_categories=tuple(len(covariate) for covariate in seen),
            deep=True,
        )

    def _table(self, per_batch: bool, start: Any, width: int) -> nn.Module | nn.Parameter:  # noqa: FBT001
        if not per_batch:
            return nn.Parameter(start(width))
        columns = Columns(0, len(self.schema.batch), width, single=True)
        columns.weight = nn.Parameter(start(len(self.schema.batch), width))
        return columns

    def _per_batch(self, value: float) -> Columns:
        """A number for each batch and protein."""
        columns = Columns(0, len(self.schema.batch), len(self.schema.proteins), single=True)
        nn.init.constant_(cast(Tensor, columns.weight), value)
        return columns

    @property
    def wants_background(self) -> bool:
        """Whether the prior of the background starts at what the cells look like."""
        wanted = self.config.empirical_protein_background_prior
        return len(self.schema.proteins) > 10 if wanted is None else wanted

    def set_background_prior(self, mean: NDArray[np.float64], std: NDArray[np.float64]) -> None:
        """Start the prior of the log background at (batches,) means and standard deviations, the same for all proteins.

        A batch whose mean is NaN stays as it is, and after surgery so do all but the query's own.
        """
        for columns, values in ((self.background_mean, mean), (self.background_log_std, np.log(std))):
            learned = columns.new if columns.new is not None else columns.weight
            if isinstance(learned, nn.Parameter):
                rows = torch.as_tensor(values[-len(learned) :], dtype=learned.dtype, device=learned.device).unsqueeze(1)
                with torch.no_grad():
                    learned.copy_(torch.where(torch.isnan(rows), learned, rows))

    def adopt(self, schema: Schema) -> None:
        """Take an extension of the schema, with the panels of its new batches; the adversary has done its work."""
        super().adopt(schema)
        self._tell_panels()
        self.adversary = None

    def inference(self, cells: Cells, noise: Noise | None) -> Gaussian:
        """q(z | x, y)."""
        mean, log_var = self._posterior(cells, noise).chunk(2, dim=1)
        return Gaussian(mean, torch.sqrt(torch.exp(log_var) + _VAR_EPS))

    def _posterior(self, cells: Cells, noise: Noise | None) -> Tensor:
        """(cells, 2 * latent) means and log variances of q(z | x, y)."""
        return self.mean_and_log_var(self.encoder(cells, cells.codes, noise))

    def generative(self, z: Tensor, cells: Cells, noise: Noise | None) -> tuple[Decoded, Proteins]:
        """p(x | z, s) and what makes p(y | z, b, s), from z (cells, latent)."""
        if self.schema.continuous:
            z = torch.cat([z, cells.continuous], 1)
        codes = cells.codes
        rna, back = self.rna(z, codes, noise), self.background(z, codes, noise)
        fore, mixing = self.foreground(z, codes, noise), self.mixing(z, codes, noise)
        explicit = self.schema.size_factor is not None
        library = torch.log(cells.size_factor if explicit else cells.counts.total)
        px = Decoded(rna["scale"], library, _rows(self.px_r, codes), mixing.get("zi"), explicit)
        per_batch = (self.log_efficiency, self.background_mean, self.background_log_std, self.py_r)
        py = Proteins(
            back["log_alpha"],
            back["log_beta"],
            fore["scale"],
            mixing["background"],
            PerBatch(codes[0], *(_table(t) for t in per_batch)),
            self.config.background_std == "exp",
        )
        return px, py

    def forward(self, batch: Batch, kl_weight: float = 1.0, noise: Noise | None = None) -> Losses:
        """The negative ELBO of a batch."""
        cells = Cells.of(batch, self.schema, self.device)
        noise = noise or Noise(batch.seeds, self.device)
        z, kl_z = draw_and_kl(self._posterior(cells, noise), noise.normal(self.config.n_latent), _VAR_EPS)
        px, py = self.generative(z, cells, noise)
        rec = reconstruction(self.config.gene_likelihood, cells.counts, px)
        proteins = losses(py, cells.proteins, self.measured, noise.normal(py.mixing.shape[1]))
        loss = rec.mean + kl_weight * (proteins.mean + over_cells(kl_z))
        likelihood, kl = proteins.likelihood.sum(), (kl_z.detach() + proteins.kl).sum()
        extra = {"proteins": (kl_weight - 1.0) * likelihood}
        if self.adversary is not None and self.training:
            # weighed by 1 - kl_weight as in scvi-tools; at 0 they still give gradients, for DistributedDataParallel
            adversarial = (1.0 - kl_weight) * torch.stack(self.adversary.losses(z, cells.codes[0], noise)).sum(0)
            loss = loss + over_cells(adversarial)
            extra["adversary"] = adversarial.detach().sum()
        return Losses(loss, rec.total + likelihood, kl, batch.n_cells, extra)

    def decode(self, quantity: Quantity, q: Gaussian, cells: Cells, noise: Noise | None) -> Tensor:
        """scvi-tools' get_normalized_expression and get_protein_foreground_probability, or counts drawn from the model.

        "expression" are genes; "proteins" the foreground's rate times its probability, without the batch's efficiency;
        "foreground" its probability. Without noise the background is the mean of q(b | z, s).
        """
        px, py = self.generative(q.mean if noise is None else q.sample(noise), cells, None)
        if quantity.name == "foreground":
            return torch.sigmoid(-py.mixing[:, quantity.chosen])
        if quantity.name == "expression":
            return px.scaled(quantity.library_size)[:, quantity.chosen]
        if quantity.name == "counts" and noise is not None:
            return draw_counts(self.config.gene_likelihood, px, noise)[:, quantity.chosen]
        b = py.background
        back = torch.exp(b.mean + 0.5 * b.std**2 if noise is None else b.sample(noise))
        if quantity.name == "protein_counts" and noise is not None:
            return drawn(back, py, noise)[:, quantity.chosen]
        proteins = back * py.foreground * torch.sigmoid(-py.mixing)
        if quantity.include_background:
            proteins = proteins + back * torch.sigmoid(py.mixing)
        return proteins[:, quantity.chosen]

    def score(self, q: Gaussian, cells: Cells, noise: Noise) -> Scores:
        """log p(x, y | z, b, s) over genes and the panel's proteins, and the KL divergences of z and b.

        `kl` has the priors of the efficiencies and the pull towards foreground as well, as in training.
        """
        z = q.sample(noise)
        px, py = self.generative(z, cells, None)
        seen, log_background = self.measured[cells.codes[0]], py.background.sample(noise)
        proteins = torch.where(seen, mixture_nll(cells.proteins, log_background, py), 0.0).sum(1)
        log_likelihood = -reconstruction(self.config.gene_likelihood, cells.counts, px).per_cell - proteins
        log_prior = py.prior.log_prob(log_background)
        posterior = torch.distributions.Normal(*py.background)
        ratio = torch.where(seen, log_prior - posterior.log_prob(log_background), 0.0).sum(1)
        kl = q.kl() + background_kl(py, seen)
        return Scores(log_likelihood, kl, log_likelihood + q.log_ratio(z) + ratio)

    def encode(self, batch: Batch) -> Gaussian:
        """q(z | x, y) of each cell, (cells, n_latent)."""
        with self.evaluating():
            return self.inference(Cells.of(batch, self.schema, self.device), None)


def _table(module: nn.Module | Tensor) -> Tensor:
    """A number per feature, or a row of them per batch."""
    return cast(Tensor, module.table() if isinstance(module, Columns) else module)


def _rows(module: nn.Module | Tensor, codes: Sequence[Tensor]) -> Tensor:
    """A number per feature, or the row of each cell's batch."""
    table = _table(module)
    return F.embedding(codes[0], table) if table.dim() > 1 else table
