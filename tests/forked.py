"""Functions in forked processes: several ranks, or one that may end or be killed, without new interpreters.

Importing torch, diffusers and the library takes seconds; a fork has it all at once, and what a test has patched too.
This needs a parent that is safe to fork:

- no live pool of threads: torch computes with one thread, tqdm has no monitor, tokenizers do not work in parallel (all
  set when this file is imported), thread pools are shut down. Trainings in the parent are fine, also before the fork;
- no process group and no CUDA context in the parent: both live in threads or a driver that the child would not have;
- nothing shared that a killed child could hold for ever: tqdm's lock between processes is replaced by one of threads.

A child ends by `os._exit`: no `atexit`, no finalizers. What is about the end of an interpreter needs a new one.
"""

from __future__ import annotations

import faulthandler
import logging
import mmap
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed
from accelerate.state import AcceleratorState, GradientState
from tqdm import tqdm

TIMEOUT = 120.0
"""Seconds after which processes that still run are killed and the test fails."""
_POLL = 0.01

os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, negative for a signal as in `subprocess`, and what it wrote."""

    status: int
    out: str
    errors: str


def fork(
    function: Callable[[int], Any], world: int = 1, *, timeout: float = TIMEOUT, check: bool = True
) -> list[Ended]:
    """Run ``function(rank)`` in ``world`` processes to their ends; how each ended, by rank.

    An exception of the function is printed and gives status 1, `SystemExit` its own status. More than one process find
    each other by RANK, WORLD_SIZE, MASTER_ADDR and so on, as by the launcher. ``timeout``: seconds for all. ``check``:
    whether a status other than 0 is an error.

    Raises TimeoutError, with the output of the processes that still ran and are killed; AssertionError with ``check``.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends = start(function, world, log=Path(folder)).wait(timeout)
    failed = [f"rank {rank}: status {end.status}\n{end.errors}" for rank, end in enumerate(ends) if end.status]
    if check and failed:
        raise AssertionError("\n".join(failed))
    return ends


class Forked:
    """Processes that were started by :func:`start`; as a context manager it kills at the end those that still run."""

    def __init__(self, pids: list[int], log: Path) -> None:
        self.pids, self._log = pids, log
        self.statuses: list[int | None] = [None] * len(pids)

    def running(self) -> list[int]:
        """The ranks that still run."""
        for rank, pid in enumerate(self.pids):
            if self.statuses[rank] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank, status in enumerate(self.statuses) if status is None]

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a process that runs."""
        if self.statuses[rank] is None:
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """SIGKILL to all that still run, and to what they have started."""
        for rank in self.running():
            with suppress(ProcessLookupError):
                os.killpg(self.pids[rank], signal.SIGKILL)
            self.statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(self.pids[rank], 0)[1])

    def wait(self, timeout: float = TIMEOUT) -> list[Ended]:
        """Wait until all have ended; see :func:`fork`."""
        deadline = time.monotonic() + timeout
        try:
            while running := self.running():
                if time.monotonic() > deadline:
                    outputs = "".join(f"\nrank {rank}:\n{self.out(rank)}{self.errors(rank)}" for rank in running)
                    raise TimeoutError(f"ranks {running} still run after {timeout:g} s{outputs}")
                time.sleep(_POLL)
        finally:
            self.kill()
        statuses = [status or 0 for status in self.statuses]
        return [Ended(status, self.out(rank), self.errors(rank)) for rank, status in enumerate(statuses)]

    def out(self, rank: int) -> str:
        """What a process has written to its standard output so far."""
        return (self._log / f"rank-{rank}.out").read_text("utf-8", "replace")

    def errors(self, rank: int) -> str:
        """What a process has written to its standard error so far."""
        return (self._log / f"rank-{rank}.err").read_text("utf-8", "replace")

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def start(function: Callable[[int], Any], world: int = 1, *, log: Path) -> Forked:
    """Start the processes of :func:`fork` and return at once; ``log``: a new folder for their output."""
    if torch.distributed.is_initialized() or torch.cuda.is_initialized():
        raise RuntimeError("a process group or a CUDA context of the parent does not survive a fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))  # all on one machine
    log.mkdir(parents=True, exist_ok=True)
    pids = list[int]()
    for rank in range(world):
        paths = log / f"rank-{rank}.out", log / f"rank-{rank}.err"
        for path in paths:
            path.touch(exist_ok=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's own on forks of a process with threads
            pid = os.fork()
        if pid == 0:
            ranks = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            _child(function, rank, paths, ranks)
        with suppress(OSError):  # a group of its own, made by whoever comes first
            os.setpgid(pid, pid)
        pids.append(pid)
    return Forked(pids, log)


def _child(
    function: Callable[[int], Any], rank: int, paths: tuple[Path, Path], environment: Mapping[str, str]
) -> NoReturn:
    status = 1
    try:
        with suppress(OSError):
            os.setpgid(0, 0)
        _become_plain(paths)
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)  # that of a training in the parent
        GradientState._reset_state()
        function(rank)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _become_plain(paths: tuple[Path, Path]) -> None:
    """Undo what a parent such as pytest has put in the place of streams, signals, warnings and logging."""
    null = os.open(os.devnull, os.O_RDONLY)
    files = [null, *(os.open(path, os.O_WRONLY | os.O_APPEND) for path in paths)]
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, "r" if i == 0 else "w", buffering=1) for i in range(3))
    faulthandler.enable(sys.stderr)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    logging.getLogger().handlers.clear()
    warnings.showwarning = lambda *args, **_: sys.stderr.write(warnings.formatwarning(*args[:4]))


class Mark:
    """A small number that children write and the parent reads, at any moment and after their deaths."""

    def __init__(self, value: int = 0) -> None:
        self._memory = mmap.mmap(-1, 1)  # anonymous and shared
        self.value = value

    @property
    def value(self) -> int:
        return self._memory[0]

    @value.setter
    def value(self, value: int) -> None:
        self._memory[0] = value
