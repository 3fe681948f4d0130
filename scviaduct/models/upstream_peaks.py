"""Weights of scvi-tools' PEAKVAE, read into a PeakVI and written from it. PoissonVI's are those of a VAE (`upstream`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scviaduct.models.peakvi import PeakVI
from scviaduct.models.upstream import UpstreamReader


def load_peakvi(model: PeakVI, state: Mapping[str, Tensor]) -> None:
    """Copy a PEAKVAE's state dict into a PeakVI of the same configuration.

    Raises:
        DataError: a tensor is missing, has another shape, or has no place in the model.
    """
    with torch.no_grad():
        reader = PeaksReader(state)
        reader.peakvae(model)
        reader.refuse_unread()


class PeaksReader(UpstreamReader):
    """Copies by the names of a PEAKVAE."""

    unused = ()

    def peakvae(self, model: PeakVI) -> None:
        """The first layers of both encoders are one of ours, their outputs side by side."""
        for k, name in enumerate(["z_encoder.encoder"] + ["d_encoder.px_decoder"] * model.config.model_depth):
            width = model.mean_and_log_var.in_features
            self.conditioned(model.input, f"{name}.fc_layers.Layer 0.0", slice(k * width, (k + 1) * width))
        self.layers(model.encoder, "z_encoder.encoder")
        self.normal(model.mean_and_log_var, "z_encoder", "encoder")
        if model.depth_encoder is not None and model.depth_output is not None:
            self.layers(model.depth_encoder, "d_encoder.px_decoder")
            self.linear(model.depth_output, "d_encoder.output.0")
        self.layers(model.decoder, "z_decoder.px_decoder")
        self.linear(model.output, "z_decoder.output.0")
        if model.region_logits is not None:
            self.copy(model.region_logits, "region_factors")
