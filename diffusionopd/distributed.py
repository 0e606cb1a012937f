"""Processes and randomness: noise keyed by counters, and the few collectives a round needs.

Randomness is a pure function of integer keys such as (seed, round, task, sample index, stream). No generator state
lives between calls, so nothing has to be saved, and a sample's noise does not depend on batch size or on the number of
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Stream(IntEnum):
    """First element of every key: what a random number is for. Two purposes never share numbers."""

    PROMPT = 0
    LATENT = 1
    STEP = 2
    EVALUATION = 3
    STUDENT_INIT = 4
    FORWARD = 5
    SUPERVISED_STEPS = 6


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the non-negative integers of ``key`` alone."""
    if any(k < 0 for k in key):
        raise ValueError(f"random keys are non-negative integers, not {key}")
    # The length goes in too: SeedSequence ignores trailing zeros.
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def noise(shape: Sequence[int], keys: Sequence[Sequence[int]]) -> Tensor:
    """Standard normal noise ``[len(keys), *shape]``, float32 on the CPU; sample ``i`` depends on ``keys[i]`` alone."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(*key)) for key in keys])


def world_size() -> int:
    """Number of processes; 1 when no process group is up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of ``value`` over all processes, on every process. NCCL sums on the GPU alone: it goes there and back."""
    if world_size() == 1:
        return value
    on_gpu = dist.get_backend() == "nccl" and not value.is_cuda
    total = value.cuda() if on_gpu else value.clone()
    dist.all_reduce(total)
    return total.to(value.device)


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of ``value`` over all processes, on every process. A NaN anywhere becomes a NaN everywhere."""
    return sum_over_processes(value) / world_size()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over processes, in one collective.

    A round has one optimizer step and a LoRA has few parameters, so one flat all-reduce at its end replaces a
    DistributedDataParallel wrapper and its hooks in every backward. A parameter that the loss does not reach has no
    gradient on any process and keeps none: a zero would let weight decay act on it.
    """
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean_over_processes(torch.cat([g.reshape(-1) for g in gradients]))
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class OtherProcessError(ValueError):
    """Another process failed at what all of them were doing; its own message says why."""


def together(work: Callable[[], object], what: str) -> None:
    """Do this process's part; when it fails on any process, raise on every one, so that none waits for another.

    The process that failed raises its own error, the others OtherProcessError.
    """
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    failures = sum_over_processes(torch.tensor(float(failure is not None))).item()
    if failure is not None:
        raise failure
    if failures:
        raise OtherProcessError(f"{what} failed in {failures:.0f} other process(es); see their messages")


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """A float64 checksum of tensors, for comparing processes: equal tensors give an equal value."""
    sums = [t.detach().double().sum() + t.detach().double().square().sum() for t in tensors]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)


def assert_same_on_all_processes(value: Tensor, what: str) -> None:
    """Raise RuntimeError on every process when ``value`` (a scalar) differs between processes."""
    if world_size() == 1:
        return
    table = torch.zeros(world_size(), dtype=torch.float64)
    table[dist.get_rank()] = value.double()
    values = sum_over_processes(table).tolist()
    odd = [rank for rank, other in enumerate(values) if other != values[0]]
    if odd:
        raise RuntimeError(
            f"{what} differs between processes: rank(s) {odd} disagree with rank 0. "
            "Check that every machine sees the same files, config and versions."
        )
