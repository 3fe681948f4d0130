"""scANVI: Xu et al., Probabilistic harmonization and annotation of single-cell transcriptomics data, Mol. Syst. Biol. 2021.

    y ~ Cat(1/K)                                           cell type, known for some cells
    z2 ~ N(0, I)                                           what the type does not explain
    z1 | z2, y ~ N(decoder_z1_z2(z2, y))                   latent cell state
    x | z1, s                                              as in SCVI

Training maximises the ELBO of unlabelled cells, with the type summed out under the classifier q(y | z1),

    E_q [log p(x | z1, s) - log q(z1 | x) + sum_y q(y | z1) (log p(z1 | z2, y) - kl_weight KL(q(z2 | z1, y) || p(z2)))]
        - kl_weight KL(q(y | z1) || p(y)),

for all cells, minus classification_ratio times the mean cross-entropy of labelled ones. Defaults are scvi-tools'.

As in scvi-tools the labelled ones are a second batch (`Batch.labelled`), where few cells have a label; where most have
one, they are those of the batch itself, without a second pass through the encoder (docs/decisions/0019). Then the
cross-entropy is a sum over the batch's labelled cells divided by (cells · share of labelled cells in the data), not by
the number of labelled cells that the batch happens to hold: its expectation is the same, and a batch that is spread over
workers gives the gradient of the whole batch whatever the workers hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scviaduct.errors import ConfigError
from scviaduct.models.base import LabelledStream, Losses, Scores, require_range
from scviaduct.models.counts import Cells
from scviaduct.models.gaussians import draw_and_kl, log_density
from scviaduct.models.likelihoods import over_cells, reconstruction
from scviaduct.models.nets import CategoricalLinear, FCLayers, Gaussian, Hidden, Linear
from scviaduct.models.noise import Kept, Noise
from scviaduct.models.scvi import SCVI, SCVIConfig
from scviaduct.models.training import TrainingPlan
from scviaduct.schema import MISSING, Batch, Schema

_ENCODER_EPS = 1e-4
_ENOUGH_LABELLED = 0.5
"""Share of labelled cells from which on a batch holds enough of them."""


@dataclass(frozen=True, kw_only=True)
class SCANVIConfig(SCVIConfig):
    """Options of SCANVI: those of SCVI, and the classifier's."""

    linear_classifier: bool = False
    """Whether the classifier is one linear map of the latent state instead of a network."""
    classification_ratio: float = 50.0
    """Weight of the cross-entropy of a labelled cell against its negative ELBO."""
    n_samples_per_label: int | None = None
    """Cells of each label that an epoch draws for its labelled batches, all where there are fewer. Default: no limit."""
    labelled_batches: bool | None = None
    """Whether a batch of labelled cells goes with each batch. Default: if under half of the cells have a label, or
    n_samples_per_label is set; otherwise the batch's own labelled cells are used."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.classification_ratio, 0.0, 1e6, "classification_ratio")
        if self.n_samples_per_label is not None:
            require_range(self.n_samples_per_label, 1, 10**9, "n_samples_per_label")
            if self.labelled_batches is False:
                raise ConfigError("n_samples_per_label chooses the cells of labelled_batches, which are off")


@lru_cache(maxsize=8)
def _every_label(n: int, k: int, device: torch.device) -> Tensor:
    """(n * k,) the labels 0 … k - 1 of n cells; an epoch's batches have one or two sizes."""
    with torch.inference_mode(False):  # a tensor that is made in it cannot be used in training
        return torch.arange(k, device=device).repeat(n)


class LabelNet(nn.Module):
    """A normal over the latent space given a point of it and a label, for all labels at once; variance exp(.) + eps."""

    def __init__(self, n_latent: int, hidden: Hidden, eps: float) -> None:
        super().__init__()
        first = CategoricalLinear(n_latent, hidden.n_hidden, hidden.n_categories, labels=True)
        self.hidden = FCLayers(first, hidden)
        self.mean_and_log_var = Linear(hidden.n_hidden, 2 * n_latent)
        self.eps, self.n_labels = eps, hidden.n_categories[0]

    def forward(self, z: Tensor, noise: Noise | None) -> Tensor:
        """(cells, latent), or (cells, labels, latent), to (cells, labels, 2 * latent) means and log variances."""
        n, k = len(z), self.n_labels
        rows = self.hidden(
            z.reshape(-1, z.shape[-1]),
            [_every_label(n, k, z.device)],
            cast("Noise | None", noise and _PerLabel(noise, k)),
        )
        return self.mean_and_log_var(rows).unflatten(0, (n, k))


