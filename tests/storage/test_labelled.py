"""The stream of labelled cells: what each step gets, for any number of workers and from any step on."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scviaduct.errors import ConfigError
from scviaduct.schema import MISSING
from scviaduct.storage import labelled as module
from scviaduct.storage.labelled import LabelledLoader, LabelledPlan, read_rows
from scviaduct.storage.loader import Loader, MemorySource
from scviaduct.storage.sampler import Sampler, Split
from tests.storage.test_loader import cells

SIZES = dict(
    n_rows=st.integers(60, 400),
    block_rows=st.integers(7, 97),
    batch_size=st.integers(8, 90),
    n_lanes=st.integers(4, 20),
    seed=st.integers(0, 5),
)


def labels(n, share=0.3, seed=0):
    """Three labels, the last of them rare."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(3, n, p=[0.6, 0.35, 0.05]).astype(np.int8)
    codes[rng.random(n) > share] = MISSING
    codes[:2] = 0
    return codes


def plan_of(n_samples_per_label=None, share=0.3, fraction=0.0, **sizes):
    main = Sampler(**sizes, split=Split(fraction, sizes["seed"]))
    return LabelledPlan(
        main=main, codes=labels(sizes["n_rows"], share, sizes["seed"]), n_samples_per_label=n_samples_per_label
    )


def source_of(plan):
    batch = replace(cells(plan.main.n_rows), labels=plan.codes.astype(np.int64))
    return MemorySource(batch, plan.main.block_rows)


def stream_of(plan, epoch, world_size=1, start=0):
    """Per step the labelled batches of all ranks."""
    source, out = source_of(plan), []
    for rank in range(world_size):
        with LabelledLoader(source, plan, rank=rank, world_size=world_size).epoch(epoch, start) as batches:
            out.append([batch.labelled for batch in batches])
    return list(zip(*out, strict=True))


def rows_of(step):
    return [int(row) for batch in step for row in batch.rows]


@given(**SIZES, world_size=st.integers(1, 4), cut=st.floats(0, 0.99), k=st.sampled_from([None, 3, 20]))
@settings(max_examples=25)
def test_any_workers_and_any_start_see_the_same_cells(world_size, cut, k, **sizes):
    plan = plan_of(k, **sizes)
    start = int(plan.main.steps * cut)
    one, many = stream_of(plan, 2), stream_of(plan, 2, world_size, start)
    assert [rows_of(s) for s in one[start:]] == [rows_of(s) for s in many]
    for a, b in zip(one[start:], many, strict=True):
        np.testing.assert_array_equal(a[0].seeds, np.concatenate([part.seeds for part in b]))
        assert all(part.weight == a[0].weight for part in b)
        assert np.concatenate([np.diff(part.lanes) for part in b]).tolist() == np.diff(a[0].lanes).tolist()


@given(**SIZES, k=st.sampled_from([None, 1, 5]), fraction=st.sampled_from([0.0, 0.2]))
@settings(max_examples=30)
def test_a_pass_visits_each_drawn_cell_once(k, fraction, **sizes):
    plan = plan_of(k, fraction=fraction, **sizes)
    drawn = plan.drawn(1)
    if len(drawn) < 2:
        return
    passes = plan.passes(len(drawn))
    steps = [rows_of(s) for s in stream_of(plan, 1)]
    assert len(steps) == plan.main.steps
    for first in range(0, len(steps) - passes.steps + 1, passes.steps):
        seen = [row for step in steps[first : first + passes.steps] for row in step]
        assert sorted(seen) == drawn.tolist()


