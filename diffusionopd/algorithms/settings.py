"""What algorithms have in common before weights load: keys of sampling, references and teachers, counts of a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusionopd.config_schema import FREE, Problems, key
from diffusionopd.data.rounds import RoundShape
from diffusionopd.data.tasks import Task
from diffusionopd.models.loading import ModelInfo
from diffusionopd.models.schedules import FAMILY, SCHEDULES
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
            problems.add(fraction, what, f"Set it to at least {math.ceil(1e4 / self.num_steps) / 1e4:g}.")
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
        return self.model.nfe_at(guidance) if self.model else 1 if guidance <= 1.0 else 2

    def target_nfe(self, visits: int) -> tuple[int, int]:
        """Forward passes of teachers, and of what targets start from, for so many supervised states of each task."""
        share = visits * self.shape.tasks_per_round / len(self.tasks)
        moved = (self.nfe(task.guidance_scale) for task in self.tasks if task.strength != 1.0)
        return round(share * sum(map(self.teacher_nfe, self.tasks))), round(share * sum(moved))

    def teacher_nfe(self, task: Task) -> int:
        """Forward passes of one velocity of a task's teacher, which may be on a model of its own."""
        own = self.teacher_models.get(task.model)
        return own.nfe_at(task.guidance_scale) if own else self.nfe(task.guidance_scale)


@dataclass(frozen=True)
class Nfe:
    """Forward passes of the transformer per round, in single images, over all processes, and what is kept for them."""

    student: int = 0  # with gradient
    teacher: int = 0
    sampling: int = 0  # of the student or its old policy, without gradient; an expectation where steps are drawn
    base: int = 0  # of the base, and of other references that a target starts from
    kept_latents: int = 2  # per image: tensors of a latent's size that live as long as the round, its noise included
    extra_adapters: int = 0  # frozen adapters of the student's size beside the teachers'
