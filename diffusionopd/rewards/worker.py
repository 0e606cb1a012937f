"""Scoring beside training: one thread, one bounded queue, a limit of time."""

import math
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch

from diffusionopd.rewards.base import RewardError, RewardUnavailableError, Scorer, Scores
from diffusionopd.rewards.images import Images, to_uint8

POLL = 0.01
"""Seconds between two looks at a full queue."""

PATIENCE = 10.0
"""Seconds for which a cancelled worker's last batch is waited for."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a reward that is unavailable is asked again the first time, doubled every time up to the second."""


class _Result(Future[Scores]):
    """Scores to come of a worker; waiting for them without a limit ends with the worker's own."""

    def __init__(self, check_time: Callable[[], None], look: float):
        super().__init__()
        self._check_time, self._look = check_time, look

    def result(self, timeout: float | None = None) -> Scores:
        while timeout is None and not wait([self], timeout=self._look).done:
            try:
                self._check_time()
            except RewardError:
                self.cancel()  # nobody will want it
                raise
        return super().result(timeout)


@dataclass(frozen=True)
class _Job:
    future: _Result
    images: torch.Tensor
    prompts: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...]


class RewardWorker:
    """Scores pictures in a thread of its own, so that a round need not wait for its monitoring rewards.

    One thread, because scorers hold models and are not required to be safe for several. The queue is bounded: when
    scoring cannot keep up, `submit` waits rather than letting pictures pile up. An exception of the scorer is kept in
    the future and never reaches the submitting thread unless that asks for the result. A scorer that hangs cannot be
    ended, but is not waited for: while it is over its time, `submit` and `result()` raise; when it is back, they work.
    """

    def __init__(
        self,
        scorer: Scorer,
        max_pending: int = 4,
        *,
        name: str = "",
        timeout: float = math.inf,
        patient: bool = False,
    ):
        """Start the thread.

        Args:
            max_pending: batches that may wait beside the one being scored.
            name: of the reward, for messages.
            timeout: seconds that a batch may take.
            patient: ask again, within the timeout, when the scorer raises `RewardUnavailableError`.
        """
        self._scorer = scorer
        self._name, self._timeout, self._patient = name, timeout, patient
        self._began: float | None = None  # when the batch in work was begun, by the monotonic clock
        self._jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=max_pending)
        self._lock = threading.Lock()
        self._closed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="rewards", daemon=True)
        self._thread.start()

    @property
    def overdue(self) -> bool:
        """Whether the batch in work has taken longer than the timeout."""
        began = self._began
        return began is not None and time.monotonic() - began > self._timeout

    def submit(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> "Future[Scores]":
        """Queue one batch; the pictures are copied to the CPU as uint8 first, so the caller may reuse its memory.

        Returns:
            the scores to come. `result()` raises what the scorer raised, or `RewardError` once the batch in work, this
            one or one before it, is over its time.

        Raises:
            RewardError: the worker is closed, or the batch in work is over its time.
        """
        pictures = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).clone()
        look = min(1.0, max(POLL, self._timeout / 10))
        job = _Job(_Result(self._check_time, look), pictures, tuple(prompts), tuple(metadata))
        while True:
            self._check_time()
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
            self._closing.set()
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
            self._began = time.monotonic()
            try:
                scores = self._scored(job)
            except BaseException as error:  # the future carries it: a failing reward must not end the training
                self._began = None
                job.future.set_exception(error)
            else:
                self._began = None
                job.future.set_result(scores)

    def _scored(self, job: _Job) -> Scores:
        began, pause, said = time.monotonic(), FIRST_PAUSE, False
        while True:
            try:
                scores = self._scorer.score(job.images, job.prompts, job.metadata)
            except RewardUnavailableError as error:
                late = time.monotonic() - began + pause > self._timeout
                if not self._patient or late or self._closing.is_set():
                    raise
                if not said:
                    warnings.warn(f"{error}; asked again for up to {self._timeout:g} seconds", stacklevel=2)
                    said = True
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if said:
                    after = time.monotonic() - began
                    warnings.warn(f"reward '{self._name}' is back after {after:.0f} seconds", stacklevel=2)
                return scores

    def _check_time(self) -> None:
        if self.overdue:
            raise RewardError(
                f"reward '{self._name}' has been scoring one batch for more than {self._timeout:g} seconds; "
                "if that is not too long for it, raise reward_timeout"
            )


def failed(error: BaseException) -> "Future[Scores]":
    """Scores that could not even be asked for: waiting for them raises the error."""
    future: Future[Scores] = Future()
    future.set_exception(error)
    return future


class LimitedScorer:
    """A scorer that is given up, with `RewardError`, when a batch takes too long, and until it is back."""

    def __init__(self, scorer: Scorer, name: str, timeout: float):
        """Args: as of `RewardWorker`."""
        self.combined = getattr(scorer, "combined", {})
        self._worker = RewardWorker(scorer, max_pending=1, name=name, timeout=timeout)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        return self._worker.submit(images, prompts, metadata).result()

    def close(self) -> None:
        """End the thread."""
        self._worker.close(cancel=True)
