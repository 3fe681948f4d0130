"""One backward pass of the global batch, in the quick way or in the way whose bits do not depend on the workers.

Quick: every rank computes on its cells at once, and DistributedDataParallel averages. Ranks may hold batches that
differ by a few cells, so each loss is weighted by its cells: the mean over ranks is then the mean over the global batch.
A rank that holds more cells than fit into a pass adds up the gradients of several; only the last one is averaged.

Deterministic: every lane is computed by itself, the lanes' gradients are gathered, and added in lane order. A lane
holds the same cells on whatever rank it lies, so the sum has the same bits for 1, 2 or 16 workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise, repeat

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scviaduct.distributed.config import FitConfig
from scviaduct.distributed.workers import Workers
from scviaduct.models.base import Losses, Model
from scviaduct.schema import Batch
from scviaduct.storage.loader import BlockSource, cut
from scviaduct.storage.sampler import Sampler


def backward(
    net: nn.Module, batch: Batch, kl_weight: float, n_global: int, workers: Workers, config: FitConfig
) -> Tensor:
    """Leave the gradient of the global batch's mean loss in the parameters.

    Returns this rank's sums over its cells: loss, reconstruction, kl, cells (float64).
    """
    if config.deterministic:
        return _lane_by_lane(net, batch, kl_weight, n_global, workers, config)
    sums, parts = torch.zeros(4, dtype=torch.float64), list(passes(batch, config.max_cells_per_pass))
    for number, part in enumerate(parts, 1):
        with _alone(net, last=number == len(parts)):
            with autocast(config):
                losses = net(part, kl_weight=kl_weight)
            (losses.loss * (_share(losses) * workers.world_size / n_global)).backward()
        sums += _sums(losses)
    return sums


def evaluate(model: Model, source: BlockSource, held_out: Sampler, workers: Workers, config: FitConfig) -> Tensor:
    """Sums of loss, reconstruction, kl and cells over the held-out cells of all workers, in eval mode.

    The order and the noise are those of epoch 0 every time, so that epochs differ by the model alone.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    with torch.inference_mode(), workers.loader(source, held_out, model.device).epoch(0) as batches:
        for batch in batches:
            for part in lanes(batch) if config.deterministic else passes(batch, config.max_cells_per_pass):
                if part.n_cells:
                    sums += _sums(model(part, kl_weight=1.0))
    return workers.total(sums)


def lanes(batch: Batch) -> Iterator[Batch]:
    """The lanes of a batch as batches of their own, each with its lane of the labelled cells."""
    others = lanes(batch.labelled) if batch.labelled else repeat(None)
    for (start, stop), labelled in zip(pairwise(batch.lanes.tolist()), others, strict=False):
        yield replace(cut(batch, start, stop, batch.lanes[:0]), labelled=labelled)


def passes(batch: Batch, most: int | None) -> Iterator[Batch]:
    """A batch in parts of at most `most` cells and as many labelled ones, alike in size; itself where it fits."""
    labelled = batch.labelled
    n = max(batch.n_cells, labelled.n_cells if labelled else 0)
    parts = -(-n // most) if most else 1
    if parts <= 1:
        yield batch
        return
    for k in range(parts):
        part = _part(batch, k, parts)
        yield replace(part, labelled=_part(labelled, k, parts)) if labelled else part


def _part(batch: Batch, k: int, parts: int) -> Batch:
    return cut(batch, k * batch.n_cells // parts, (k + 1) * batch.n_cells // parts, batch.lanes[:0])


def autocast(config: FitConfig) -> AbstractContextManager[object]:
    """The context of a forward pass: under bf16 linear layers compute in bfloat16 and give float32 on."""
    if config.precision != "bf16":
        return nullcontext()
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def _alone(net: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """No averaging over the workers, unless it is the last pass."""
    return nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync()


def _sums(losses: Losses) -> Tensor:
    parts = (losses.loss.detach() * _share(losses), losses.reconstruction, losses.kl)
    return torch.tensor([*(float(part) for part in parts), losses.n_cells], dtype=torch.float64)


def _share(losses: Losses) -> int:
    """What a loss counts for: its cells, and 1 where there are only labelled ones, whose loss is a sum."""
    return max(1, losses.n_cells)


def _lane_by_lane(
    net: nn.Module, batch: Batch, kl_weight: float, n_global: int, workers: Workers, config: FitConfig
) -> Tensor:
    parameters = [p for p in net.parameters() if p.requires_grad]
    sums, rows = torch.zeros(4, dtype=torch.float64), []
    for lane in lanes(batch):
        if lane.n_cells == 0 and (lane.labelled is None or lane.labelled.n_cells == 0):
            rows.append(parameters[0].new_zeros(sum(p.numel() for p in parameters)))
            continue
        with autocast(config):
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
