"""State dicts of scvi-tools' modules, written from our models.

scvi-tools' modules have heads and encoders whether they use them or not. Ours have not; those tensors are zeros (batch norms:
as they start), which no output of the model depends on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scviaduct.errors import DataError
from scviaduct.models.base import Model
from scviaduct.models.peakvi import PeakVI
from scviaduct.models.scanvi import SCANVI
from scviaduct.models.scvi import SCVI
from scviaduct.models.totalvi import TotalVI
from scviaduct.models.upstream import UpstreamReader
from scviaduct.models.upstream_peaks import PeaksReader


def upstream_state(model: Model) -> dict[str, Tensor]:
    """The state dict of the VAE, SCANVAE, TOTALVAE or PEAKVAE that gives what the model gives.

    Raises:
        DataError: scvi-tools has no such module.
    """
    with torch.no_grad():
        if isinstance(model, PeakVI):
            writer: UpstreamReader = PeaksReader()
            writer.peakvae(model)  # type: ignore[attr-defined]
        elif isinstance(model, TotalVI):
            writer = UpstreamReader()
            writer.totalvae(model)
            _unused_of_totalvae(model, writer.state)
        elif isinstance(model, SCVI):
            writer = UpstreamReader()
            writer.vae(model)
            _unused_of_vae(model, writer.state)
        else:
            raise DataError(
                f"scvi-tools has no counterpart of {type(model).__name__}; scvi, scanvi, totalvi, peakvi and poissonvi it has."
            )
        return {name: tensor.clone() for name, tensor in writer.state.items()}


def _unused_of_vae(model: SCVI, state: dict[str, Tensor]) -> None:
    c, n_genes = model.config, len(model.schema.genes)
    first = state["z_encoder.encoder.fc_layers.Layer 0.0.weight"]
    if model.l_encoder is None:
        norm = c.use_batch_norm in ("encoder", "both")
        outputs = ("l_encoder.mean_encoder", "l_encoder.var_encoder")
        _encoder(state, "l_encoder.encoder", first.shape, outputs, batch_norm=norm)
    for head in ("px_r_decoder", "px_dropout_decoder"):
        if f"decoder.{head}.weight" not in state:
            _linear(state, f"decoder.{head}", (n_genes, c.n_hidden))
    if model.px_r is None and c.dispersion == "gene":
        state["px_r"] = torch.zeros(n_genes)
    if isinstance(model, SCANVI):
        if c.dispersion == "gene-label":
            raise DataError(
                'scvi-tools has no SCANVI with dispersion="gene-label": it makes none of these dispersions.'
            )
        n_labels = model.classifier.logits.out_features
        state["y_prior"] = torch.full((1, n_labels), 1.0 / n_labels)


def _unused_of_totalvae(model: TotalVI, state: dict[str, Tensor]) -> None:
    c, n_genes = model.config, len(model.schema.genes)
    first = state["encoder.encoder.fc_layers.Layer 0.0.weight"]
    outputs = ("encoder.l_gene_mean_encoder", "encoder.l_gene_var_encoder")
    norm = c.use_batch_norm in ("encoder", "both")
    _encoder(state, "encoder.l_gene_encoder", first.shape, outputs, batch_norm=norm)
    if "decoder.px_dropout_decoder_gene.fc_layers.Layer 0.0.weight" not in state:
        like = state["decoder.px_scale_decoder.fc_layers.Layer 0.0.weight"]
        _linear(state, "decoder.px_dropout_decoder_gene.fc_layers.Layer 0.0", (n_genes, like.shape[1]))


def _encoder(
    state: dict[str, Tensor],
    name: str,
    first: Sequence[int],
    outputs: Sequence[str],
    *,
    batch_norm: bool,
) -> None:
    """One hidden layer and two outputs: what infers the library size."""
    _linear(state, f"{name}.fc_layers.Layer 0.0", first)
    if batch_norm:
        for part, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            state[f"{name}.fc_layers.Layer 0.1.{part}"] = torch.full((first[0],), value)
        state[f"{name}.fc_layers.Layer 0.1.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    for output in outputs:
        _linear(state, output, (1, first[0]))


def _linear(state: dict[str, Tensor], name: str, shape: Sequence[int]) -> None:
    state[f"{name}.weight"] = torch.zeros(tuple(shape))
    state[f"{name}.bias"] = torch.zeros(shape[0])
