"""Watching the student while it trains: images and proxy rewards of its own rollouts, off the critical path."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusionopd.data.prompts import Prompt
from diffusionopd.distributed import sum_over_processes
from diffusionopd.rewards import NOT_APPLICABLE, RewardError, RewardWorker, build_composite
from diffusionopd.rewards.images import to_uint8
from diffusionopd.training.grids import sample_grid


@dataclass(frozen=True)
class MonitoredBatch:
    """Final latents ``[B, C, h, w]`` of one task's rollout and the prompts they were rolled out for."""

    task: str
    latents: Tensor
    prompts: Sequence[Prompt]


class Monitor:
    """Decodes and scores images and writes captioned grids, in threads and, on a GPU, on a stream of its own.

    A reward that cannot be built is reported once and left out. One that fails, or is over its time, is reported, tried
    again at every monitored round, and reported when it is back. Nothing here can change the training.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        rewards: Mapping[str, Mapping[str, float]],
        folder: Path,
        device: str,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        timeout: float = math.inf,
    ) -> None:
        """``rewards``: task -> {reward: weight}, the same on every process; ``folder`` receives the grids.

        ``options``: reward -> keyword arguments of its scorer. ``timeout``: seconds that a batch's scores may take.
        """
        self._decode, self._folder = decode, folder
        self._names = [(task, name) for task, weights in rewards.items() for name in weights]
        self._workers: dict[str, RewardWorker] = {}
        for task, weights in rewards.items():
            try:
                if weights:
                    scorer = build_composite(weights, device, options)
                    self._workers[task] = RewardWorker(scorer, name=", ".join(weights), timeout=timeout)
            except RewardError as error:
                warnings.warn(f"task {task!r} is trained without monitoring its rewards: {error}", stacklevel=2)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="monitor")
        # For each monitored round a future of what it led to: futures of a task's scores, and of the grid (named "").
        self._rounds: list[Future[list[tuple[str, Future[Any]]]]] = []
        self._failing: set[str] = set()  # what has been warned about since it last worked
        self._closing = threading.Event()

    def watch(self, batches: Sequence[MonitoredBatch], *, score: bool, grid: str = "", title: str = "") -> None:
        """Have images decoded, scored when ``score``, written to ``grid`` (a file name) when given. Does not wait."""
        device = batches[0].latents.device
        computed = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._rounds.append(self._thread.submit(self._decode_and_score, batches, computed, score, grid, title))

    def collect(self) -> dict[str, float]:
        """Wait for what was submitted; the mean over processes of each ``monitor/<task>/<reward>``. Collective."""
        totals = torch.zeros(len(self._names), 2, dtype=torch.float64)
        rounds, self._rounds = self._rounds, []
        for task, future in [entry for each in rounds for entry in self._result("decoding images", each, [])]:
            scores = self._result(f"monitoring of task {task!r}" if task else "writing the sample grid", future, {})
            for row, (own, name) in enumerate(self._names):
                if own == task and name in scores:
                    values = scores[name][scores[name] != NOT_APPLICABLE]
                    totals[row] += torch.tensor([values.sum(), len(values)])
        rows = zip(self._names, sum_over_processes(totals).tolist(), strict=True)
        return {f"monitor/{task}/{name}": total / count for (task, name), (total, count) in rows if count}

    def close(self) -> None:
        """Drop what has not been scored and end the threads; an image in work is not waited for."""
        self._closing.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers.values():
            worker.close(cancel=True)

    def _decode_and_score(
        self, batches: Sequence[MonitoredBatch], computed: torch.cuda.Event | None, score: bool, grid: str, title: str
    ) -> list[tuple[str, Future[Any]]]:
        images: list[np.ndarray] = []
        futures: list[tuple[str, Future[Any]]] = []
        for batch in batches:
            if self._closing.is_set():
                return futures
            with _beside(computed, batch.latents.device):
                images.append(to_uint8(self._decode(batch.latents)))
            if score and (worker := self._workers.get(batch.task)):
                texts, metadata = [p.text for p in batch.prompts], [p.metadata for p in batch.prompts]
                futures.append((batch.task, worker.submit(images[-1], texts, metadata)))
        if grid:
            captions = [f"{batch.task}: {prompt.text}" for batch in batches for prompt in batch.prompts]
            drawn = self._thread.submit(sample_grid, np.concatenate(images), captions, self._folder / grid, title=title)
            futures.append(("", drawn))
        return futures

    def _result(self, what: str, future: Future[Any], otherwise: Any) -> Any:
        """The future's result; what went wrong is said here, in the training thread, once until it works again."""
        try:
            result = future.result()
        except Exception as error:  # noqa: BLE001 - decoders and scorers raise whatever their libraries raise
            if what not in self._failing:
                warnings.warn(f"{what} failed, training goes on without it: {error!r}", stacklevel=3)
            self._failing.add(what)
            return otherwise
        if what in self._failing:
            self._failing.remove(what)
            warnings.warn(f"{what} works again", stacklevel=3)
        return result


def _beside(computed: torch.cuda.Event | None, device: torch.device) -> AbstractContextManager:
    """Launch on a stream of its own what needs ``computed``, so that neither waits for what is launched after that."""
    if computed is None:
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_event(computed)
    return torch.cuda.stream(stream)
