"""Random numbers of samples: pure functions of (seed, epoch, sample, repeat), computed for whole batches at once.

Counter-based: no state, so any process, thread or rank that asks for a sample's numbers gets the same ones, in
any order. Built-in transforms draw from here; users' own transforms draw from global generators, which
`trainer.data.loader` seeds per sample.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.sampler import KeyRows, key_array

Keys = NDArray[np.uint64]  # (B,): one appearance of a sample in one epoch of one run each

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class Stream(IntEnum):
    """What numbers are for: the numbers of different streams are independent."""

    CROP = 1
    FLIP = 2
    MIX = 3
    ERASE = 4
    ERASE_NOISE = 5
    REPLACE = 6


def sample_keys(seed: int, keys: KeyRows) -> Keys:
    """Returns one 64-bit key per sample, a function of (seed, epoch, index, repeat) and of nothing else."""
    run = _finalize(np.array([(seed * _GOLDEN + 1) & _MASK], dtype=np.uint64))
    epoch, sample, repeat = key_array(keys).astype(np.uint64).T
    found: Keys = _finalize(_finalize(run + epoch * np.uint64(_GOLDEN)) + sample * np.uint64(_GOLDEN))
    # Nothing more happens to the first: a run without repeats has the numbers that it had before there were any.
    return np.where(repeat == 0, found, _finalize(found + repeat * np.uint64(_GOLDEN)))


def uniforms(keys: Keys, stream: Stream, count: int) -> NDArray[np.float64]:
    """Returns `count` numbers in [0, 1) for every key, (B, count)."""
    offsets = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 32)) * np.uint64(_GOLDEN)
    bits = _finalize(keys[:, None] + offsets[None, :])
    return (bits >> np.uint64(11)) * 2.0**-53


def _finalize(values: NDArray[np.uint64]) -> Any:
    """SplitMix64's output function (Steele, Lea and Flood, 2014): a bijection that mixes every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
