"""One process per core: they talk through gloo. Two OpenMP threads were slower than one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist


def start() -> tuple[int, int]:
    """(rank, world size); joins the process group where there is more than one process."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", rank=rank, world_size=world)
    return rank, world


def agree(value: float, world: int) -> float:
    """Rank 0's value in every process: clocks differ, decisions must not."""
    if world == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared.item())


def spawn(module: str, arguments: Sequence[str], processes: int) -> None:
    """Run `python -m module arguments` in `processes` processes and wait; RuntimeError if one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
    }
    command = [sys.executable, "-m", module, *arguments]
    children = [subprocess.Popen(command, env=os.environ | shared | {"RANK": str(r)}) for r in range(processes)]
    wait_all(children)


def wait_all(children: Sequence[subprocess.Popen]) -> None:
    """Wait for all; RuntimeError as soon as one fails. Whatever ends the waiting also ends the children."""
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                break
            time.sleep(0.2)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
    failed = [child for child in children if child.wait() != 0]
    if failed:
        raise RuntimeError(f"a build process failed, see its output above: {failed[0].args!r}")
