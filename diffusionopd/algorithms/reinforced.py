"""What the reward-driven ways of training share: sample, score beside sampling, rank within each prompt's group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusionopd.algorithms.advantages import Advantages, clip_advantages, group_advantages
from diffusionopd.algorithms.base import STUDENT, Parts, Sample, SampledLearner
from diffusionopd.data.batches import Batch
from diffusionopd.distributed import by_rank, gather_over_processes, sum_over_processes
from diffusionopd.rewards import AVERAGE, NOT_APPLICABLE, RewardError, Scores, failed
from diffusionopd.rollout import Visit, walk
from diffusionopd.transitions import Transition

Score = Callable[[Batch, Tensor], "Future[Scores]"]
"""``(batch, final latents [B, C, h, w])`` -> scores to come, among them ``avg``, the weighted mean to be trained on."""


@dataclass(frozen=True)
class RewardRecipe:
    """How every round is run, whatever the loss."""

    transitions: Sequence[Transition]
    trained_steps: int
    images_per_task: int  # over all processes
    images_per_prompt: int  # the size of a group
    guidance_scale: float = 1.0
    multistep: bool = False
    advantage_scale: str = "prompt"  # or global: the standard deviation that advantages are divided by
    advantage_clip: float = 5.0
    reference_weight: float = 0.0  # of staying near the base model
    accumulation: int = 0  # batches per optimizer step; 0: one step a round
    inner_epochs: int = 1


class Reinforced(SampledLearner):
    """A student that learns from rewards of its own samples."""

    behaviour = STUDENT  # the adapter that samples

    def __init__(self, parts: Parts, recipe: RewardRecipe, score: Score) -> None:
        """``score`` is called as soon as a batch is sampled; its results are awaited after the last batch."""
        super().__init__(
            parts,
            recipe.transitions,
            recipe.trained_steps,
            guidance_scale=recipe.guidance_scale,
            multistep=recipe.multistep,
            accumulation=recipe.accumulation,
            inner_epochs=recipe.inner_epochs,
        )
        self.recipe = recipe
        self.score = score
        self._pending: list[Future[Scores]] = []

    def _trajectory(self, batch: Batch) -> Iterator[Visit]:
        policy = self._policy(self.behaviour, batch, self.guidance_scale)
        return walk(batch.x, self.transitions, policy, draw_noise=batch.draw_noise, multistep=self.multistep)

    def _collect(self, batch: Batch) -> Sample:
        visits, final = [], batch.x
        for visit in self._trajectory(batch):
            final = visit.x_next
            if visit.step < self.trained_steps:
                visits.append(self._keep(visit))
        self._pending.append(self._submitted(batch, final))
        return Sample(final, [visit for visit in visits if visit is not None])

    def _submitted(self, batch: Batch, final: Tensor) -> Future[Scores]:
        """The scores to come; what fails here fails when they are awaited, on all processes together."""
        try:
            return self.score(batch, final)
        except Exception as error:  # noqa: BLE001 - a scorer may raise whatever its libraries raise
            return failed(error)

    def _keep(self, visit: Visit) -> tuple[Tensor, Tensor, Tensor] | None:
        """What training needs of a visit; by default the final latents are enough."""
        return None

    def _weigh(self, batches: Sequence[Batch]) -> tuple[Sequence[Tensor], dict[str, float]]:
        pending, self._pending = self._pending, []
        scores = self._awaited(batches, pending)
        weights: list[Tensor] = [torch.empty(0)] * len(batches)
        metrics: dict[str, float] = {}
        for task in dict.fromkeys(batch.task for batch in batches):
            own = [i for i, batch in enumerate(batches) if batch.task == task]
            table = self._gather([batches[i] for i in own], [scores[i] for i in own])
            advantages = self._advantages(table[AVERAGE])
            values = clip_advantages(advantages.values, self.recipe.advantage_clip)
            for i in own:
                weights[i] = values[list(batches[i].samples)].float().to(self.backbone.device)
            metrics[f"zero_variance/{task}"] = advantages.zero_variance_share
            for name, all_scores in table.items():
                applied = all_scores[all_scores != NOT_APPLICABLE]
                if len(applied):
                    key = f"reward/{task}" if name == AVERAGE else f"monitor/{task}/{name}"
                    metrics[key] = applied.mean().item()
        return weights, metrics

    def _awaited(self, batches: Sequence[Batch], pending: Sequence[Future[Scores]]) -> list[Scores]:
        """The scores of all batches. RewardError on every process, naming task and rank, if some cannot be had."""
        scores: list[Scores] = []
        failure = ""
        try:
            for future in pending:
                scores.append(future.result())
        except Exception as error:  # noqa: BLE001 - a scorer may raise whatever its libraries raise
            failure = f"the samples of task {batches[len(scores)].task!r} cannot be scored: {error}"
        if failures := by_rank(gather_over_processes([failure])):
            raise RewardError(
                f"{failures}. The student has not been changed by this round; go on from the last checkpoint with "
                "--config.resume_from=auto."
            )
        return scores

    def _advantages(self, rewards: Tensor) -> Advantages:
        groups = torch.arange(len(rewards)) // self.recipe.images_per_prompt
        return group_advantages(rewards, groups, self.recipe.advantage_scale)

    def _gather(self, batches: Sequence[Batch], scores: Sequence[Scores]) -> dict[str, Tensor]:
        """Every score of a task's samples of all processes, float64 ``[images_per_task]`` by sample index."""
        names = list(scores[0])
        table = torch.zeros(len(names), self.recipe.images_per_task, dtype=torch.float64)
        for batch, found in zip(batches, scores, strict=True):
            table[:, list(batch.samples)] = torch.stack([torch.as_tensor(found[name]).double() for name in names])
        return dict(zip(names, sum_over_processes(table), strict=True))
