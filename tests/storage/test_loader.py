import threading
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from scviaduct.errors import ConfigError
from scviaduct.schema import Batch
from scviaduct.storage import loader
from scviaduct.storage.loader import Loader, MemorySource, Prefetched, cut, gather, stream
from scviaduct.storage.memory import Recycled
from scviaduct.storage.sampler import Sampler, Split


def cells(n=200, genes=30, seed=0, **extra):
    rng = np.random.default_rng(seed)
    x = sp.csr_matrix(rng.poisson(0.3, (n, genes)).astype(np.float32))
    return Batch(
        n_genes=genes,
        indptr=x.indptr.astype(np.int64),
        indices=x.indices.astype(np.int32),
        data=x.data,
        batch_index=rng.integers(0, 3, n),
        rows=np.arange(n),
        **extra,
    )


def dense(batch):
    return sp.csr_matrix((batch.data, batch.indices, batch.indptr), (batch.n_cells, batch.n_genes)).toarray()


@given(
    n=st.integers(1, 300),
    block_rows=st.integers(1, 70),
    batch_size=st.integers(1, 80),
    world=st.integers(1, 4),
    fraction=st.sampled_from([0.0, 0.2]),
)
def test_batches_hold_the_right_counts_codes_and_rows(n, block_rows, batch_size, world, fraction):
    whole = cells(n)
    x = dense(whole)
    split = Split(fraction)
    sampler = Sampler(n_rows=n, block_rows=block_rows, batch_size=batch_size, split=split)
    seen = []
    for rank in range(world):
        with Loader(MemorySource(whole, block_rows), sampler, rank=rank, world_size=world).epoch(3) as batches:
            for batch in batches:
                np.testing.assert_array_equal(dense(batch), x[batch.rows])
                np.testing.assert_array_equal(batch.batch_index, whole.batch_index[batch.rows])
                np.testing.assert_array_equal(batch.seeds, sampler.seeds(3, batch.rows))
                assert batch.lanes[-1] == batch.n_cells
                assert len(batch.lanes) == len(sampler.lanes_of(rank, world)) + 1
                seen += list(batch.rows)
    assert sorted(seen) == list(np.flatnonzero(~split.validation(np.arange(n))))


def test_starting_at_a_step_gives_the_rest_of_the_epoch():
    sampler = Sampler(n_rows=200, block_rows=32, batch_size=20)
    source = MemorySource(cells(200), 32)
    with Loader(source, sampler).epoch(0) as a, Loader(source, sampler).epoch(0, 4) as b:
        whole, rest = list(a), list(b)
    assert len(rest) == len(whole) - 4
    assert all((x.rows == y.rows).all() for x, y in zip(whole[4:], rest, strict=True))


def test_every_field_follows_its_cell():
    n = 64
    whole = cells(
        n,
        labels=np.arange(n),
        categorical=np.arange(2 * n).reshape(n, 2),
        continuous=np.arange(3 * n, dtype=np.float32).reshape(n, 3),
        size_factor=np.arange(n, dtype=np.float32) + 1,
        proteins=np.arange(2 * n, dtype=np.float32).reshape(n, 2),
    )
    rows = np.array([5, 3, 60, 3])
    batch = gather([(whole, rows[:2]), (whole, rows[2:])])
    per_cell = {f.name for f in fields(Batch)} - {
        "n_genes",
        "indptr",
        "indices",
        "data",
        "seeds",
        "lanes",
        "labelled",
        "weight",
    }
    for name in per_cell:
        np.testing.assert_array_equal(getattr(batch, name), getattr(whole, name)[rows])
    np.testing.assert_array_equal(dense(batch), dense(whole)[rows])


def test_types_are_widened_on_the_way_or_kept():
    whole = cells(100)
    small = replace(whole, indices=whole.indices.astype(np.uint16), data=whole.data.astype(np.uint8))
    sampler = Sampler(n_rows=100, block_rows=16, batch_size=30)
    with (
        Loader(MemorySource(small, 16), sampler).epoch(0) as wide,
        Loader(MemorySource(small, 16), sampler, compact=True).epoch(0) as compact,
    ):
        for a, b in zip(wide, compact, strict=True):
            assert (a.indices.dtype, a.data.dtype) == (np.int32, np.float32)
            assert (b.indices.dtype, b.data.dtype) == (np.uint16, np.uint8)
            np.testing.assert_array_equal(dense(a), dense(whole)[a.rows])
            np.testing.assert_array_equal(dense(a), dense(b))


def test_places_say_where_each_cell_goes():
    whole, rows, places = cells(50), np.array([4, 9, 1, 30]), np.array([2, 0, 3, 1])
    batch = gather([(whole, rows[:1]), (whole, rows[1:])], places)
    assert batch.rows.tolist() == [9, 30, 4, 1]
    np.testing.assert_array_equal(dense(batch), dense(whole)[batch.rows])
    np.testing.assert_array_equal(batch.batch_index, whole.batch_index[batch.rows])


