"""From rewards to group-relative advantages: how much better an image is than the same prompt's other images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusionopd.algorithms.pull import ComparisonSettings, Pull
from diffusionopd.algorithms.results import Losses
from diffusionopd.algorithms.settings import ReferenceSettings
from diffusionopd.config_schema import READ, Problems, key
from diffusionopd.data.batches import Batch
from diffusionopd.data.rounds import RoundShape
from diffusionopd.data.unfit import way_out
from diffusionopd.distributed import by_rank, gather_over_processes, sum_over_processes
from diffusionopd.rewards import AVERAGE, NOT_APPLICABLE, RewardError, RewardWorker, Scores, failed

SCALES = ("prompt", "global", "none")


@dataclass(frozen=True)
class Advantages:
    """Advantages of N samples, and what the rewards of their G groups look like.

    Groups without any applicable reward are in none of the figures.
    """

    values: Tensor
    """``[N]`` float64; 0 for a sample of a group without variance and where the reward does not apply."""
    group_mean: Tensor
    """``[G]`` float64: mean reward of each group, in the order of the groups' numbers."""
    group_std: Tensor
    """``[G]`` float64: population standard deviation of each group's rewards, exactly 0 where all are equal."""
    zero_variance_share: float
    """Share of groups whose rewards are all equal: they teach nothing. 0 when there are no groups."""
    not_applicable: int
    """Samples that the reward does not apply to."""


def group_advantages(rewards: Tensor, groups: Tensor, scale: str = "prompt", epsilon: float = 1e-4) -> Advantages:
    """``(reward - mean of its group) / (std + epsilon)`` (GRPO, arXiv 2402.03300).

    ``scale`` names the std: ``prompt`` is that of the sample's own group; ``global`` that of all rewards, so that
    prompts on which the images differ little also count little; ``none`` only centres. As in the code of Flow-GRPO
    and DiffusionNFT (``sample.global_std`` False and True), the std is the population's (divided by N), ``global`` is
    taken before centring, and epsilon is 1e-4. Without per-prompt tracking (``per_prompt_stat_tracking`` False)
    everything is one group.

    ``rewards`` ``[N]`` and ``groups`` ``[N]`` (integers, equal for the images of one prompt) are those of **all**
    processes: means and deviations of a part would depend on how samples are spread. Rewards equal to
    ``NOT_APPLICABLE`` are left out of every statistic.

    Raises ValueError for an unknown scale, for shapes that do not fit and for a reward that is not finite, with its
    sample.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown advantage scale {scale!r}: choose one of {', '.join(SCALES)}")
    rewards = rewards.double()
    _check(rewards, groups)
    applies = rewards != NOT_APPLICABLE
    kept = rewards[applies]
    numbers, group = torch.unique(groups[applies], return_inverse=True)
    mean, std = _group_statistics(kept, group, len(numbers))
    advantage = kept - mean[group]
    if scale == "prompt":
        advantage = advantage / (std[group] + epsilon)
    elif scale == "global" and len(kept):
        advantage = advantage / (kept.std(correction=0) + epsilon)
    values = torch.zeros_like(rewards)
    values[applies] = torch.where(std[group] > 0, advantage, 0.0)
    share = (std == 0).double().mean().item() if len(numbers) else 0.0
    return Advantages(values, mean, std, share, int((~applies).sum()))


def clip_advantages(values: Tensor, clip: float) -> Tensor:
    """Advantages limited to ``[-clip, clip]`` (``train.adv_clip_max``, published as 5)."""
    return values.clamp(-clip, clip)


@dataclass(frozen=True)
class RewardSettings(ComparisonSettings, ReferenceSettings):
    """Training from rewards."""

    dataset: str = key("dataset", "", path=READ)
    """Without `train.teachers`: folder of the prompts of the one task."""
    prompt_fn: str = key("prompt_fn", "")
    """Without `train.teachers`: format of the prompts, as of a task."""
    reward_fn: dict = key("reward_fn", {})
    """Without `train.teachers`: {reward: weight} to train on."""
    per_prompt_stat_tracking: bool = key("per_prompt_stat_tracking", True)
    """Advantages are rewards minus the mean of their prompt's images (False: of all the round's images of the task),
    divided by the same images' standard deviation, or with `sample.global_std` by that of all."""
    global_std: bool = key("sample.global_std", False)
    """See `per_prompt_stat_tracking`."""
    adv_clip_max: float = key("train.adv_clip_max", 5.0, "(0, inf)")
    """Advantages are clipped to [-adv_clip_max, adv_clip_max]."""
    distill_weight: float = key("train.distill_weight", 0.0, "[0, inf)")
    """Above 0 the tasks have teachers too, and so many times the distillation loss to their targets is added to the
    loss (as of `train.target` and `train.self_normalize`): grpo at the trained states of its trajectories, nft at those
    of a rollout of the student beside them, which costs as much again. `metrics.jsonl` has it as `distill/<task>`."""

    def pull(self, table: Losses) -> Pull | None:
        """The distillation beside the rewards, if any; ``table``: empty, for all batches of a round."""
        return Pull(self.distill_weight, self, table) if self.distill_weight > 0 else None

    def notes(self, changed: Sequence[str]) -> list[str]:
        """What was set for a distillation that there is not."""
        names = [name for name in changed if name in ("train.target", "train.self_normalize", "train.merge_teachers")]
        return [f"{name} is ignored: train.distill_weight is 0" for name in names] * (self.distill_weight == 0)

    def check(self, values: Mapping[str, Any], problems: Problems) -> None:
        """Advantages compare the images of one prompt."""
        name = "sample.num_image_per_prompt"
        if problems.good(name) and values[name] == 1 and self.per_prompt_stat_tracking:
            problems.add(name, "is 1", "Set it to at least 2, such as 8: advantages compare the images of one prompt.")


