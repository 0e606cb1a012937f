"""On-policy distillation (Algorithm 1): the student's step is pulled to its teacher's at every state that it visits."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from diffusionopd.algorithms.base import Algorithm, Models
from diffusionopd.algorithms.pull import ComparisonSettings
from diffusionopd.algorithms.results import Losses, Result
from diffusionopd.algorithms.settings import (
    ClipSettings,
    Nfe,
    ReferenceSettings,
    RoundPlan,
    SamplerSettings,
    TeacherSettings,
)
from diffusionopd.config_schema import Problems, key
from diffusionopd.data.batches import Batch, choose_steps, step_chances
from diffusionopd.data.tasks import Task
from diffusionopd.losses import distillation_loss, policy_gradient_loss
from diffusionopd.rollout import Branches, Target, Visit
from diffusionopd.transitions import per_sample_mean, velocity_difference

KL, POLICY_GRADIENT = "kl", "policy_gradient"
GAPS = TO_TEACHER, TO_TARGET = "teacher", "target"


_MOST_OF_THE_LOSS = 0.9  # of one step among several: the others are hardly trained
UNIFORM = "uniform"
STEEPEST = 100  # of a beta density: far above, chances are too small for a float64
_BETA = re.compile(r"beta\(\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*\)")


def _is_weighting(value: str) -> bool:
    beta = _BETA.fullmatch(value or "")
    return value == UNIFORM or beta is not None and all(0 < float(shape) <= STEEPEST for shape in beta.groups())


@dataclass(frozen=True)
class OpdSettings(ComparisonSettings, ClipSettings, ReferenceSettings):
    """On-policy distillation."""

    loss: str = key("train.loss", KL, choices=(KL, POLICY_GRADIENT))
    """What is minimised: "kl", the closed-form KL of student and teacher steps (ODE: half the squared distance of their
    means), or "policy_gradient", the PPO-style surrogate, whose advantage is minus the KL as the sampled next state
    shows it (needs noise)."""
    baseline: bool = key("train.baseline", False)
    """Of the surrogate "policy_gradient": subtract the advantage's known mean over the step's noise, minus the KL at
    the state. The gradient is the same in expectation, with much less noise."""
    conditional_weight: float = key("train.conditional_weight", 0.0, "[0, inf)")
    """Weight of the same loss between the conditional velocities, before guidance, beside that between the guided ones:
    under guidance the latter alone leaves open how the two branches share the change. No further forward; student and
    teachers must be under guidance."""
    steps_per_rollout: int = key("train.steps_per_rollout", 0, "[0, inf)")
    """Of the trained steps of a rollout, this many are supervised, drawn anew for each round and task, all equally
    likely; the others cost the student's forward pass only, and those after the last one nothing. The gradient is
    the same in expectation. 0 supervises all."""
    step_weighting: str = key(
        "train.step_weighting",
        UNIFORM,
        form=(f'"{UNIFORM}" or "beta(a, b)" with a and b up to {STEEPEST}', _is_weighting),
    )
    """How the `steps_per_rollout` steps are drawn: "uniform", or "beta(a, b)" in proportion to that density over the
    trajectory from noise (0) to data (1): "beta(5, 2)" prefers low noise, "beta(2, 5)" high noise."""
    step_correction: bool = key("train.step_correction", False)
    """Weigh each drawn step by how much rarer than uniform it is drawn, so that the gradient is that of all steps in
    expectation, whatever `step_weighting`."""

    def chances(self, trained_steps: int) -> tuple[float, ...] | None:
        """How likely each trained step is drawn; None where all are as likely."""
        beta = _BETA.fullmatch(self.step_weighting)
        if not beta or not self.steps_per_rollout:
            return None
        return step_chances(trained_steps, self.steps_per_rollout, float(beta[1]), float(beta[2]))


class Opd(Algorithm):
    """Every round visits each task once and takes one optimizer step."""

    name = "opd"
    verb = "distilling"
    groups = (OpdSettings, TeacherSettings)
    has_teachers = True
    one_step = True
    settings: OpdSettings

    def __init__(self, models: Models, *others: Any) -> None:
        super().__init__(models, *others)
        steps, s = self.sampler.trained_steps, self.settings
        chances = s.chances(steps) if s.step_correction else None
        self.step_weights = chances and [s.steps_per_rollout / (steps * chance) for chance in chances]
        if s.loss == KL and s.target == "mean":
            self._warn_of_one_step([each.kl_weight * each.b**2 for each in self.transitions[:steps]])

    def _warn_of_one_step(self, weights: Sequence[float]) -> None:
        share = max(weights) / sum(weights)
        if len(weights) > 1 and share > _MOST_OF_THE_LOSS and (not dist.is_initialized() or dist.get_rank() == 0):
            what = f"step {weights.index(max(weights)) + 1} of {len(weights)} has {share:.1%} of the loss's weight"
            why = f"solver {self.sampler.solver!r} adds hardly any noise there"
            remedy = "Set train.target to 'velocity', or lower train.timestep_fraction (docs/method.md)."
            warnings.warn(f"{what}, as {why}. {remedy}", stacklevel=2)

    def round(self, batches: Sequence[Batch], step: bool = True) -> Result:
        """See :meth:`Algorithm.round`.

        Rollout, teacher and training are one pass: weights are constant within a round, so a visit's loss is
        backpropagated at once and then forgotten. With ``num_inner_epochs`` above 1 the visits are kept, and each
        further epoch trains on the same states with the new weights, one optimizer step per epoch.
        """
        result, kept, losses = Result(), list[tuple[Batch, Visit]](), self.losses(batches)
        gaps = {name: self.losses(batches) for name in GAPS if any(map(_is_extrapolated, batches))}
        for batch in batches:  # of each task, or of several tasks side by side
            for part, visit in self.rollout(batch, finish=batch.wants_images):
                if visit.target is not None:
                    self._learn(losses, part, visit, visit.v)
                    for name, gap in gaps.items():
                        gap.add(part, visit.step, _squared_distance(visit.v, visit.target, name))
                    if self.sampler.num_inner_epochs > 1:
                        kept.append((part, replace(visit, v=Branches(*(v.detach() for v in visit.v)))))
                if batch.wants_images and visit.step == len(self.transitions) - 1:
                    result.images.append((part, visit.x_next))
        result.note(losses, self.update(losses, step))
        for _ in range(1, self.sampler.num_inner_epochs):
            losses = self.losses(batches)
            for part, visit in kept:
                self._learn(losses, part, visit, self.branches(part)(visit.x, visit.transition.sigma))
            self.update(losses, step)
        result.metrics |= _distances(gaps)
        return result

    def _learn(self, losses: Losses, batch: Batch, visit: Visit, v: Branches) -> None:
        """Accumulate the gradient at a visited state, of the student's velocities ``v`` there."""
        self.optimizer.backward(losses.add(batch, visit.step, self._loss(batch, visit, v)))

    def _loss(self, batch: Batch, visit: Visit, v: Branches) -> Tensor:
        """The loss ``[B]`` at a visited state, of the student's velocities ``v`` there."""
        s, tr, target = self.settings, visit.transition, visit.target
        assert target is not None
        if s.loss == KL:
            loss = distillation_loss(tr, v.guided, target.v.guided, s.target, s.self_normalize)
        else:
            old = visit.v.guided.detach()
            there = tr, visit.x, visit.x_next
            loss = policy_gradient_loss(*there, v.guided, old, target.v.guided, s.clip_range, s.baseline)
        if s.conditional_weight > 0:
            branch = distillation_loss(tr, v.conditional, target.v.conditional, s.target, s.self_normalize)
            loss = loss + s.conditional_weight * branch
        if s.beta > 0:
            v_base = self.base(batch)(visit.x, tr.sigma)
            loss = loss + s.beta * distillation_loss(tr, v.guided, v_base, s.target, s.self_normalize)
        return loss if self.step_weights is None else loss * self.step_weights[visit.step]

    @classmethod
    def check(
        cls,
        settings: OpdSettings,
        sampler: SamplerSettings,
        teachers: Mapping[str, Task],
        values: Mapping[str, Any],
        problems: Problems,
    ) -> None:
        """Drawn steps are among the trained ones, and the surrogate needs noise."""
        drawn, trained = settings.steps_per_rollout, sampler.trained_steps
        if trained and drawn > trained:
            remedy = f"Set it to at most {trained}, or to 0 for all of them."
            problems.add("train.steps_per_rollout", f"is {drawn}, more than the {trained} trained steps", remedy)
        if settings.step_weighting != UNIFORM and not drawn:
            remedy = "Set train.steps_per_rollout to how many steps are drawn, or this to 'uniform'."
            problems.add("train.step_weighting", f"is {settings.step_weighting!r}, but no steps are drawn", remedy)
        if settings.loss == POLICY_GRADIENT:
            sampler.check_noise("train.loss", POLICY_GRADIENT, problems)
        if settings.conditional_weight > 0:
            _check_branches(settings, sampler, teachers, problems)

    @classmethod
    def notes(cls, settings: OpdSettings, changed: Sequence[str]) -> list[str]:
        """The surrogate has no choice of what is compared, but its pull to the base; the closed form no baseline."""
        if settings.loss == KL:
            of_other = ["train.baseline", "train.clip_range"]
        else:
            of_other = [] if settings.beta > 0 else ["train.target", "train.self_normalize"]
        notes = [f"{name} is ignored: train.loss is {settings.loss}" for name in changed if name in of_other]
        if settings.step_correction and settings.step_weighting == UNIFORM:
            notes.append("train.step_correction is ignored: steps are equally likely")
        return notes

    @classmethod
    def steps(cls, plan: RoundPlan, key: tuple[int, int, int]) -> tuple[int, ...]:
        """The same steps for all of a task's batches, so that neither their size nor the processes matter."""
        drawn = plan.settings.steps_per_rollout
        trained = plan.sampler.trained_steps
        if not drawn:
            return super().steps(plan, key)
        return choose_steps(trained, drawn, *key, chances=plan.settings.chances(trained))

    @classmethod
    def count(cls, plan: RoundPlan) -> Nfe:
        """Teacher and student once per trained step, the student alone at the drawn rollout's other steps.

        The largest of k numbers drawn from 1 to T without replacement is k (T + 1) / (k + 1) on average.
        """
        shape, sampler = plan.shape, plan.sampler
        drawn = plan.settings.steps_per_rollout
        visits = shape.images_per_task * (drawn or sampler.trained_steps)
        own = plan.nfe(sampler.guidance)
        student = visits * shape.tasks_per_round * own * sampler.num_inner_epochs
        teachers, references = plan.target_nfe(visits)
        unsupervised = drawn * (sampler.trained_steps + 1) / (drawn + 1) - drawn
        if plan.settings.chances(sampler.trained_steps):  # no such formula
            draws = [cls.steps(plan, (0, i, 0)) for i in range(200)]
            unsupervised = sum(steps[-1] + 1 - drawn for steps in draws) / len(draws)
        return Nfe(
            student=student,
            teacher=teachers,
            sampling=round(shape.images_per_round * own * unsupervised),
            base=(student if plan.settings.beta > 0 else 0) + references,
            kept_latents=1 + (4 * (drawn or sampler.trained_steps) if sampler.num_inner_epochs > 1 else 0),
        )


