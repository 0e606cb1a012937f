"""The slow, obvious way of a round, as the method is written down: roll out, ask the teacher, then train.

It is the oracle of the tests and the reference schedule of ``benchmarks/round.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusionopd.algorithms.opd import Opd
from diffusionopd.data.batches import Batch


def three_pass(algorithm: Opd, batches: Sequence[Batch]) -> tuple[Tensor, list[Tensor]]:
    """Accumulate the round's gradient in three separate passes; losses ``[batches, steps]`` and the final latents.

    Pass 1 samples the whole trajectory without gradients, pass 2 computes the teacher's mean at every state of it,
    pass 3 runs the student again, with gradients, at the trained steps and compares the means of the transitions.
    """
    losses = torch.zeros(len(batches), len(batches[0].steps), device=algorithm.policies.backbone.device)
    finals = []
    for i, batch in enumerate(batches):
        student, teacher, states = algorithm.student(batch), algorithm.teacher(batch), [batch.noise]
        with torch.no_grad():
            for step, tr in enumerate(algorithm.transitions):
                noise = tr.std * batch.step_noise(step) if tr.std > 0 else 0.0
                states.append(tr.mean(states[-1], student(states[-1], tr.sigma)) + noise)
        means = [tr.mean(x, teacher(x, tr.sigma)) for x, tr in zip(states, algorithm.transitions, strict=False)]
        for column, step in enumerate(batch.steps):
            tr, x = algorithm.transitions[step], states[step]
            difference = tr.mean(x, student(x, tr.sigma)) - means[step]
            loss = (difference.square().flatten(1).mean(1) / (2 * (tr.std**2 or 1.0))).mean()
            algorithm.optimizer.backward(loss / losses.numel())
            losses[i, column] = loss.detach()
        finals.append(states[-1])
    return losses, finals
