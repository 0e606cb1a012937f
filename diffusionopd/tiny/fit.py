"""The training loop that all stages share, and one process per core: two OpenMP threads were slower than one."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers.training_utils import EMAModel

from diffusionopd.distributed import average_gradients


def fit(
    name: str,
    optimizer: torch.optim.Optimizer,
    minutes: float,
    rate: Callable[[float, int], float],
    loss: Callable[[float, int], torch.Tensor],
    average: EMAModel | None = None,
) -> None:
    """Steps with clipped gradients, averaged over processes, until ``minutes`` are over.

    Args:
        optimizer: of one parameter group.
        rate, loss: learning rate and scalar loss, from the fraction of the time that is over and the number of steps.
        average: moving average of the parameters, which have its values in the end.
    """
    (group,) = optimizer.param_groups
    parameters: list[torch.nn.Parameter] = group["params"]
    main = not dist.is_initialized() or dist.get_rank() == 0
    step, mean_loss, begin = 0, 0.0, time.monotonic()
    while (done := _of_rank_0(time.monotonic() - begin) / (60 * minutes)) < 1:
        group["lr"] = rate(done, step)
        value = loss(done, step)
        optimizer.zero_grad()
        value.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if average:
            average.step(parameters)
        step += 1
        mean_loss += (value.item() - mean_loss) / min(step, 100)
        if main and step % 100 == 0:
            print(f"{name} {done:5.1%} step {step} loss {mean_loss:.4f}", flush=True)
    if average:
        average.copy_to(parameters)


def _of_rank_0(value: float) -> float:
    """Rank 0's value in every process: clocks differ, decisions must not."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared.item())


def spawn(function: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Run ``function(rank, *arguments)`` in processes that share a gloo group; when one fails all are ended."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (function, processes, f"file://{folder}/rendezvous", arguments), nprocs=processes)


def _work(rank: int, function: Callable[..., None], world: int, meeting: str, arguments: Sequence[Any]) -> None:
    one_thread()
    if world > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    function(rank, *arguments)


def one_thread() -> None:
    """Compute with one thread, here and in processes that are started."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
