"""What a round reports: losses by task and step, images, the norm of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusionopd.data.batches import Batch
from diffusionopd.distributed import mean_over_processes


class Losses:
    """Losses of the samples of one optimizer step, by task and sampler step, in the formula's own units."""

    def __init__(self, batches: Sequence[Batch], num_steps: int, device: torch.device) -> None:
        self.tasks = tuple(dict.fromkeys(task for batch in batches for task in batch.slices))
        self.terms = sum(len(row.steps) for batch in batches for row in batch.rows)  # of this process
        self.sums = torch.zeros(len(self.tasks), num_steps, device=device)
        self.counts = torch.zeros(len(self.tasks), num_steps)

    def add(self, batch: Batch, step: int, loss: Tensor, beside: bool = False) -> Tensor:
        """Note the losses ``[B]`` of a batch's rows at a step; their share of the weighted mean, to go backward.

        ``beside``: they are a further term of losses that were added before.
        """
        for task, rows in batch.slices.items():
            self.sums[self.tasks.index(task), step] += loss.detach()[rows].sum()
            self.counts[self.tasks.index(task), step] += 0 if beside else rows.stop - rows.start
        weights = [row.weight for row in batch.rows]
        if set(weights) != {1.0}:
            loss = loss * torch.tensor(weights).to(loss.device, loss.dtype, non_blocking=True)
        return loss.sum() / self.terms

    def reduce(self) -> None:
        """Means over processes, on the CPU. Collective."""
        self.sums = mean_over_processes(self.sums).cpu()

    def first_broken(self) -> tuple[str, int] | None:
        """Task and step of a mean that is not finite."""
        broken = (~self.sums.isfinite()).nonzero().tolist()
        return (self.tasks[broken[0][0]], broken[0][1]) if broken else None

    def means(self) -> dict[str, float]:
        """Task -> mean over its samples and trained steps."""
        means = self.sums.sum(1) / self.counts.sum(1)
        return dict(zip(self.tasks, means.tolist(), strict=True))

    @property
    def mean(self) -> float:
        """Over all tasks."""
        return (self.sums.sum() / self.counts.sum()).item()

    def __iadd__(self, other: Losses) -> Losses:
        """The losses of another optimizer step of the same round beside these; both are reduced."""
        tasks = tuple(dict.fromkeys(self.tasks + other.tasks))
        sums, counts = (torch.zeros(len(tasks), self.sums.shape[1]) for _ in range(2))
        for part in (self, other):
            rows = [tasks.index(task) for task in part.tasks]
            sums[rows] += part.sums
            counts[rows] += part.counts
        self.tasks, self.sums, self.counts = tasks, sums, counts
        return self


@dataclass
class Result:
    """What a round reports."""

    images: list[tuple[Batch, Tensor]] = field(default_factory=list)  # (batch, final latents [B, C, h, w])
    metrics: dict[str, float] = field(default_factory=dict)  # by name, the same on every process
    losses: Losses | None = None  # of the first pass over the round's samples, averaged over processes
    grad_norm: float | None = None  # of the first optimizer step; None without one, and when fp16 overflowed

    def note(self, losses: Losses, grad_norm: float | None) -> None:
        """Add the losses of an optimizer step."""
        if self.losses is None:
            self.losses, self.grad_norm = losses, grad_norm
        else:
            self.losses += losses
