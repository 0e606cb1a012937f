"""Random numbers as a pure function of integer keys such as (stream, seed, round, task, sample index).

No generator state lives between calls, so nothing has to be saved, and a sample's noise does not depend on batch size
or on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """First element of every key: what a random number is for. Two purposes never share numbers."""

    PROMPT = 0
    LATENT = 1
    STEP = 2
    EVALUATION = 3
    FORWARD = 5
    SUPERVISED_STEPS = 6
    TASKS = 7


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the non-negative integers of ``key`` alone."""
    # The length goes in too: SeedSequence ignores trailing zeros.
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def noise(shape: Sequence[int], keys: Sequence[Sequence[int]]) -> Tensor:
    """Standard normal noise ``[len(keys), *shape]``, float32 on the CPU; sample ``i`` depends on ``keys[i]`` alone."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(*key)) for key in keys])
