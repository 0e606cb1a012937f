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

from diffusionopd.algorithms.optim import NonFiniteError, StudentOptimizer
from diffusionopd.config_schema import FREE, Problems, is_number, key
from diffusionopd.data.batches import Batch, Row
from diffusionopd.data.rounds import RoundShape
from diffusionopd.data.tasks import Task
from diffusionopd.distributed import any_process, by_rank, gather_over_processes, mean_over_processes
from diffusionopd.losses import extrapolated
from diffusionopd.models.loading import ModelInfo
from diffusionopd.models.policies import STUDENT, Policies, Request
from diffusionopd.models.schedules import FAMILY, SCHEDULES
from diffusionopd.rewards import RewardWorker
from diffusionopd.rollout import Branches, Target, Velocity, Visit, rollout, walk
from diffusionopd.transitions import Transition, schedule

NOISY_KERNELS = {"flow": "flow_sde", "dance": "dance_sde", "cps": "cps", "ddim": "ddim"}
ODE_SOLVERS = ("dpm1", "dpm2")


@dataclass(frozen=True)
class SamplerSettings:
    """Sampling in training."""

    num_steps: int = key("sample.num_steps", 40, "[1, inf)", from_model="num_steps")
    """Sampler steps of a trajectory in training."""
    schedule: str = key("sample.schedule", FAMILY, choices=SCHEDULES)
    """Noise levels of the training trajectories: "family", those of the base's own pipeline, or "linspace", num_steps
    levels evenly spread from 1 to 1 / num_steps and then shifted as the pipeline does (what diffusers makes of
    `sigmas=`): the last step is longer. Evaluation keeps the family's."""
    guidance_scale: float = key("sample.guidance_scale", 4.5, "[1, inf)", from_model="guidance_scale")
    """Classifier-free guidance of the student in training (if `train.cfg`); 1.0 is without."""
    cfg: bool = key("train.cfg", True)
    """Train the student under classifier-free guidance, at `sample.guidance_scale`."""
    solver: str = key("sample.solver", "flow", choices=(*NOISY_KERNELS, *ODE_SOLVERS))
    """Sampler of the training trajectories: "flow", "dance", "cps" or "ddim", stochastic with the amount of
    `noise_level`, or "dpm1", "dpm2", ODE solvers of first and second order without noise."""
    noise_level: float = key("sample.noise_level", 0.7, "[0, inf)")
    """Amount of noise (eta) that a step of flow, dance, cps or ddim adds; at 0 each of them is the Euler ODE. cps and
    ddim take at most 1."""
    deterministic: bool = key("sample.deterministic", False)
    """True is the same as `noise_level` 0."""
    timestep_fraction: float = key("train.timestep_fraction", 1.0, "(0, 1]")
    """Fraction of the steps to train on, from the first: int(num_steps * timestep_fraction) steps."""
    num_inner_epochs: int = key("train.num_inner_epochs", 1, "[1, inf)")
    """Passes over one round's trajectories or samples. Distillation above 1 keeps the trajectories in memory."""

    @property
    def kernel(self) -> str:
        """Name of the transitions; without noise every solver's step is compared as an Euler step."""
        noiseless = self.solver in ODE_SOLVERS or self.deterministic or self.noise_level == 0
        return "ode" if noiseless else NOISY_KERNELS[self.solver]

    @property
    def multistep(self) -> bool:
        """Whether trajectories are those of the second-order ODE solver."""
        return self.solver == "dpm2"

    @property
    def trained_steps(self) -> int:
        """The first so many steps are trained."""
        return int(self.num_steps * self.timestep_fraction)

    @property
    def guidance(self) -> float:
        """The student's."""
        return float(self.guidance_scale) if self.cfg else 1.0

    def transitions(self, sigmas: Tensor) -> list[Transition]:
        """One per step, on the noise levels ``[num_steps + 1]``."""
        return schedule(self.kernel, sigmas, 0.0 if self.kernel == "ode" else float(self.noise_level))

    def check(self, problems: Problems) -> None:
        """Steps and noise must go together."""
        steps, fraction, noise = "sample.num_steps", "train.timestep_fraction", "sample.noise_level"
        if problems.good(steps, fraction) and self.trained_steps < 1:
            what = f"is {self.timestep_fraction}, which trains none of {self.num_steps} steps"
            problems.add(fraction, what, f"Set it to at least {1 / self.num_steps:.3g}.")
        if problems.good("sample.solver", noise) and self.solver in ("cps", "ddim") and self.noise_level > 1:
            problems.add(noise, f"is {self.noise_level}", f"Solver {self.solver!r} takes at most 1.")

    def check_noise(self, name: str, value: str, problems: Problems) -> None:
        """For the setting ``name``, which works with the densities of sampled steps."""
        if problems.good("sample.solver", "sample.noise_level", "sample.deterministic") and self.kernel == "ode":
            remedy = "Use solver flow, dance, cps or ddim with noise_level above 0 and deterministic False."
            problems.add(name, f"is {value!r}, which needs a sampler with noise", remedy)
        fraction = "train.timestep_fraction"
        last = problems.good(fraction, "sample.num_steps") and self.trained_steps == self.num_steps
        if last and self.kernel in ("cps", "ddim"):
            what = f"is {self.timestep_fraction:g}: the last step is trained too, to which {self.solver} adds no noise"
            remedy = f"{name} {value!r} needs noise in every trained step: set it below 1, such as 0.99."
            problems.add(fraction, what, remedy)

    def notes(self) -> list[str]:
        """What was set and does nothing."""
        if self.noise_level > 0 and (self.solver in ODE_SOLVERS or self.deterministic):
            why = f"solver {self.solver} adds none" if self.solver in ODE_SOLVERS else "sample.deterministic is True"
            return [f"sample.noise_level {self.noise_level:g} is ignored: {why}"]
        return []


