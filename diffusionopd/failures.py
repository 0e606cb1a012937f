"""When one of several processes fails all of them end, and each says which one it was and why.

A process that waits in a collective for one that failed waits for as long as collectives may take, and under NCCL it
cannot be called back from there. So every process has a thread that looks into the process group's key-value store,
where one that fails leaves a note. This costs the training nothing, works during any collective or none, and is the
same for NCCL and gloo.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from diffusionopd.config_schema.secrets import redacted
from diffusionopd.distributed import world_size

POLL = 0.5
"""Seconds between two looks into the store."""

GRACE = 3.0
"""Seconds that a process has for ending by an error of its own, before it is ended because of another's."""


class OutOfMemoryError(ValueError):
    """The device's memory is full; the message says doing what, and what to set."""


@contextmanager
def memory_advice(what: str, remedy: str) -> Iterator[None]:
    """Turn torch's error for a full memory inside the block into OutOfMemoryError: ``what`` needs it, ``remedy``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = " ".join(str(error).split(". ")[0].split())
        raise OutOfMemoryError(f"{what}: the memory of the device is full ({said}). {remedy}") from error


@contextmanager
def ending_together() -> Iterator[None]:
    """An error that leaves the block in one process ends all of them, whatever they are waiting for.

    The others print the rank and its message and exit with status 1, unless they end by themselves within ``GRACE``
    seconds; the one that failed goes on with its error once they have. Every process enters the block equally often.
    """
    if world_size() == 1:
        yield
        return
    watch = _Watch()
    try:
        yield
    except BaseException as error:
        watch.stop()
        watch.report(error)
        raise
    finally:
        watch.stop()


_blocks = itertools.count()


class _Watch:
    """The notes of one block: who failed first (`failed`), and how many processes have ended since (`ended`)."""

    def __init__(self) -> None:
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        # The original is kept too: in one of the processes it is what serves the others.
        self._served = dist.distributed_c10d._get_default_store()
        # A connection of its own, because the thread's question must not wait for one of the main thread's.
        connection = self._served.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
        self._store = dist.PrefixStore(f"failures/{next(_blocks)}", connection)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="failures", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def report(self, error: BaseException) -> None:
        """Leave the note, and wait until the others have read it: with this process their store may go."""
        message = redacted(f"{type(error).__name__}: {error}")
        note = json.dumps([self._rank, message])
        try:
            if self._store.compare_set("failed", "", note).decode() == note:
                # At once: a launcher that sees another process end first may end this one before its error is shown.
                print(f"rank {self._rank} failed, all processes end: {message}", file=sys.stderr, flush=True)
            self._store.add("ended", 1)
            deadline = time.monotonic() + GRACE + 4 * POLL
            while self._store.add("ended", 0) < self._world and time.monotonic() < deadline:
                time.sleep(POLL / 5)
        except RuntimeError:  # the store is gone, and with it the process that served it
            return

    def _look(self) -> None:
        while not self._over.wait(POLL):
            try:
                if not self._store.check(["failed"]):
                    continue
                rank, message = json.loads(self._store.get("failed"))
            except RuntimeError:
                return
            if self._over.wait(GRACE):
                return
            print(f"rank {self._rank} ends because rank {rank} failed: {message}", file=sys.stderr, flush=True)
            self._store.add("ended", 1)
            os._exit(1)  # the main thread may be in a collective, from where no exception would return
