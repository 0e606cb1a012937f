"""Ending at a signal: the first one is a wish, the second an order.

What Slurm, a terminal or a cluster sends before it kills: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME = 1.0
"""Seconds within which signals count as one: a launcher passes on what its process group may get as well."""


class SignalWatch:
    """Within a ``with`` block the first signal calls ``first(number)``, and a later one ends the process at once.

    Signals are read from a pipe by a thread, so that they are seen while the main thread waits in a collective or in a
    GPU kernel, where Python's own handlers would wait as well. Ending at once is ``os._exit(128 + number)``. The
    handlers that were there before come back after the block. Does nothing outside the main thread, where the system
    delivers no signals.
    """

    def __init__(self, first: Callable[[int], None]) -> None:
        """``first`` is called in the watching thread."""
        self._first = first
        self.received = 0
        """The number of the first signal; 0 before it."""
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, _noted) for number in SIGNALS}
            self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            signal.set_wakeup_fd(self._wakeup)
            os.write(self._writer, b"\0")
            self._thread.join()
            os.close(self._reader)
            os.close(self._writer)
            self._before = {}

    def _watch(self) -> None:
        while number := os.read(self._reader, 1)[0]:
            if number not in SIGNALS:
                continue
            if not self.received:
                self.received, self._since = number, time.monotonic()
                with suppress(OSError, ValueError):  # nobody reads the terminal any more
                    self._first(number)
            elif time.monotonic() - self._since > SAME:
                with suppress(OSError, ValueError):
                    print(f"\na second signal ({name(number)}): ending at once", file=sys.stderr, flush=True)
                os._exit(128 + number)


def name(number: int) -> str:
    """``SIGTERM`` and so on."""
    return signal.Signals(number).name


def end_at_signals(message: str) -> SignalWatch:
    """A watch under which the first signal prints ``message`` and ends the process with status 128 + its number."""

    def end(number: int) -> None:
        with suppress(OSError, ValueError):
            print(f"\n{name(number)}: {message}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    return SignalWatch(end)


def _noted(number: int, frame: object) -> None:
    """Python's part of a handler; the work is done in the watching thread."""
