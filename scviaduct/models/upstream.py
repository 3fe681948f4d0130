"""Weights of scvi-tools' modules (scvi.module.VAE, SCANVAE), read into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from scviaduct.errors import DataError
from scviaduct.models.nets import CategoricalLinear, Columns, CountsLinear, Encoder, FCLayers, Given, HiddenLayer
from scviaduct.models.scanvi import SCANVI, LabelNet
from scviaduct.models.scvi import SCVI
from scviaduct.models.totalvi import TotalVI, TotalVIInput


def load_totalvi(model: TotalVI, state: Mapping[str, Tensor]) -> None:
    """Copy a TOTALVAE's state dict into a TotalVI of the same configuration.

    Raises:
        DataError: a tensor is missing or has another shape.
    """
    reader = _Reader(state)
    with torch.no_grad():
        reader.layers(model.encoder, "encoder.encoder")
        for part in ("weight", "bias"):
            both = torch.cat([reader.get(f"encoder.z_{head}_encoder.{part}") for head in ("mean", "var")])
            reader.put(getattr(model.mean_and_log_var, part), both, f"encoder.z_mean_encoder.{part}")
        for branch, hidden in _TOTALVI_HIDDEN.items():
            reader.layers(getattr(model, branch).hidden, f"decoder.{hidden}")
        for (branch, head), name in _TOTALVI_HEADS.items():
            if head in getattr(model, branch).heads:
                reader.conditioned(getattr(model, branch).heads[head], f"decoder.{name}.fc_layers.Layer 0.0")
        for ours, theirs in _TOTALVI_TABLES.items():
            table = getattr(model, ours)
            rows = reader.get(theirs)
            target = cast(Tensor, table.weight if isinstance(table, Columns) else table)
            reader.put(target, rows.t() if rows.dim() > 1 else rows, theirs)


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


def load_upstream(model: SCVI, state: Mapping[str, Tensor]) -> None:
    """Copy a VAE's (a SCANVAE's) state dict into a SCVI (SCANVI) of the same configuration.

    Heads that the model does not use are ignored.

    Raises:
        DataError: a tensor is missing or has another shape.
    """
    reader = _Reader(state)
    with torch.no_grad():
        reader.encoder(model.z_encoder, "z_encoder")
        if model.l_encoder is not None:
            reader.encoder(model.l_encoder, "l_encoder")
            reader.copy(model.library_log_means, "library_log_means", flatten=True)
            reader.copy(model.library_log_vars, "library_log_vars", flatten=True)
        reader.layers(model.decoder.hidden, "decoder.px_decoder")
        for ours, theirs in (("scale", "px_scale_decoder.0"), ("zi", "px_dropout_decoder"), ("px_r", "px_r_decoder")):
            if ours in model.decoder.heads:
                reader.linear(cast(nn.Linear, model.decoder.heads[ours]), f"decoder.{theirs}")
        reader.dispersion(model)
        if isinstance(model, SCANVI):
            reader.label_net(model.encoder_z2_z1, "encoder_z2_z1", "encoder")
            reader.label_net(model.decoder_z1_z2, "decoder_z1_z2", "decoder")
            hidden = model.classifier.hidden
            if hidden is not None:
                reader.layers(hidden, "classifier.classifier.0")
            reader.linear(model.classifier.logits, f"classifier.classifier.{int(hidden is not None)}")


class _Reader:
    """Copies by upstream's names, checking shapes."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def get(self, name: str) -> Tensor:
        if name not in self.state:
            raise DataError(
                f"The weights have no tensor {name!r}; were they saved from an SCVI model of this configuration?"
            )
        return self.state[name]

    def put(self, target: Tensor, value: Tensor, name: str) -> None:
        if target.shape != value.shape:
            raise DataError(
                f"{name!r}: the file's part is {tuple(value.shape)}, the model's {tuple(target.shape)}; "
                "n_hidden, n_latent, n_layers, genes, categories and encode_covariates must be the file's"
            )
        target.copy_(value)

    def copy(self, target: Tensor, name: str, *, flatten: bool = False) -> None:
        value = self.get(name)
        self.put(target, value.flatten() if flatten else value, name)

    def linear(self, module: nn.Linear, name: str) -> None:
        self.copy(module.weight, f"{name}.weight")
        self.copy(module.bias, f"{name}.bias")

    def encoder(self, encoder: Encoder, name: str) -> None:
        self.layers(encoder.hidden, f"{name}.encoder")
        self.normal(encoder.mean_and_log_var, name, "encoder")

    def label_net(self, net: LabelNet, name: str, kind: str) -> None:
        self.layers(net.hidden, f"{name}.{kind}")
        self.normal(net.mean_and_log_var, name, kind)

    def normal(self, module: nn.Linear, name: str, kind: str) -> None:
        """The two heads of a normal distribution, one below the other."""
        for part in ("weight", "bias"):
            both = torch.cat([self.get(f"{name}.{head}_{kind}.{part}") for head in ("mean", "var")])
            self.put(getattr(module, part), both, f"{name}.mean_{kind}.{part}")

    def layers(self, layers: FCLayers, name: str) -> None:
        for i, layer in enumerate(cast("list[HiddenLayer]", layers.layers)):
            prefix = f"{name}.fc_layers.Layer {i}"
            if not isinstance(layer.linear, Given):
                self.conditioned(cast("CategoricalLinear | CountsLinear | TotalVIInput", layer.linear), f"{prefix}.0")
            if layer.batch_norm is not None:
                for part in ("weight", "bias", "running_mean", "running_var"):
                    self.copy(getattr(layer.batch_norm, part), f"{prefix}.1.{part}")

    def conditioned(self, linear: CategoricalLinear | CountsLinear | TotalVIInput, name: str) -> None:
        """Upstream's weight is (width, [features | continuous | batch | further covariates])."""
        weight = self.get(f"{name}.weight")
        if isinstance(linear, CountsLinear | TotalVIInput):
            proteins = [linear.proteins] if isinstance(linear, TotalVIInput) else []
            continuous = [linear.continuous] if linear.continuous is not None else []
            blocks = [linear.weight, *proteins, *continuous, *linear.columns.tables]
        else:
            blocks = [linear.weight.T, *linear.columns.tables]
        widths = [len(block) for block in blocks]
        if sum(widths) != weight.shape[1]:
            raise DataError(f"{name!r} has {weight.shape[1]} inputs, the model {sum(widths)} ({widths})")
        for block, part in zip(blocks, weight.T.split(widths), strict=True):
            self.put(block, part, name)
        if linear.bias is not None:
            self.copy(linear.bias, f"{name}.bias")

    def dispersion(self, model: SCVI) -> None:
        px_r = model.px_r.weight if isinstance(model.px_r, Columns) else cast("Tensor | None", model.px_r)
        if px_r is None:
            return
        rows = self.get("px_r").t()
        # A label's last row is ours alone, for cells without a label; scvi-tools may have had a category for them.
        target = px_r[: len(rows)] if model.config.dispersion == "gene-label" else px_r
        self.put(target, rows, "px_r")
