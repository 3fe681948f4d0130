from dataclasses import replace

import numpy as np
import pytest
import torch

from scviaduct.distributed import workers as workers_module
from scviaduct.distributed.cadence import Every
from scviaduct.distributed.checkpoint import Checkpoints
from scviaduct.distributed.config import FitConfig
from scviaduct.distributed.gradients import backward, lanes, passes
from scviaduct.distributed.loop import Hooks, fit
from scviaduct.distributed.saver import Saver
from scviaduct.distributed.workers import Workers
from scviaduct.errors import ConfigError, DataError
from scviaduct.models.counts import Counts
from scviaduct.models.likelihood_kernels import Nonzeros
from scviaduct.models.scanvi import SCANVI
from scviaduct.models.scvi import PRESETS, SCVI
from scviaduct.schema import MISSING, Batch, Covariate, Schema
from scviaduct.storage.labelled import LabelledLoader, LabelledPlan
from scviaduct.storage.loader import Loader, MemorySource
from scviaduct.storage.sampler import Sampler

GENES = 40
SCHEMA = Schema(genes=tuple(f"g{k}" for k in range(GENES)), batch=Covariate("batch", ("a", "b")))
FIT = FitConfig(max_epochs=4, batch_size=32, n_epochs_kl_warmup=2, threads=1)


def cells(n=300, seed=0):
    rng = np.random.default_rng(seed)
    rates = rng.gamma(1, 2, (3, GENES))[rng.integers(0, 3, n)]
    x = rng.poisson(rates) + (np.arange(GENES) == 0)
    rows, columns = np.nonzero(x)
    return MemorySource(
        Batch(
            n_genes=GENES,
            indptr=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))]).astype(np.int64),
            indices=columns.astype(np.int32),
            data=x[rows, columns].astype(np.float32),
            batch_index=rng.integers(0, 2, n),
            rows=np.arange(n),
        ),
        block_rows=50,
    )


def model(seed=0, **options):
    torch.manual_seed(seed)
    return SCVI(SCHEMA, SCVI.Config(**{"n_hidden": 16, "n_latent": 3} | options))


