"""Which prompts and which noise a process rolls out in a round: a pure function of (seed, round, task, sample index).

A sample's index runs over all batches of a task in a round and over all processes, so the same samples are drawn
whatever the number of processes and the size of a backward batch. Letters: B rows, C channels, h and w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from diffusionopd.config_schema import FREE, key
from diffusionopd.data.noise import Stream, generator, noise
from diffusionopd.data.prompts import Prompt
from diffusionopd.data.rounds import RoundShape
from diffusionopd.data.sampler import PromptSampler
from diffusionopd.data.tasks import Task, loss_weights
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.text_cache import TextCache
from diffusionopd.rows import take

T = TypeVar("T")


@dataclass(frozen=True)
class NoiseSettings:
    """Noise and prefetching."""

    seed: int = key("seed", 42, "[0, inf)")
    """Seed of everything random: adapter initialisation, prompt order, initial and step noise."""
    same_latent: bool = key("sample.same_latent", False)
    """Start the images of one prompt from the same initial noise."""
    prefetch: bool = key("prefetch", True, resume=FREE)
    """Make the batches of the next round (prompts, cached embeddings, noise) in a thread while this one trains. They
    are the same; the embeddings of two rounds are in the host's memory."""


@dataclass(frozen=True)
class Row:
    """One sample of a batch."""

    task: str
    sample: int  # index in the task's round, over all batches and processes
    prompt: Prompt
    teacher: str  # the teacher's adapter
    guidance: float  # the teacher's
    strength: float = 1.0  # of its target: how far from the reference to the teacher, and beyond
    reference: str | None = None  # an adapter; None: the bare base
    weight: float = 1.0  # of its loss
    steps: tuple[int, ...] = ()  # the sampler steps that are trained, increasing; the same for all rows of a task


