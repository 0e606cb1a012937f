"""Which passes of a round fit into a GPU: rungs of equal students, from what is configured down to one image a pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from diffusionopd.data.rounds import RoundShape
from diffusionopd.training.costs.models import Pipeline
from diffusionopd.training.costs.round import HEADROOM, memory, own_models, scorers, step_cost
from diffusionopd.training.plan import Plan

GPUS = {f"{size} GB": size * 2**30 for size in (24, 40, 80)}
"""Common sizes -> bytes. A GPU's GB are sold as 1024^3 bytes."""


@dataclass(frozen=True)
class Rung:
    """A size of the passes, and what it takes."""

    tasks: int  # side by side
    batch_size: int  # images of each in a pass
    checkpointing: bool
    size: int  # bytes: the peak of a training step, and the models of rewards

    def fits(self, room: float) -> bool:
        """Whether it leaves enough of ``room`` bytes to what is not counted."""
        return self.size <= HEADROOM * room


def rungs(plan: Plan, pipeline: Pipeline, shards: int = 1) -> Iterator[Rung]:
    """What is configured, then smaller passes, then the same with activations that are computed again; counted as they
    are asked for. ``shards`` as of :func:`memory`. Raises BackboneError and UncountableError."""
    shape, own, beside = plan.shape, own_models(plan, pipeline), scorers(plan)
    for checkpointing in dict.fromkeys((plan.values["activation_checkpointing"], True)):
        values = {**plan.values, "activation_checkpointing": checkpointing}
        cost = step_cost(replace(plan, values=values), pipeline, shape.backward_size)
        for tasks, batch in _passes(shape):
            held = memory(replace(plan, shape=replace(shape, tasks_per_pass=tasks)), cost, shards, own)
            # Activations grow with the rows; the other tensors do not.
            more = cost.activations * (tasks * batch / shape.backward_size - 1)
            yield Rung(tasks, batch, checkpointing, round(sum(held.values()) + more) + beside)


def _passes(shape: RoundShape) -> Iterator[tuple[int, int]]:
    """Tasks and images of each in a pass, decreasing: fewer tasks in about equal passes, then parts of a batch."""
    most, visited = shape.tasks_per_pass or shape.tasks_per_round, shape.tasks_per_round
    counts = (math.ceil(visited / math.ceil(visited / tasks)) for tasks in range(most, 0, -1))
    first = [shape.tasks_per_pass] if shape.tasks_per_pass else []  # as it is configured
    yield from ((tasks, shape.backward_size) for tasks in dict.fromkeys([*first, *counts]))
    yield from ((1, part) for part in range(shape.backward_size - 1, 0, -1) if shape.backward_size % part == 0)


def lines(plan: Plan, pipeline: Pipeline, rooms: Mapping[str, float], shards: int = 1) -> list[str]:
    """For people: the peak as it is configured, and for each GPU the first rung that fits; ``rooms`` in bytes by the
    names of GPUs, the other arguments and errors as of :func:`rungs`."""
    rest = rungs(plan, pipeline, shards)
    configured = next(rest)
    rung: Rung | None = configured
    found = dict[str, Rung | None]()
    for name, room in sorted(rooms.items(), key=lambda item: -item[1]):  # a smaller one needs a lower rung
        while rung and not rung.fits(room):
            rung = next(rest, None)
        found[name] = rung
    most = "" if plan.shape.tasks_per_pass else "at most "
    return [f"memory: {most}{_size(configured)} (computed)", *(f"{name}: {_told(plan, found[name])}" for name in rooms)]


def _told(plan: Plan, rung: Rung | None) -> str:
    if rung is None:
        return "does not fit, not even one image in a pass; docs/scaling.md has what else saves memory"
    changes = " ".join(f"--config.{name}={value}" for name, value in changed(plan, rung).items())
    return f"does not fit; would with {changes}: {_size(rung)}" if changes else f"fits, {_size(rung)}"


def _size(rung: Rung) -> str:
    images = rung.tasks * rung.batch_size
    return f"{giga(rung.size)} at the peak, {images} image{'' if images == 1 else 's'} in a pass"


def changed(plan: Plan, rung: Rung) -> dict[str, int | bool]:
    """The configuration's keys that lead to a rung; none for fewer tasks where their number is yet to be chosen."""
    shape, changes = plan.shape, dict[str, int | bool]()
    if rung.tasks < min(shape.tasks_per_pass, shape.tasks_per_round):
        changes["train.tasks_per_pass"] = rung.tasks
    if rung.batch_size < shape.backward_size:
        changes["train.batch_size"] = rung.batch_size
        changes["train.gradient_accumulation_steps"] = shape.accumulation * (shape.backward_size // rung.batch_size)
    if rung.checkpointing and not plan.values["activation_checkpointing"]:
        changes["activation_checkpointing"] = True
    return changes


def giga(size: float) -> str:
    """Bytes in units that fit."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