def weights(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_lowers_the_elbo_and_records_every_epoch():
    net, seen = model(), []
    progress = fit(net, cells(), replace(FIT, max_epochs=12, lr=1e-2), hooks=Hooks(on_epoch=seen.append))
    assert [r["epoch"] for r in seen] == list(range(12)) and seen == progress.history
    assert seen[-1]["elbo_train"] < 0.9 * seen[0]["elbo_train"]
    assert seen[-1]["elbo_validation"] < 0.9 * seen[0]["elbo_validation"]
    assert [r["kl_weight"] for r in seen[:4]] == [0.0, 0.5, 1.0, 1.0]
    assert all(0 <= r["data_wait"] <= 1 for r in seen)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    nets = [model(), model(), model()]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        fit(net, cells(), replace(FIT, seed=seed))
    assert same(weights(nets[0]), weights(nets[1])) and not same(weights(nets[0]), weights(nets[2]))


def saving(folder):
    """Due at every sixteenth step."""
    return Saver(Checkpoints(folder), Every(seconds=0.0))


class Killed(Exception):
    pass


class KillAfter:
    """Stands in for the cell log and stops the loop after so many steps."""

    def __init__(self, steps):
        self.left = steps

    def write(self, epoch, step, rows):
        self.left -= 1
        if self.left < 0:
            raise Killed


@pytest.mark.parametrize("deterministic", [False, True])
def test_stopped_and_resumed_equals_never_stopped(tmp_path, deterministic):
    config = replace(FIT, batch_size=8, max_epochs=3, deterministic=deterministic)
    options = PRESETS["scarches"]
    undisturbed = model(**options)
    want = fit(undisturbed, cells(), config)
    for seed, steps in enumerate((20, 7, 30)):  # later attempts start from other weights: the checkpoint decides
        with pytest.raises(Killed), saving(tmp_path) as saver:
            fit(model(seed, **options), cells(), config, hooks=Hooks(saver=saver, cells=KillAfter(steps)))
    resumed = model(9, **options)
    with saving(tmp_path) as saver:
        got = fit(resumed, cells(), config, hooks=Hooks(saver=saver))
    assert same(weights(resumed), weights(undisturbed))
    assert [r["elbo_train"] for r in got.history] == pytest.approx([r["elbo_train"] for r in want.history], rel=1e-12)


def test_early_stopping_keeps_the_best_epoch():
    net = model()
    config = replace(FIT, max_epochs=200, lr=3e-2, early_stopping=True, early_stopping_patience=5, n_epochs_kl_warmup=0)
    progress = fit(net, cells(120), config)
    values = [r["elbo_validation"] for r in progress.history]
    assert len(values) < 200 and progress.best_epoch == int(np.argmin(values)) == len(values) - 6
    other = model()
    fit(other, cells(120), replace(config, max_epochs=progress.best_epoch + 1, early_stopping=False))
    assert same(weights(net), weights(other))


def test_the_plateau_rule_lowers_the_learning_rate():
    config = replace(FIT, max_epochs=80, lr=1e-9, reduce_lr_on_plateau=True, n_epochs_kl_warmup=0)
    history = fit(model(), cells(60), replace(config, early_stopping_min_delta=1e3)).history
    rates = [r["lr"] for r in history]
    assert rates[0] == 1e-9 and rates[40] == pytest.approx(0.6e-9) and rates[-1] == pytest.approx(0.36e-9)


def test_the_plateau_rule_as_one_sets_it():
    config = replace(FIT, max_epochs=8, lr=1e-9, reduce_lr_on_plateau=True, n_epochs_kl_warmup=0)
    config = replace(config, early_stopping_min_delta=1e3, lr_patience=2, lr_factor=0.1)
    rates = [r["lr"] / 1e-9 for r in fit(model(), cells(60), config).history]
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("monitor", ["reconstruction", "kl", "loss"])
def test_another_number_may_be_monitored(monitor):
    config = replace(FIT, max_epochs=12, lr=3e-2, early_stopping=True, early_stopping_patience=3, n_epochs_kl_warmup=6)
    progress = fit(model(), cells(120), replace(config, early_stopping_monitor=monitor))
    values = [r[f"{monitor}_validation"] for r in progress.history]
    assert progress.best == min(values) and progress.best_epoch == int(np.argmin(values))
    assert len(values) == min(12, progress.best_epoch + 4)


@pytest.mark.parametrize(
    ("change", "reference"),
    [
        ({"optimizer": "AdamW", "weight_decay": 0.1}, (torch.optim.AdamW, {"weight_decay": 0.1, "eps": 0.01})),
        ({"eps": 1e-8, "weight_decay": 0.1}, (torch.optim.Adam, {"weight_decay": 0.1, "eps": 1e-8})),
    ],
)
def test_the_optimizer_is_the_one_asked_for(change, reference):
    """One step of a batch that is the whole epoch, beside the same step by hand."""
    config = replace(FIT, max_epochs=1, batch_size=300, validation_size=0.0, max_kl_weight=0.5, **change)
    config = replace(config, n_epochs_kl_warmup=0)
    ours, by_hand = model(), model()
    fit(ours, cells(), config)
    kind, options = reference
    optimizer = kind(by_hand.parameters(), lr=1e-3, **options)
    with Loader(cells(), Sampler(n_rows=300, block_rows=50, batch_size=300)).epoch(0) as batches:
        by_hand(next(iter(batches)), kl_weight=0.5).loss.backward()
    optimizer.step()
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, msg=name)


def test_the_kl_weight_moves_between_its_bounds():
    config = replace(FIT, min_kl_weight=0.1, max_kl_weight=0.3)
    assert [r["kl_weight"] for r in fit(model(), cells(60), config).history] == pytest.approx([0.1, 0.2, 0.3, 0.3])


def test_gradient_clipping_bounds_the_step():
    free, clipped = model(), model()
    fit(free, cells(), replace(FIT, max_epochs=1))
    fit(clipped, cells(), replace(FIT, max_epochs=1, gradient_clip=1e-6))
    start = weights(model())
    assert max((weights(clipped)[k] - start[k]).abs().max() for k in start if "weight" in k) < 1e-3
    assert not same(weights(free), weights(clipped))


def test_a_loss_that_is_not_finite_names_the_step():
    source = cells()
    source.cells.data[source.cells.indptr[40]] = np.float32("inf")
    with pytest.raises(DataError, match=r"The loss became (nan|inf) at epoch 0, step \d+"):
        fit(model(), source, FIT)


