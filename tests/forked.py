"""Training runs in forked processes that say, in shared memory, what they are doing."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusionopd.training import Trainer, checkpoint, train
from diffusionopd.training import run as trainer_run

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("start", "round", "evaluation", "writing a checkpoint", "renaming and pruning", "between")
START, ROUND, EVALUATION, WRITING, PUBLISHING, BETWEEN = range(len(PHASES))
_MARKED = (
    (Trainer, "round", ROUND),
    (trainer_run, "evaluate_task", EVALUATION),
    (checkpoint, "save", WRITING),
    (checkpoint, "_publish", PUBLISHING),
    (checkpoint, "_point_latest", PUBLISHING),
    (checkpoint, "_prune", PUBLISHING),
)


@dataclass
class Run:
    """The processes of one start of a run, and where the first of them says what it is doing."""

    pids: list[int]
    phase: mmap.mmap

    def ended(self) -> bool:
        """Whether all processes have ended; raises RuntimeError for one that failed by itself, and ends the others."""
        for pid in list(self.pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.pids.remove(pid)
                if status:
                    self.kill()
                    raise RuntimeError(f"a process ended with {os.waitstatus_to_exitcode(status)} by itself")
        return not self.pids

    def kill(self) -> int:
        """SIGKILL to all; the phase in which the first one was."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        while self.pids:
            os.waitpid(self.pids.pop(), 0)
        return self.phase[0]


def start(config: Any, processes: int, log: Path) -> Run:
    """Fork the processes of a run; their output goes to the end of ``log``."""
    phase = mmap.mmap(-1, 1)  # shared with the children
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _child(config, rank, processes, port, log, phase if rank == 0 else mmap.mmap(-1, 1))
        pids.append(pid)
    return Run(pids, phase)


def _child(config: Any, rank: int, world: int, port: int, log: Path, phase: mmap.mmap) -> None:
    """Train and end this process; never returns."""
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(ROOT)
        if world > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}}
        for owner, name, mark in _MARKED:
            setattr(owner, name, _marking(getattr(owner, name), mark, phase))
        train(config)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _marking(function: Callable, mark: int, phase: mmap.mmap) -> Callable:
    def marked(*args: Any, **kwargs: Any) -> Any:
        before = phase[0] or BETWEEN  # after the first round it is never the start again
        phase[0] = mark
        try:
            return function(*args, **kwargs)
        finally:
            phase[0] = before

    return marked
