"""Looking at the student while it trains: pictures and proxy rewards of its own rollouts, off the critical path."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionopd.data.prompts import Prompt
from diffusionopd.distributed import sum_over_processes
from diffusionopd.rewards import NOT_APPLICABLE, RewardError, RewardWorker, Scores, build_composite, failed
from diffusionopd.training.metrics import sample_grid


@dataclass(frozen=True)
class Picture:
    """Final latents ``[B, C, h, w]`` of one task's rollout and the prompts they were rolled out for."""

    task: str
    latents: Tensor
    prompts: Sequence[Prompt]


@dataclass
class _Look:
    """What the thread made of the pictures of a round."""

    scores: list[tuple[str, Future[Scores]]] = field(default_factory=list)  # (task, its scores to come)
    problem: str | None = None  # with the grid; empty without one, None where none was to be written


class Monitor:
    """Decodes and scores pictures and writes captioned grids, in threads and, on a GPU, on a stream of its own.

    A reward that cannot be built is reported once and left out. One that fails, or is over its time, is reported, tried
    again whenever pictures are to be scored, and reported when it is back. Nothing here can change the training.
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
        self._decode = decode
        self._folder = folder
        self._names = [(task, name) for task, weights in rewards.items() for name in weights]
        built = {task: self._worker(task, weights, device, options or {}, timeout) for task, weights in rewards.items()}
        self._workers = {task: worker for task, worker in built.items() if worker is not None}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="monitor")
        self._looks: list[Future[_Look]] = []
        self._failed: set[str] = set()
        self._grids_fail = False
        self._closing = threading.Event()

    def watch(self, pictures: Sequence[Picture], *, score: bool, grid: Path | None = None, title: str = "") -> None:
        """Have pictures decoded, scored when ``score``, written to ``grid`` (a file name) when given. Does not wait."""
        self._looks.append(self._thread.submit(self._look, pictures, _ready(pictures), score, grid, title))

    def collect(self) -> dict[str, float]:
        """Wait for what was submitted; the mean over processes of each ``monitor/<task>/<reward>``. Collective."""
        totals = torch.zeros(len(self._names), 2, dtype=torch.float64)
        looks, self._looks = self._looks, []
        for task, future in [entry for look in looks for entry in self._seen(look)]:
            scores = self._result(task, future)
            for row, (name_task, name) in enumerate(self._names):
                if name_task == task and name in scores:
                    values = torch.as_tensor(scores[name], dtype=torch.float64)
                    values = values[(values != NOT_APPLICABLE) & values.isfinite()]
                    totals[row] += torch.tensor([values.sum().item(), float(len(values))])
        totals = sum_over_processes(totals, "gathering the monitored rewards")
        rows = zip(self._names, totals.tolist(), strict=True)
        return {f"monitor/{task}/{name}": total / count for (task, name), (total, count) in rows if count}

    def close(self) -> None:
        """Drop what has not been scored and end the threads; a picture in work is not waited for."""
        self._closing.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers.values():
            worker.close(cancel=True)

    def _look(
        self, pictures: Sequence[Picture], ready: torch.cuda.Event | None, score: bool, grid: Path | None, title: str
    ) -> _Look:
        look, images = _Look(), []
        for picture in pictures:
            if self._closing.is_set():
                return look
            with _beside(ready, picture.latents.device):
                images.append(self._decode(picture.latents).cpu())
            if score and (worker := self._workers.get(picture.task)):
                look.scores.append((picture.task, self._submitted(worker, images[-1], picture.prompts)))
        if grid is not None and images:
            captions = [f"{p.task}: {prompt.text}" for p in pictures for prompt in p.prompts]
            look.problem = self._write_grid(torch.cat(images), captions, self._folder / grid, title)
        return look

    def _seen(self, look: Future[_Look]) -> list[tuple[str, Future[Scores]]]:
        """The scores to come of one round's pictures; what went wrong is said here, in the training thread."""
        try:
            seen = look.result()
        except Exception as error:  # noqa: BLE001 - out of memory, or whatever a decoder raises
            warnings.warn(f"the pictures of a round could not be decoded, training goes on: {error!r}", stacklevel=3)
            return []
        if seen.problem and not self._grids_fail:
            warnings.warn(seen.problem, stacklevel=3)
        if seen.problem is not None:
            self._grids_fail = bool(seen.problem)
        return seen.scores

    @staticmethod
    def _submitted(worker: RewardWorker, pixels: Tensor, prompts: Sequence[Prompt]) -> Future[Scores]:
        try:
            return worker.submit(pixels, [p.text for p in prompts], [p.metadata for p in prompts])
        except RewardError as error:  # a batch before is over its time
            return failed(error)

    def _result(self, task: str, future: Future[Scores]) -> Scores:
        try:
            scores = future.result()
        except Exception as error:  # noqa: BLE001 - a scorer may raise whatever its libraries raise
            self._fails(task, error)
            return {}
        if task in self._failed:
            self._failed.remove(task)
            warnings.warn(f"monitoring of task {task!r} works again", stacklevel=3)
        return scores

    def _fails(self, task: str, error: Exception) -> None:
        if task not in self._failed:
            self._failed.add(task)
            warnings.warn(f"monitoring of task {task!r} failed, training goes on without it: {error!r}", stacklevel=4)

    @staticmethod
    def _worker(
        task: str,
        weights: Mapping[str, float],
        device: str,
        options: Mapping[str, Mapping[str, Any]],
        timeout: float,
    ) -> RewardWorker | None:
        if not weights:
            return None
        try:
            scorer = build_composite(weights, device, options)
            return RewardWorker(scorer, name=", ".join(weights), timeout=timeout)
        except RewardError as error:
            warnings.warn(f"task {task!r} is trained without monitoring its rewards: {error}", stacklevel=4)
            return None

    @staticmethod
    def _write_grid(images: Tensor, captions: Sequence[str], path: Path, title: str) -> str:
        try:
            sample_grid(images, captions, path, title=title)
        except OSError as error:
            return f"cannot write the sample grid {path}, training goes on without grids until it can: {error}"
        return ""


def _ready(pictures: Sequence[Picture]) -> torch.cuda.Event | None:
    """The moment at which the GPU has computed what was launched so far, the pictures' latents among it."""
    device = pictures[0].latents.device
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextmanager
def _beside(ready: torch.cuda.Event | None, device: torch.device) -> Iterator[None]:
    """Launch on a stream of its own what needs ``ready``, so that neither waits for what is launched after that."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield
