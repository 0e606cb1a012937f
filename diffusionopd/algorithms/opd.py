"""On-policy distillation: one round visits every task once and ends in one optimizer step (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusionopd.algorithms.base import STUDENT, Learner, Parts, RoundResult
from diffusionopd.data.batches import Batch
from diffusionopd.losses import distillation_loss, policy_gradient_loss
from diffusionopd.rollout import Velocity, Visit, rollout
from diffusionopd.transitions import Transition


@dataclass(frozen=True)
class Recipe:
    """How every round is run: the trajectory, which of its steps are trained, and the loss."""

    transitions: Sequence[Transition]
    trained_steps: int
    multistep: bool = False
    student_guidance: float = 1.0
    loss: str = "kl"  # or policy_gradient
    target: str = "mean"
    self_normalize: bool = False
    clip_range: float = 1e-4
    beta: float = 0.0  # weight of the same distillation loss towards the bare base
    inner_epochs: int = 1


class Distiller(Learner):
    """The student and its teachers on one backbone, and the round that pulls one to the others."""

    def __init__(self, parts: Parts, recipe: Recipe) -> None:
        super().__init__(parts, recipe.transitions, recipe.trained_steps)
        self.recipe = recipe

    def round(self, batches: Sequence[Batch], name: str = "this round", *, step: bool = True) -> RoundResult:
        """Algorithm 1's inner loop: every batch of every task, then one optimizer step.

        Rollout, teacher and training are one pass: a visit's loss is backpropagated at once and then forgotten. With
        ``inner_epochs > 1`` the visits are kept and each further epoch trains on the same states with the new weights,
        one optimizer step an epoch. For ``step`` see :meth:`Learner.round`. Raises NonFiniteError, before the student
        changes, naming ``name``, task and step.
        """
        recipe, result = self.recipe, RoundResult(self._table(batches), None)
        kept: list[tuple[int, int, Visit]] = []
        for i, batch in enumerate(batches):
            columns = {step: column for column, step in enumerate(self._steps(batch))}
            for visit in self._visits(batch):
                if visit.v_teacher is not None:
                    loss = self._loss(batch, visit, visit.v_student).mean()
                    self.optimizer.backward(loss / result.losses.numel())
                    result.losses[i, columns[visit.step]] = loss.detach()
                    if recipe.inner_epochs > 1:
                        kept.append((i, columns[visit.step], _without_graph(visit)))
            if batch.wants_picture:
                result.pictures.append((batch, visit.x_next))
        result.losses, result.grad_norm = self._step(batches, result.losses, name, step)
        for epoch in range(1, recipe.inner_epochs):
            self._train_again(batches, kept, f"{name}, inner epoch {epoch + 1}")
        return result

    def _train_again(self, batches: Sequence[Batch], kept: Sequence[tuple[int, int, Visit]], name: str) -> None:
        losses = self._table(batches)
        for i, column, visit in kept:
            v_student = self._student(batches[i])(visit.x, visit.transition.sigma)
            loss = self._loss(batches[i], visit, v_student).mean()
            self.optimizer.backward(loss / losses.numel())
            losses[i, column] = loss.detach()
        self._step(batches, losses, name)

    def _loss(self, batch: Batch, visit: Visit, v_student: Tensor) -> Tensor:
        """The recipe's loss of one visit, ``[B]``; ``v_student`` may come from newer weights than the visit."""
        recipe, tr = self.recipe, visit.transition
        assert visit.v_teacher is not None
        if recipe.loss == "policy_gradient":
            old = visit.v_student.detach()
            loss = policy_gradient_loss(tr, visit.x, visit.x_next, v_student, old, visit.v_teacher, recipe.clip_range)
        else:
            loss = distillation_loss(tr, v_student, visit.v_teacher, recipe.target, recipe.self_normalize)
        if recipe.beta > 0:
            with torch.no_grad():
                v_base = self._policy(None, batch, recipe.student_guidance)(visit.x, tr.sigma)
            loss = loss + recipe.beta * distillation_loss(tr, v_student, v_base, recipe.target, recipe.self_normalize)
            self.adapters.use(STUDENT)  # checkpointed blocks run again in backward
        return loss

    def _visits(self, batch: Batch) -> Iterator[Visit]:
        return rollout(
            batch.x,
            self.recipe.transitions,
            self._student(batch),
            self._policy(batch.teacher, batch, batch.teacher_guidance),
            trained=self._steps(batch),
            draw_noise=batch.draw_noise,
            multistep=self.recipe.multistep,
            finish=batch.wants_picture,
        )

    def _student(self, batch: Batch) -> Velocity:
        return self._policy(STUDENT, batch, self.recipe.student_guidance)


def _without_graph(visit: Visit) -> Visit:
    return Visit(visit.step, visit.transition, visit.x, visit.v_student.detach(), visit.v_teacher, visit.x_next)