class _PerLabel:
    """Dropout for rows that are (cell, label) pairs, with noise that belongs to the cells."""

    def __init__(self, noise: Noise, n_labels: int) -> None:
        self._noise, self._n_labels = noise, n_labels

    def chosen(self, p: float) -> Kept:
        return self._noise.chosen(p, self._n_labels)

    def dropout(self, h: Tensor, p: float) -> Tensor:
        if p == 0.0:
            return self._noise.dropout(h, p)
        wide = h.reshape(len(h) // self._n_labels, self._n_labels * h.shape[1])
        return self._noise.dropout(wide, p).reshape(h.shape)


class GivenLabels(NamedTuple):
    """What depends on the label, for every label of every cell."""

    qz2: Tensor
    """(cells, labels, 2 * latent) mean and log variance of q(z2 | z1, y)."""
    z2: Tensor
    """(cells, labels, latent) a draw from it."""
    kl: Tensor
    """(cells, labels) KL(q(z2 | z1, y) || p(z2))."""
    log_pz1: Tensor
    """(cells, labels) log p(z1 | z2, y)."""


class Classifier(nn.Module):
    """q(y | z1): hidden layers, unless it is linear, and one logit per label."""

    def __init__(self, n_latent: int, n_labels: int, hidden: Hidden | None) -> None:
        super().__init__()
        self.hidden = FCLayers(CategoricalLinear(n_latent, hidden.n_hidden, ()), hidden) if hidden else None
        self.logits = Linear(hidden.n_hidden if hidden else n_latent, n_labels)

    def forward(self, z: Tensor, noise: Noise | None) -> Tensor:
        """(cells, latent) to (cells, labels)."""
        no_codes: Sequence[Tensor] = ()
        return self.logits(z if self.hidden is None else self.hidden(z, no_codes, noise))


class SCANVI(SCVI):
    """The model; see the module's docstring."""

    Config = SCANVIConfig
    obsm_key = "X_scANVI"
    plan = TrainingPlan(refining_epochs=(2, 10))
    config: SCANVIConfig
    labelled_share: Tensor

    def __init__(self, schema: Schema, config: SCANVIConfig | None = None) -> None:
        super().__init__(schema, config or SCANVIConfig())
        if schema.labels is None:
            raise ConfigError("SCANVI learns from labels; name the obs column that has them with labels_key")
        c, n_labels = self.config, len(schema.labels)
        classifier = None if c.linear_classifier else self._net("encoder", (), c.dropout_rate)
        self.classifier = Classifier(c.n_latent, n_labels, classifier)
        self.encoder_z2_z1 = LabelNet(c.n_latent, self._net("encoder", (n_labels,), c.dropout_rate), _ENCODER_EPS)
        self.decoder_z1_z2 = LabelNet(c.n_latent, self._net("decoder", (n_labels,), 0.0), 0.0)
        self.register_buffer("labelled_share", torch.ones(()))

    def _net(self, where: str, n_categories: tuple[int, ...], dropout_rate: float) -> Hidden:
        """Hidden layers with the norms of the encoder or of the decoder; labels are seen by every layer, as upstream."""
        c = self.config
        return Hidden(
            n_hidden=c.n_hidden,
            n_layers=c.n_layers,
            dropout_rate=dropout_rate,
            batch_norm=c.use_batch_norm in (where, "both"),
            layer_norm=c.use_layer_norm in (where, "both"),
            n_categories=n_categories,
            deep=True,
            labels=bool(n_categories),
        )

    def set_labelled_share(self, share: float) -> None:
        """Tell which share of the training cells has a label; 1 until then.

        Raises:
            ConfigError: the share is not in (0, 1].
        """
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"{share:.0%} of the training cells have a label; SCANVI needs some, else use scvi")
        self.labelled_share.fill_(share)

    def labelled_stream(self) -> LabelledStream | None:
        """A second batch of labelled cells, if the options say so or less than half of the cells have a label."""
        c = self.config
        few = c.n_samples_per_label is not None or float(self.labelled_share) < _ENOUGH_LABELLED
        wanted = few if c.labelled_batches is None else c.labelled_batches
        return LabelledStream(c.n_samples_per_label) if wanted else None

    def forward(self, batch: Batch, kl_weight: float = 1.0, noise: Noise | None = None) -> Losses:
        """The negative ELBO of a batch, plus the weighted cross-entropy of labelled cells.

        Without a cell, but with labelled ones (a lane may be so), the loss is their cross-entropy alone, undivided.
        """
        cells = Cells.of(batch, self.schema, self.device)
        noise = noise or Noise(batch.seeds, self.device)
        qz, ql = self.inference(cells, noise)
        z, library = self._point((qz, ql), cells, noise)
        rec = reconstruction(self.config.gene_likelihood, cells.counts, self.generative(z, library, cells))
        z1 = torch.softmax(z, 1) if self.config.latent_distribution == "ln" else z
        entropy, kl = self._summed_over_labels(qz, z1, self._given_labels(z1, noise), noise)
        if ql is not None:
            kl = kl + self._library_kl(ql, cells)
        if batch.labelled is None:
            ce = self._cross_entropy(qz, cells, noise) / self.labelled_share
        else:
            ce = self._labelled_cross_entropy(batch)
        return Losses(
            rec.mean + over_cells(entropy + kl_weight * kl) + ce / max(1, batch.n_cells),
            rec.total + entropy.detach().sum(),
            kl.detach().sum(),
            batch.n_cells,
            {"classification": ce.detach()},
        )

    def _given_labels(self, z1: Tensor, noise: Noise) -> GivenLabels:
        """All that is computed for each label, at a draw z2 from q(z2 | z1, y)."""
        n, k = len(z1), self.classifier.logits.out_features
        qz2 = self.encoder_z2_z1(z1, noise)
        z2, kl = draw_and_kl(qz2, noise.normal(k * z1.shape[1]).reshape(n, k, z1.shape[1]), self.encoder_z2_z1.eps)
        pz1 = self.decoder_z1_z2(z2, None)
        return GivenLabels(qz2, z2, kl, log_density(pz1, z1, self.decoder_z1_z2.eps))

    def _summed_over_labels(self, qz: Gaussian, z1: Tensor, given: GivenLabels, noise: Noise) -> tuple[Tensor, Tensor]:
        """(cells,) log q(z1 | x) - E_y log p(z1 | z2, y), and (cells,) E_y KL(q(z2 | z1, y)) + KL(q(y | z1) || p(y))."""
        log_probs = torch.log_softmax(self.classifier(z1, noise), 1)
        probs = torch.exp(log_probs)
        kl = (probs * (given.kl + log_probs + math.log(probs.shape[1]))).sum(1)
        return qz.log_prob(z1) - (probs * given.log_pz1).sum(1), kl

    def score(self, q: tuple[Gaussian, Gaussian | None], cells: Cells, noise: Noise) -> Scores:
        """The ELBO's parts as in training: scvi-tools counts log q(z1 | x) - log p(z1 | z2, y) as reconstruction.

        In the weight y is summed out and z2 drawn from q(z2 | z1, y), so its mean is p(x) of this model.
        """
        qz, ql = q
        z, library = self._point(q, cells, noise)
        rec = reconstruction(self.config.gene_likelihood, cells.counts, self.generative(z, library, cells)).per_cell
        softmax = self.config.latent_distribution == "ln"
        z1 = torch.softmax(z, 1) if softmax else z
        given = self._given_labels(z1, noise)
        entropy, kl = self._summed_over_labels(qz, z1, given, noise)
        by_label = given.log_pz1 + self._log_ratio(given)
        log_pz1 = torch.logsumexp(by_label, 1) - math.log(by_label.shape[1])
        log_weight = log_pz1 - qz.log_prob(z) - rec
        if ql is not None:
            prior = self._library_prior(cells)
            kl, log_weight = kl + ql.kl(*prior), log_weight + ql.log_ratio(library.unsqueeze(1), *prior)
        return Scores(-rec - entropy, kl, torch.full_like(rec, torch.nan) if softmax else log_weight)

    def _log_ratio(self, given: GivenLabels) -> Tensor:
        """(cells, labels) log p(z2) - log q(z2 | z1, y)."""
        log_prior = -0.5 * (given.z2**2 + math.log(2.0 * math.pi)).sum(2)
        return log_prior - log_density(given.qz2, given.z2, self.encoder_z2_z1.eps)

    def _cross_entropy(self, qz: Gaussian, cells: Cells, noise: Noise) -> Tensor:
        """Sum over the cells with a label, at the mean of q(z1 | x), times classification_ratio."""
        logits = self.classifier(qz.mean, noise)
        loss = F.cross_entropy(logits, cells.labels, ignore_index=MISSING, reduction="sum")
        return loss * self.config.classification_ratio

    def _labelled_cross_entropy(self, batch: Batch) -> Tensor:
        """The cross-entropy of the labelled batch, weighted so that its sum over workers is a mean over the cells."""
        assert batch.labelled
        cells = Cells.of(batch.labelled, self.schema, self.device)
        noise = Noise(batch.labelled.seeds, self.device)
        return self._cross_entropy(self.z_encoder(cells, noise), cells, noise) * batch.labelled.weight

    def predict(self, batch: Batch) -> Tensor:
        """(cells, labels) probability of each label, at the mean of q(z1 | x)."""
        qz = self.encode(batch)
        with self.evaluating():
            return torch.softmax(self.classifier(qz.mean, None), 1)