def assert_lane_by_lane_is_the_whole(net, batch, atol):
    """The gradients of both modes, and of one that makes parts of the batch, each over all of the batch's cells."""
    gradients = []
    for config in (FIT, replace(FIT, deterministic=True), replace(FIT, max_cells_per_pass=7)):
        net.zero_grad()
        sums = backward(net, batch, 0.7, batch.n_cells, Workers(), config)
        gradients.append([p.grad.clone() for p in net.parameters()])
        assert sums[3] == batch.n_cells
    for whole, *parts in zip(*gradients, strict=True):
        for part in parts:
            torch.testing.assert_close(whole, part, rtol=1e-4, atol=atol)


def test_deterministic_and_quick_gradients_agree():
    net = model(**PRESETS["scarches"])
    sampler = Sampler(n_rows=300, block_rows=50, batch_size=64)
    with Loader(cells(), sampler).epoch(0) as batches:
        batch = next(iter(batches))
    assert_lane_by_lane_is_the_whole(net, batch, atol=1e-6)


def test_lanes_are_the_batch_in_pieces():
    sampler = Sampler(n_rows=300, block_rows=50, batch_size=64, n_lanes=5)
    with Loader(cells(), sampler).epoch(0) as batches:
        batch = next(iter(batches))
    pieces = list(lanes(batch))
    assert len(pieces) == 5
    np.testing.assert_array_equal(np.concatenate([p.rows for p in pieces]), batch.rows)
    np.testing.assert_array_equal(np.concatenate([p.data for p in pieces]), batch.data)
    assert all(p.indptr[0] == 0 and p.indptr[-1] == len(p.data) for p in pieces)


@pytest.mark.parametrize("option", [{"deterministic": True}, {"max_cells_per_pass": 16}], ids=str)
def test_batch_norm_cannot_be_computed_in_parts(option):
    with pytest.raises(ConfigError, match=f"--{next(iter(option)).replace('_', '-')} computes .* batch norm mixes the"):
        fit(model(use_batch_norm="both"), cells(), replace(FIT, **option))


def test_passes_are_the_batch_in_equal_parts():
    sampler = Sampler(n_rows=300, block_rows=50, batch_size=64)
    with Loader(cells(), sampler).epoch(0) as batches:
        batch = next(iter(batches))
    assert list(passes(batch, None)) == [batch] == list(passes(batch, batch.n_cells))
    pieces = list(passes(batch, 20))
    assert max(p.n_cells for p in pieces) <= 20 and max(p.n_cells for p in pieces) - min(p.n_cells for p in pieces) <= 1
    np.testing.assert_array_equal(np.concatenate([p.rows for p in pieces]), batch.rows)


def test_training_in_passes_gives_the_same_model_up_to_rounding_and_to_the_bit_lane_by_lane():
    whole, parts, lane_by_lane, both = (model(**PRESETS["scarches"]) for _ in range(4))
    exact = replace(FIT, deterministic=True)
    fit(whole, cells(), FIT)
    fit(parts, cells(), replace(FIT, max_cells_per_pass=5))
    fit(lane_by_lane, cells(), exact)
    fit(both, cells(), replace(exact, max_cells_per_pass=2))
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-3, atol=1e-4)
    assert not same(weights(whole), weights(parts)) and same(weights(lane_by_lane), weights(both))
    with pytest.raises(ConfigError, match="lane by lane, 2 cells each, not in passes of 1: use --n-lanes 32"):
        fit(both, cells(), replace(exact, max_cells_per_pass=1))


def test_bfloat16_trains_nearly_the_same_model():
    exact, short = model(**PRESETS["scarches"]), model(**PRESETS["scarches"])
    config = replace(FIT, max_epochs=8, lr=1e-2)
    want, got = (fit(net, cells(), replace(config, precision=p)) for net, p in ((exact, "32"), (short, "bf16")))
    assert all(t.dtype == torch.float32 for t in weights(short).values())
    series = [[r["elbo_validation"] for r in progress.history] for progress in (want, got)]
    np.testing.assert_allclose(*series, rtol=0.01)
    assert series[0] != series[1] and series[1][-1] < 0.9 * series[1][0]


