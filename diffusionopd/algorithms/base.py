"""What the algorithms have in common: policies on one backbone, losses by task and step, the optimizer step.

An algorithm is a file with its settings, its rules, its count of forward passes and its ``round``; the helpers here are
called by it and call nothing back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from diffusionopd.algorithms.finite import REMEDIES, VelocityChecks
from diffusionopd.algorithms.optim import NonFiniteError, StudentOptimizer
from diffusionopd.algorithms.results import Losses, Result
from diffusionopd.algorithms.settings import Nfe, RoundPlan, SamplerSettings
from diffusionopd.config_schema import Problems, is_number
from diffusionopd.data.batches import Batch, Row
from diffusionopd.data.rounds import RoundShape
from diffusionopd.data.tasks import Task
from diffusionopd.distributed import any_process, by_rank, gather_over_processes
from diffusionopd.losses import extrapolated
from diffusionopd.models.policies import STUDENT, Policies, Request
from diffusionopd.rewards import RewardWorker
from diffusionopd.rollout import Branches, Target, Velocity, Visit, rollout, walk


@dataclass(frozen=True)
class Models:
    """What an algorithm works with."""

    policies: Policies
    optimizer: StudentOptimizer
    rewards: Mapping[str, RewardWorker] = field(default_factory=dict)  # by task; none in a distillation


class Asked(NamedTuple):
    """A frozen policy for some rows of a batch."""

    policy: str | None
    rows: slice
    batch: Batch  # of these rows
    guidance: float


class Algorithm:
    """The student and the frozen policies on one backbone; a subclass's ``round`` is the method."""

    name: ClassVar[str]
    verb: ClassVar[str] = "training"
    sampled_by: ClassVar[str] = "the student"  # whose trajectories it trains on
    groups: ClassVar[tuple[type, ...]]  # of its keys; the first is its own settings
    has_teachers: ClassVar[bool] = False
    has_rewards: ClassVar[bool] = False
    one_step: ClassVar[bool] = False  # whether a round may not have several optimizer steps
    ema_each_batch: ClassVar[bool] = True  # whether the published code calls its average after each batch, or each step

    def __init__(self, models: Models, settings: Any, sampler: SamplerSettings, sigmas: Tensor, shape: RoundShape):
        """``sigmas`` ``[num_steps + 1]``: the noise levels of the training trajectories."""
        self.policies, self.optimizer, self.rewards = models.policies, models.optimizer, models.rewards
        self.settings, self.sampler, self.shape = settings, sampler, shape
        self.transitions = sampler.transitions(sigmas)
        self.velocities = VelocityChecks()

    # --- what a subclass says ---------------------------------------------------------------------------------------

    @classmethod
    def check(
        cls,
        settings: Any,
        sampler: SamplerSettings,
        teachers: Mapping[str, Task],
        values: Mapping[str, Any],
        problems: Problems,
    ) -> None:
        """Note what does not go together in a configuration; ``teachers``: the tasks by their places, if they have
        teachers that are used, and all is well with them."""

    @classmethod
    def notes(cls, settings: Any, changed: Sequence[str]) -> list[str]:
        """What was set and does nothing; ``changed``: keys that do not have their defaults."""
        return []

    @classmethod
    def uses_teachers(cls, values: Mapping[str, Any]) -> bool:
        """Whether a flat configuration, which may be wrong, needs the tasks' teachers."""
        weight: Any = values.get("train.distill_weight")
        return cls.has_teachers or cls.has_rewards and is_number(weight) and weight > 0

    @classmethod
    def count(cls, plan: RoundPlan) -> Nfe:
        """Forward passes per round, and the memory that goes with them."""
        raise NotImplementedError

    @classmethod
    def steps(cls, plan: RoundPlan, key: tuple[int, int, int]) -> tuple[int, ...]:
        """The sampler steps that are trained in a round of a task; ``key``: (seed, round, task)."""
        return tuple(range(plan.sampler.trained_steps))

    def round(self, batches: Sequence[Batch], step: bool = True) -> Result:
        """Train on the batches of one round.

        Without ``step`` the round's gradient is kept: the next round that has one steps by the mean over all of them.
        Raises NonFiniteError, before the student changes by it, naming task, step and policy.
        """
        raise NotImplementedError

    def finish(self, updates: int) -> None:
        """Called after each round that ended in an optimizer step, with the number of those completed."""

    def state(self) -> dict[str, Tensor]:
        """What a resume needs beside the student and its optimizer, by name."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""

    # --- policies ---------------------------------------------------------------------------------------------------

    def student(self, batch: Batch) -> Velocity:
        """The student's velocity for a batch, with gradient where the caller has it enabled."""
        branches = self.branches(batch)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return branches(x, sigma).guided

        return velocity

    def branches(self, batch: Batch) -> Callable[[Tensor, float], Branches]:
        """The student's velocities for a batch."""

        def velocities(x: Tensor, sigma: float) -> Branches:
            v = Branches(*self.policies.student(x, sigma, batch.text, self.sampler.guidance))
            self.velocities.note(STUDENT, batch.rows, sigma, v.guided)
            return v

        return velocities

    def frozen(self, policy: str | None, batch: Batch, guidance: float) -> Velocity:
        """The velocity of a frozen adapter, or of the bare base for None, without gradient."""
        asked = [Asked(policy, slice(None), batch, guidance)]

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return self._answers(asked, x, sigma)[0].guided

        return velocity

    def target(self, batch: Batch) -> Callable[[Tensor, float], Target]:
        """The targets of a batch: its teachers' velocities, or those at their ``strength`` from the references'."""
        asked, strengths = [], []
        for rows, part, own in _tasks(batch):
            policies = [own.teacher] if own.strength == 1.0 else [own.teacher, own.reference]
            asked.append([Asked(policy, rows, part, own.guidance) for policy in policies])
            strengths.append(own.strength)

        def velocities(x: Tensor, sigma: float) -> Target:
            answers = iter(self._answers([one for task in asked for one in task], x, sigma))
            targets = [_pulled([next(answers) for _ in t], s) for t, s in zip(asked, strengths, strict=True)]
            guided, conditional, teacher = (_cat(parts) for parts in zip(*targets, strict=True))
            return Target(Branches(guided, conditional), teacher)

        return velocities

    def teacher(self, batch: Batch) -> Velocity:
        """The velocities of the batch's teachers, under their own guidance."""
        asked = [Asked(own.teacher, rows, part, own.guidance) for rows, part, own in _tasks(batch)]

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return _cat([v.guided for v in self._answers(asked, x, sigma)])

        return velocity

    def base(self, batch: Batch) -> Velocity:
        """The bare base's velocity, under the student's guidance."""
        return self.frozen(None, batch, self.sampler.guidance)

    def _answers(self, asked: Sequence[Asked], x: Tensor, sigma: float) -> list[Branches]:
        """The velocities of frozen policies at the states ``x`` of a batch, each on its rows."""
        requests = [Request(one.policy, x[one.rows], sigma, one.batch.text, one.guidance) for one in asked]
        answers = [Branches(*answer) for answer in self.policies.frozen(requests)]
        for one, v in zip(asked, answers, strict=True):
            self.velocities.note(one.policy, one.batch.rows, sigma, v.guided)
        return answers

    def trajectory(self, batch: Batch, policy: Velocity) -> Iterator[Visit]:
        """A policy's walk from noise to final latents, without gradient."""
        return walk(
            batch.noise, self.transitions, policy, draw_noise=batch.step_noise, multistep=self.sampler.multistep
        )

    def rollout(self, batch: Batch, finish: bool = False) -> Iterator[tuple[Batch, Visit]]:
        """The student's walk with its targets at the trained steps: :func:`diffusionopd.rollout.rollout`.

        Each visit comes with the batch of its rows.
        """
        part = cache(lambda rows: batch if len(rows) == len(batch.rows) else batch.select(rows))
        student, target = cache(lambda rows: self.branches(part(rows))), cache(lambda rows: self.target(part(rows)))
        visits = rollout(
            batch.noise,
            self.transitions,
            lambda x, sigma, rows: student(tuple(rows))(x, sigma),
            lambda x, sigma, rows: target(tuple(rows))(x, sigma),
            trained=[row.steps for row in batch.rows],
            draw_noise=batch.step_noise,
            multistep=self.sampler.multistep,
            finish=finish,
        )
        for visit in visits:
            yield part(tuple(visit.rows)), visit

    # --- updates ----------------------------------------------------------------------------------------------------

    def losses(self, batches: Sequence[Batch]) -> Losses:
        """An empty table for the batches of one optimizer step."""
        return Losses(batches, len(self.transitions), self.policies.backbone.device)

    def parts(self, batches: Sequence[Batch]) -> list[list[int]]:
        """The numbers of the batches of each optimizer step of a round, by their rows: tasks may share a batch."""
        size, parts, rows = self.shape.batches_per_step * self.shape.backward_size, list[list[int]](), 0
        for number, batch in enumerate(batches):
            if rows % size == 0:
                parts.append([])
            parts[-1].append(number)
            rows += len(batch.rows)
        return parts

    def passes(self, batches: Sequence[Batch], result: Result, step: bool) -> Iterator[tuple[int, int, Losses]]:
        """Inner epochs over a round: (epoch, number of a batch to train on, table of the optimizer step it belongs to).

        The step follows once all its batches have been trained on; ``result`` notes those of the first epoch.
        """
        for epoch in range(self.sampler.num_inner_epochs):
            for part in self.parts(batches):
                losses = self.losses([batches[i] for i in part])
                for i in part:
                    yield epoch, i, losses
                norm = self.update(losses, step)
                if epoch == 0:
                    result.note(losses, norm)

    def update(self, losses: Losses, step: bool = True) -> float | None:
        """One optimizer step, if any, after a check of the losses; the gradient's norm. Collective."""
        losses.reduce()
        if broken := losses.first_broken():
            sigma = self.transitions[broken[1]].sigma
            self._stop(f"the loss of task {broken[0]!r} is not finite at step {broken[1]} (sigma {sigma:.4f})")
        self.velocities.clear()
        try:
            if step:
                return self.optimizer.step()
            self.optimizer.keep()
            return None
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}, with finite losses. {_UNCHANGED} {REMEDIES[STUDENT]}") from error

    def check_samples(self) -> None:
        """Raise NonFiniteError on every process if a velocity noted so far is not finite on any of them."""
        if any_process(int(bool(self.velocities.first_broken()))):
            self._stop("sampling")

    def _stop(self, what: str) -> NoReturn:
        """Name the velocities that were the first not to be finite, and the ranks that had them; collective."""
        self.optimizer.discard()
        causes = by_rank(gather_over_processes([self.velocities.describe(self.transitions)]))
        self.velocities.clear()
        raise NonFiniteError(f"{what}. {_UNCHANGED} {causes or REMEDIES[STUDENT]}")


_UNCHANGED = "The student has not been changed by it."


def _tasks(batch: Batch) -> Iterator[tuple[slice, Batch, Row]]:
    """Each task's rows in a batch, the batch of them, and one of them, which says what they have in common."""
    for rows in batch.slices.values():
        yield rows, batch.select(range(rows.start, rows.stop)), batch.rows[rows.start]


def _pulled(answers: Sequence[Branches], strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """Guided and conditional target and the teacher's guided velocity, of a teacher's answer, and a reference's."""
    teacher, start = answers[0], answers[-1]
    guided, conditional = (extrapolated(v_ref, v, strength) for v_ref, v in zip(start, teacher, strict=True))
    return guided, conditional, teacher.guided


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
