"""DiffusionNFT (arXiv 2509.16117): learn from rewards on the forward process, with any sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusionopd.algorithms.base import STUDENT, Parts, Sample
from diffusionopd.algorithms.reinforced import Reinforced, RewardRecipe, Score
from diffusionopd.data.batches import Batch
from diffusionopd.losses import nft_loss, old_policy_decay, optimality, reference_penalty

OLD = "old"


class Nft(Reinforced):
    """The old policy samples; the student moves towards what was good and away from what was bad.

    The old policy is a copy of the student that follows it after every round, ``old <- d old + (1 - d) student``.
    """

    behaviour = OLD

    def __init__(
        self,
        parts: Parts,
        recipe: RewardRecipe,
        score: Score,
        *,
        beta: float,
        decay: tuple[int, float, float],
    ) -> None:
        """``beta`` mixes student and old policy into the two implicit ones; ``decay``: (start, slope, maximum) of d."""
        super().__init__(parts, recipe, score)
        self.beta = beta
        self.decay = decay
        self.adapters.add_copy(OLD, STUDENT)

    def _loss(self, batch: Batch, sample: Sample, weight: Tensor, step: int) -> Tensor:
        sigma = self.transitions[step].sigma
        x_t = (1 - sigma) * sample.x0 + sigma * batch.draw_forward_noise(step)
        with torch.no_grad():
            v_old = self._policy(OLD, batch, self.guidance_scale)(x_t, sigma)
            v_base = None
            if self.recipe.reference_weight > 0:
                v_base = self._policy(None, batch, self.guidance_scale)(x_t, sigma)
        v_student = self._policy(STUDENT, batch, self.guidance_scale)(x_t, sigma)
        r = optimality(weight, self.recipe.advantage_clip)
        loss = self.recipe.advantage_clip * nft_loss(v_student, v_old, sample.x0, x_t, sigma, r, self.beta)
        if v_base is not None:
            loss = loss + self.recipe.reference_weight * reference_penalty(v_student, v_base)
        return loss

    def finish(self, completed: int) -> None:
        """Move the old policy; its decay is a function of the number of completed rounds."""
        decay = old_policy_decay(completed, *self.decay)
        with torch.no_grad():
            for old, new in zip(self.adapters.parameters(OLD), self.adapters.parameters(STUDENT), strict=True):
                old.lerp_(new, 1 - decay)

    def state_tensors(self) -> dict[str, Tensor]:
        """The old policy."""
        return {f"old.{i}": p.detach() for i, p in enumerate(self.adapters.parameters(OLD))}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore the old policy; a run that had none starts from the student."""
        with torch.no_grad():
            students = self.adapters.parameters(STUDENT)
            for i, old in enumerate(self.adapters.parameters(OLD)):
                old.copy_(tensors.get(f"old.{i}", students[i]))