def partly_labelled(n=300, every=10):
    source = cells(n)
    labels = np.where(np.arange(n) % every == 0, np.arange(n) // every % 3, MISSING)
    return MemorySource(replace(source.cells, labels=labels), source.block_rows)


def scanvi(seed=0, **options):
    torch.manual_seed(seed)
    schema = replace(SCHEMA, labels=Covariate("label", ("x", "y", "z")))
    made = SCANVI(schema, SCANVI.Config(**{"n_hidden": 16, "n_latent": 3} | PRESETS["scarches"] | options))
    made.set_labelled_share(0.1)
    return made


@pytest.mark.parametrize("batch_size", [64, 8])
def test_labelled_cells_add_the_same_gradient_lane_by_lane(batch_size):
    """At a batch size of 8 most lanes are empty, and some of these have labelled cells."""
    source, net = partly_labelled(), scanvi()
    main = Sampler(n_rows=300, block_rows=50, batch_size=batch_size)
    with LabelledLoader(source, LabelledPlan(main=main, codes=source.labels())).epoch(0) as batches:
        alone = lambda b: any(lane.n_cells == 0 and lane.labelled.n_cells > 0 for lane in lanes(b))  # noqa: E731
        batch = next(b for b in batches if alone(b) == (batch_size == 8))
    assert_lane_by_lane_is_the_whole(net, batch, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"n_samples_per_label": 4}], ids=["all", "four of each"])
def test_a_stopped_scanvi_goes_on_with_the_labelled_cells_that_were_next(tmp_path, options):
    config = replace(FIT, batch_size=8, max_epochs=2)
    undisturbed = scanvi(**options)
    fit(undisturbed, partly_labelled(), config)
    with pytest.raises(Killed), saving(tmp_path) as saver:
        fit(scanvi(**options), partly_labelled(), config, hooks=Hooks(saver=saver, cells=KillAfter(20)))
    resumed = scanvi(9, **options)
    with saving(tmp_path) as saver:
        fit(resumed, partly_labelled(), config, hooks=Hooks(saver=saver))
    assert same(weights(resumed), weights(undisturbed))


def test_the_labelled_stream_is_what_the_model_asks_for():
    rows = []

    class Seen(SCANVI):
        def forward(self, batch, kl_weight=1.0, noise=None):
            if self.training:
                rows.append(None if batch.labelled is None else len(np.unique(batch.labelled.rows)))
            return super().forward(batch, kl_weight, noise)

    for options, each in (({}, 25), ({"n_samples_per_label": 4}, 12), ({"labelled_batches": False}, None)):
        rows.clear()
        net = scanvi(**options)
        net.__class__ = Seen
        fit(net, partly_labelled(), replace(FIT, max_epochs=1, batch_size=64))
        assert set(rows) == {each}  # 30 cells have a label, 5 of these are held out


def test_too_few_cells_for_the_workers():
    with pytest.raises(ConfigError, match="batch_size 16 is too small for 8 workers: 4 cells each"):
        fit(model(), cells(), replace(FIT, batch_size=16), Workers(0, 8))
    with pytest.raises(ConfigError, match="7 cells are too few for 2 workers"):
        fit(model(), cells(7), FIT, Workers(0, 2))


def test_batches_for_a_gpu_keep_the_stored_types_and_widen_to_the_same(monkeypatch):
    """The copy to a GPU itself is not run here: pinned memory is replaced by ordinary memory."""
    monkeypatch.setattr(workers_module, "pinned", np.empty)
    source = cells()
    small = replace(
        source.cells, indices=source.cells.indices.astype(np.uint16), data=source.cells.data.astype(np.uint8)
    )
    compact = MemorySource(small, source.block_rows)
    sampler = Sampler(n_rows=source.n_rows, block_rows=source.block_rows, batch_size=32)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with (
        Workers().loader(compact, sampler, cpu).epoch(0) as wide,
        Workers().loader(compact, sampler, gpu).epoch(0) as raw,
    ):
        for a, b in zip(wide, raw, strict=True):
            assert (a.indices.dtype, a.data.dtype) == (np.int32, np.float32)
            assert (b.indices.dtype, b.data.dtype) == (np.uint16, np.uint8)
            dense = [Counts(Nonzeros(x.indptr, x.indices, x.data), x.n_cells, x.n_genes, cpu).dense for x in (a, b)]
            assert torch.equal(*dense)
