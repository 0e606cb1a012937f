"""The batches of every round; the next round's are made in a thread while this one trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from diffusionopd.data.batches import Batch, BatchMaker


class BatchError(ValueError):
    """The batches of a round cannot be made; the message names the round and says why."""


class Rounds:
    """Batches by round. They are functions of the round's index alone, so that making them early changes nothing."""

    def __init__(self, maker: BatchMaker, *, watched: Callable[[int], bool], end: int, ahead: bool) -> None:
        """``watched(index)``: whether a round's pictures are wanted. With ``ahead``, the round after the one that was
        asked for last is made in a thread, up to round ``end`` (exclusive)."""
        self._maker = maker
        self._watched = watched
        self._end = end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if ahead else None
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def batches(self, index: int) -> list[Batch]:
        """The batches of round ``index`` (from 0), on the training device. BatchError when they cannot be made."""
        ahead, self._next = self._next, None
        try:
            made = ahead[1].result() if ahead is not None and ahead[0] == index else self._make(index)
        except Exception as error:
            raise BatchError(f"round {index + 1}: its batches cannot be made: {error}") from error
        if self._thread is not None and index + 1 < self._end:
            self._next = index + 1, self._thread.submit(self._make, index + 1)
        return [batch.to(self._maker.device) for batch in made]

    def close(self) -> None:
        """End the thread; what it has made is dropped."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, index: int) -> list[Batch]:
        return list(self._maker.round(index, watched=self._watched(index)))
