"""When one of several processes fails all of them end, and each says which one it was and why.

A process that waits in a collective for one that failed waits for as long as collectives may take, and under NCCL it
cannot be called back from there. So every process has a thread that reads the process group's key-value store, where
one that fails leaves a note: on several machines too, during any collective or none, at no cost for the training.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from diffusionopd.config_schema.secrets import redacted
from diffusionopd.distributed import world_size
from diffusionopd.signals import end_at_once

POLL = 0.5
"""Seconds between two readings of the store."""
GRACE = 3.0
"""Seconds that a process has for ending by an error of its own, before it is ended because of another's."""
_blocks = itertools.count()


@contextmanager
def ending_together() -> Iterator[None]:
    """An error that leaves the block in one process ends all of them, whatever they are waiting for.

    The others print the rank and its message and exit with status 1, unless they end by themselves within ``GRACE``
    seconds. Every process enters the block equally often.
    """
    world = world_size()  # a process group may be gone when the block is left
    if world == 1:
        yield
        return
    # A connection of its own, because the thread's question must not wait for one of the main thread's. The original
    # is kept alive too: in one of the processes it is what serves the others.
    served, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    store = dist.PrefixStore(f"failures/{next(_blocks)}", served.clone())  # type: ignore[attr-defined]
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(store, rank, over), name="failures", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        message = redacted(f"{type(error).__name__}: {error}")
        note = json.dumps([rank, message])
        with suppress(RuntimeError):  # the store is gone, and with it the process that served it
            if store.compare_set("failed", "", note).decode() == note:
                # At once: a launcher that sees another process end first may end this one before its error is shown.
                print(f"rank {rank} failed, all processes end: {message}", file=sys.stderr, flush=True)
            store.add("ended", 1)
            deadline = time.monotonic() + GRACE + 4 * POLL
            while store.add("ended", 0) < world and time.monotonic() < deadline:
                time.sleep(POLL / 5)  # the others read the note: with this process their store may go
        raise
    finally:
        over.set()
        thread.join()


def _watch(store: dist.Store, rank: int, over: threading.Event) -> None:
    while not over.wait(POLL):
        try:
            if not store.check(["failed"]):
                continue
            failed, message = json.loads(store.get("failed"))
        except RuntimeError:
            return
        if failed != rank and not over.wait(GRACE):
            print(f"rank {rank} ends because rank {failed} failed: {message}", file=sys.stderr, flush=True)
            store.add("ended", 1)
            end_at_once(1)  # the main thread may be in a collective, from where no exception would return
        return