@dataclass(frozen=True)
class ReferenceSettings:
    """Staying near the base model."""

    beta: float = key("train.beta", 0.0, "[0, inf)")
    """Weight of staying near the base model without adapters (distillation: by the same loss; grpo: by the KL; nft: by
    the squared distance of the velocities); above 0 it costs one more forward per step."""


@dataclass(frozen=True)
class ClipSettings:
    """The clipped probability ratio."""

    clip_range: float = key("train.clip_range", 1e-4, "(0, inf)")
    """The loss "policy_gradient", and "grpo", clip the probability ratio to [1 - clip_range, 1 + clip_range]."""


@dataclass(frozen=True)
class TeacherSettings:
    """Teachers."""

    merge_teachers: bool = key("train.merge_teachers", False, resume=FREE)
    """Give each teacher merged copies of the matrices that it adapts, W + alpha / r B A, instead of its LoRA beside the
    base: its forwards cost no more than the base's, its memory is that of these matrices (docs/performance.md). In
    half precision the copies are rounded."""


@dataclass(frozen=True)
class RoundPlan:
    """What a round will be, known before weights load."""

    settings: Any  # the algorithm's own
    sampler: SamplerSettings
    shape: RoundShape
    tasks: tuple[Task, ...]
    model: ModelInfo | None  # where the base model is a folder here
    teacher_models: Mapping[str, ModelInfo]  # by the tasks' `model`, those that are here

    def steps_after(self, completed: int) -> int:
        """Optimizer steps of so many rounds."""
        in_round = self.shape.backward_batches // self.shape.batches_per_step * self.sampler.num_inner_epochs
        return completed * in_round // self.shape.rounds_per_step

    def nfe(self, guidance: float) -> int:
        """Forward passes of one guided velocity: a prompt alone, or with its unconditional counterpart."""
        return self.model.evaluations_at(guidance) if self.model else 1 if guidance <= 1.0 else 2

    def target_nfe(self, visits: int) -> tuple[int, int]:
        """Forward passes of teachers, and of what targets start from, for so many supervised states of each task."""
        share = visits * self.shape.tasks_per_round / len(self.tasks)
        moved = (self.nfe(task.guidance_scale) for task in self.tasks if task.strength != 1.0)
        return round(share * sum(map(self.teacher_nfe, self.tasks))), round(share * sum(moved))

    def teacher_nfe(self, task: Task) -> int:
        """Forward passes of one velocity of a task's teacher, which may be on a model of its own."""
        own = self.teacher_models.get(task.model)
        return own.evaluations_at(task.guidance_scale) if own else self.nfe(task.guidance_scale)


@dataclass(frozen=True)
class Nfe:
    """Forward passes of the transformer per round, in single images, over all processes, and what is kept for them."""

    student: int = 0  # with gradient
    teacher: int = 0
    sampling: int = 0  # of the student or its old policy, without gradient; an expectation where steps are drawn
    base: int = 0  # of the base, and of other references that a target starts from
    kept_latents: int = 2  # per image: tensors of a latent's size that live as long as the round, its noise included
    extra_adapters: int = 0  # frozen adapters of the student's size beside the teachers'


