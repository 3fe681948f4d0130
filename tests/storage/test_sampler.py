import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scviaduct.errors import ConfigError
from scviaduct.storage import sampler as module
from scviaduct.storage.sampler import Sampler, Split, StratifiedSplit, keyed

SIZES = dict(
    n_rows=st.integers(1, 700),
    block_rows=st.integers(1, 97),
    batch_size=st.integers(1, 200),
    n_lanes=st.integers(1, 20),
    seed=st.integers(0, 5),
)


def rows_of_step(sampler, epoch, step, rank=0, world_size=1):
    """Source rows of one rank's batch, in order."""
    out = []
    for lane in sampler.request(epoch, range(step, step + 1), rank, world_size):
        for block, start, stop in lane:
            out += list(block * sampler.block_rows + sampler.rows_of(epoch.index, block)[start:stop])
    return [int(x) for x in out]


def rows_of_epoch(sampler, index, world_size=1, start=0, stop=None):
    epoch = sampler.epoch(index)
    return [
        [rows_of_step(sampler, epoch, step, rank, world_size) for rank in range(world_size)]
        for step in range(start, sampler.steps if stop is None else stop)
    ]


def flat(nested):
    return [x for item in nested for x in (flat(item) if isinstance(item, list) else [item])]


@given(**SIZES, epoch=st.integers(0, 3), world_size=st.integers(1, 8))
def test_every_row_exactly_once_in_an_epoch(epoch, world_size, **sizes):
    sampler = Sampler(**sizes)
    if world_size > sampler.n_lanes:
        with pytest.raises(ConfigError, match="n-lanes"):
            sampler.lanes_of(0, world_size)
        return
    assert sorted(flat(rows_of_epoch(sampler, epoch, world_size))) == list(range(sampler.n_rows))


