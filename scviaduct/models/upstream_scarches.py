"""Weights of scArches' trVAE, read into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from scviaduct.models.nets import CategoricalLinear, Columns, CountsLinear, HiddenLayer
from scviaduct.models.state import StateReader
from scviaduct.models.trvae import TRVAE, Layers


def load_trvae(model: TRVAE, state: Mapping[str, Tensor]) -> None:
    """Copy a trVAE's state dict into a TRVAE of the same configuration.

    scArches numbers conditions in order of first appearance; the schema's batch categories must be in that order.

    Raises:
        DataError: a tensor is missing, has another shape, or has no place in the model.
    """
    reader = _Reader(state)
    with torch.no_grad():
        reader.stack(model.encoder, "encoder", ("FC", "FC"))
        reader.stacked(model.mean_and_log_var, [f"encoder.{head}_encoder" for head in ("mean", "log_var")])
        reader.stack(model.decoder, "decoder", ("FirstL", "HiddenL"))
        mean = "recon_decoder" if model.px_r is None else "mean_decoder"
        reader.linear(cast(nn.Linear, model.heads["mean"]), f"decoder.{mean}.0")
        if "zi" in model.heads:
            reader.linear(cast(nn.Linear, model.heads["zi"]), "decoder.dropout_decoder")
        if model.px_r is not None:
            reader.put(cast(Tensor, model.px_r.weight), reader.get("theta").t(), "theta")
    reader.refuse_unread()


class _Reader(StateReader):
    """Copies by scArches' names."""

    origin = "a trVAE of this configuration"
    options = "recon_loss, use_batch_norm, hidden_layer_sizes, n_latent, genes and conditions"

    def stack(self, stack: Layers, name: str, parts: tuple[str, str]) -> None:
        """Hidden layers: the first under one name, the further ones under another."""
        for i, layer in enumerate(cast("list[HiddenLayer]", stack.layers)):
            prefix = f"{name}.{parts[i > 0]}"
            if i == 0:
                self.conditional(cast("CountsLinear | CategoricalLinear", layer.linear), f"{prefix}.L0")
            else:
                self.copy(cast(Tensor, layer.linear.weight), f"{prefix}.L{i}.weight")
                if layer.linear.bias is not None:
                    self.copy(cast(Tensor, layer.linear.bias), f"{prefix}.L{i}.bias")
            if layer.batch_norm is not None:
                self.batch_norm(layer.batch_norm, f"{prefix}.N{i}")

    def conditional(self, linear: CountsLinear | CategoricalLinear, name: str) -> None:
        """scArches' CondLayers: a linear map of the features and one of the condition."""
        weight = self.get(f"{name}.expr_L.weight")
        self.put(linear.weight, weight.t() if isinstance(linear, CountsLinear) else weight, f"{name}.expr_L.weight")
        if linear.bias is not None:
            self.copy(linear.bias, f"{name}.expr_L.bias")
        rows = cast(Columns, linear.columns[0]).weight
        self.put(cast(Tensor, rows), self.get(f"{name}.cond_L.weight").t(), f"{name}.cond_L.weight")
