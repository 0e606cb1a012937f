"""What NFT, GRPO and GRPO-Guard have in common beside their scoring: their rules and their count of forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusionopd.algorithms.advantages import RewardSettings
from diffusionopd.algorithms.base import Algorithm
from diffusionopd.algorithms.settings import Nfe, RoundPlan, SamplerSettings
from diffusionopd.config_schema import Problems
from diffusionopd.data.tasks import Task


class FromRewards(Algorithm):
    """A policy samples images; the student is trained on how good they are, and towards its targets if it distils."""

    has_rewards = True
    needs_noise: ClassVar[bool] = False
    """Whether it works with the densities of sampled steps."""

    @classmethod
    def check(
        cls,
        settings: RewardSettings,
        sampler: SamplerSettings,
        teachers: Mapping[str, Task],
        values: Mapping[str, Any],
        problems: Problems,
    ) -> None:
        """Advantages compare several images, and ratios need densities."""
        settings.check(values, problems)
        if cls.needs_noise:
            sampler.check_noise("train.algorithm", cls.name, problems)

    @classmethod
    def notes(cls, settings: RewardSettings, changed: Sequence[str]) -> list[str]:
        """What was set for teachers that there are not."""
        return settings.notes(changed)

    @classmethod
    def count(cls, plan: RoundPlan) -> Nfe:
        """A policy of the student's size samples; the student, base and targets are asked at every trained step."""
        shape, sampler, settings = plan.shape, plan.sampler, plan.settings
        own, visits = plan.nfe(sampler.guidance), sampler.trained_steps * sampler.num_inner_epochs
        student = shape.images_per_round * visits * own
        teacher, references = plan.target_nfe(shape.images_per_task * visits if settings.distill_weight > 0 else 0)
        return Nfe(
            student=student,
            teacher=teacher,
            sampling=shape.images_per_round * sampler.num_steps * own,
            base=(student if settings.beta > 0 else 0) + references,
        )
