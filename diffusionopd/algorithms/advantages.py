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

EPSILON = 1e-4
"""Added to a standard deviation, as in the code of Flow-GRPO and DiffusionNFT."""


def group_advantages(rewards: Tensor, global_std: bool = False) -> tuple[Tensor, float]:
    """``(reward - mean of its group) / (std + 1e-4)`` (GRPO, arXiv 2402.03300); the share of groups of equal rewards.

    ``rewards`` ``[G, n]`` float64: a row for the n images of a prompt, those of **all** processes. The std is the
    population's (divided by n), that of the row or, with ``global_std``, of all rewards before centring, so that
    prompts on which the images differ little also count little (both as in the code of Flow-GRPO and DiffusionNFT).

    Rewards equal to ``NOT_APPLICABLE`` are in none of these figures. The advantage, ``[G, n]``, is 0 there, and exactly
    0 in a group of equal rewards, which teaches nothing. The share is of the groups to which the reward applies.
    """
    applies = rewards != NOT_APPLICABLE
    known = rewards.where(applies, torch.nan)
    mean, whole = known.nanmean(1, keepdim=True), (0, 1) if global_std else 1
    std = (known - known.nanmean(whole, keepdim=True)).square().nanmean(whole, keepdim=True).sqrt()
    lowest, highest = (rewards.where(applies, sign * torch.inf) for sign in (1, -1))
    varies = lowest.amin(1) < highest.amax(1)  # whatever rounding leaves of the std
    values = ((known - mean) / (std + EPSILON)).where(applies & varies[:, None], 0.0)
    counted = applies.any(1)
    return values, (~varies[counted]).double().mean().item() if counted.any() else 0.0


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

        Raises RewardError on every process, naming task and rank, if some scores cannot be had; torch.OutOfMemoryError
        where that was why.
        """
        tables, metrics = self._gathered(shape), dict[str, float]()
        values: dict[str, Tensor] = {}
        group = shape.images_per_prompt if settings.per_prompt_stat_tracking else shape.images_per_task
        limit = settings.adv_clip_max
        for task, table in tables.items():
            found, metrics[f"zero_variance/{task}"] = group_advantages(
                table[AVERAGE].view(-1, group), settings.global_std
            )
            values[task] = found.flatten().clamp(-limit, limit).float()
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
            _raise_if_memory(error)
            remedy = way_out(error, prompts, _RESUME, f"{_RESUME} --allow_config_change")
            failure = f"the samples of task {task!r} cannot be scored: {error}. To continue, {remedy}"
        if failures := by_rank(gather_over_processes([failure])):
            raise RewardError(f"{failures}. The student has not been changed by this round.")
        return scores


def _raise_if_memory(error: BaseException | None) -> None:
    """Raise the error for a full memory that ``error`` is or was caused by: no prompt is to blame for it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        error = error.__cause__
