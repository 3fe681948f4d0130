"""The optimizer moves the weights as torch's own classes do, to the bit, and goes on where it was saved."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scviaduct.distributed.optimizer import Adam, Group

SHAPES = ((3, 5), (7,), (2, 4), ())
OPTIONS = {"eps": 0.01, "weight_decay": 1e-3}
KINDS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


def weights(seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def give_gradients(parameters, step, without=()):
    generator = torch.Generator().manual_seed(step)
    for k, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if k in without else gradient


def ours(parameters, kind):
    return Adam([Group(parameters[:2], 0.05), Group(parameters[2:], 0.01)], kind, **OPTIONS)


def theirs(parameters, kind):
    groups = [{"params": parameters[:2], "lr": 0.05}, {"params": parameters[2:], "lr": 0.01}]
    return KINDS[kind](groups, fused=True, **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
@given(missing=st.lists(st.sets(st.integers(0, len(SHAPES) - 1)), min_size=1, max_size=6), factor=st.floats(0.1, 1.0))
def test_weights_are_those_of_torch_bit_by_bit(kind, missing, factor):
    mine, other = weights(), weights()
    own, reference = ours(mine, kind), theirs(other, kind)
    for step, without in enumerate(missing):
        for parameters, optimizer in ((mine, own), (other, reference)):
            give_gradients(parameters, step, without)
            optimizer.step()
        own.groups[0].lr *= factor
        reference.param_groups[0]["lr"] *= factor
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    saved = own.tensors()
    for index, slot in reference.state_dict()["state"].items():
        assert all(torch.equal(saved[f"{index}.{name}"], value) for name, value in slot.items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_goes_on_as_if_nothing_had_been(kind):
    parameters = weights()
    optimizer = ours(parameters, kind)
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = ours(copies, kind)
    resumed.load({name: tensor.clone() for name, tensor in optimizer.tensors().items()})
    for own, all_of_them in ((optimizer, parameters), (resumed, copies)):
        give_gradients(all_of_them, 3)
        own.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))


def test_another_model_s_memory_is_refused():
    saved = ours(weights(), "Adam").tensors()
    optimizer = ours([torch.nn.Parameter(torch.zeros(9)) for _ in SHAPES], "Adam")
    with pytest.raises(ValueError, match=r"0\.exp_avg belongs to none of these 4 parameters"):
        optimizer.load(saved)


def test_gradients_are_forgotten():
    parameters = weights()
    optimizer = ours(parameters, "Adam")
    give_gradients(parameters, 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


def test_it_does_not_load_torch_s_compiler():
    """Which takes 0.9 s."""
    code = (
        "import sys, torch; from scviaduct.distributed.loop import Adam, Group; "
        "p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.ones(2); "
        "Adam([Group([p], 0.1)], 'Adam', eps=1e-8, weight_decay=0.0).step(); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
