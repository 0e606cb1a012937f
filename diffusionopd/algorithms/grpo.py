"""Flow-GRPO (arXiv 2505.05470) and GRPO-Guard (arXiv 2510.22319): policy gradients on stochastic trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusionopd.algorithms.base import STUDENT, Parts, Sample
from diffusionopd.algorithms.reinforced import Reinforced, RewardRecipe, Score
from diffusionopd.data.batches import Batch
from diffusionopd.distributed import mean_over_processes
from diffusionopd.losses import grpo_guard_loss, grpo_loss, kl_to_reference
from diffusionopd.rollout import Visit


class Grpo(Reinforced):
    """Every sampled step is an action, made likelier or less likely by its picture's advantage (PPO clipping)."""

    def __init__(
        self,
        parts: Parts,
        recipe: RewardRecipe,
        score: Score,
        *,
        clip_low: float,
        clip_high: float,
        guard: bool,
    ) -> None:
        """The ratio is clipped to ``[1 - clip_low, 1 + clip_high]``; ``guard`` chooses GRPO-Guard's objective."""
        super().__init__(parts, recipe, score)
        self.clip_low, self.clip_high = clip_low, clip_high
        self._objective = grpo_guard_loss if guard else grpo_loss
        self._begin_training()

    def _keep(self, visit: Visit) -> tuple[Tensor, Tensor, Tensor]:
        return visit.x, visit.v_student, visit.x_next

    def _loss(self, batch: Batch, sample: Sample, weight: Tensor, step: int) -> Tensor:
        transition = self.transitions[step]
        x, v_old, x_next = sample.visits[step]
        v_base = None
        if self.recipe.reference_weight > 0:
            with torch.no_grad():
                v_base = self._policy(None, batch, self.guidance_scale)(x, transition.sigma)
        v_student = self._policy(STUDENT, batch, self.guidance_scale)(x, transition.sigma)
        loss, ratio = self._objective(transition, x, x_next, v_student, v_old, weight, self.clip_low, self.clip_high)
        self._count(ratio.detach())
        if v_base is not None:
            loss = loss + self.recipe.reference_weight * kl_to_reference(transition, v_student, v_base)
        return loss

    def _count(self, ratio: Tensor) -> None:
        clipped = (ratio < 1 - self.clip_low) | (ratio > 1 + self.clip_high)
        self._seen += torch.stack([ratio.new_tensor(float(len(ratio))), clipped.sum(), ratio.sum()]).double().cpu()

    def _begin_training(self) -> None:
        self._seen = torch.zeros(3, dtype=torch.float64)  # ratios: how many, how many clipped, their sum

    def _statistics(self) -> dict[str, float]:
        count, clipped, total = mean_over_processes(self._seen).tolist()
        return {"clip_fraction": clipped / count, "ratio": total / count}
