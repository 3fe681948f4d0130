"""The training loop: one function, the same for one process and for many, for references and for surgery.

What distribution adds to it are the four numbered marks; everything else is the loop one would write on a laptop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scviaduct.distributed.celllog import CellLog
from scviaduct.distributed.checkpoint import Progress
from scviaduct.distributed.config import FitConfig
from scviaduct.distributed.gradients import backward, evaluate
from scviaduct.distributed.optimizer import Adam, Group
from scviaduct.distributed.saver import Saver
from scviaduct.distributed.workers import Workers
from scviaduct.errors import ConfigError, DataError
from scviaduct.models.base import Model
from scviaduct.models.memory import keep_freed
from scviaduct.models.training import TrainingPlan
from scviaduct.schema import MISSING, Batch
from scviaduct.storage.labelled import LabelledPlan
from scviaduct.storage.loader import BlockSource, stream
from scviaduct.storage.sampler import Sampler, Split, StratifiedSplit


@dataclass(frozen=True)
class Hooks:
    """Where a run leaves its traces; the default leaves none (surgery in memory)."""

    saver: Saver | None = None
    cells: CellLog | None = None
    on_epoch: Callable[[dict[str, float]], None] = lambda record: None


def fit(
    model: Model, source: BlockSource, config: FitConfig, workers: Workers | None = None, hooks: Hooks | None = None
) -> Progress:
    """Train the parameters of `model` on `source`; afterwards the model holds the result.

    Under early stopping that is the best epoch. The progress returned has one history record per epoch: elbo_train and
    elbo_validation (nats per cell, KL unweighted), loss, reconstruction, kl, kl_weight, seconds, cells_per_second,
    data_wait (share of the time spent waiting for data).

    Raises:
        ConfigError: sizes that cannot work together.
        DataError: the loss is not finite; names the step and cells.
    """
    keep_freed()
    workers, hooks = workers or Workers.current(), hooks or Hooks()  # [1] which of how many processes this is
    plan = config.plan(model.training_plan, source.n_rows)
    train, held_out = samplers(model, source, config, plan.batch_size, workers)
    optimizer = optimizer_of(model, plan)
    progress = _restored(hooks, model, optimizer, workers)
    net = workers.wrap(model, deterministic=config.deterministic)  # [2] backward averages gradients over the workers
    loader = workers.loader(source, train, model.device, labelled(model, source, train))  # [3] my lanes only
    epochs = plan.max_epochs or 1

    while progress.epoch < epochs and not progress.finished:
        model.train()
        watch, first = time.perf_counter(), progress.step
        with loader.epoch(progress.epoch, first) as batches:
            for batch in batches:
                kl_weight = plan.kl_weight(progress.epoch, progress.epoch * train.steps + progress.step)
                optimizer.zero_grad()
                sums = backward(net, batch, kl_weight, train.rows_at(progress.step), workers, config)
                _require_finite(sums, progress, batch)
                if config.gradient_clip:
                    nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
                optimizer.step()
                if hooks.cells:
                    hooks.cells.write(progress.epoch, progress.step, batch.rows)
                progress.sums += sums
                progress.step += 1
                if progress.step < train.steps and _due(hooks, progress, train, workers):
                    _save(hooks, model, optimizer, progress, train, workers)  # [4] sums are everybody's, rank 0 writes

        seconds = time.perf_counter() - watch
        record = _means(workers.total(progress.sums), "_train") | {"kl_weight": kl_weight, "lr": optimizer.groups[0].lr}
        if held_out:
            record |= _means(evaluate(model, source, held_out, workers, config), "_validation")
        record |= {"epoch": progress.epoch, "seconds": seconds, "data_wait": batches.waited / seconds}
        record["cells_per_second"] = train.n_kept * (train.steps - first) / train.steps / seconds
        progress.close_epoch(record)
        _judge(progress, record, plan, model, optimizer)
        if workers.rank == 0:
            hooks.on_epoch(record)
        progress.finished |= progress.epoch >= epochs
        if progress.finished or _due(hooks, progress, train, workers):
            _save(hooks, model, optimizer, progress, train, workers)

    if progress.best_weights:
        model.load_state_dict(progress.best_weights)
    return progress


def optimizer_of(model: Model, plan: TrainingPlan) -> Adam:
    """The plan's optimizer over the model's parameters; those of its opponent keep a learning rate of their own."""
    apart = list(model.opponent.parameters()) if model.opponent else []
    own = {id(p) for p in apart}
    groups = [Group((p for p in model.parameters() if id(p) not in own), plan.lr)]
    if model.opponent:
        groups.append(Group(apart, model.opponent.lr))
    return Adam(groups, plan.optimizer, eps=plan.eps, weight_decay=plan.weight_decay)


def labelled(model: Model, source: BlockSource, train: Sampler) -> LabelledPlan | None:
    """The plan of the cells with a label that go with each batch, where the model wants them and there are any."""
    wanted = model.labelled_stream()
    if wanted is None or not bool(((codes := source.labels()) != MISSING).any()):
        return None
    return LabelledPlan(main=train, codes=codes, n_samples_per_label=wanted.n_samples_per_label)


def samplers(
    model: Model, source: BlockSource, config: FitConfig, batch_size: int, workers: Workers
) -> tuple[Sampler, Sampler | None]:
    """The plan of the training cells and of the held-out ones, refusing sizes that cannot work together."""
    _require_parts(model, config)
    if source.n_rows < 4 * workers.world_size:
        raise ConfigError(f"{source.n_rows} cells are too few for {workers.world_size} workers; use --workers 1.")
    lane, most = -(-batch_size // config.n_lanes), config.max_cells_per_pass
    if config.deterministic and most and most < lane:
        raise ConfigError(
            f"--deterministic computes lane by lane, {lane} cells each, not in passes of {most}: use --n-lanes "
            f"{-(-batch_size // most)}."
        )
    if workers.world_size > 1 and batch_size < 4 * workers.world_size:
        raise ConfigError(f"batch_size {batch_size} is too small for {workers.world_size} workers: 4 cells each.")

    split = Split(config.validation_size, config.seed)
    if config.validation_stratify_by:
        codes = source.strata(config.validation_stratify_by)
        split = StratifiedSplit(config.validation_size, config.seed, codes=codes)

    def sampler(part: str) -> Sampler:
        return Sampler(
            n_rows=source.n_rows,
            block_rows=source.block_rows,
            batch_size=batch_size,
            seed=config.seed,
            n_lanes=config.n_lanes,
            split=split,
            part=part,  # type: ignore[arg-type]
        )

    return sampler("train"), sampler("validation") if config.validation_size else None


def _require_parts(model: Model, config: FitConfig) -> None:
    """Refuse to compute a batch in parts where the model does not allow it."""
    why = "computes lane by lane" if config.deterministic else "computes a batch in parts"
    if model.couples_cells and (config.deterministic or config.max_cells_per_pass):
        raise ConfigError(
            f"--{'deterministic' if config.deterministic else 'max-cells-per-pass'} {why}, but batch norm mixes the "
            "cells of a batch; use --preset scarches, or --set use_batch_norm=none --set use_layer_norm=both. So does "
            "trvae's MMD: --set use_mmd=false."
        )


def _means(sums: Tensor, suffix: str) -> dict[str, float]:
    """Per-cell means of (loss, reconstruction, kl, cells)."""
    loss, reconstruction, kl, cells = sums.tolist()
    means = {"elbo": reconstruction + kl, "loss": loss, "reconstruction": reconstruction, "kl": kl}
    return {name + suffix: value / cells for name, value in means.items()}


def _require_finite(sums: Tensor, progress: Progress, batch: Batch) -> None:
    if not math.isfinite(sum(sums.tolist())):
        raise DataError(
            f"The loss became {float(sums[0])} at epoch {progress.epoch}, step {progress.step} (cells at rows "
            f"{batch.rows[:5].tolist()}… of the view). The last checkpoint is intact. Usual causes: a learning rate that "
            f"is too high (try --lr 1e-4), extreme counts, or covariates that are not finite."
        )


def _restored(hooks: Hooks, model: Model, optimizer: Adam, workers: Workers) -> Progress:
    """Go on at the checkpoint that rank 0 finds: others may see a file system that is shared a moment later."""
    if not hooks.saver:
        return Progress()
    newest = workers.total(torch.tensor([hooks.saver.store.newest() if workers.rank == 0 else 0]))
    return hooks.saver.restored(model, optimizer, int(newest), workers.rank)


def _due(hooks: Hooks, progress: Progress, train: Sampler, workers: Workers) -> bool:
    """Whether rank 0 says that a checkpoint is due. Raises what the writing of the one before ran into."""
    if not hooks.saver:
        return False
    hooks.saver.check()
    position = progress.epoch * train.steps + progress.step
    if not hooks.saver.asked(position, epoch_ends=progress.step == 0):
        return False
    mine = workers.rank == 0 and hooks.saver.due(position, improved=progress.improved)
    return bool(workers.total(torch.tensor([float(mine)])) > 0)


def _save(hooks: Hooks, model: Model, optimizer: Adam, progress: Progress, train: Sampler, workers: Workers) -> None:
    if not hooks.saver:
        return
    sums = workers.total(progress.sums.clone())
    if workers.rank == 0:
        hooks.saver.save(model, optimizer, progress, sums, progress.epoch * train.steps + progress.step)


def _judge(progress: Progress, record: dict[str, float], plan: TrainingPlan, model: Model, optimizer: Adam) -> None:
    """Early stopping and learning-rate plateau, from the held-out cells (the training cells where none are)."""
    name = plan.early_stopping_monitor
    value = record.get(f"{name}_validation", record[f"{name}_train"])
    improved = progress.best is None or value < progress.best - plan.early_stopping_min_delta
    if improved:
        progress.best, progress.best_epoch, progress.plateau_epochs = value, progress.epoch - 1, 0
        if plan.early_stopping:
            progress.best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    else:
        progress.plateau_epochs += 1
    stale = progress.epoch - 1 - progress.best_epoch
    progress.finished = plan.early_stopping and stale >= plan.early_stopping_patience
    if plan.reduce_lr_on_plateau and progress.plateau_epochs > plan.lr_patience:
        progress.plateau_epochs = 0
        optimizer.groups[0].lr *= plan.lr_factor


def embedded(model: Model, source: BlockSource) -> NDArray[np.float32]:
    """(rows, n_latent) posterior means of all cells of a source."""
    with stream(source) as blocks:
        return np.concatenate([z.cpu().numpy() for _, z in embed(model, iter(blocks))])


def embed(model: Model, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Posterior means of batches of cells, (cells, n_latent) each, in eval mode."""
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            yield batch, model.encode(batch).mean
