"""Chunks decoded many at a time: by the C function, one by one, and plain ones, all the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import Blosc, blosc

from scviaduct.storage import unpack

CHUNK = 64
VALUES = np.random.default_rng(0).integers(0, 50, 5 * CHUNK).astype(np.uint8)
CODECS = {"lz4": Blosc("lz4", 3, Blosc.SHUFFLE), "zstd": Blosc("zstd", 1), "none": None}


def packed(codec):
    """The chunks one after another, something between them, and where they begin."""
    parts = [VALUES[k : k + CHUNK].tobytes() for k in range(0, len(VALUES), CHUNK)]
    parts = [(codec.encode(part) if codec else part) + b"crc" for part in parts]
    return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0, *map(len, parts)])[:-1].tolist()


def test_the_c_function_is_there():
    """Else batches are made at four fifths of the speed: numcodecs no longer exports it."""
    assert unpack.DECOMPRESS is not None


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("codec", CODECS)
@given(first=st.integers(0, 4), n=st.integers(1, 5), skipped=st.integers(0, CHUNK - 1), less=st.integers(0, CHUNK - 1))
def test_the_values_between_two_places(codec, there, first, n, skipped, less):
    n = min(n, 5 - first)
    less = min(less, n * CHUNK - skipped)
    content, starts = packed(CODECS[codec])
    out = np.full(n * CHUNK - skipped - less, 255, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        if not there:
            patch.setattr(unpack, "DECOMPRESS", None)
        starts = starts[first : first + n]
        unpack.unpack(content, starts, CHUNK, -skipped, out, compressed=CODECS[codec] is not None)
    begin = first * CHUNK + skipped
    np.testing.assert_array_equal(out, VALUES[begin : begin + len(out)])


@pytest.mark.parametrize("there", [True, False])
def test_what_cannot_be_decoded_is_refused_and_nothing_else_is_written(monkeypatch, there):
    if not there:
        monkeypatch.setattr(unpack, "DECOMPRESS", None)
    too_long = Blosc("lz4", 3).encode(np.zeros(2 * CHUNK, np.uint8))
    for wrong in (np.full(CHUNK, 255, np.uint8), np.frombuffer(too_long, np.uint8)):
        out = np.zeros(3 * CHUNK, np.uint8)
        with pytest.raises((RuntimeError, ValueError)):
            unpack.unpack(wrong, [0], CHUNK, CHUNK, out, compressed=True)
        assert not out[:CHUNK].any() and not out[2 * CHUNK :].any()


def test_a_module_without_the_function_is_noticed(monkeypatch):
    monkeypatch.setattr(blosc, "__file__", np.__file__)
    assert unpack._decompress_ctx() is None
