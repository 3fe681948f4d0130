"""What DistributedDataParallel needs of every model, in two processes: gradients of all parameters, at every step."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from scviaduct.distributed.config import FitConfig
from scviaduct.distributed.gradients import backward
from scviaduct.distributed.workers import Workers
from scviaduct.models import MODELS, model_class
from scviaduct.schema import Batch, Covariate, Schema
from scviaduct.storage.loader import cut

GENES, PROTEINS, CELLS = 30, 4, 24
QUICK = FitConfig()
PARTS = FitConfig(max_cells_per_pass=5)
BORDERS = (CELLS, 3, 10, 0)
"""What rank 0 holds of the batch, step by step; rank 1 the rest."""


def schema(proteins):
    types = Covariate("type", ("x", "y", "z"))
    measured = ((True,) * proteins, (True,) * (proteins - 1) + (False,)) if proteins else ()
    names = tuple(f"p{k}" for k in range(proteins))
    return Schema(
        genes=tuple(map(str, range(GENES))), batch=Covariate("batch", ("a", "b")), labels=types,
        proteins=names, measured=measured,
    )  # fmt: skip


def batch_of(proteins):
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(1.0, 2.0, (CELLS, GENES))) + (np.arange(GENES) == 0)
    rows, columns = np.nonzero(x)
    return Batch(
        n_genes=GENES,
        indptr=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=CELLS))]),
        indices=columns.astype(np.int32),
        data=x[rows, columns].astype(np.float32),
        batch_index=np.arange(CELLS) % 2,
        labels=np.arange(CELLS) % 3,
        proteins=rng.poisson(5.0, (CELLS, proteins)).astype(np.float32),
        rows=np.arange(CELLS),
        seeds=rng.integers(0, 2**63, CELLS).astype(np.uint64),
    )


def made(name):
    torch.manual_seed(0)
    kind = model_class(name)
    proteins = PROTEINS * kind.uses_proteins
    small = {"n_hidden": 8, "n_latent": 3}
    known = {f.name for f in fields(kind.Config)}
    model = kind(schema(proteins), kind.Config(**{k: v for k, v in small.items() if k in known})).train()
    return model, batch_of(proteins)


def cases():
    """Every model as it comes, and one without batch norm in passes."""
    return [*((name, QUICK) for name in MODELS), ("peakvi", PARTS)]


def steps(rank, workers):
    """Gradients and sums of each case and step, as this rank has them."""
    torch.set_num_threads(1)
    found = []
    for name, config in cases():
        model, batch = made(name)
        net = workers.wrap(model)
        for border in BORDERS:
            model.zero_grad()
            mine = slice(0, border) if rank == 0 else slice(border, CELLS)
            part = cut(batch, mine.start, mine.stop, batch.lanes) if workers.world_size > 1 else batch
            sums = workers.total(backward(net, part, 0.5, CELLS, workers, config))
            # copies: under DistributedDataParallel gradients are views of what the next step sums
            found.append(
                (name, {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}, sums)
            )
    return found


def in_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(steps(rank, Workers.current()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(in_process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_two_workers_give_the_gradient_of_the_batch_even_when_one_has_no_cells(two):
    alone = steps(0, Workers())
    for (name, whole, sums), *ranks in zip(alone, *two, strict=True):
        for _, gradients, total in ranks:
            torch.testing.assert_close(total, sums, rtol=1e-4, atol=1e-3, msg=name)
            assert all(g is not None for g in (*whole.values(), *gradients.values())), name
            # weights before a batch norm have gradients that are sums of numbers which cancel
            atol = 1e-5 * max(float(g.abs().max()) for g in whole.values())
            for parameter, wanted in whole.items():
                where = f"{name}: {parameter}"
                torch.testing.assert_close(gradients[parameter], wanted, rtol=1e-3, atol=atol, msg=where)


def test_both_workers_have_the_same_bits(two):
    for (name, a, _), (_, b, _) in zip(*two, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a), name
