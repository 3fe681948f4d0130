import gc
import resource
import sys
import weakref

import numpy as np
import pytest
import torch

from scviaduct.models import memory
from scviaduct.models.bernoulli import Factors, bernoulli
from scviaduct.models.memory import empty, keep_freed
from tests.models.test_likelihoods import counts_of

LARGE = memory._LARGE


@pytest.fixture(autouse=True)
def own_pool(monkeypatch):
    monkeypatch.setattr(memory, "_POOL", memory._Pool())


def test_memory_of_a_freed_tensor_is_used_again():
    a = empty(3, LARGE)
    place = a.data_ptr()
    del a
    assert empty(3, LARGE).data_ptr() == place


def test_a_tensor_that_lives_shares_its_memory_with_nobody():
    a, b = empty(LARGE), empty(LARGE)
    a.fill_(1.0)
    b.fill_(2.0)
    view = a[5:]
    del a
    c = empty(LARGE).fill_(3.0)
    assert float(view.sum()) == len(view)
    assert float(b.sum()) == 2 * LARGE
    assert c.is_contiguous()


def test_batches_of_nearly_the_same_size_share_memory():
    a = empty(LARGE + 100)
    place = a.data_ptr()
    del a
    assert empty(LARGE + 3000).data_ptr() == place


def test_memory_of_a_shape_that_is_gone_is_freed():
    a = empty(8 * LARGE)
    block = weakref.ref(memory._POOL.take(LARGE))
    del a
    gc.collect()
    empty(LARGE)  # takes the small block
    empty(3 * LARGE)  # nothing fits
    assert block() is None
    assert [b.size // LARGE for b in memory._POOL._free] == [3]


def test_small_tensors_are_none_of_the_pool_s():
    empty(2, 3).fill_(1.0)
    assert memory._POOL._free == []


def test_the_optimizer_s_gradient_is_memory_of_the_step_before():
    """No copy between the kernel and `.grad`, and no new memory in the next step."""
    rng = np.random.default_rng(0)
    counts = counts_of(rng.poisson(0.1, (4, 9000)))
    h = torch.randn(4, 40, requires_grad=True)
    weight, bias = torch.randn(9000, 40, requires_grad=True), torch.randn(9000, requires_grad=True)
    places = set()
    for _ in range(4):
        weight.grad = None
        bernoulli(counts, h, weight, bias, Factors(None, None)).mean.backward()
        places.add(weight.grad.data_ptr())
    assert len(places) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc of glibc")
def test_arrays_of_a_step_do_not_fault_again():
    """Three arrays of 24 MB, all freed after each step: by default malloc gives 72 MB back, 18,432 pages."""
    keep_freed()

    def step():
        for array in [torch.empty(6 << 20) for _ in range(3)]:
            array.fill_(1.0)

    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 18_432