@given(**SIZES, worlds=st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_the_global_batch_does_not_depend_on_the_number_of_workers(worlds, **sizes):
    sampler = Sampler(**sizes)
    a, b = (min(w, sampler.n_lanes) for w in worlds)
    # ranks own neighbouring lanes, so even the order of the cells is the same
    assert [flat(s) for s in rows_of_epoch(sampler, 1, a)] == [flat(s) for s in rows_of_epoch(sampler, 1, b)]


@given(**SIZES, worlds=st.lists(st.integers(1, 8), min_size=2, max_size=4), cut=st.floats(0, 1))
def test_interrupted_and_resumed_with_other_workers_sees_the_same_cells(worlds, cut, **sizes):
    sampler = Sampler(**sizes)
    worlds = [min(w, sampler.n_lanes) for w in worlds]
    stops = [round(sampler.steps * cut * (k + 1) / len(worlds)) for k in range(len(worlds) - 1)] + [sampler.steps]
    seen, at = [], 0
    for world, stop in zip(worlds, stops, strict=True):
        seen += rows_of_epoch(sampler, 2, world, at, stop)
        at = stop
    assert [flat(s) for s in seen] == [flat(s) for s in rows_of_epoch(sampler, 2, 1)]
    assert sorted(flat(seen)) == list(range(sampler.n_rows))


@given(**SIZES)
def test_batches_are_nearly_equal_and_rows_at_tells_their_size(**sizes):
    sampler = Sampler(**sizes)
    lengths = [len(flat(s)) for s in rows_of_epoch(sampler, 0)]
    assert lengths == [sampler.rows_at(s) for s in range(sampler.steps)]
    ideal = sampler.n_rows / sampler.steps
    assert max(abs(n - ideal) for n in lengths) <= sampler.n_lanes  # every lane is off by less than one row


@pytest.mark.parametrize(("n_rows", "batch_size"), [(1556, 128), (60_000, 128), (60_001, 1024), (123_457, 256)])
def test_the_lanes_phases_spread_the_rounding(n_rows, batch_size):
    sampler = Sampler(n_rows=n_rows, block_rows=1024, batch_size=batch_size)
    lengths = np.array([sampler.rows_at(s) for s in range(sampler.steps)])
    assert np.abs(lengths - n_rows / sampler.steps).max() < 6  # without phases up to 16


@pytest.mark.parametrize(
    ("n_rows", "batch_size", "steps"), [(1025, 128, 9), (360, 256, 2), (1024, 128, 8), (40, 128, 1)]
)
def test_as_many_steps_as_batches_with_a_tail_and_no_tail(n_rows, batch_size, steps):
    """A small data set in few steps learns less: rounding gave 360 cells one step of 256 where scvi-tools takes two."""
    sampler = Sampler(n_rows=n_rows, block_rows=1024, batch_size=batch_size)
    sizes = [sampler.rows_at(s) for s in range(sampler.steps)]
    assert sampler.steps == steps and sum(sizes) == n_rows
    assert min(sizes) > 0.95 * n_rows / steps


def test_order_changes_with_epoch_and_seed_and_is_reproducible():
    first = Sampler(n_rows=500, block_rows=64, batch_size=50, seed=1)
    assert rows_of_epoch(first, 0) == rows_of_epoch(first, 0)
    assert rows_of_epoch(first, 0) != rows_of_epoch(first, 1)
    assert rows_of_epoch(first, 0) != rows_of_epoch(Sampler(n_rows=500, block_rows=64, batch_size=50, seed=2), 0)


@given(n_rows=st.integers(200, 3000), fraction=st.sampled_from([0.1, 0.3, 0.5]), seed=st.integers(0, 3))
def test_split_covers_all_rows_without_overlap(n_rows, fraction, seed):
    split = Split(fraction, seed)
    common = dict(n_rows=n_rows, block_rows=100, batch_size=64, split=split)
    train = flat(rows_of_epoch(Sampler(**common, seed=seed, part="train"), 0))
    held = flat(rows_of_epoch(Sampler(**common, seed=seed, part="validation"), 0))
    assert sorted(train + held) == list(range(n_rows))
    assert abs(len(held) / n_rows - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / n_rows)


def test_split_is_not_a_contiguous_block():
    held = Split(0.1, 0).validation(np.arange(10_000))
    by_block = held.reshape(10, 1000).mean(1)
    assert by_block.min() > 0.05 and by_block.max() < 0.15


@given(
    codes=st.lists(st.integers(-1, 6), min_size=1, max_size=300),
    fraction=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9]),
    seed=st.integers(0, 3),
    at_once=st.sampled_from([7, 1 << 20]),
)
def test_a_stratified_split_holds_out_the_share_of_each_category(codes, fraction, seed, at_once):
    codes = np.array(codes, np.int8)
    rows, plain = np.arange(len(codes)), Split(fraction, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_HASH_ROWS", at_once)
        split = StratifiedSplit(fraction, seed, codes=codes)
        held = split.validation(rows)
    for code in np.unique(codes):
        mine = rows[codes == code]
        wanted = int(np.floor(fraction * len(mine) + 0.5))
        assert held[mine].sum() == wanted
        by_hash = mine[np.argsort(plain._hash(mine))]
        assert set(mine[held[mine]]) == set(by_hash[:wanted])  # so that only seed and codes decide
    assert [split.validation(np.array([r]))[0] for r in rows] == held.tolist()  # a row at a time, in any blocks


def test_a_stratified_split_of_many_categories_and_of_one():
    rows = np.arange(50_000)
    for codes in (np.random.default_rng(0).permutation(rows % 5_000).astype(np.int16), np.zeros(50_000, np.int8)):
        held = StratifiedSplit(0.3, 1, codes=codes).validation(rows)
        assert set(np.bincount(codes, held)) == {round(0.3 * np.bincount(codes)[0])}
    shares = held.reshape(50, 1000).mean(1)
    assert shares.min() > 0.2 and shares.max() < 0.4  # no block of rows


@given(**SIZES, worlds=st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_a_stratified_epoch_is_the_same_for_any_workers(worlds, **sizes):
    codes = (np.arange(sizes["n_rows"]) % 3).astype(np.int8)
    split = StratifiedSplit(0.4, 0, codes=codes)
    if not (~split.validation(np.arange(sizes["n_rows"]))).any():
        return
    sampler = Sampler(**sizes, split=split)
    a, b = (min(w, sampler.n_lanes) for w in worlds)
    assert [flat(s) for s in rows_of_epoch(sampler, 1, a)] == [flat(s) for s in rows_of_epoch(sampler, 1, b)]
    seen = flat(rows_of_epoch(sampler, 1, a))
    assert sorted(seen) == np.flatnonzero(~split.validation(np.arange(sizes["n_rows"]))).tolist()


@given(**SIZES, world_size=st.integers(1, 8), length=st.integers(1, 9))
def test_neighbouring_steps_may_be_asked_for_at_once(world_size, length, **sizes):
    sampler = Sampler(**sizes)
    epoch, world_size = sampler.epoch(0), min(world_size, sampler.n_lanes)
    steps = range(0, min(length, sampler.steps))
    for rank in range(world_size):
        lanes = sampler.request(epoch, steps, rank, world_size)
        shares = sampler.shares(steps, rank, world_size)
        assert shares.shape == (len(steps), len(lanes))
        for v, lane in enumerate(lanes):
            one_by_one = [sampler.request(epoch, range(s, s + 1), rank, world_size)[v] for s in steps]
            assert [sum(x.stop - x.start for x in lane_at) for lane_at in one_by_one] == shares[:, v].tolist()
            cells = [(b, r) for lane_at in one_by_one for b, start, stop in lane_at for r in range(start, stop)]
            assert [(b, r) for b, start, stop in lane for r in range(start, stop)] == cells


def test_an_empty_part_is_refused():
    with pytest.raises(ConfigError, match="validation part of 10 rows is empty"):
        Sampler(n_rows=10, block_rows=4, batch_size=2, part="validation")


@pytest.mark.parametrize("field", ["n_rows", "block_rows", "batch_size", "n_lanes"])
def test_sizes_must_be_positive(field):
    with pytest.raises(ConfigError, match=f"{field} must be at least 1, not 0"):
        Sampler(**dict(n_rows=10, block_rows=4, batch_size=2) | {field: 0})


def test_cells_get_other_keys_each_epoch_and_the_same_keys_again():
    sampler, rows = Sampler(n_rows=100, block_rows=10, batch_size=10), np.arange(100)
    assert (sampler.seeds(0, rows) == sampler.seeds(0, rows)).all()
    assert len(set(sampler.seeds(0, rows)) | set(sampler.seeds(1, rows))) == 200


def test_keys_are_uniform():
    bits = np.unpackbits(keyed(np.arange(20_000), 3).view(np.uint8)).reshape(20_000, 64)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02
