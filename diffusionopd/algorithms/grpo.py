"""Flow-GRPO (arXiv 2505.05470) and GRPO-Guard (arXiv 2510.22319): policy gradients on stochastic trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from diffusionopd.algorithms.advantages import RewardSettings, Scoring
from diffusionopd.algorithms.from_rewards import FromRewards
from diffusionopd.algorithms.results import Result
from diffusionopd.algorithms.settings import ClipSettings, Nfe, RoundPlan, TeacherSettings
from diffusionopd.config_schema import key
from diffusionopd.data.batches import Batch
from diffusionopd.distributed import mean_over_processes
from diffusionopd.losses import grpo_guard_loss, grpo_loss, kl_to_reference


@dataclass(frozen=True)
class GrpoSettings(ClipSettings, RewardSettings):
    """Flow-GRPO."""

    @property
    def clip(self) -> tuple[float, float]:
        """How far below and above 1 the ratio may go."""
        return self.clip_range, self.clip_range


@dataclass(frozen=True)
class GuardSettings(RewardSettings):
    """GRPO-Guard."""

    clip_range_lt: float = key("train.clip_range_lt", 1e-4, "(0, inf)")
    """The normalised ratio is clipped to [1 - clip_range_lt, 1 + clip_range_gt]."""
    clip_range_gt: float = key("train.clip_range_gt", 1e-4, "(0, inf)")
    """See `train.clip_range_lt`."""

    @property
    def clip(self) -> tuple[float, float]:
        """How far below and above 1 the ratio may go."""
        return self.clip_range_lt, self.clip_range_gt


class Grpo(FromRewards):
    """Every sampled step is an action, made likelier or less likely by its image's advantage (PPO clipping)."""

    name = "grpo"
    groups: ClassVar[tuple[type, ...]] = (GrpoSettings, TeacherSettings)
    objective: ClassVar[Callable[..., tuple[Tensor, Tensor]]] = staticmethod(grpo_loss)
    needs_noise = True
    settings: GrpoSettings | GuardSettings

    def round(self, batches: Sequence[Batch], step: bool = True) -> Result:
        """See :meth:`Algorithm.round`: sample all batches, then train on them, in one optimizer step or several."""
        s, scoring, visits = self.settings, Scoring(self.rewards, self.policies.backbone.decode), []
        images, pull = [], s.pull(self.losses(batches))
        for batch in batches:
            kept = {}  # of a step that is not trained nothing but the way to the image is needed
            for visit in self.trajectory(batch, self.student(batch)):
                if visit.step in batch.steps:
                    kept[visit.step] = visit
            visits.append(kept)
            x0 = visit.x_next
            scoring.submit(batch, x0)  # runs in a thread while the next batch is sampled
            if batch.wants_images:
                images.append((batch, x0))
        self.check_samples()
        advantages, metrics = scoring.advantages(s, self.shape)
        result = Result(images, metrics)
        ratios, counted = 0, []  # how many of them; how many clipped, their sum
        for epoch, i, losses in self.passes(batches, result, step):
            batch = batches[i]
            own = advantages[i].to(x0.device, x0.dtype, non_blocking=True)
            for visit in (visits[i][n] for n in batch.steps):
                tr, x, v_old = visit.transition, visit.x, visit.v.guided
                v_base = self.base(batch)(x, tr.sigma) if s.beta > 0 else None
                target = self.target(batch)(x, tr.sigma) if pull else None
                v_student = self.student(batch)(x, tr.sigma)
                loss, ratio = self.objective(tr, x, visit.x_next, v_student, v_old, own, *s.clip)
                ratios += len(ratio)
                counted.append(_counted(ratio, *s.clip))
                if v_base is not None:
                    loss = loss + s.beta * kl_to_reference(tr, v_student, v_base)
                if pull and target is not None:
                    loss = loss + pull.loss(batch, visit.step, tr, v_student, target, note=epoch == 0)
                self.optimizer.backward(losses.add(batch, visit.step, loss))
        clipped, total = mean_over_processes(torch.stack(counted).sum(0).cpu() / ratios).tolist()
        result.metrics |= {"clip_fraction": clipped, "ratio": total}
        result.metrics |= pull.metrics() if pull else {}
        return result

    @classmethod
    def count(cls, plan: RoundPlan) -> Nfe:
        """State and velocity of the trained steps of the trajectories are kept, the state after the last, the image."""
        return replace(super().count(plan), kept_latents=2 + 2 * plan.sampler.trained_steps)


class GrpoGuard(Grpo):
    """GRPO-Guard: the ratio normalised, the gradient reweighted across steps."""

    name = "grpo_guard"
    groups = (GuardSettings, TeacherSettings)
    objective = staticmethod(grpo_guard_loss)


def _counted(ratio: Tensor, low: float, high: float) -> Tensor:
    """How many ratios are clipped, and the sum of all: float64 ``[2]``."""
    clipped = (ratio < 1 - low) | (ratio > 1 + high)
    return torch.stack([clipped.sum().double(), ratio.sum().double()])
