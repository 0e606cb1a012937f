"""Where the time of a round goes: named stages, marked in traces always and timed on request.

``with stage("backward"):`` costs microseconds. Inside ``with timed_stages(device) as seconds:`` every stage of the same
thread adds its own time, that of the stages inside it left out, to ``seconds[name]``. torch's profiler could not tell:
it does not count the kernels that autograd's own thread launches to the stage that waits for it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.profiler import record_function


class _Timer:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]  # for each open stage: seconds of the stages inside it

    def now(self) -> float:
        """The clock, when the device has finished what was launched so far: else a stage would get others' time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


_timer: ContextVar[_Timer | None] = ContextVar("timer", default=None)  # other threads begin without one


@contextmanager
def stage(name: str) -> Iterator[None]:
    """What happens inside the block is called ``name`` in traces and in the timing."""
    timer = _timer.get()
    with record_function(name):
        if timer is None:
            yield
            return
        started = timer.now()
        timer.inner.append(0.0)
        try:
            yield
        finally:
            total, inner = timer.now() - started, timer.inner.pop()
            timer.seconds[name] += total - inner
            timer.inner[-1] += total


@contextmanager
def timed_stages(device: torch.device | str) -> Iterator[dict[str, float]]:
    """Seconds of each stage of this thread, filled while the block runs.

    A GPU is waited for at every boundary, so that each stage gets the time of its own kernels; what would otherwise
    overlap is then one after the other, and the sum may be more than an undisturbed round takes.
    """
    timer = _Timer(torch.device(device))
    token = _timer.set(timer)
    try:
        yield timer.seconds
    finally:
        _timer.reset(token)
