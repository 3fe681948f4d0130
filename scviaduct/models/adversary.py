"""A classifier that tells a cell's batch from z, and the encoder's loss for being told, as in scvi-tools' adversarial plan.

scvi-tools takes two steps: the model's, with the loss `fooled`, then the classifier's, with the loss `told` of the same
z. Neither step changes what the other's gradient is made of, so here both losses are added and differentiated at once:
`fooled` sees the classifier's weights as constants, `told` sees z as one. The optimiser's own group for the classifier
does the rest, and a batch that is spread over workers needs nothing more than other losses do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from scviaduct.models.nets import CategoricalLinear, FCLayers, Hidden, Linear
from scviaduct.models.noise import Noise


class AdversarialLosses(NamedTuple):
    """(cells,) each, in nats."""

    fooled: Tensor
    """Cross-entropy of the classifier to the uniform distribution over the other batches; differentiates z."""
    told: Tensor
    """Cross-entropy of the classifier to the cell's batch; differentiates the classifier."""


class Adversary(nn.Module):
    """q(batch | z): two hidden layers of 32 units with dropout 0.1, and one logit per batch.

    `lr` is its own learning rate, whatever the model's.
    """

    lr = 1e-3

    def __init__(self, n_latent: int, n_batches: int, *, batch_norm: bool) -> None:
        super().__init__()
        hidden = Hidden(
            n_hidden=32,
            n_layers=2,
            dropout_rate=0.1,
            batch_norm=batch_norm,
            layer_norm=False,
            n_categories=(),
            deep=False,
        )
        self.hidden = FCLayers(CategoricalLinear(n_latent, hidden.n_hidden, ()), hidden)
        self.logits = Linear(hidden.n_hidden, n_batches)

    def forward(self, z: Tensor, noise: Noise | None) -> Tensor:
        """(cells, n_latent) to (cells, batches) log probabilities."""
        return torch.log_softmax(self.logits(self.hidden(z, (), noise)), 1)

    def losses(self, z: Tensor, batches: Tensor, noise: Noise | None) -> AdversarialLosses:
        """Both losses of cells at z, (cells, n_latent), with these (cells,) batch codes."""
        constant = {name: p.detach() for name, p in self.named_parameters()}
        seen: Tensor = functional_call(self, constant, (z, noise))
        true = batches.unsqueeze(1)
        others = (seen.sum(1) - seen.gather(1, true).squeeze(1)) / (seen.shape[1] - 1)
        return AdversarialLosses(-others, -self(z.detach(), noise).gather(1, true).squeeze(1))
