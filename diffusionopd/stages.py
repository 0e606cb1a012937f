"""Where the time of a round goes: named stages, marked in traces always and timed on request.

``with stage("backward"):`` costs microseconds. Inside ``with timed_stages(device) as seconds:`` every stage of the same
thread adds its own time, that of the stages inside it left out, to ``seconds[name]``.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


class _Timer:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.thread = threading.get_ident()
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside: list[float] = []  # for each open stage: seconds of the stages inside it

    def now(self) -> float:
        """The clock, when the device has finished what was launched so far: else a stage would get others' time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


_timer: _Timer | None = None


@contextmanager
def stage(name: str) -> Iterator[None]:
    """What happens inside the block is called ``name`` in traces and in the timing."""
    timer = _timer
    with record_function(name):
        if timer is None or timer.thread != threading.get_ident():
            yield
            return
        started = timer.now()
        timer.inside.append(0.0)
        try:
            yield
        finally:
            whole, inner = timer.now() - started, timer.inside.pop()
            timer.seconds[name] += whole - inner
            if timer.inside:
                timer.inside[-1] += whole


@contextmanager
def timed_stages(device: torch.device | str) -> Iterator[dict[str, float]]:
    """Seconds of each stage of this thread, filled while the block runs.

    A GPU is waited for at every boundary, so that each stage gets the time of its own kernels; what would otherwise
    overlap is then one after the other, and the sum may be more than an undisturbed round takes.
    """
    global _timer
    if _timer is not None:
        raise RuntimeError("stages are being timed already")
    _timer = _Timer(torch.device(device))
    try:
        yield _timer.seconds
    finally:
        _timer = None
