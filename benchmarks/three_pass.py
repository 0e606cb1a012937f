"""The slow, obvious way of a round, as the method is written down: roll out, ask the teacher, then train.

It is the oracle of the tests and the reference schedule of ``benchmarks/round.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionopd.algorithms.base import STUDENT
from diffusionopd.data.batches import Batch


def three_pass(learner: Any, batches: Sequence[Batch]) -> tuple[Tensor, list[Tensor]]:
    """Accumulate the round's gradient in three separate passes; losses ``[batches, steps]`` and the final latents.

    Pass 1 samples the whole trajectory without gradients, pass 2 computes the teacher's mean at every state of it,
    pass 3 runs the student again, with gradients, at the trained steps and compares the means of the transitions.
    ``learner`` has the backbone, adapters, optimizer, negative and recipe of a distillation.
    """
    recipe = learner.recipe
    losses = torch.zeros(len(batches), recipe.trained_steps, device=learner.backbone.device)
    finals = []
    for i, batch in enumerate(batches):

        def mean(adapter: str, x: Tensor, step: int, guidance: float, batch: Batch = batch) -> Tensor:
            learner.adapters.use(adapter)
            transition = recipe.transitions[step]
            v = learner.backbone.velocity(x, transition.sigma, batch.text, guidance, learner.negative)
            return transition.mean(x, v)

        states = [batch.x]
        with torch.no_grad():
            for step, transition in enumerate(recipe.transitions):
                x_next = mean(STUDENT, states[-1], step, recipe.student_guidance)
                noise = transition.std * batch.draw_noise(step) if transition.std > 0 else 0.0
                states.append(x_next + noise)
            visited = list(enumerate(states[:-1]))
            teacher_means = [mean(batch.teacher, x, step, batch.teacher_guidance) for step, x in visited]
        for step, x in visited[: recipe.trained_steps]:
            difference = mean(STUDENT, x, step, recipe.student_guidance) - teacher_means[step]
            variance = recipe.transitions[step].std ** 2 or 1.0
            loss = (difference.square().flatten(1).mean(1) / (2 * variance)).mean()
            learner.optimizer.backward(loss / losses.numel())
            losses[i, step] = loss.detach()
        finals.append(states[-1])
    return losses, finals