def _is_extrapolated(batch: Batch) -> bool:
    return any(row.strength != 1.0 for row in batch.rows)


def _squared_distance(v: Branches, target: Target | None, name: str) -> Tensor:
    """Mean squared distance ``[B]`` of the student's guided velocity to its teacher's, or to its target."""
    assert target is not None
    other = target.v_teacher if name == TO_TEACHER else target.v.guided
    return per_sample_mean(velocity_difference(v.guided.detach(), other).square())


def _distances(gaps: Mapping[str, Losses]) -> dict[str, float]:
    """``distance/<task>/<teacher or target>``: the roots of the mean squared distances. Collective."""
    found: dict[str, float] = {}
    for name, gap in gaps.items():
        gap.reduce()
        found |= {f"distance/{task}/{name}": mean**0.5 for task, mean in gap.means().items()}
    return found


def _check_branches(
    settings: OpdSettings, sampler: SamplerSettings, teachers: Mapping[str, Task], problems: Problems
) -> None:
    """The loss of the branches needs two of them, of the student and of every teacher."""
    name = "train.conditional_weight"
    remedy = (
        "Set it to 0, or all of them under guidance above 1 (sample.guidance_scale with train.cfg, guidance_scale)."
    )
    if settings.loss != KL:
        problems.add(name, f"goes with train.loss {KL!r} only", "Set it to 0.")
    if problems.good("sample.guidance_scale", "train.cfg") and sampler.guidance <= 1:
        problems.add(name, f"is {settings.conditional_weight:g}, but the student has no guidance", remedy)
    for place, task in teachers.items():
        if task.guidance_scale == 1:
            problems.add(name, f"is {settings.conditional_weight:g}, but {place} has no guidance", remedy)