def test_a_cut_is_a_batch_of_its_own():
    whole = cells(50, seeds=np.arange(50, dtype=np.uint64))
    part = cut(whole, 10, 25, whole.lanes)
    np.testing.assert_array_equal(dense(part), dense(whole)[10:25])
    assert part.rows.tolist() == part.seeds.tolist() == list(range(10, 25)) and part.labels.size == 0


def test_batches_that_are_kept_are_never_overwritten():
    """Memory is used again, but only that of batches nobody has any more."""
    whole = cells(2000)
    sampler = Sampler(n_rows=2000, block_rows=64, batch_size=40)
    made, kept = Loader(MemorySource(whole, 64), sampler), []
    for epoch in range(3):
        with made.epoch(epoch) as batches:
            kept += [b for k, b in enumerate(batches) if k % 7 == 0]
    for batch in kept:
        np.testing.assert_array_equal(dense(batch), dense(whole)[batch.rows])


def test_memory_is_used_again_once_its_arrays_and_their_views_are_gone():
    allocate = Recycled(slabs=2)
    first = allocate(1000, np.float32)
    address, view = first.__array_interface__["data"][0], first[10:20]
    del first
    second = allocate(1000, np.uint16)
    assert not np.shares_memory(second, view)
    del view
    third = allocate(900, np.float32)
    assert third.__array_interface__["data"][0] == address and len(third) == 900
    many = [allocate(1000, np.float32) for _ in range(5)]  # more than are kept: ordinary memory
    assert not any(np.shares_memory(a, b) for a in many for b in [*many, second, third] if a is not b)


def test_cells_in_memory_have_no_columns_to_split_by():
    with pytest.raises(ConfigError, match="'donor'"):
        MemorySource(cells(5)).strata("donor")


def test_as_many_blocks_are_read_at_once_as_the_source_wants():
    class Meeting(MemorySource):
        """Reads return when `readers` of them are under way."""

        def __init__(self, cells, block_rows):
            super().__init__(cells, block_rows)
            self.readers, self.met = 4, threading.Barrier(4)

        def read(self, block):
            self.met.wait(timeout=20)
            return super().read(block)

    with Loader(Meeting(cells(256), 16), Sampler(n_rows=256, block_rows=16, batch_size=32, n_lanes=1)).epoch(0) as made:
        assert sum(b.n_cells for b in made) == 256
    with stream(Meeting(cells(256), 16)) as made:
        assert sum(b.n_cells for b in made) == 256


def test_stream_visits_every_block_in_order_and_ranks_share_them():
    source = MemorySource(cells(105), 10)
    rows = []
    for rank in range(3):
        with stream(source, rank=rank, world_size=3) as blocks:
            rows += [r for b in blocks for r in b.rows]
    assert rows == list(range(105))


def test_blocks_are_read_once_per_lane_that_touches_them():
    class Counting(MemorySource):
        reads = 0

        def read(self, block):
            self.reads += 1
            return super().read(block)

    source = Counting(cells(1000), 50)
    with Loader(source, Sampler(n_rows=1000, block_rows=50, batch_size=10, n_lanes=4)).epoch(0) as batches:
        assert sum(b.n_cells for b in batches) == 1000
    assert 20 <= source.reads <= 20 + 4  # a block cut by a lane border is read by both lanes


def test_an_error_in_the_thread_reaches_the_consumer_and_the_thread_ends():
    def broken():
        yield [1]
        raise OSError("disk gone")

    before = threading.active_count()
    with pytest.raises(OSError, match="disk gone"), Prefetched(broken) as items:
        list(items)
    assert threading.active_count() == before


def test_leaving_early_stops_the_thread():
    before = threading.active_count()
    with Prefetched(lambda: ([k] for k in range(10**9))) as items:
        assert next(iter(items)) == 0
    assert threading.active_count() == before


def test_leaving_an_epoch_early_ends_its_threads_and_reads_no_further(monkeypatch):
    class Counting(MemorySource):
        reads = 0

        def read(self, block):
            self.reads += 1
            return super().read(block)

    monkeypatch.setattr(loader, "_RUN_CELLS", 20)
    before, source = threading.active_count(), Counting(cells(3000), 5)
    with Loader(source, Sampler(n_rows=3000, block_rows=5, batch_size=20, n_lanes=1)).epoch(0) as batches:
        assert next(iter(batches)).n_cells == 20
    assert threading.active_count() == before and 4 <= source.reads < 600


def test_items_are_made_ahead_and_waiting_is_measured():
    def slow():
        for k in range(3):
            time.sleep(0.02)
            yield [k, k + 0.5]

    with Prefetched(slow) as items:
        time.sleep(0.2)
        assert list(items) == [0, 0.5, 1, 1.5, 2, 2.5]
    assert items.waited < 0.05
