"""Scoring beside training: one thread, a bounded number of waiting batches, a time limit."""

import math
import queue
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

from diffusionopd.rewards.base import RewardError, RewardUnavailableError, Scorer, Scores
from diffusionopd.rewards.images import Images, to_uint8

POLL = 0.02
"""Seconds between two looks at the clock while waiting for a scorer."""

SHUTDOWN_GRACE = 10.0
"""Seconds for which a cancelled worker's last batch is waited for."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a reward that is unavailable is asked again the first time, doubled every time up to the second."""


class RewardWorker:
    """A scorer in a thread of its own, so that a round need not wait for its monitoring rewards.

    One thread, because scorers hold models and are not required to be safe for several. When scoring cannot keep up,
    `submit` waits rather than letting images pile up. Whatever goes wrong is kept in the future and raised by its
    `result()`. A scorer that hangs cannot be ended, but is not waited for: while it is over its time, futures fail;
    when it is back, they work. The thread is a daemon, unlike those of a ThreadPoolExecutor, which the interpreter
    joins at exit even when they hang.
    """

    def __init__(
        self,
        scorer: Scorer,
        max_pending: int = 4,
        *,
        name: str = "",
        timeout: float = math.inf,
        retry_unavailable: bool = False,
    ):
        """Start the thread.

        Args:
            max_pending: batches that may wait beside the one being scored.
            name: of the reward, for messages.
            timeout: seconds that a batch may take.
            retry_unavailable: ask again, within the timeout, when the scorer raises `RewardUnavailableError`.
        """
        self.combined = getattr(scorer, "combined", {})
        self._scorer, self._name, self._timeout, self._retry = scorer, name, timeout, retry_unavailable
        self._began = math.inf  # when the batch in work was begun, by the monotonic clock
        self._pending: queue.Queue[tuple[Future[Scores], tuple]] = queue.Queue(max_pending)
        self._closed, self._cancelled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="rewards", daemon=True)
        self._thread.start()

    def submit(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> "Future[Scores]":
        """Queue one batch; its images are copied to the CPU as uint8 first, so the caller may reuse the memory.

        Returns:
            a future of the scores. Its `result()` raises what the scorer raised, or `RewardError` when the worker is
            closed, or once the batch in work, this one or one before it, is over its time.
        """
        batch = to_uint8(images).copy(), tuple(prompts), tuple(metadata)
        future = _Result(self)
        while not self._closed.is_set() and not self.overdue:
            with suppress(queue.Full):
                self._pending.put((future, batch), timeout=POLL)
                if not self._cancelled.is_set():
                    return future
                future.cancel()  # it came after what `close` has dropped
        return failed(self.overdue or RewardError(f"the worker of reward '{self._name}' is closed"))

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`, but given up with `RewardError` when it takes too long, and until the scorer is back."""
        return self.submit(images, prompts, metadata).result()

    def close(self, cancel: bool = False) -> None:
        """Finish what waits (or, with `cancel`, drop what has not begun), then end the thread. May be repeated.

        With `cancel`, a batch being scored is waited for `SHUTDOWN_GRACE` seconds only.
        """
        self._closed.set()
        if cancel:
            self._cancelled.set()
            with suppress(queue.Empty):
                while True:
                    self._pending.get_nowait()[0].cancel()
        self._thread.join(SHUTDOWN_GRACE if cancel else None)

    @property
    def overdue(self) -> RewardError | None:
        """An error while the batch in work has taken longer than the timeout; None otherwise."""
        if time.monotonic() - self._began <= self._timeout:
            return None
        return RewardUnavailableError(
            f"reward '{self._name}' has been scoring one batch for more than {self._timeout:g} seconds; "
            "if that is not too long for it, raise reward_timeout"
        )

    def _work(self) -> None:
        while not (self._closed.is_set() and self._pending.empty()):
            try:
                future, batch = self._pending.get(timeout=POLL)
            except queue.Empty:
                continue
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._scored(batch))
                except BaseException as error:  # the future carries it: a failing reward must not end the training
                    future.set_exception(error)

    def _scored(self, batch: tuple) -> Scores:
        """The scores, asked for again and again while the reward is unavailable and there is time."""
        self._began, pause = time.monotonic(), FIRST_PAUSE
        try:
            while True:
                try:
                    return self._scorer.score(*batch)
                except RewardUnavailableError as error:
                    late = time.monotonic() - self._began + pause > self._timeout
                    if not self._retry or late or self._cancelled.is_set():
                        raise
                    if pause == FIRST_PAUSE:
                        warnings.warn(f"{error}; asked again for up to {self._timeout:g} seconds", stacklevel=2)
                self._cancelled.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            self._began = math.inf


class _Result(Future[Scores]):
    """A future of a worker's scores; waiting for it without a limit ends with the worker's own."""

    def __init__(self, worker: RewardWorker):
        super().__init__()
        self._worker = worker

    def result(self, timeout: float | None = None) -> Scores:
        while timeout is None and not wait([self], timeout=POLL).done:
            if overdue := self._worker.overdue:
                self.cancel()  # nobody will want it
                raise overdue
        return super().result(timeout)


def failed(error: BaseException) -> "Future[Scores]":
    """A future that holds an error already: scores that could not even be asked for."""
    future: Future[Scores] = Future()
    future.set_exception(error)
    return future