_RESUME = "--config.resume_from=auto"


class Scoring:
    """The rewards of a round's samples: scored beside sampling, awaited together, gathered over processes."""

    def __init__(self, rewards: Mapping[str, RewardWorker], decode: Callable[[Tensor], Tensor]) -> None:
        """``rewards``: by task; ``decode``: latents ``[B, C, h, w]`` to images."""
        self._rewards, self._decode = rewards, decode
        self._batches: list[Batch] = []
        self._pending: list[list[tuple[str, Future[Scores]]]] = []  # of each batch, by task

    def submit(self, batch: Batch, x0: Tensor) -> None:
        """Have a batch's final latents scored; what fails here fails when scores are awaited, on all processes."""
        pending = []
        for task, rows in batch.slices.items():
            prompts = [row.prompt for row in batch.rows[rows]]
            try:
                images, texts = self._decode(x0[rows]), [prompt.text for prompt in prompts]
                future = self._rewards[task].submit(images, texts, [prompt.metadata for prompt in prompts])
            except Exception as error:  # noqa: BLE001 - a scorer may raise whatever its libraries raise
                future = failed(error)
            pending.append((task, future))
        self._batches.append(batch)
        self._pending.append(pending)

    def advantages(self, settings: RewardSettings, shape: RoundShape) -> tuple[list[Tensor], dict[str, float]]:
        """The clipped advantages ``[B]`` of every batch, float32 on the CPU, and what is reported. Collective.

        Raises RewardError on every process, naming task and rank, if some scores cannot be had.
        """
        tables, metrics = self._gathered(shape), dict[str, float]()
        values: dict[str, Tensor] = {}
        size = shape.images_per_prompt if settings.per_prompt_stat_tracking else shape.images_per_task
        for task, table in tables.items():
            groups = torch.arange(shape.images_per_task) // size
            found = group_advantages(table[AVERAGE], groups, "global" if settings.global_std else "prompt")
            values[task] = clip_advantages(found.values, settings.adv_clip_max).float()
            metrics[f"zero_variance/{task}"] = found.zero_variance_share
            for name, scores in table.items():
                applied = scores[scores != NOT_APPLICABLE]
                if len(applied):
                    metric = f"reward/{task}" if name == AVERAGE else f"monitor/{task}/{name}"
                    metrics[metric] = applied.mean().item()
        return [torch.stack([values[row.task][row.sample] for row in batch.rows]) for batch in self._batches], metrics

    def _gathered(self, shape: RoundShape) -> dict[str, dict[str, Tensor]]:
        """Task -> score -> its values for the samples of all processes, float64 ``[images_per_task]`` by index."""
        tables: dict[str, dict[str, Tensor]] = {}
        for batch, scores in zip(self._batches, self._awaited(), strict=True):
            for task, found in scores:
                empty = {name: torch.zeros(shape.images_per_task, dtype=torch.float64) for name in found}
                table = tables.setdefault(task, empty)
                samples = [row.sample for row in batch.rows[batch.slices[task]]]
                for name, column in found.items():
                    table[name][samples] = torch.as_tensor(column).double()
        for table in tables.values():
            sums = sum_over_processes(torch.stack(list(table.values())))
            table.update(zip(table, sums, strict=True))
        return tables

    def _awaited(self) -> list[list[tuple[str, Scores]]]:
        """The scores of every batch."""
        scores: list[list[tuple[str, Scores]]] = []
        task, failure = "", ""
        try:
            for batch, pending in zip(self._batches, self._pending, strict=True):
                scores.append([])
                for task, future in pending:
                    prompts = [row.prompt for row in batch.rows[batch.slices[task]]]
                    scores[-1].append((task, future.result()))
        except Exception as error:  # noqa: BLE001 - a scorer may raise whatever its libraries raise
            remedy = way_out(error, prompts, _RESUME, f"{_RESUME} --allow_config_change")
            failure = f"the samples of task {task!r} cannot be scored: {error}. To continue, {remedy}"
        if failures := by_rank(gather_over_processes([failure])):
            raise RewardError(f"{failures}. The student has not been changed by this round.")
        return scores


def _check(rewards: Tensor, groups: Tensor) -> None:
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(f"one reward and one group a sample: got {tuple(rewards.shape)} and {tuple(groups.shape)}")
    broken = (~rewards.isfinite()).nonzero().flatten().tolist()
    if broken:
        first = broken[0]
        raise ValueError(
            f"reward of sample {first} (group {int(groups[first])}) is {rewards[first].item()}, and {len(broken)} of "
            f"{len(rewards)} are not finite: a scorer gives {NOT_APPLICABLE} where it does not apply"
        )


def _group_statistics(rewards: Tensor, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and population std ``[count]`` of each group; equal rewards have a std of exactly 0, whatever rounding."""
    size = torch.bincount(group, minlength=count)
    zeros = rewards.new_zeros(count)
    mean = zeros.index_add(0, group, rewards) / size
    std = (zeros.index_add(0, group, (rewards - mean[group]).square()) / size).sqrt()
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    return mean, torch.where(lowest == highest, 0.0, std)
