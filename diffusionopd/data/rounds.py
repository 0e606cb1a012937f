"""The shape of a round: how many images of which task, in which batches, and when the optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusionopd.config_schema import FREE, ROUND, Problems, key
from diffusionopd.data.noise import Stream, generator

TOGETHER, ALTERNATE, CASCADE = "together", "alternate", "cascade"


@dataclass(frozen=True)
class BatchSettings:
    """Batches and rounds. "Per process" is per GPU."""

    train_batch_size: int = key("sample.train_batch_size", 1, "[1, inf)", resume=ROUND)
    """Images per process in a batch."""
    num_batches_per_epoch: int = key("sample.num_batches_per_epoch", 2, "[1, inf)", resume=ROUND)
    """Batches per process and round, shared equally by the tasks: a multiple of the number of teachers."""
    num_image_per_prompt: int = key("sample.num_image_per_prompt", 1, "[1, inf)")
    """Images per prompt in a round. Divides the images per task and round, over all batches and processes."""
    batch_size: int = key("train.batch_size", 1, "[1, inf)", resume=ROUND)
    """Images per process in one backward pass. Divides `sample.train_batch_size`."""
    gradient_accumulation_steps: int = key("train.gradient_accumulation_steps", 1, "[1, inf)", resume=ROUND)
    """Backward batches per optimizer step. `num_batches_per_epoch * sample.train_batch_size / train.batch_size` makes
    one step per round; k times that, one every k rounds, which then count as one for EMA and nft's old policy. A
    divisor of it makes several steps per round, except in a distillation."""
    task_order: str = key("train.task_order", TOGETHER, choices=(TOGETHER, ALTERNATE, CASCADE))
    """Which tasks a round visits: "together", all of them; "alternate", one, in turn; "cascade", one, each for an equal
    share of the rounds, one after another. `num_batches_per_epoch` is shared by the tasks of a round."""
    tasks_per_round: int = key("train.tasks_per_round", 0, "[0, inf)")
    """With `task_order` "together": visit this many tasks in a round, drawn anew for each, all as likely; 0 visits all.
    The gradient is that of all tasks in expectation."""
    tasks_per_pass: int = key("train.tasks_per_pass", 0, "[0, inf)", resume=FREE)
    """At most so many tasks of an optimizer step walk side by side: a pass of the student, and one of all frozen LoRAs,
    over the rows of all of them (docs/performance.md). 1 is a pass for each task. 0: as many as fit into memory, on a
    CPU all; chosen at the start, printed, and kept when the run is resumed."""

    def check(self, visited: int, num_processes: int, one_step: bool, inner_epochs: int, problems: Problems) -> None:
        """Everything that must divide something else.

        ``visited``: the tasks of a round; ``one_step``: it may not have several optimizer steps.
        """
        batches, size = self.num_batches_per_epoch, self.train_batch_size
        part, steps, group = self.batch_size, self.gradient_accumulation_steps, self.num_image_per_prompt
        if batches % visited:
            what = f"is {batches}, not a multiple of the {visited} tasks of a round"
            up = math.ceil(batches / visited) * visited
            remedy = f"Set it to {up} (and train.gradient_accumulation_steps to match)."
            problems.add("sample.num_batches_per_epoch", what, remedy)
        if (images := batches // visited * size * num_processes) % group:
            what = f"is {group}, which does not divide the {images} images of a task in a round"
            problems.add("sample.num_image_per_prompt", what, f"Choose a divisor of {images}.")
        if size % part:
            what = f"is {part}, which does not divide sample.train_batch_size {size}"
            problems.add("train.batch_size", what, f"Choose a divisor of {size}.")
            return
        right, key = batches * size // part, "train.gradient_accumulation_steps"
        several = "a multiple of it for a step every several rounds"
        if one_step and steps % right:
            what = f"is {steps}, but one optimizer step per round needs {right}"
            problems.add(key, what, f"Set it to {right} ({batches} batches x {size} images / {part}), or {several}.")
        elif right % steps and steps % right:
            what = f"is {steps}, which does not divide the {right} backward batches of a round"
            problems.add(key, what, f"Choose a divisor of {right}, or {several}.")
        if steps > right and inner_epochs > 1:
            what = f"is {inner_epochs}, but with an optimizer step every several rounds all passes would be the same"
            problems.add("train.num_inner_epochs", what, f"Set it to 1, or {key} to {right}.")


@dataclass(frozen=True)
class RoundShape:
    """What a round is. Counts are over all processes unless they say otherwise."""

    num_rounds: int
    num_processes: int
    num_tasks: int
    batch_size: int  # images per process in a batch
    backward_size: int  # of them in a backward pass
    batches_per_task: int  # per process
    images_per_prompt: int
    accumulation: int  # backward batches per optimizer step: part of a round's, a round's, or those of several rounds
    task_order: str = TOGETHER
    drawn: int = 0  # tasks per round, if they are drawn
    seed: int = 0
    tasks_per_pass: int = 1  # side by side, at most; 0 until it is known

    @property
    def tasks_per_round(self) -> int:
        """How many tasks a round visits."""
        return self.drawn or (self.num_tasks if self.task_order == TOGETHER else 1)

    @property
    def images_per_task(self) -> int:
        """Images per visited task."""
        return self.batches_per_task * self.batch_size * self.num_processes

    @property
    def images_per_round(self) -> int:
        """Images of all visited tasks."""
        return self.images_per_task * self.tasks_per_round

    @property
    def groups_per_task(self) -> int:
        """Prompts per visited task."""
        return self.images_per_task // self.images_per_prompt

    @property
    def backward_batches(self) -> int:
        """Per process and round."""
        return self.tasks_per_round * self.batches_per_task * self.batch_size // self.backward_size

    @property
    def batches_per_step(self) -> int:
        """Backward batches of a process in a round before its gradient is averaged."""
        return min(self.accumulation, self.backward_batches)

    @property
    def rounds_per_step(self) -> int:
        """Rounds before an optimizer step; 1 also where a round has several."""
        return max(1, self.accumulation // self.backward_batches)

    def updates_after(self, completed: int) -> int | None:
        """How many rounds, counting those that share a step as one, are complete; None between steps."""
        updates, more = divmod(completed, self.rounds_per_step)
        return None if more else updates

    def tasks_of(self, index: int) -> Sequence[int]:
        """Which tasks round ``index`` (from 0) visits, increasing."""
        if self.drawn:
            order = torch.randperm(self.num_tasks, generator=generator(Stream.TASKS, self.seed, index))
            return sorted(order[: self.drawn].tolist())
        if self.task_order == TOGETHER:
            return range(self.num_tasks)
        task = index % self.num_tasks if self.task_order == ALTERNATE else index * self.num_tasks // self.num_rounds
        return range(task, task + 1)

    def rounds_of(self, task: int, start: int = 0) -> Iterable[int]:
        """The rounds from ``start`` that visit a task."""
        if self.drawn:
            return (index for index in range(start, self.num_rounds) if task in self.tasks_of(index))
        if self.task_order == TOGETHER:
            return range(start, self.num_rounds)
        if self.task_order == ALTERNATE:
            return range(start + (task - start) % self.num_tasks, self.num_rounds, self.num_tasks)
        first, end = (-(-part * self.num_rounds // self.num_tasks) for part in (task, task + 1))
        return range(max(start, first), end)


def round_shape(
    settings: BatchSettings, num_tasks: int, num_processes: int, num_rounds: int, seed: int = 0
) -> RoundShape:
    """The shape that settings in which nothing is wrong describe."""
    drawn = settings.tasks_per_round % num_tasks if settings.task_order == TOGETHER else 0
    return RoundShape(
        num_rounds,
        num_processes,
        num_tasks,
        batch_size=settings.train_batch_size,
        backward_size=settings.batch_size,
        batches_per_task=settings.num_batches_per_epoch
        // (drawn or (num_tasks if settings.task_order == TOGETHER else 1)),
        images_per_prompt=settings.num_image_per_prompt,
        accumulation=settings.gradient_accumulation_steps,
        task_order=settings.task_order,
        drawn=drawn,
        seed=seed,
        tasks_per_pass=settings.tasks_per_pass,
    )


def tasks_per_round(values: Mapping[str, Any]) -> int:
    """How many tasks a round visits; training from rewards without ``train.teachers`` has one."""
    if values["train.task_order"] != TOGETHER:
        return 1
    return values.get("train.tasks_per_round") or max(1, len(values["train.teachers"]))


def fitted_round(values: Mapping[str, Any]) -> dict[str, int]:
    """The changes with which a round has equal shares of its tasks and an optimizer step: counts are raised alone, but
    for ``train.tasks_per_round`` beyond the number of tasks. For values of the right types."""
    drawn = values["train.tasks_per_round"] if values["train.tasks_per_round"] < len(values["train.teachers"]) else 0
    visited = tasks_per_round({**values, "train.tasks_per_round": drawn})
    batches = math.ceil(values["sample.num_batches_per_epoch"] / visited) * visited
    right = batches * values["sample.train_batch_size"] // values["train.batch_size"]
    steps = values["train.gradient_accumulation_steps"]
    return {
        "train.tasks_per_round": drawn,
        "sample.num_batches_per_epoch": batches,
        "train.gradient_accumulation_steps": math.ceil(steps / right) * right,
    }
