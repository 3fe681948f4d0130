"""Weights of scvi-tools' PEAKVAE, read into a PeakVI. PoissonVI's are those of a VAE: `upstream.load_upstream`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scviaduct.models.peakvi import PeakVI
from scviaduct.models.upstream import _Reader


def load_peakvi(model: PeakVI, state: Mapping[str, Tensor]) -> None:
    """Copy a PEAKVAE's state dict into a PeakVI of the same configuration.

    Raises:
        DataError: a tensor is missing or has another shape.
    """
    reader = _Reader(state)
    with torch.no_grad():
        _Reader(_joint_input(reader, model)).conditioned(model.input, "input")
        reader.layers(model.encoder, "z_encoder.encoder")
        reader.normal(model.mean_and_log_var, "z_encoder", "encoder")
        if model.depth_encoder is not None and model.depth_output is not None:
            reader.layers(model.depth_encoder, "d_encoder.px_decoder")
            reader.linear(model.depth_output, "d_encoder.output.0")
        reader.layers(model.decoder, "z_decoder.px_decoder")
        reader.linear(model.output, "z_decoder.output.0")
        if model.region_logits is not None:
            reader.copy(model.region_logits, "region_factors")


def _joint_input(reader: _Reader, model: PeakVI) -> dict[str, Tensor]:
    """The first layers of the two encoders, one below the other."""
    names = ["z_encoder.encoder"] + ["d_encoder.px_decoder"] * model.config.model_depth
    return {
        f"input.{part}": torch.cat([reader.get(f"{name}.fc_layers.Layer 0.0.{part}") for name in names])
        for part in ("weight", "bias")
    }
