"""Random numbers that belong to cells, not to processes.

Every number is a function of (the cell's seed, how many draws came before, the unit): the same whichever worker holds
the cell and whatever else is in its batch. The hash is splitmix64 (Steele, Lea & Flood, OOPSLA 2014) applied twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scviaduct.models.vectormath import cos_and_sin_of_turns, log

GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BITS = 23  # (k + 1/2) / 2**23 is exact in float32 and never 0 or 1
_STEP = 2.0**-BITS


def _signed(x: int) -> int:
    """A 64-bit pattern as torch's int64."""
    return x - 2**64 if x >= 2**63 else x


@numba.njit(forceinline=True, nogil=True, cache=True)
def mix(x: np.uint64) -> np.uint64:
    """The last steps of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fill(seeds: NDArray[np.uint64], draw: int, out: NDArray[np.float32]) -> None:
    """One hash gives two uniforms: bits 41-63 and bits 9-31."""
    mask, step = np.uint64(2**BITS - 1), np.float32(_STEP)
    half = np.float32(0.5 * _STEP)
    for i in range(seeds.size):
        key = mix(seeds[i] + np.uint64(GOLDEN) * np.uint64(draw + 1))
        for j in range(out.shape[1] // 2):
            h = mix(key + np.uint64(GOLDEN) * np.uint64(j + 1))
            out[i, 2 * j] = np.float32(np.int32(h >> np.uint64(41))) * step + half
            out[i, 2 * j + 1] = np.float32(np.int32((h >> np.uint64(9)) & mask)) * step + half


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _normals(u: NDArray[np.float32]) -> None:
    """In place: pairs of uniforms to pairs of standard normal numbers."""
    for i in range(u.shape[0]):
        for j in range(u.shape[1] // 2):
            radius = np.sqrt(np.float32(-2.0) * log(u[i, 2 * j]))
            cos, sin = cos_and_sin_of_turns(u[i, 2 * j + 1])
            u[i, 2 * j], u[i, 2 * j + 1] = radius * cos, radius * sin


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _threshold(u: NDArray[np.float32], p: np.float32, kept: np.float32) -> None:
    """In place: 0 below p, `kept` from p on; one pass instead of three torch operations."""
    for i in range(u.shape[0]):
        for j in range(u.shape[1]):
            u[i, j] = kept if u[i, j] >= p else np.float32(0.0)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right (torch's keeps the sign)."""
    return (x >> by) & (2 ** (64 - by) - 1)


def _mix_tensor(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def _uniform_tensor(seeds: Tensor, draw: int, width: int) -> Tensor:
    """The numbers of `_fill` by torch's integer operations, for any device."""
    golden = _signed(GOLDEN)
    key = _mix_tensor(seeds + _signed((GOLDEN * (draw + 1)) % 2**64))
    pairs = torch.arange(1, width // 2 + 1, device=seeds.device) * golden
    h = _mix_tensor(key.unsqueeze(1) + pairs)
    both = torch.stack([_shift(h, 41), _shift(h, 9) & (2**BITS - 1)], 2).flatten(1)
    return both.to(torch.float32) * _STEP + 0.5 * _STEP


class Kept(NamedTuple):
    """Which units dropout keeps: those whose `Noise.uniform` of this draw is at least p."""

    seeds: NDArray[np.uint64]
    """(cells,)."""
    draw: int
    labels: int
    """Rows of each cell, whose units follow one another in its draw."""
    p: float


class Noise:
    """Draws for the cells with these seeds; each call is the next draw."""

    def __init__(self, seeds: NDArray[np.uint64], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._seeds = np.ascontiguousarray(seeds, np.uint64)
        self._draw = 0

    def uniform(self, width: int) -> Tensor:
        """(cells, width) float32 in (0, 1)."""
        draw, even = self._draw, width + width % 2
        self._draw += 1
        if self.device.type != "cpu":
            seeds = torch.from_numpy(self._seeds.view(np.int64).copy()).to(self.device)
            return _uniform_tensor(seeds, draw, even)[:, :width]
        out = torch.empty(len(self._seeds), even)
        _fill(self._seeds, draw, out.numpy())
        return out[:, :width]

    def normal(self, width: int) -> Tensor:
        """(cells, width) float32 from N(0, 1), by Box and Muller."""
        u = self.uniform(width + width % 2)
        if self.device.type == "cpu":
            _normals(u.numpy())
            return u[:, :width]
        radius = torch.sqrt(-2.0 * torch.log(u[:, 0::2]))
        angle = (2.0 * math.pi) * u[:, 1::2]
        return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 2).flatten(1)[:, :width]

    def generators(self) -> Iterator[np.random.Generator]:
        """For each cell a generator of its own, for numpy's distributions."""
        draw = self._draw
        self._draw += 1
        for seed in self._seeds:
            yield np.random.Generator(np.random.Philox(key=np.array([seed, draw], np.uint64)))

    def chosen(self, p: float, labels: int = 1) -> Kept:
        """What `dropout` would keep of (cells * labels) rows, for kernels that draw the numbers themselves."""
        self._draw += 1
        return Kept(self._seeds, self._draw - 1, labels, p)

    def dropout(self, h: Tensor, p: float) -> Tensor:
        """Inverted dropout: zero with probability p, otherwise h / (1 - p); h itself when p is 0."""
        if p == 0.0:
            self._draw += 1
            return h
        mask, kept = self.uniform(h.shape[1]), 1.0 / (1.0 - p)
        if self.device.type == "cpu":
            _threshold(mask.numpy(), np.float32(p), np.float32(kept))
        else:
            mask = (mask >= p).to(h.dtype).mul_(kept)
        return h * mask
