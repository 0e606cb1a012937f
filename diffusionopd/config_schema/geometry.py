"""A round as all processes together make it, and the per-process keys that make the same round on another number."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

BATCH_KEYS = (
    "sample.train_batch_size",
    "sample.num_batches_per_epoch",
    "train.batch_size",
    "train.gradient_accumulation_steps",
)


def tasks_a_round(values: dict[str, Any]) -> int:
    """How many tasks a round visits; training from rewards without ``train.teachers`` has one."""
    return max(1, len(values["train.teachers"])) if values["train.task_order"] == "together" else 1


def geometry(values: dict[str, Any], num_processes: int) -> dict[str, Fraction]:
    """What a round is over all processes; the keys are for people."""
    size, batches, part, accumulation = (values[key] for key in BATCH_KEYS)
    return {
        "pictures of a task in a round": Fraction(batches * size * num_processes, tasks_a_round(values)),
        "optimizer steps in a round": Fraction(batches * size, part * accumulation),
    }


def adapted_batches(values: dict[str, Any], before: int, now: int) -> dict[str, int]:
    """The batch keys with which ``now`` processes make the round that ``values`` describe for ``before`` processes.

    A process's batches stay as large as they are, or become smaller if they must, and so do its backward batches: what
    fitted into a GPU's memory still does. Raises ValueError naming the numbers of processes that work.
    """
    found = next(_solutions(values, before, now), None)
    if found is None:
        pictures = geometry(values, before)["pictures of a task in a round"]
        working = [n for n in range(1, int(pictures) + 1) if next(_solutions(values, before, n), None)]
        raise ValueError(
            f"the {pictures} pictures of a task in a round cannot be shared equally by them. "
            f"Use {_or([str(n) for n in working])} processes."
        )
    return found


def _solutions(values: dict[str, Any], before: int, now: int) -> Iterator[dict[str, int]]:
    """Solutions for batches and backward batches of at most their present size, the largest first."""
    old_size, _, old_part, _ = (values[key] for key in BATCH_KEYS)
    pictures, steps = geometry(values, before).values()
    for size in range(old_size, 0, -1):
        batches = pictures / (size * now)  # of a task
        if batches.denominator > 1:
            continue
        for part in (n for n in range(min(size, old_part), 0, -1) if size % n == 0):
            accumulation = tasks_a_round(values) * batches * size / part / steps
            if accumulation.denominator == 1:
                total = tasks_a_round(values) * int(batches)
                yield dict(zip(BATCH_KEYS, (size, total, part, int(accumulation)), strict=True))


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
