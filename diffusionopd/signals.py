"""Ending at a signal: the first one requests a graceful stop, the second ends the process at once.

What Slurm, a terminal or a cluster sends before it kills: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 75
"""Exit status of a run that a signal stopped: what it did is saved, and there is more to do (EX_TEMPFAIL)."""
SAME = 1.0
"""Seconds within which signals count as one: a launcher passes on what a process may also get directly."""

before_end: list[Callable[[], object]] = []
"""What is called, in any thread, before a process ends at once, where no cleaning up follows."""


class SignalWatch:
    """Within a ``with`` block the first signal calls ``first(number)``, and a later one ends the process at once.

    That is `end_at_once` with status ``128 + number``. Handlers run when the main thread is back in Python; a process
    that is stuck elsewhere is killed by its launcher. The handlers that were there before come back after the block.
    Does nothing outside the main thread, where the system delivers no signals.
    """

    def __init__(self, first: Callable[[int], None]) -> None:
        """``first`` is called in the main thread, between two of its instructions."""
        self._first = first
        self.received = 0
        """The number of the first signal; 0 before it."""
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _: object) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            self._first(number)
        elif time.monotonic() - self._since > SAME:
            say(f"a second signal ({name(number)}): ending at once")
            end_at_once(128 + number)


def end_at_once(status: int) -> NoReturn:
    """`os._exit`, whatever other threads are doing, after the calls of ``before_end``."""
    try:
        for call in before_end:
            call()
    finally:
        os._exit(status)


def name(number: int) -> str:
    """``SIGTERM`` and so on."""
    return signal.Signals(number).name


def say(message: str) -> None:
    """Write a line of its own to standard error, also where a signal interrupted a print or nobody reads any more."""
    with suppress(OSError):
        os.write(2, f"\n{message}\n".encode())


def end_at_signals(message: str) -> SignalWatch:
    """A watch under which the first signal prints ``message`` and ends the process with status 128 + its number."""

    def end(number: int) -> None:
        say(f"{name(number)}: {message}")
        end_at_once(128 + number)

    return SignalWatch(end)
