"""The picture of a training: its losses over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_PANELS = ("elbo", "reconstruction", "kl")


def draw_losses(history: Sequence[Mapping[str, float]], out: Path) -> Path:
    """Draw elbo, reconstruction and KL (nats a cell) of the training and held-out cells into `out` (PNG)."""
    from matplotlib.figure import Figure  # half a second, which workers need not spend

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    epochs = [record["epoch"] + 1 for record in history]
    for panel, name in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for part in ("train", "validation"):
            values = [record.get(f"{name}_{part}") for record in history]
            if any(value is not None for value in values):
                panel.plot(epochs, values, label=part, marker="." if len(history) < 30 else None)
        panel.set(title=name, xlabel="epoch", ylabel="nats a cell")
    panel.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return out
