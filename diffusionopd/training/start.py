"""A student that starts at the sum of its teachers (``train.student_init``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tqdm import tqdm

from diffusionopd.algorithms.base import Algorithm
from diffusionopd.algorithms.optim import NonFiniteError
from diffusionopd.data.batches import Batch, Batches
from diffusionopd.data.rounds import TOGETHER
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import LoraWeights
from diffusionopd.models.merging import Merged, merge
from diffusionopd.models.policies import STUDENT
from diffusionopd.models.settings import FRESH, FROM_TEACHERS, LoraSettings
from diffusionopd.training.memory import ROUND_MEMORY, memory_advice
from diffusionopd.training.plan import Plan
from diffusionopd.training.resume import RunError

SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""What the sum is tried at, unless the configuration says; and at their mean, where that is less."""


def start_from_teachers(
    plan: Plan, adapters: Adapters, loras: Mapping[str, LoraWeights], say: Callable[[str], None]
) -> Merged | None:
    """Put the student at the sum of its teachers, if it is to start there. AdapterError for modules that it lacks.

    ``loras``: by adapter, the teachers' among them.
    """
    lora = plan.read(LoraSettings)
    if lora.student_init != FROM_TEACHERS:
        return None
    merged = merge([loras[task.adapter] for task in plan.tasks], lora.lora_rank)
    say(f"the student starts at the sum of its teachers: {merged.describe()}")
    adapters.start_from(STUDENT, merged.weights, lora.student_init_scale or 1.0)
    return merged


def choose_scale(algorithm: Algorithm, batches: Batches, merged: Merged, say: Callable[[str], None]) -> None:
    """Scale the start to the smallest mean loss on the first batch of every task. Collective.

    Raises RunError where the student's velocities are finite at no scale, and OutOfMemoryError.
    """
    shape = replace(batches.shape, task_order=TOGETHER, drawn=0)
    made = replace(batches, shape=shape, settings=replace(batches.settings, prefetch=False)).round(0)
    # Whole ones, however train.batch_size cuts them for a backward pass.
    first = [batch for batch in made if batch.rows[0].sample < shape.batch_size * shape.num_processes]
    tried = [replace(batch, wants_images=False) for batch in first]
    losses = {}
    scales = sorted({*SCALES, min(SCALES[0], 1 / algorithm.shape.num_tasks)})
    for scale in tqdm(scales, desc="trying scales of the sum", unit="scale", disable=batches.rank > 0):
        algorithm.policies.adapters.start_from(STUDENT, merged.weights, scale)
        losses[scale] = _loss(algorithm, tried)
    best = min(losses, key=losses.__getitem__)
    if math.isinf(losses[best]):
        what = (
            f"at none of the scales {', '.join(f'{scale:g}' for scale in scales)} of the teachers' sum the student is"
        )
        raise RunError(f"{what} finite. Set train.student_init_scale, lower, or train.student_init to {FRESH!r}.")
    algorithm.policies.adapters.start_from(STUDENT, merged.weights, best)
    listed = ", ".join(f"{scale:g} {loss:.4g}" for scale, loss in losses.items())
    say(f"at {best:g} times the sum, by the loss of each: {listed}")


def _loss(algorithm: Algorithm, batches: Sequence[Batch]) -> float:
    """The mean loss of the student, infinite where a velocity or the gradient is not finite."""
    try:
        with memory_advice("trying scales of the sum", ROUND_MEMORY):
            result = algorithm.round(batches, step=False)
    except NonFiniteError:  # on every process
        return math.inf
    finally:
        algorithm.optimizer.discard()
    assert result.losses is not None
    return result.losses.mean
