"""Supervised fine-tuning on samples of the teachers: the offline baseline of on-policy distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusionopd.algorithms.base import Algorithm
from diffusionopd.algorithms.results import Result
from diffusionopd.algorithms.settings import Nfe, RoundPlan, SamplerSettings, TeacherSettings
from diffusionopd.config_schema import Problems
from diffusionopd.data.batches import Batch
from diffusionopd.data.tasks import Task
from diffusionopd.losses import flow_matching_loss


@dataclass(frozen=True)
class SftSettings:
    """Supervised fine-tuning."""


class Sft(Algorithm):
    """Each task's teacher samples, and the student learns to draw the same images by flow matching."""

    name = "sft"
    sampled_by = "the teachers"
    groups = (SftSettings, TeacherSettings)
    has_teachers = True

    def round(self, batches: Sequence[Batch], step: bool = True) -> Result:
        """See :meth:`Algorithm.round`: sample all batches, then train on them, in one optimizer step or several."""
        samples = []
        for batch in batches:
            for visit in self.trajectory(batch, self.teacher(batch)):
                x0 = visit.x_next
            samples.append(x0)
        self.check_samples()
        images = [(batch, x0) for batch, x0 in zip(batches, samples, strict=True) if batch.wants_images]
        result = Result(images)
        for _, i, losses in self.passes(batches, result, step):
            batch, x0 = batches[i], samples[i]
            for n in batch.steps:
                sigma, noise = self.transitions[n].sigma, batch.forward_noise(n)
                x_t = (1 - sigma) * x0 + sigma * noise
                loss = flow_matching_loss(self.student(batch)(x_t, sigma), noise, x0)
                self.optimizer.backward(losses.add(batch, n, loss))
        return result

    @classmethod
    def check(
        cls,
        settings: Any,
        sampler: SamplerSettings,
        teachers: Mapping[str, Task],
        values: Mapping[str, Any],
        problems: Problems,
    ) -> None:
        """Samples are the teacher's own."""
        for place, task in teachers.items():
            if task.strength != 1.0:
                what = f"is {task.strength}, but {cls.name} samples from the teacher itself"
                problems.add(f"{place}.strength", what, "Leave it at 1, or set train.algorithm='opd'.")

    @classmethod
    def count(cls, plan: RoundPlan) -> Nfe:
        """The teachers sample, the student is trained at every trained step."""
        shape, sampler = plan.shape, plan.sampler
        visits = shape.images_per_round * sampler.trained_steps
        teachers = sum(map(plan.teacher_nfe, plan.tasks)) * shape.tasks_per_round / len(plan.tasks)
        return Nfe(
            student=visits * plan.nfe(sampler.guidance) * sampler.num_inner_epochs,
            teacher=round(shape.images_per_task * sampler.num_steps * teachers),
        )
