"""Weights of scArches' trVAE, read into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from scviaduct.errors import DataError
from scviaduct.models.nets import CategoricalLinear, Columns, CountsLinear, HiddenLayer
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
        reader.normal_heads(model.mean_and_log_var)
        reader.stack(model.decoder, "decoder", ("FirstL", "HiddenL"))
        mean = "recon_decoder" if model.px_r is None else "mean_decoder"
        reader.linear(cast(nn.Linear, model.heads["mean"]), f"decoder.{mean}.0")
        if "zi" in model.heads:
            reader.linear(cast(nn.Linear, model.heads["zi"]), "decoder.dropout_decoder")
        if model.px_r is not None:
            reader.put(cast(Tensor, model.px_r.weight), reader.get("theta").t(), "theta")
    reader.refuse_unread()


class _Reader:
    """Copies by scArches' names, checking shapes and that nothing is left over."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.unread = {name for name in state if not name.endswith("num_batches_tracked")}

    def get(self, name: str) -> Tensor:
        if name not in self.state:
            raise DataError(f"The weights have no tensor {name!r}; were they saved from a trVAE of this configuration?")
        self.unread.discard(name)
        return self.state[name]

    def put(self, target: Tensor, value: Tensor, name: str) -> None:
        if target.shape != value.shape:
            raise DataError(
                f"{name!r}: the file's part is {tuple(value.shape)}, the model's {tuple(target.shape)}; "
                "hidden_layer_sizes, n_latent, genes and conditions must be the file's"
            )
        target.copy_(value)

    def copy(self, target: Tensor, name: str) -> None:
        self.put(target, self.get(name), name)

    def linear(self, module: nn.Linear, name: str) -> None:
        self.copy(module.weight, f"{name}.weight")
        self.copy(module.bias, f"{name}.bias")

    def refuse_unread(self) -> None:
        if self.unread:
            raise DataError(
                f"{len(self.unread)} tensors of the weights have no place in the model, e.g. {min(self.unread)!r}; "
                "recon_loss, use_batch_norm and hidden_layer_sizes must be the file's"
            )

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
                for part in ("weight", "bias", "running_mean", "running_var"):
                    self.copy(getattr(layer.batch_norm, part), f"{prefix}.N{i}.{part}")

    def conditional(self, linear: CountsLinear | CategoricalLinear, name: str) -> None:
        """scArches' CondLayers: a linear map of the features and one of the condition."""
        weight = self.get(f"{name}.expr_L.weight")
        self.put(linear.weight, weight.t() if isinstance(linear, CountsLinear) else weight, f"{name}.expr_L.weight")
        if linear.bias is not None:
            self.copy(linear.bias, f"{name}.expr_L.bias")
        rows = cast(Columns, linear.columns[0]).weight
        self.put(cast(Tensor, rows), self.get(f"{name}.cond_L.weight").t(), f"{name}.cond_L.weight")

    def normal_heads(self, linear: nn.Linear) -> None:
        """Mean and log variance, one below the other."""
        for part in ("weight", "bias"):
            both = torch.cat([self.get(f"encoder.{head}_encoder.{part}") for head in ("mean", "log_var")])
            self.put(getattr(linear, part), both, f"encoder.mean_encoder.{part}")
