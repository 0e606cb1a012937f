"""Scoring beside training: one thread, one bounded queue."""

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from diffusionopd.rewards.base import RewardError, Scorer, Scores
from diffusionopd.rewards.images import Images, to_uint8

POLL = 0.01
"""Seconds between two looks at a full queue."""

PATIENCE = 10.0
"""Seconds for which a cancelled worker's last batch is waited for."""


@dataclass(frozen=True)
class _Job:
    future: "Future[Scores]"
    images: torch.Tensor
    prompts: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...]


class RewardWorker:
    """Scores pictures in a thread of its own, so that a round need not wait for its monitoring rewards.

    One thread, because scorers hold models and are not required to be safe for several. The queue is bounded: when
    scoring cannot keep up, `submit` waits rather than letting pictures pile up. An exception of the scorer is kept in
    the future and never reaches the submitting thread unless that asks for `future.result()`.
    """

    def __init__(self, scorer: Scorer, max_pending: int = 4):
        """Start the thread; `max_pending` batches may wait beside the one being scored."""
        self._scorer = scorer
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=max_pending)
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="rewards", daemon=True)
        self._thread.start()

    def submit(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> "Future[Scores]":
        """Queue one batch; the pictures are copied to the CPU as uint8 first, so the caller may reuse its memory.

        Raises:
            RewardError: the worker is closed.
        """
        pictures = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).clone()
        job = _Job(Future(), pictures, tuple(prompts), tuple(metadata))
        while True:
            with self._lock:  # never held while waiting: `close` may come meanwhile
                if self._closed:
                    raise RewardError("the reward worker is closed")
                try:
                    self._jobs.put_nowait(job)
                    return job.future
                except queue.Full:
                    pass
            time.sleep(POLL)

    def close(self, cancel: bool = False) -> None:
        """Finish what is queued (or, with `cancel`, drop what has not begun), then end the thread. May be repeated.

        With `cancel`, a batch being scored is waited for `PATIENCE` seconds only: a scorer that hangs must not keep the
        program from ending (the thread is a daemon).
        """
        with self._lock:
            already, self._closed = self._closed, True
        if cancel:
            self._drop_pending()
        if not already:
            self._jobs.put(None)
        self._thread.join(PATIENCE if cancel else None)

    def __enter__(self) -> "RewardWorker":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _drop_pending(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is None:
                self._jobs.put(None)
                return
            job.future.cancel()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(self._scorer.score(job.images, job.prompts, job.metadata))
            except BaseException as error:  # the future carries it: a failing reward must not end the training
                job.future.set_exception(error)