@dataclass(frozen=True)
class Batch:
    """What one process rolls out at once: B rows, those of one task next to each other."""

    rows: tuple[Row, ...]
    noise: Tensor  # [B, C, h, w] at the first noise level, float32
    text: Conditions  # of B prompts
    draw: Callable[[Stream, int], Tensor]  # (what for, step) -> [B, C, h, w] standard normal noise
    wants_images: bool = False  # whether the final latents are used: the rollout goes to its end

    @property
    def slices(self) -> dict[str, slice]:
        """Task -> its rows."""
        names = [row.task for row in self.rows]
        return {name: slice(names.index(name), names.index(name) + names.count(name)) for name in dict.fromkeys(names)}

    @property
    def steps(self) -> tuple[int, ...]:
        """The sampler steps at which some row is trained, increasing."""
        return tuple(sorted({step for row in self.rows for step in row.steps}))

    def step_noise(self, step: int) -> Tensor:
        """The noise that a stochastic sampler step adds: ``[B, C, h, w]``."""
        return self.draw(Stream.STEP, step)

    def forward_noise(self, step: int) -> Tensor:
        """The noise that final latents are mixed with, at the time of a step: ``[B, C, h, w]``."""
        return self.draw(Stream.FORWARD, step)

    def select(self, rows: Sequence[int]) -> Batch:
        """The batch of some of the rows."""
        return Batch(
            tuple(self.rows[row] for row in rows),
            take(self.noise, rows),
            self.text.index(rows),
            lambda stream, step: take(self.draw(stream, step), rows),
            self.wants_images,
        )

    def pin_memory(self) -> Batch:
        """The same batch with its tensors in pinned memory of the host."""
        return replace(self, noise=self.noise.pin_memory(), text=self.text.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``; from pinned memory the host does not wait for the copies."""
        noise = self.noise.to(device, non_blocking=True)
        return replace(self, noise=noise, text=self.text.to(device, non_blocking=True))


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several tasks."""
    if len(batches) == 1:
        return batches[0]
    return Batch(
        tuple(row for batch in batches for row in batch.rows),
        torch.cat([batch.noise for batch in batches]),
        Conditions.cat([batch.text for batch in batches]),
        lambda stream, step: torch.cat([batch.draw(stream, step) for batch in batches]),
        any(batch.wants_images for batch in batches),
    )


def side_by_side(batches: Sequence[Batch], tasks: int) -> list[Batch]:
    """Those of the same samples of different tasks joined, at most ``tasks`` in one; for 1 all as they are.

    Only what has the same conditions is joined: prompts with a reference image walk beside none without.
    """
    if tasks < 2:
        return list(batches)
    alike: dict[object, list[Batch]] = {}
    for batch in batches:
        alike.setdefault((batch.rows[0].sample, frozenset(batch.text.parts)), []).append(batch)
    return [join(group[start : start + tasks]) for group in alike.values() for start in range(0, len(group), tasks)]


def optimizer_steps(by_task: Sequence[Sequence[T]], size: int) -> list[list[T]]:
    """The ``size`` batches of each optimizer step of a round: as many of each task, if these can be; else in order."""
    share, rest = divmod(size, len(by_task))
    share = len(by_task[0]) if rest else share
    ordered = [b for start in range(0, len(by_task[0]), share) for own in by_task for b in own[start : start + share]]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class BatchError(ValueError):
    """The batches of a round cannot be made; the message names the round and says why."""


@dataclass
class Batches:
    """A process's batches of any round. The next round's are made in a thread while this one trains, if wanted."""

    shape: RoundShape
    tasks: Sequence[Task]
    settings: NoiseSettings
    prompts: Mapping[str, Sequence[Prompt]]  # by task
    samplers: Mapping[str, PromptSampler]  # by task
    text: TextCache
    latent_shape: Sequence[int]
    steps: Callable[[int, int], tuple[int, ...]]  # (round, task) -> the trained sampler steps
    wants_images: Callable[[int], bool]  # whether a round's images are scored or saved
    device: torch.device
    dtype: torch.dtype  # of the text embeddings
    rank: int = 0

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if self.settings.prefetch else None
        self._next: tuple[int, Future[list[Batch]]] | None = None
        self._weights = loss_weights(self.tasks)

    def round(self, index: int) -> list[Batch]:
        """The batches of round ``index`` (from 0), on the training device. BatchError when they cannot be made."""
        ahead, self._next = self._next, None
        try:
            made = ahead[1].result() if ahead is not None and ahead[0] == index else self._make(index)
        except Exception as error:
            raise BatchError(f"round {index + 1}: its batches cannot be made: {error}") from error
        if self._thread is not None and index + 1 < self.shape.num_rounds:
            self._next = index + 1, self._thread.submit(self._make, index + 1)
        return [batch.to(self.device) for batch in made]

    def close(self) -> None:
        """End the thread; what it has made is dropped."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, index: int) -> list[Batch]:
        shape, wanted, size = self.shape, self.wants_images(index), self.shape.backward_size
        made = list[list[Batch]]()  # by task
        for task in shape.tasks_of(index):
            made.append([])
            for batch in range(shape.batches_per_task):
                first = (batch * shape.num_processes + self.rank) * shape.batch_size
                for start in range(first, first + shape.batch_size, size):
                    made[-1].append(self._batch(index, task, range(start, start + size), wanted and batch == 0))
        parts = optimizer_steps(made, shape.batches_per_step)
        joined = [batch for part in parts for batch in side_by_side(part, shape.tasks_per_pass)]
        return [batch.pin_memory() for batch in joined] if self.device.type == "cuda" else joined

    def _batch(self, index: int, task: int, samples: Sequence[int], wants_images: bool) -> Batch:
        own, weight, key = self.tasks[task], self._weights[task], (self.settings.seed, index, task)
        groups = [sample // self.shape.images_per_prompt for sample in samples]
        sampler, known = self.samplers[own.name], self.prompts[own.name]
        prompts = [known[sampler.index(index, group)] for group in groups]

        def draw(stream: Stream, step: int) -> Tensor:
            drawn = noise(self.latent_shape, [(stream, *key, i, step) for i in samples])
            drawn = drawn.pin_memory() if self.device.type == "cuda" else drawn
            return drawn.to(self.device, non_blocking=True)

        text = self.text.get([prompt.key for prompt in prompts], dtype=self.dtype)
        target = (own.adapter, own.guidance_scale, own.strength, own.reference_adapter)
        steps = self.steps(index, task)
        rows = [Row(own.name, i, p, *target, weight, steps) for i, p in zip(samples, prompts, strict=True)]
        starts = groups if self.settings.same_latent else samples
        latents = noise(self.latent_shape, [(Stream.LATENT, *key, i) for i in starts])
        return Batch(tuple(rows), latents, text, draw, wants_images)


def choose_steps(trained_steps: int, count: int, *key: int, chances: Sequence[float] | None = None) -> tuple[int, ...]:
    """``count`` of the first ``trained_steps`` steps without replacement, increasing. A function of ``key`` alone.

    Without ``chances`` each subset is equally likely, and the mean of a loss over them has the mean over all steps as
    its expectation. ``chances``: how likely each step is to be among them, as of :func:`step_chances`; the draw is
    systematic sampling in a random order, which has exactly these.
    """
    random = generator(Stream.SUPERVISED_STEPS, *key)
    order = torch.randperm(trained_steps, generator=random)
    if chances is None:
        return tuple(sorted(order[:count].tolist()))
    ends = torch.tensor(chances, dtype=torch.float64)[order].cumsum(0)
    ends[-1] = count  # exactly
    points = torch.arange(count) + torch.rand(1, generator=random, dtype=torch.float64)
    return tuple(sorted(order[torch.searchsorted(ends, points, right=True)].tolist()))


def step_chances(trained_steps: int, count: int, a: float, b: float) -> tuple[float, ...]:
    """How likely each step is drawn when ``count`` are drawn in proportion to a beta(a, b) density over the trajectory.

    Step ``i`` of ``T`` is at ``(i + 1/2) / T``, from 0 at the noise to 1 at the data. The sum is ``count``; what would
    be above 1 is drawn always, and the others share the rest.
    """
    at = (torch.arange(trained_steps, dtype=torch.float64) + 0.5) / trained_steps
    density = at ** (a - 1) * (1 - at) ** (b - 1)
    chances = torch.zeros_like(density)
    certain = chances.bool()
    while True:
        chances[certain] = 1.0
        free = ~certain
        chances[free] = density[free] / density[free].sum() * (count - certain.sum())
        if not (chances > 1.0).any():
            return tuple(chances.tolist())
        certain |= chances > 1.0
