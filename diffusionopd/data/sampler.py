"""Which prompt each group of a round gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from diffusionopd.data.noise import Stream, generator
from diffusionopd.data.prompts import Prompt


class PromptSampler:
    """The prompt of every group of every round, as a pure function of (seed, task, position).

    A group is one prompt with its `num_image_per_prompt` images; a round has `groups_per_round` of them over all
    processes. Positions `round * groups_per_round + group` walk through one fresh permutation of the prompts after
    another. Where every round visits the task, each prompt comes once before any comes twice, whatever the number of
    processes or restarts; where some rounds alone do (`train.task_order` "alternate", `train.tasks_per_round`), a
    permutation is used in pieces, and prompts repeat before all have come.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, task_index: int, groups_per_round: int) -> None:
        self._count = len(prompts)
        self._key = (Stream.PROMPT, seed, task_index)
        self._groups_per_round = groups_per_round
        self._permutation = lru_cache(1)(self._draw)

    def index(self, round_index: int, group_index: int) -> int:
        """Index of the prompt for a group (0 <= group_index < groups_per_round) of a round (counted from 0)."""
        epoch, offset = divmod(round_index * self._groups_per_round + group_index, self._count)
        return self._permutation(epoch)[offset]

    def used_by(self, rounds: Iterable[int]) -> list[int]:
        """Sorted indices of the prompts that these rounds use, each once: what the text cache must hold for them."""
        used: set[int] = set()
        for round_index in rounds:
            used.update(self.index(round_index, group) for group in range(self._groups_per_round))
            if len(used) == self._count:
                break
        return sorted(used)

    def _draw(self, epoch: int) -> list[int]:
        return torch.randperm(self._count, generator=generator(*self._key, epoch)).tolist()