@given(**SIZES, k=st.sampled_from([None, 1, 5, 1000]), fraction=st.sampled_from([0.0, 0.3]), at_once=st.integers(3, 99))
def test_what_an_epoch_draws(k, fraction, at_once, **sizes):
    plan = plan_of(k, fraction=fraction, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS", at_once)
        drawn = plan.drawn(0)
    assert drawn.tolist() == plan.drawn(0).tolist() == sorted(set(drawn.tolist()))  # not a matter of the chunks
    every = np.arange(plan.main.n_rows)
    known = every[(plan.codes != MISSING) & plan.main.includes(every)]
    assert set(drawn) <= set(known)
    wanted = np.bincount(plan.codes[known], minlength=3)
    assert np.bincount(plan.codes[drawn], minlength=3).tolist() == np.minimum(wanted, k or 10**6).tolist()


def test_each_epoch_draws_anew_and_over_time_every_cell():
    plan = plan_of(10, n_rows=400, block_rows=32, batch_size=32, n_lanes=4, seed=0)
    draws = [set(plan.drawn(epoch).tolist()) for epoch in range(60)]
    assert draws[0] != draws[1]
    assert set().union(*draws) == set(np.flatnonzero(plan.codes != MISSING).tolist())


def test_no_more_than_memory_is_given_are_drawn_when_nobody_says_how_many(monkeypatch):
    plan = plan_of(None, share=1.0, n_rows=400, block_rows=32, batch_size=32, n_lanes=4, seed=0)
    assert len(plan.drawn(0)) == 400
    monkeypatch.setattr(module, "HELD", 50)
    assert len(plan.drawn(0)) == 50 and plan.drawn(0).tolist() != plan.drawn(1).tolist()


def test_the_main_batches_stay_as_they_are_and_weights_make_means():
    plan = plan_of(20, fraction=0.1, n_rows=400, block_rows=32, batch_size=50, n_lanes=8, seed=1)
    source = source_of(plan)
    with LabelledLoader(source, plan).epoch(3) as pairs, Loader(source, plan.main).epoch(3) as plain:
        for pair, batch in zip(pairs, plain, strict=True):
            for name in ("rows", "indptr", "indices", "data", "seeds", "lanes", "labels"):
                np.testing.assert_array_equal(getattr(pair, name), getattr(batch, name))
            extra = pair.labelled
            assert extra.weight == batch.n_cells / extra.n_cells
            assert (extra.labels == plan.codes[extra.rows]).all() and (extra.labels != MISSING).all()
            for i, row in enumerate(extra.rows[:5]):
                own, there = (slice(p[k], p[k + 1]) for p, k in ((extra.indptr, i), (source.cells.indptr, row)))
                np.testing.assert_array_equal(extra.indices[own], source.cells.indices[there])
                np.testing.assert_array_equal(extra.data[own], source.cells.data[there])


def test_the_same_cell_gets_other_noise_in_each_pass_and_beside_the_main_stream():
    plan = plan_of(20, n_rows=384, block_rows=32, batch_size=32, n_lanes=4, seed=0)
    steps = stream_of(plan, 0)
    keys = [dict(zip(rows_of(s), s[0].seeds.tolist(), strict=True)) for s in steps]
    row = int(np.intersect1d(plan.drawn(0), plan.drawn(1))[0])
    keys += [dict(zip(rows_of(s), s[0].seeds.tolist(), strict=True)) for s in stream_of(plan, 1)]
    of_row = [k[row] for k in keys if row in k]
    assert len(set(of_row)) == len(of_row) == len(steps)  # a pass has two steps, and there are two epochs
    assert plan.main.seeds(0, np.array([row]))[0] not in of_row


class Counting(MemorySource):
    """Remembers which blocks were read."""

    def __init__(self, cells, block_rows):
        super().__init__(cells, block_rows)
        self.seen = []

    def read(self, block):
        self.seen.append(block)
        return super().read(block)


@pytest.mark.parametrize(("k", "again"), [(None, 0), (1, 3)])
def test_blocks_are_read_once_an_epoch_and_only_for_other_cells(k, again):
    plan = plan_of(k, n_rows=400, block_rows=10, batch_size=32, n_lanes=4, seed=0)
    whole = source_of(plan)
    source = Counting(whole.cells, 10)
    loader = LabelledLoader(source, plan)
    counts = []
    for epoch in (0, 1):
        source.seen.clear()
        with loader.epoch(epoch) as batches:
            list(batches)
        counts.append(len(source.seen) - 40)
    touched = len(np.unique(plan.drawn(0) // 10))
    assert counts[0] == touched and counts[1] == again


def test_rows_are_read_in_the_types_on_disk():
    whole = cells(100)
    small = replace(whole, indices=whole.indices.astype(np.uint16), data=whole.data.astype(np.uint8))
    some = read_rows(MemorySource(small, 16), np.array([3, 17, 18, 99]))
    assert (some.indices.dtype, some.data.dtype) == (np.uint16, np.uint8)
    assert some.rows.tolist() == [3, 17, 18, 99]


def test_one_labelled_cell_makes_no_batch():
    plan = plan_of(None, n_rows=100, block_rows=32, batch_size=32, n_lanes=4, seed=0)
    plan.codes[:] = MISSING
    plan.codes[5] = 1
    with (
        pytest.raises(ConfigError, match="1 training cells have a label"),
        LabelledLoader(source_of(plan), plan).epoch(0) as b,
    ):
        list(b)
