"""Supervised fine-tuning on samples of the teachers: the offline baseline of on-policy distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusionopd.algorithms.base import STUDENT, Sample, SampledLearner
from diffusionopd.data.batches import Batch
from diffusionopd.rollout import walk
from diffusionopd.transitions import per_sample_mean


class Supervised(SampledLearner):
    """Each task's teacher samples, and the student learns to draw the same pictures by flow matching."""

    def _collect(self, batch: Batch) -> Sample:
        policy = self._policy(batch.teacher, batch, batch.teacher_guidance)
        final = batch.x
        for visit in walk(batch.x, self.transitions, policy, draw_noise=batch.draw_noise, multistep=self.multistep):
            final = visit.x_next
        return Sample(final)

    def _weigh(self, batches: Sequence[Batch]) -> tuple[Sequence[Tensor], dict[str, float]]:
        return [torch.ones(len(batch.x), device=self.backbone.device) for batch in batches], {}

    def _loss(self, batch: Batch, sample: Sample, weight: Tensor, step: int) -> Tensor:
        """Half the squared error of the velocity ``noise - x0`` at a noised teacher sample."""
        sigma, noise = self.transitions[step].sigma, batch.draw_forward_noise(step)
        x_t = (1 - sigma) * sample.x0 + sigma * noise
        v_student = self._policy(STUDENT, batch, self.guidance_scale)(x_t, sigma)
        return weight * 0.5 * per_sample_mean((v_student - (noise - sample.x0)).square())