@dataclass(frozen=True)
class Models:
    """What an algorithm works with."""

    policies: Policies
    optimizer: StudentOptimizer
    rewards: Mapping[str, RewardWorker] = field(default_factory=dict)  # by task; none in a distillation


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
    def check(cls, settings: Any, sampler: SamplerSettings, values: Mapping[str, Any], problems: Problems) -> None:
        """Note what does not go together in a configuration."""

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
        for rows in batch.slices.values():
            part = batch.select(range(rows.start, rows.stop))
            ((teacher, reference, guidance, strength),) = {
                (row.teacher, row.reference, row.guidance, row.strength) for row in part.rows
            }
            policies = [teacher] if strength == 1.0 else [teacher, reference]
            asked.append([Asked(policy, rows, part, guidance) for policy in policies])
            strengths.append(strength)

        def velocities(x: Tensor, sigma: float) -> Target:
            answers = iter(self._answers([one for task in asked for one in task], x, sigma))
            targets = [_pulled([next(answers) for _ in t], s) for t, s in zip(asked, strengths, strict=True)]
            guided, conditional, teacher = (_cat(parts) for parts in zip(*targets, strict=True))
            return Target(Branches(guided, conditional), teacher)

        return velocities

    def teacher(self, batch: Batch) -> Velocity:
        """The velocities of the batch's teachers, under their own guidance."""
        asked = []
        for rows in batch.slices.values():
            part = batch.select(range(rows.start, rows.stop))
            ((teacher, guidance),) = {(row.teacher, row.guidance) for row in part.rows}
            asked.append(Asked(teacher, rows, part, guidance))

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
            raise NonFiniteError(f"{error}, with finite losses. {_UNCHANGED} {_REMEDIES[STUDENT]}") from error

    def check_samples(self) -> None:
        """Raise NonFiniteError on every process if a velocity noted so far is not finite on any of them."""
        if any_process(int(bool(self.velocities.first_broken()))):
            self._stop("sampling")

    def _stop(self, what: str) -> NoReturn:
        """Name the velocities that were the first not to be finite, and the ranks that had them; collective."""
        self.optimizer.discard()
        causes = by_rank(gather_over_processes([self.velocities.describe(self.transitions)]))
        self.velocities.clear()
        raise NonFiniteError(f"{what}. {_UNCHANGED} {causes or _REMEDIES[STUDENT]}")


_UNCHANGED = "The student has not been changed by it."
_BASE, _TEACHER = "base model", "teacher"
_REMEDIES = {
    _TEACHER: "Check that task's teacher (lora_path or model in train.teachers), or choose mixed_precision bf16 or no.",
    _BASE: "Check the base model (pretrained.model), or choose mixed_precision bf16 or no.",
    STUDENT: "Resume from the last checkpoint with a lower learning rate, or choose mixed_precision bf16 or no.",
}


def _pulled(answers: Sequence[Branches], strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """Guided and conditional target and the teacher's guided velocity, of a teacher's answer, and a reference's."""
    teacher, start = answers[0], answers[-1]
    guided, conditional = (extrapolated(v_ref, v, strength) for v_ref, v in zip(start, teacher, strict=True))
    return guided, conditional, teacher.guided


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class VelocityChecks:
    """Remembers, on the device, whether each velocity of a round was finite, and reads the answers when asked."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, str, float]] = []  # (policy, task, sigma) of each row
        self._finite: list[Tensor] = []

    def note(self, policy: str | None, rows: Sequence[Row], sigma: float, velocity: Tensor) -> None:
        """Check velocities of rows, ``[B, ...]``; the device is not waited for."""
        for row in rows:
            name = _BASE if policy is None else _TEACHER if policy == row.teacher else policy
            self._seen.append((name, row.task, sigma))
        self._finite.append(velocity.detach().isfinite().flatten(1).all(1))

    def first_broken(self) -> list[tuple[str, str, float]]:
        """(policy, task, sigma) of the first velocity that is not finite, and of other policies' at the same state.

        What comes after may be so because of it. Several policies, on different adapters, point to what they share.
        """
        if not self._seen:
            return []
        broken = [e for e, finite in zip(self._seen, torch.cat(self._finite).tolist(), strict=True) if not finite]
        return [e for e in dict.fromkeys(broken) if e[1:] == broken[0][1:]]

    def describe(self, transitions: Sequence[Transition]) -> str:
        """What is not finite, where, and the remedy; empty if nothing is."""
        broken = self.first_broken()
        if not broken:
            return ""
        names, (_, task, sigma) = [policy for policy, _, _ in broken], broken[0]
        steps = [f"step {i}, " for i, transition in enumerate(transitions) if transition.sigma == sigma]
        remedy = _REMEDIES.get(names[0] if len(names) == 1 else _BASE, _REMEDIES[STUDENT])
        where = f"for task {task!r} is not finite at {''.join(steps[:1])}sigma {sigma:.4f}"
        return f"the velocity of the {' and the '.join(names)} {where}. {remedy}"

    def clear(self) -> None:
        """Forget what was noted."""
        self._seen.clear()
        self._finite.clear()
