"""DiffusionNFT (arXiv 2509.16117): learn from rewards on the forward process, with any sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusionopd.algorithms.advantages import RewardSettings, Scoring
from diffusionopd.algorithms.base import Models
from diffusionopd.algorithms.from_rewards import FromRewards
from diffusionopd.algorithms.pull import Pull
from diffusionopd.algorithms.results import Losses, Result
from diffusionopd.algorithms.settings import Nfe, RoundPlan, TeacherSettings
from diffusionopd.config_schema import is_number, key
from diffusionopd.data.batches import Batch
from diffusionopd.losses import nft_loss, old_policy_decay, optimality, reference_penalty
from diffusionopd.models.policies import STUDENT

OLD = "old"


def _is_decay(value: Sequence[Any]) -> bool:
    return len(value) == 3 and all(is_number(each) and each >= 0 for each in value) and value[2] <= 1


@dataclass(frozen=True)
class NftSettings(RewardSettings):
    """DiffusionNFT."""

    nft_beta: float = key("train.nft_beta", 1.0, "(0, inf)")
    """How far the two implicit policies are from the old one; smaller values give larger policy updates."""
    old_policy_decay: tuple = key(
        "train.old_policy_decay",
        (0, 0.001, 0.5),
        form=("three numbers of at least 0, the last at most 1", _is_decay),
    )
    """(start, slope, maximum): after n rounds the sampling policy keeps min(slope * max(n - start, 0), maximum) of
    itself and takes the rest from the student."""


class Nft(FromRewards):
    """The old policy samples; the student moves towards what was good and away from what was bad.

    The old policy is a copy of the student that follows it after every round, ``old <- d old + (1 - d) student``.
    """

    name = "nft"
    sampled_by = "its old policy"
    groups = (NftSettings, TeacherSettings)
    ema_each_batch = False
    settings: NftSettings

    def __init__(self, models: Models, *others: Any) -> None:
        super().__init__(models, *others)
        self.policies.adapters.add_copy(OLD, STUDENT)

    def round(self, batches: Sequence[Batch], step: bool = True) -> Result:
        """See :meth:`Algorithm.round`: sample all batches, then train on them, in one optimizer step or several."""
        s, scoring, samples = self.settings, Scoring(self.rewards, self.policies.backbone.decode), []
        for batch in batches:
            for visit in self.trajectory(batch, self.frozen(OLD, batch, self.sampler.guidance)):
                x0 = visit.x_next
            samples.append(x0)
            scoring.submit(batch, x0)  # runs in a thread while the next batch is sampled
        self.check_samples()
        advantages, metrics = scoring.advantages(s, self.shape)
        images = [(batch, x0) for batch, x0 in zip(batches, samples, strict=True) if batch.wants_images]
        result, pull = Result(images, metrics), s.pull(self.losses(batches))
        for epoch, i, losses in self.passes(batches, result, step):
            batch, x0 = batches[i], samples[i]
            r = optimality(advantages[i].to(x0.device), s.adv_clip_max)
            for n in batch.steps:
                sigma = self.transitions[n].sigma
                x_t = (1 - sigma) * x0 + sigma * batch.forward_noise(n)
                v_old = self.frozen(OLD, batch, self.sampler.guidance)(x_t, sigma)
                v_base = self.base(batch)(x_t, sigma) if s.beta > 0 else None
                v_student = self.student(batch)(x_t, sigma)
                loss = s.adv_clip_max * nft_loss(v_student, v_old, x0, x_t, sigma, r, s.nft_beta)
                if v_base is not None:
                    loss = loss + s.beta * reference_penalty(v_student, v_base)
                self.optimizer.backward(losses.add(batch, n, loss))
            if pull:
                self._distil(batch, losses, pull, note=epoch == 0)
        result.metrics |= pull.metrics() if pull else {}
        return result

    def _distil(self, batch: Batch, losses: Losses, pull: Pull, note: bool) -> None:
        """The distillation's part of an optimizer step: at states of the student's own, since ``x_t`` are none."""
        for part, visit in self.rollout(batch):
            if visit.target is not None:
                loss = pull.loss(part, visit.step, visit.transition, visit.v.guided, visit.target, note)
                self.optimizer.backward(losses.add(part, visit.step, loss, beside=True))

    @torch.no_grad()
    def finish(self, updates: int) -> None:
        """Move the old policy; its decay is a function of the number of completed rounds."""
        decay = old_policy_decay(updates, *self.settings.old_policy_decay)
        adapters = self.policies.adapters
        for old, new in zip(adapters.parameters(OLD), adapters.parameters(STUDENT), strict=True):
            old.lerp_(new, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The old policy."""
        return {f"old.{i}": p.detach() for i, p in enumerate(self.policies.adapters.parameters(OLD))}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the old policy; a run that had none starts from the student."""
        students = self.policies.adapters.parameters(STUDENT)
        for i, old in enumerate(self.policies.adapters.parameters(OLD)):
            old.copy_(tensors.get(f"old.{i}", students[i]))

    @classmethod
    def count(cls, plan: RoundPlan) -> Nfe:
        """The old policy is asked again wherever the student is trained, which walks once more where it distils."""
        nfe = super().count(plan)
        distils = plan.settings.distill_weight > 0
        return replace(
            nfe,
            student=nfe.student * (2 if distils else 1),
            sampling=nfe.sampling + nfe.student,
            extra_adapters=1,
        )
