"""Looking at the student while it trains: pictures and proxy rewards of its own rollouts, off the critical path."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionopd.distributed import sum_over_processes
from diffusionopd.metrics import sample_grid
from diffusionopd.prompts import Prompt
from diffusionopd.rewards import NOT_APPLICABLE, RewardError, RewardWorker, Scores, build_composite


@dataclass(frozen=True)
class Picture:
    """Final latents ``[B, C, h, w]`` of one task's rollout and the prompts they were rolled out for."""

    task: str
    latents: Tensor
    prompts: Sequence[Prompt]


class Monitor:
    """Scores pictures in a worker thread and writes captioned grids.

    A reward that cannot be built or that fails is reported once and left out: nothing here can change or stop the
    training.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        rewards: Mapping[str, Mapping[str, float]],
        folder: Path,
        device: str,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """``rewards``: task -> {reward: weight}, the same on every process; ``folder`` receives the grids.

        ``options``: reward -> keyword arguments of its scorer.
        """
        self._decode = decode
        self._folder = folder
        self._names = [(task, name) for task, weights in rewards.items() for name in weights]
        built = {task: self._worker(task, weights, device, options or {}) for task, weights in rewards.items()}
        self._workers = {task: worker for task, worker in built.items() if worker is not None}
        self._pending: list[tuple[str, Future[Scores]]] = []
        self._failed: set[str] = set()

    def watch(self, pictures: Sequence[Picture], *, score: bool, grid: Path | None = None, title: str = "") -> None:
        """Decode pictures; hand them to the scorers when ``score``; write them to ``grid`` (a file name) when given."""
        images = [self._decode(p.latents).cpu() for p in pictures]
        if score:
            for picture, pixels in zip(pictures, images, strict=True):
                if worker := self._workers.get(picture.task):
                    texts, metadata = [p.text for p in picture.prompts], [p.metadata for p in picture.prompts]
                    self._pending.append((picture.task, worker.submit(pixels, texts, metadata)))
        if grid is not None and images:
            captions = [f"{p.task}: {prompt.text}" for p in pictures for prompt in p.prompts]
            self._write_grid(torch.cat(images), captions, self._folder / grid, title)

    def collect(self) -> dict[str, float]:
        """Wait for what was submitted; the mean over processes of each ``monitor/<task>/<reward>``. Collective."""
        totals = torch.zeros(len(self._names), 2, dtype=torch.float64)
        pending, self._pending = self._pending, []
        for task, future in pending:
            scores = self._result(task, future)
            for row, (name_task, name) in enumerate(self._names):
                if name_task == task and name in scores:
                    values = torch.as_tensor(scores[name], dtype=torch.float64)
                    values = values[(values != NOT_APPLICABLE) & values.isfinite()]
                    totals[row] += torch.tensor([values.sum().item(), float(len(values))])
        totals = sum_over_processes(totals)
        rows = zip(self._names, totals.tolist(), strict=True)
        return {f"monitor/{task}/{name}": total / count for (task, name), (total, count) in rows if count}

    def close(self) -> None:
        """Drop what has not been scored and end the threads."""
        for worker in self._workers.values():
            worker.close(cancel=True)

    def _result(self, task: str, future: Future[Scores]) -> Scores:
        try:
            return future.result()
        except Exception as error:  # noqa: BLE001 - a scorer may raise whatever its libraries raise
            if task not in self._failed:
                self._failed.add(task)
                warnings.warn(f"monitoring of task {task!r} failed, training goes on: {error!r}", stacklevel=3)
            return {}

    @staticmethod
    def _worker(
        task: str, weights: Mapping[str, float], device: str, options: Mapping[str, Mapping[str, Any]]
    ) -> RewardWorker | None:
        if not weights:
            return None
        try:
            return RewardWorker(build_composite(weights, device, options))
        except RewardError as error:
            warnings.warn(f"task {task!r} is trained without monitoring its rewards: {error}", stacklevel=4)
            return None

    @staticmethod
    def _write_grid(images: Tensor, captions: Sequence[str], path: Path, title: str) -> None:
        try:
            sample_grid(images, captions, path, title=title)
        except OSError as error:
            warnings.warn(f"cannot write the sample grid {path}, training goes on: {error}", stacklevel=3)
