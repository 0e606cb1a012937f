"""What may differ when a run goes on: which keys change the experiment, how other processes make its round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from diffusionopd.algorithms import ALGORITHMS
from diffusionopd.config_schema import FREE, REFUSE, REWARDS, ROUND, TEACHERS, comparable
from diffusionopd.data.rounds import CASCADE, tasks_per_round
from diffusionopd.data.tasks import FIELDS
from diffusionopd.rewards import RUNTIME_OPTIONS
from diffusionopd.training.keys import SCHEMA, is_used

# In the order of their declaration: a batch, batches per round, a backward batch, backward batches per step.
BATCH_KEYS = tuple(name for name, declared in SCHEMA.keys.items() if declared.resume == ROUND)


def changes_since(
    saved: Mapping[str, Any], written_for: int, values: Mapping[str, Any], num_processes: int
) -> tuple[list[str], list[str]]:
    """``key: old -> new``, first of what changes the experiment, then of what does not."""
    before, now = _expanded(saved), _expanded(values)
    refused: list[str] = []
    free: list[str] = []
    for name in sorted(before | now):
        old, new = comparable(before.get(name)), comparable(now.get(name))
        if old != new and name not in BATCH_KEYS:
            (refused if _is_experiment(name, before, now) else free).append(f"{name}: {old!r} -> {new!r}")
    old_round, new_round = _geometry(saved, written_for), _geometry(values, num_processes)
    refused += [f"{name}: {old_round[name]} -> {new}" for name, new in new_round.items() if old_round[name] != new]
    return refused, free


def _expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with a key for each field of each task, and the default of what it leaves out."""
    flat = {name: value for name, value in values.items() if name not in ("train.teachers", "reward_options")}
    tasks = [task for task in values["train.teachers"] if isinstance(task, Mapping)]  # the others are check()'s
    for i, task in enumerate(tasks):
        fields = {name: field.default for name, field in FIELDS.items()}
        fields |= {"guidance_scale": values["sample.teacher_guidance_scale"]}
        fields |= {name: value for name, value in task.items() if value is not None}
        flat |= {f"train.teachers[{i}].{name}": value for name, value in fields.items()}
    if tasks:
        del flat["sample.teacher_guidance_scale"]
    for reward, options in values["reward_options"].items():
        flat |= {f"reward_options.{reward}.{name}": value for name, value in options.items()}
    return flat


def _is_experiment(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a change of an expanded key changes what the student is trained on, or towards."""
    algorithms = [values["train.algorithm"] for values in (before, now)]
    known = [(ALGORITHMS.get(values["train.algorithm"]), values) for values in (before, now)]
    from_rewards = any(cls and cls.has_rewards for cls, _ in known)
    with_teachers = any(cls and cls.uses_teachers(values) for cls, values in known)
    if name == "num_epochs":  # by which a cascade's tasks share the rounds
        return CASCADE in (before["train.task_order"], now["train.task_order"])
    if name.startswith("reward_options."):
        reward, option = name.split(".")[1:3]
        return from_rewards and option not in RUNTIME_OPTIONS and reward in _trained_on(before) | _trained_on(now)
    if name in SCHEMA.keys and not any(is_used(name, algorithm) for algorithm in algorithms):
        return False
    declared = SCHEMA.keys.get(name) or FIELDS.get(name.rpartition("].")[2])
    rule = declared.resume if declared else FREE
    return rule == REFUSE or rule == REWARDS and from_rewards or rule == TEACHERS and with_teachers


def _trained_on(expanded: Mapping[str, Any]) -> set[str]:
    tasks = [value for name, value in expanded.items() if name.endswith(".proxy_reward")] or [expanded["reward_fn"]]
    return {reward for rewards in tasks for reward in rewards}


# --- another number of processes --------------------------------------------------------------------------------------


def _geometry(values: Mapping[str, Any], num_processes: int) -> dict[str, Fraction]:
    """What a round is over all processes; the keys are for people."""
    size, batches, part, accumulation = (values[name] for name in BATCH_KEYS)
    return {
        "images per task and round": Fraction(batches * size * num_processes, tasks_per_round(values)),
        "optimizer steps per round": Fraction(batches * size, part * accumulation),
    }


def adapted_batches(values: Mapping[str, Any], before: int, now: int) -> dict[str, int]:
    """The batch keys with which ``now`` processes make the round that ``values`` describe for ``before`` processes.

    A process's batches stay as large as they are, or become smaller if they must, and so do its backward batches: what
    fitted into a GPU's memory still does. Raises ValueError naming the numbers of processes that work.
    """
    found = next(_solutions(values, before, now), None)
    if found is None:
        images, _ = _geometry(values, before).values()
        working = [str(n) for n in range(1, int(images) + 1) if next(_solutions(values, before, n), None)]
        raise ValueError(
            f"the {images} images of a task in a round cannot be shared equally by them. "
            f"Use {', '.join(working[:-1])}{' or ' * (len(working) > 1)}{working[-1]} processes."
        )
    return found


def _solutions(values: Mapping[str, Any], before: int, now: int) -> Iterator[dict[str, int]]:
    """Solutions for batches and backward batches of at most their present size, the largest first."""
    old_size, _, old_part, _ = (values[name] for name in BATCH_KEYS)
    images, steps = _geometry(values, before).values()
    for size in range(old_size, 0, -1):
        batches = images / (size * now)  # per task
        if batches.denominator > 1:
            continue
        for part in (n for n in range(min(size, old_part), 0, -1) if size % n == 0):
            accumulation = tasks_per_round(values) * batches * size / part / steps
            if accumulation.denominator == 1:
                total = tasks_per_round(values) * int(batches)
                yield dict(zip(BATCH_KEYS, (size, total, part, int(accumulation)), strict=True))
