"""On-policy distillation (Algorithm 1): the student's step is pulled to its teacher's at every state that it visits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffusionopd.algorithms.base import (
    Algorithm,
    ClipSettings,
    Nfe,
    ReferenceSettings,
    Result,
    RoundPlan,
    SamplerSettings,
    TeacherSettings,
)
from diffusionopd.config_schema import Problems, key
from diffusionopd.data.batches import Batch, choose_steps
from diffusionopd.losses import TARGETS, distillation_loss, policy_gradient_loss
from diffusionopd.rollout import Visit, rollout

KL, POLICY_GRADIENT = "kl", "policy_gradient"


@dataclass(frozen=True)
class OpdSettings(ClipSettings, ReferenceSettings):
    """On-policy distillation."""

    loss: str = key("train.loss", KL, choices=(KL, POLICY_GRADIENT))
    """What is minimised: "kl", the closed-form KL of student and teacher steps (ODE: half the squared distance of their
    means), or "policy_gradient", the PPO-style surrogate, whose advantage is minus the KL as the sampled next state
    shows it (needs noise)."""
    target: str = key("train.target", "mean", choices=TARGETS)
    """In which quantity "kl" compares: "mean" of the step (the paper's), "velocity", or "x0"."""
    self_normalize: bool = key("train.self_normalize", False)
    """Divide each sample's error by its own mean magnitude (detached)."""
    steps_per_rollout: int = key("train.steps_per_rollout", 0, "[0, inf)")
    """Of the trained steps of a rollout, this many are supervised, drawn anew for each round and task, all equally
    likely; the others cost the student's forward pass only, and those after the last one nothing. The gradient is
    the same in expectation. 0 supervises all."""


class Opd(Algorithm):
    """Every round visits each task once and takes one optimizer step."""

    name = "opd"
    verb = "distilling"
    groups = (OpdSettings, TeacherSettings)
    has_teachers = True
    one_step = True
    settings: OpdSettings

    def round(self, batches: Sequence[Batch], step: bool = True) -> Result:
        """See :meth:`Algorithm.round`.

        Rollout, teacher and training are one pass: weights are constant within a round, so a visit's loss is
        backpropagated at once and then forgotten. With ``num_inner_epochs`` above 1 the visits are kept, and each
        further epoch trains on the same states with the new weights, one optimizer step per epoch.
        """
        s, result = self.settings, Result()
        kept: list[tuple[Batch, Visit]] = []
        for epoch in range(self.sampler.num_inner_epochs):
            losses = self.losses(batches)
            for batch, visit, v_student in self._again(kept) if epoch else self._visits(batches, result, kept):
                tr, v_teacher = visit.transition, visit.v_teacher
                assert v_teacher is not None
                if s.loss == KL:
                    loss = distillation_loss(tr, v_student, v_teacher, s.target, s.self_normalize)
                else:
                    v_old = visit.v_student.detach()
                    loss = policy_gradient_loss(tr, visit.x, visit.x_next, v_student, v_old, v_teacher, s.clip_range)
                if s.beta > 0:
                    v_base = self.base(batch)(visit.x, tr.sigma)
                    loss = loss + s.beta * distillation_loss(tr, v_student, v_base, s.target, s.self_normalize)
                self.optimizer.backward(losses.add(batch, visit.step, loss))
            norm = self.update(losses, step)
            if epoch == 0:
                result.note(losses, norm)
        return result

    def _visits(
        self, batches: Sequence[Batch], result: Result, kept: list[tuple[Batch, Visit]]
    ) -> Iterator[tuple[Batch, Visit, Tensor]]:
        """The trained states of the student's trajectories, with its velocity there; what is looked at is noted."""
        for batch in batches:
            for visit in rollout(
                batch.noise,
                self.transitions,
                self.student(batch),
                self.teacher(batch),
                trained=batch.steps,
                draw_noise=batch.step_noise,
                multistep=self.sampler.multistep,
                finish=batch.wants_images,
            ):
                if visit.v_teacher is not None:
                    yield batch, visit, visit.v_student
                    if self.sampler.num_inner_epochs > 1:
                        kept.append((batch, replace(visit, v_student=visit.v_student.detach())))
            if batch.wants_images:
                result.images.append((batch, visit.x_next))

    def _again(self, kept: Sequence[tuple[Batch, Visit]]) -> Iterator[tuple[Batch, Visit, Tensor]]:
        """The same states, with the velocity of the student as it is now."""
        for batch, visit in kept:
            yield batch, visit, self.student(batch)(visit.x, visit.transition.sigma)

    @classmethod
    def check(
        cls, settings: OpdSettings, sampler: SamplerSettings, values: Mapping[str, Any], problems: Problems
    ) -> None:
        """Drawn steps are among the trained ones, and the surrogate needs noise."""
        drawn, trained = settings.steps_per_rollout, sampler.trained_steps
        if trained and drawn > trained:
            remedy = f"Set it to at most {trained}, or to 0 for all of them."
            problems.add("train.steps_per_rollout", f"is {drawn}, more than the {trained} trained steps", remedy)
        if settings.loss == POLICY_GRADIENT:
            sampler.check_noise("train.loss", POLICY_GRADIENT, problems)

    @classmethod
    def notes(cls, settings: OpdSettings, changed: Sequence[str]) -> list[str]:
        """The surrogate has no choice of what is compared."""
        ignored = [name for name in changed if name in ("train.target", "train.self_normalize")]
        return [f"{name} is ignored: train.loss is {POLICY_GRADIENT}" for name in ignored] * (settings.loss != KL)

    @classmethod
    def steps(cls, plan: RoundPlan, key: tuple[int, int, int]) -> tuple[int, ...]:
        """The same steps for all of a task's batches, so that neither their size nor the processes matter."""
        drawn = plan.settings.steps_per_rollout
        return choose_steps(plan.sampler.trained_steps, drawn, *key) if drawn else super().steps(plan, key)

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
        teachers = sum(plan.nfe(task.guidance_scale) for task in plan.tasks) * shape.tasks_per_round / len(plan.tasks)
        unsupervised = drawn * (sampler.trained_steps + 1) / (drawn + 1) - drawn
        return Nfe(
            student=student,
            teacher=round(visits * teachers),
            sampling=round(shape.images_per_round * own * unsupervised),
            base=student if plan.settings.beta > 0 else 0,
            kept_latents=1 + (4 * (drawn or sampler.trained_steps) if sampler.num_inner_epochs > 1 else 0),
        )
