"""Which prompts and which noise a process rolls out in a round: a pure function of (seed, round, task, sample index).

A sample's index runs over all batches of a task in a round and over all processes, so the same samples are drawn
whatever the number of processes and the size of a backward batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from diffusionopd.config_schema import RunPlan, TeacherSpec
from diffusionopd.data.noise import Stream, generator, noise
from diffusionopd.data.prompts import Prompt
from diffusionopd.data.sampler import PromptSampler
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.text_cache import TextCache


def draw_none(step: int) -> Tensor:
    """For batches that are never noised again."""
    raise ValueError(f"this batch has no forward noise for step {step}")


@dataclass(frozen=True)
class Batch:
    """What one process rolls out for one task at once: ``B`` samples."""

    task: str
    teacher: str  # the adapter's name
    teacher_guidance: float
    x: Tensor  # [B, C, h, w] noise at sigma 1, float32
    text: Conditions  # of B samples
    draw_noise: Callable[[int], Tensor]  # step -> [B, C, h, w]
    prompts: Sequence[Prompt] = ()
    wants_picture: bool = False
    samples: Sequence[int] = ()  # their indices in the task's round, over all batches and processes
    groups: Sequence[int] = ()  # those of their prompts: samples of one group share one
    steps: Sequence[int] = ()  # which of the trained steps are supervised, increasing; empty: all of them
    draw_forward_noise: Callable[[int], Tensor] = draw_none  # as draw_noise, for noising final latents again

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``; from pinned memory the host does not wait for the copies."""
        return replace(self, x=self.x.to(device, non_blocking=True), text=self.text.to(device, non_blocking=True))


@dataclass(frozen=True)
class BatchMaker:
    """Makes a process's batches of any round, in any order and in any thread."""

    plan: RunPlan
    samplers: Mapping[str, PromptSampler]  # task -> which of its prompts comes when
    prompts: Mapping[str, Sequence[Prompt]]  # task -> its training prompts
    text: TextCache
    latent_shape: tuple[int, ...]
    device: torch.device  # that the batches will be used on
    dtype: torch.dtype  # of the text embeddings
    seed: int
    backward_size: int  # samples in one backward pass
    images_per_prompt: int
    same_latent: bool
    rank: int
    world: int

    def round(self, index: int, *, watched: bool) -> Iterator[Batch]:
        """The batches of round ``index`` (from 0), task by task; ``watched`` asks the first of each for pictures.

        Their tensors are in the host's memory, pinned when they will be used on a GPU; noise that is drawn later is on
        the device.
        """
        plan, size = self.plan, self.backward_size
        for task in plan.tasks_of(index):
            for batch in range(plan.batches_per_task):
                first = (batch * self.world + self.rank) * plan.batch_size
                for start in range(first, first + plan.batch_size, size):
                    yield self._batch(index, task, range(start, start + size), watched and batch == 0)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _supervised(self, key: tuple[int, int, int]) -> tuple[int, ...]:
        """The same steps for all of a task's batches, so that neither their size nor the processes matter."""
        count = self.plan.steps_per_rollout
        return choose_steps(self.plan.trained_steps, count, *key) if count else ()

    def _batch(self, index: int, task: int, samples: Sequence[int], watched: bool) -> Batch:
        teacher, key = self.plan.teachers[task], (self.seed, index, task)
        groups = [sample // self.images_per_prompt for sample in samples]
        sampler, texts = self.samplers[teacher.name], self.prompts[teacher.name]
        prompts = [texts[sampler.index(index, group)] for group in groups]
        own = groups if self.same_latent else samples
        text = self.text.get([prompt.text for prompt in prompts], dtype=self.dtype)

        def draw(stream: Stream, step: int) -> Tensor:
            drawn = noise(self.latent_shape, [(stream, *key, i, step) for i in samples])
            return self._pinned(drawn).to(self.device, non_blocking=True)

        return Batch(
            task=teacher.name,
            teacher=adapter_name(teacher),
            teacher_guidance=teacher.guidance_scale,
            x=self._pinned(noise(self.latent_shape, [(Stream.LATENT, *key, i) for i in own])),
            text=text.pin_memory() if self.device.type == "cuda" else text,
            draw_noise=partial(draw, Stream.STEP),
            prompts=prompts,
            wants_picture=watched,
            samples=tuple(samples),
            groups=tuple(groups),
            steps=self._supervised(key),
            draw_forward_noise=partial(draw, Stream.FORWARD),
        )


def choose_steps(trained_steps: int, count: int, *key: int) -> tuple[int, ...]:
    """``count`` of the first ``trained_steps`` steps without replacement, increasing, each subset equally likely.

    The mean of a loss over them has the mean over all steps as its expectation. A function of ``key`` alone.
    """
    order = torch.randperm(trained_steps, generator=generator(Stream.SUPERVISED_STEPS, *key))
    return tuple(sorted(order[:count].tolist()))


def adapter_name(teacher: TeacherSpec) -> str:
    """The teacher's adapter: a task may be called anything, a module attribute may not."""
    return "teacher_" + "".join(c if c.isalnum() else "_" for c in teacher.name)
