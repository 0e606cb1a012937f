"""The slow, obvious way of a round, as the method is written down: roll out, ask the teacher, then train. An oracle."""

from __future__ import annotations

import torch

from diffusionopd.opd import STUDENT


def three_pass(distiller, batches):
    """Accumulate the round's gradient in three separate passes; returns losses [batches, steps] and final latents.

    Pass 1 samples every trajectory without gradients, pass 2 computes the teacher's means along it, pass 3 runs the
    student again, with gradients, and compares the means of the transitions.
    """
    backbone, adapters, recipe = distiller.backbone, distiller.adapters, distiller.recipe
    losses = torch.zeros(len(batches), recipe.trained_steps)
    finals = []
    for i, batch in enumerate(batches):

        def velocity(adapter, x, transition, guidance, batch=batch):
            adapters.use(adapter)
            return backbone.velocity(x, transition.sigma, batch.text, guidance, distiller.negative)

        states = [batch.x]
        with torch.no_grad():
            for step, tr in enumerate(recipe.transitions):
                v = velocity(STUDENT, states[-1], tr, recipe.student_guidance)
                states.append(tr.mean(states[-1], v) + (tr.std * batch.draw_noise(step) if tr.std > 0 else 0.0))
            teacher_means = [
                tr.mean(x, velocity(batch.teacher, x, tr, batch.teacher_guidance))
                for x, tr in zip(states, recipe.transitions, strict=False)
            ]
        for step, tr in enumerate(recipe.transitions[: recipe.trained_steps]):
            mean = tr.mean(states[step], velocity(STUDENT, states[step], tr, recipe.student_guidance))
            squared = (mean - teacher_means[step]).square().flatten(1).mean(1)
            loss = (squared / (2 * tr.std**2) if tr.std > 0 else squared / 2).mean()
            distiller.optimizer.backward(loss / losses.numel())
            losses[i, step] = loss.detach()
        finals.append(states[-1])
    return losses, finals
