"""Watching the student while it trains: images and proxy rewards of its own rollouts, off the critical path."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusionopd.data.prompts import Prompt
from diffusionopd.distributed import gather_over_processes, sum_over_processes
from diffusionopd.rewards import NOT_APPLICABLE, RewardError, RewardWorker, build_composite
from diffusionopd.rewards.images import to_uint8
from diffusionopd.training.collapse import diversities, thumbnails
from diffusionopd.training.grids import sample_grid


@dataclass(frozen=True)
class MonitoredBatch:
    """Final latents ``[B, C, h, w]`` of one task's rollout and the prompts they were rolled out for."""

    task: str
    latents: Tensor
    prompts: Sequence[Prompt]


@dataclass
class _Watched:
    """What a monitored round led to."""

    scores: list[tuple[str, Future[Any]]] = field(default_factory=list)  # of each batch, with its task
    seen: list[tuple[str, str, np.ndarray]] = field(default_factory=list)  # of each image: task, prompt, thumbnail
    grid: Future[Any] | None = None


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
        self._keys = [f"monitor/{task}/{name}" for task, weights in rewards.items() for name in weights]
        self._workers: dict[str, RewardWorker] = {}
        for task, weights in rewards.items():
            try:
                if weights:
                    scorer = build_composite(weights, device, options)
                    self._workers[task] = RewardWorker(scorer, name=", ".join(weights), timeout=timeout)
            except RewardError as error:
                warnings.warn(f"task {task!r} is trained without monitoring its rewards: {error}", stacklevel=2)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="monitor")
        self._rounds: list[Future[_Watched]] = []
        self._failing: set[str] = set()  # what has been warned about since it last worked
        self._closing = threading.Event()

    def watch(self, batches: Sequence[MonitoredBatch], *, score: bool, grid: str = "", title: str = "") -> None:
        """Have images decoded, scored when ``score``, written to ``grid`` (a file name) when given. Does not wait."""
        device = batches[0].latents.device
        computed = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._rounds.append(self._thread.submit(self._decode_and_score, batches, computed, score, grid, title))

    def collect(self) -> dict[str, float]:
        """Wait for what was submitted; by the name of the metric, of the images of all processes. Collective.

        The means ``monitor/<task>/<reward>``, and the :func:`diversities` ``diversity/<task>`` and
        ``prompt_diversity/<task>``.
        """
        totals, seen = torch.zeros(len(self._keys), 2, dtype=torch.float64), []
        rounds, self._rounds = self._rounds, []
        if not rounds:
            return {}
        for each in rounds:
            watched = self._result("decoding images", each, _Watched())
            for task, future in watched.scores:
                for name, scores in self._result(f"monitoring of task {task!r}", future, {}).items():
                    if (key := f"monitor/{task}/{name}") in self._keys:
                        values = scores[scores != NOT_APPLICABLE]
                        totals[self._keys.index(key)] += torch.tensor([values.sum(), len(values)])
            seen += watched.seen
            if watched.grid:
                self._result("writing the sample grid", watched.grid, None)
        rows = zip(self._keys, sum_over_processes(totals).tolist(), strict=True)
        found = {key: total / count for key, (total, count) in rows if count}
        seen = gather_over_processes(seen)
        for task in dict.fromkeys(task for task, *_ in seen):
            texts, small = zip(*[(text, image) for own, text, image in seen if own == task], strict=True)
            found |= {f"{name}/{task}": value for name, value in diversities(small, texts).items()}
        return found

    def close(self) -> None:
        """Drop what has not been scored and end the threads; an image in work is not waited for."""
        self._closing.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers.values():
            worker.close(cancel=True)

    def _decode_and_score(
        self, batches: Sequence[MonitoredBatch], computed: torch.cuda.Event | None, score: bool, grid: str, title: str
    ) -> _Watched:
        images: list[np.ndarray] = []
        watched = _Watched()
        for batch in batches:
            if self._closing.is_set():
                return watched
            with _beside(computed, batch.latents.device):
                images.append(to_uint8(self._decode(batch.latents)))
            small = zip(batch.prompts, thumbnails(images[-1]), strict=True)
            watched.seen += [(batch.task, prompt.text, image) for prompt, image in small]
            if score and (worker := self._workers.get(batch.task)):
                texts, metadata = [p.text for p in batch.prompts], [p.metadata for p in batch.prompts]
                watched.scores.append((batch.task, worker.submit(images[-1], texts, metadata)))
        if grid:
            captions = [f"{batch.task}: {prompt.text}" for batch in batches for prompt in batch.prompts]
            all_images = np.concatenate(images)
            watched.grid = self._thread.submit(sample_grid, all_images, captions, self._folder / grid, title=title)
        return watched

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
