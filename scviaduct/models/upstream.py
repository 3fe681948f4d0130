"""Weights of scvi-tools' modules (VAE, SCANVAE, TOTALVAE), read into ours and written from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from scviaduct.errors import DataError
from scviaduct.models.nets import CategoricalLinear, Columns, CountsLinear, Encoder, FCLayers, Given, HiddenLayer
from scviaduct.models.scanvi import SCANVI, LabelNet
from scviaduct.models.scvi import SCVI
from scviaduct.models.state import StateReader
from scviaduct.models.totalvi import TotalVI, TotalVIInput


def load_upstream(model: SCVI, state: Mapping[str, Tensor]) -> None:
    """Copy a VAE's (a SCANVAE's) state dict into a SCVI or PoissonVI (SCANVI) of the same configuration.

    Heads that the model does not use are ignored.

    Raises:
        DataError: a tensor is missing, has another shape, or has no place in the model.
    """
    with torch.no_grad():
        reader = UpstreamReader(state)
        reader.vae(model)
        reader.refuse_unread()


def load_totalvi(model: TotalVI, state: Mapping[str, Tensor]) -> None:
    """Copy a TOTALVAE's state dict into a TotalVI of the same configuration.

    Raises:
        DataError: a tensor is missing, has another shape, or has no place in the model.
    """
    with torch.no_grad():
        reader = UpstreamReader(state)
        reader.totalvae(model)
        reader.refuse_unread()


_TOTALVI_HIDDEN = {
    "rna": "px_decoder",
    "background": "py_back_decoder",
    "foreground": "py_fore_decoder",
    "mixing": "sigmoid_decoder",
}
_TOTALVI_HEADS = {
    ("rna", "scale"): "px_scale_decoder",
    ("background", "log_alpha"): "py_back_mean_log_alpha",
    ("background", "log_beta"): "py_back_mean_log_beta",
    ("foreground", "scale"): "py_fore_scale_decoder",
    ("mixing", "zi"): "px_dropout_decoder_gene",
    ("mixing", "background"): "py_background_decoder",
}
_TOTALVI_TABLES = {
    "px_r": "px_r",
    "py_r": "py_r",
    "background_mean": "background_pro_alpha",
    "background_log_std": "background_pro_log_beta",
    "log_efficiency": "log_per_batch_efficiency",
}


class UpstreamReader(StateReader):
    """Copies by scvi-tools' names."""

    origin = "an SCVI model of this configuration"
    options = "n_hidden, n_latent, n_layers, genes, categories and encode_covariates"
    unused: ClassVar[tuple[str, ...]] = (
        *("l_encoder.", "decoder.px_r_decoder.", "decoder.px_dropout_decoder", "encoder.l_gene_"),
        *("px_r", "y_prior", "library_log_"),
    )

    def vae(self, model: SCVI) -> None:
        """A VAE, or a SCANVAE."""
        self.encoder(model.z_encoder, "z_encoder")
        if model.l_encoder is not None:
            self.encoder(model.l_encoder, "l_encoder")
            self.copy(model.library_log_means, "library_log_means", flatten=True)
            self.copy(model.library_log_vars, "library_log_vars", flatten=True)
        self.layers(model.decoder.hidden, "decoder.px_decoder")
        for ours, theirs in (("scale", "px_scale_decoder.0"), ("zi", "px_dropout_decoder"), ("px_r", "px_r_decoder")):
            if ours in model.decoder.heads:
                self.linear(cast(nn.Linear, model.decoder.heads[ours]), f"decoder.{theirs}")
        self.dispersion(model)
        if isinstance(model, SCANVI):
            self.label_net(model.encoder_z2_z1, "encoder_z2_z1", "encoder")
            self.label_net(model.decoder_z1_z2, "decoder_z1_z2", "decoder")
            hidden = model.classifier.hidden
            if hidden is not None:
                self.layers(hidden, "classifier.classifier.0")
            self.linear(model.classifier.logits, f"classifier.classifier.{int(hidden is not None)}")

    def totalvae(self, model: TotalVI) -> None:
        """A TOTALVAE."""
        self.layers(model.encoder, "encoder.encoder")
        self.stacked(model.mean_and_log_var, [f"encoder.z_{head}_encoder" for head in ("mean", "var")])
        for branch, hidden in _TOTALVI_HIDDEN.items():
            self.layers(getattr(model, branch).hidden, f"decoder.{hidden}")
        for (branch, head), name in _TOTALVI_HEADS.items():
            if head in getattr(model, branch).heads:
                self.conditioned(getattr(model, branch).heads[head], f"decoder.{name}.fc_layers.Layer 0.0")
        for ours, theirs in _TOTALVI_TABLES.items():
            table = getattr(model, ours)
            self.transposed(cast(Tensor, table.weight if isinstance(table, Columns) else table), theirs)

    def encoder(self, encoder: Encoder, name: str) -> None:
        """An Encoder: hidden layers, mean and variance."""
        self.layers(encoder.hidden, f"{name}.encoder")
        self.normal(encoder.mean_and_log_var, name, "encoder")

    def label_net(self, net: LabelNet, name: str, kind: str) -> None:
        """One of SCANVI's nets between its two latent spaces."""
        self.layers(net.hidden, f"{name}.{kind}")
        self.normal(net.mean_and_log_var, name, kind)

    def normal(self, module: nn.Linear, name: str, kind: str) -> None:
        """The two heads of a normal distribution, one below the other."""
        self.stacked(module, [f"{name}.{head}_{kind}" for head in ("mean", "var")])

    def layers(self, layers: FCLayers, name: str) -> None:
        """FCLayers: each layer's linear map and batch norm."""
        for i, layer in enumerate(cast("list[HiddenLayer]", layers.layers)):
            prefix = f"{name}.fc_layers.Layer {i}"
            if not isinstance(layer.linear, Given):
                self.conditioned(cast("CategoricalLinear | CountsLinear | TotalVIInput", layer.linear), f"{prefix}.0")
            if layer.batch_norm is not None:
                self.batch_norm(layer.batch_norm, f"{prefix}.1")

    def conditioned(
        self, linear: CategoricalLinear | CountsLinear | TotalVIInput, name: str, outputs: slice | None = None
    ) -> None:
        """Upstream's weight is (width, [features | continuous | batch | further covariates]).

        `outputs` are those of our layer that upstream's has; None for all.
        """
        if isinstance(linear, CountsLinear | TotalVIInput):
            proteins = [linear.proteins] if isinstance(linear, TotalVIInput) else []
            continuous = [linear.continuous] if linear.continuous is not None else []
            whole = [linear.weight, *proteins, *continuous, *linear.columns.tables]
        else:
            whole = [linear.weight.T, *linear.columns.tables]
        outputs = outputs or slice(None)
        blocks = [block[:, outputs] for block in whole]
        widths = [len(block) for block in blocks]
        weight = self.get(f"{name}.weight", (blocks[0].shape[1], sum(widths)))
        if sum(widths) != weight.shape[1]:
            raise DataError(f"{name!r} has {weight.shape[1]} inputs, the model {sum(widths)} ({widths})")
        for block, part in zip(blocks, weight.T.split(widths), strict=True):
            self.put(block, part, name)
        if linear.bias is not None:
            self.copy(linear.bias[outputs], f"{name}.bias")

    def dispersion(self, model: SCVI) -> None:
        """The log inverse dispersion, in any of its forms."""
        px_r = model.px_r.weight if isinstance(model.px_r, Columns) else cast("Tensor | None", model.px_r)
        if px_r is None:
            return
        if model.config.dispersion == "gene-label" and not self.writing:
            # A label's last row is ours alone, for cells without a label; scvi-tools may have had a category for them.
            px_r = px_r[: self.get("px_r").shape[-1]]
        self.transposed(px_r, "px_r")
