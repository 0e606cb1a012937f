"""The training loop that all stages share, and one process per core: two OpenMP threads were slower than one."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diffusionopd.distributed import average_gradients

_SAVE_SECONDS = 120


@dataclass
class Progress:
    """How far a training has come."""

    step: int = 0
    seconds: float = 0.0
    mean_loss: float = 0.0  # over about the last 100 steps


def fit(
    name: str,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    minutes: float,
    rate: Callable[[float, int], float],
    loss: Callable[[float, int], torch.Tensor],
    *,
    progress: Progress | None = None,
    average: Sequence[torch.Tensor] = (),
    decay: float = 0.0,
    save: Callable[[], None] | None = None,
) -> None:
    """Steps with clipped gradients, averaged over processes, until ``minutes`` are over, earlier runs included.

    Args:
        rate, loss: learning rate and scalar loss, from the fraction of the time that is over and the number of steps.
        progress: where to go on, advanced in place.
        average: moving averages of the parameters, advanced in place with ``decay``.
        save: called by rank 0 every two minutes.
    """
    progress = progress or Progress()
    main = not dist.is_initialized() or dist.get_rank() == 0
    saved = time.monotonic()
    begin = saved - progress.seconds
    while True:
        progress.seconds = _of_rank_0(time.monotonic() - begin)
        done = progress.seconds / (60 * minutes)
        if done >= 1:
            return
        for group in optimizer.param_groups:
            group["lr"] = rate(done, progress.step)
        value = loss(done, progress.step)
        optimizer.zero_grad()
        value.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.step += 1
        progress.mean_loss += (value.item() - progress.mean_loss) / min(progress.step, 100)
        if average:
            with torch.no_grad():
                weight = 1 - min(decay, (1 + progress.step) / (10 + progress.step))
                torch._foreach_lerp_(list(average), list(parameters), weight)
        if main and progress.step % 100 == 0:
            print(f"{name} {done:5.1%} step {progress.step} loss {progress.mean_loss:.4f}", flush=True)
        if main and save and time.monotonic() - saved > _SAVE_SECONDS:
            save()
            saved = time.monotonic()


def _of_rank_0(value: float) -> float:
    """Rank 0's value in every process: clocks differ, decisions must not."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared.item())


def spawn(function: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Run ``function(rank, *arguments)`` in processes that share a gloo group; when one fails all are ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one_thread()
    mp.spawn(_work, (function, processes, port, arguments), nprocs=processes)


def _work(rank: int, function: Callable[..., None], world: int, port: int, arguments: Sequence[Any]) -> None:
    one_thread()
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    function(rank, *arguments)


def one_thread() -> None:
    """Compute with one thread, here and in processes that are started."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
