"""The processes of one training run and the three things they say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from scviaduct.errors import ConfigError
from scviaduct.storage.labelled import LabelledLoader, LabelledPlan
from scviaduct.storage.loader import BlockSource, Loader
from scviaduct.storage.sampler import Sampler


def device() -> torch.device:
    """The GPU this process was given, else the CPU. Ray shows each worker its own GPU as the first."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def use_precision(precision: str) -> None:
    """Let this process's GPU compute float32 products in TF32, or not.

    Raises:
        ConfigError: there is no GPU.
    """
    if precision == "tf32" and not torch.cuda.is_available():
        raise ConfigError("--precision tf32 is of NVIDIA GPUs, and this worker has none; use 32 or bf16.")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def pinned(n: int, dtype: Any) -> NDArray[Any]:
    """(n,) uninitialised values in page-locked memory, which a GPU copies from without waiting; torch reuses it."""
    dtype = np.dtype(dtype)
    return torch.empty(n * dtype.itemsize, dtype=torch.uint8, pin_memory=True).numpy().view(dtype)


@dataclass(frozen=True)
class Workers:
    """The place of this process among `world_size` equal ones; the default is a process of its own."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> Workers:
        """The place in torch's process group, when one is up."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def loader(
        self, source: BlockSource, sampler: Sampler, target: torch.device, labelled: LabelledPlan | None = None
    ) -> Loader:
        """This worker's batches, for a model on `target`, with labelled ones where these are planned.

        For a GPU they keep the types on disk, 3 or 4 bytes a non-zero instead of 8, and are widened there.
        """
        gpu = target.type == "cuda"
        allocate = pinned if gpu else None
        rank, world_size = self.rank, self.world_size
        if labelled:
            return LabelledLoader(source, labelled, rank=rank, world_size=world_size, compact=gpu, allocate=allocate)
        return Loader(source, sampler, rank=rank, world_size=world_size, compact=gpu, allocate=allocate)

    def wrap(self, model: nn.Module, *, deterministic: bool = False) -> nn.Module:
        """The model whose backward averages gradients over the workers; itself when alone or deterministic."""
        if self.world_size == 1 or deterministic:
            return model
        # buffers need no broadcast at every step: batch norm's statistics are synchronised where they are made
        # gradients are views of what is summed, which saves copying them back
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all workers, on each of them."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def stacked(self, rows: Tensor) -> Tensor:
        """All workers' rows below each other in rank order; workers may bring different numbers of rows."""
        if self.world_size == 1:
            return rows
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(rows)]))
        most = int(max(counts))
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])

    def barrier(self) -> None:
        """Wait until every worker is here."""
        if self.world_size > 1:
            dist.barrier()
