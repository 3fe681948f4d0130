"""One backward pass of the global batch, in the quick way or in the way whose bits do not depend on the workers.

Quick: every rank computes on its cells at once, and DistributedDataParallel averages. Ranks may hold batches that
differ by a few cells, so each loss is weighted by its cells: the mean over ranks is then the mean over the global batch.

Deterministic: every lane is computed by itself, the lanes' gradients are gathered, and added in lane order. A lane
holds the same cells on whatever rank it lies, so the sum has the same bits for 1, 2 or 16 workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, repeat

import torch
from torch import Tensor, nn

from scviaduct.distributed.workers import Workers
from scviaduct.models.base import Losses, Model
from scviaduct.schema import Batch
from scviaduct.storage.loader import BlockSource, cut
from scviaduct.storage.sampler import Sampler


def backward(
    net: nn.Module, batch: Batch, kl_weight: float, n_global: int, workers: Workers, *, deterministic: bool
) -> Tensor:
    """Leave the gradient of the global batch's mean loss in the parameters.

    Returns this rank's sums over its cells: loss, reconstruction, kl, cells (float64).
    """
    if deterministic:
        return _lane_by_lane(net, batch, kl_weight, n_global, workers)
    losses = net(batch, kl_weight=kl_weight)
    (losses.loss * (batch.n_cells * workers.world_size / n_global)).backward()
    return _sums(losses)


def evaluate(model: Model, source: BlockSource, held_out: Sampler, workers: Workers, *, deterministic: bool) -> Tensor:
    """Sums of loss, reconstruction, kl and cells over the held-out cells of all workers, in eval mode.

    The order and the noise are those of epoch 0 every time, so that epochs differ by the model alone.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    with torch.inference_mode(), workers.loader(source, held_out, model.device).epoch(0) as batches:
        for batch in batches:
            for part in lanes(batch) if deterministic else [batch]:
                if part.n_cells:
                    sums += _sums(model(part, kl_weight=1.0))
    return workers.total(sums)


def lanes(batch: Batch) -> Iterator[Batch]:
    """The lanes of a batch as batches of their own, each with its lane of the labelled cells."""
    others = lanes(batch.labelled) if batch.labelled else repeat(None)
    for (start, stop), labelled in zip(pairwise(batch.lanes.tolist()), others, strict=False):
        yield replace(cut(batch, start, stop, batch.lanes[:0]), labelled=labelled)


def _sums(losses: Losses) -> Tensor:
    parts = (losses.loss.detach() * _share(losses), losses.reconstruction, losses.kl)
    return torch.tensor([*(float(part) for part in parts), losses.n_cells], dtype=torch.float64)


def _share(losses: Losses) -> int:
    """What a loss counts for: its cells, and 1 where there are only labelled ones, whose loss is a sum."""
    return max(1, losses.n_cells)


def _lane_by_lane(net: nn.Module, batch: Batch, kl_weight: float, n_global: int, workers: Workers) -> Tensor:
    parameters = [p for p in net.parameters() if p.requires_grad]
    sums, rows = torch.zeros(4, dtype=torch.float64), []
    for lane in lanes(batch):
        if lane.n_cells == 0 and (lane.labelled is None or lane.labelled.n_cells == 0):
            rows.append(parameters[0].new_zeros(sum(p.numel() for p in parameters)))
            continue
        losses = net(lane, kl_weight=kl_weight)
        gradients = torch.autograd.grad(losses.loss * (_share(losses) / n_global), parameters, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
        sums += _sums(losses)
    total = torch.zeros_like(rows[0])
    for row in workers.stacked(torch.stack(rows)):
        total += row
    for parameter, gradient in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.reshape(parameter.shape)
    return sums
