"""The student's own trajectory, visited once: both velocities at each state, then the next state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusionopd.transitions import DpmSolver2, Transition

Velocity = Callable[[Tensor, float], Tensor]
"""``(x [B, C, h, w], sigma) -> velocity [B, C, h, w]`` of one policy: an adapter, its prompts and its guidance."""


@dataclass(frozen=True)
class Visit:
    """One state of the trajectory. Tensors ``[B, C, h, w]``, float32.

    ``v_student`` carries the gradient when the step is trained; ``x``, ``x_next`` and ``v_teacher`` never do.
    ``v_teacher`` is None at a step that is not trained.
    """

    step: int
    transition: Transition
    x: Tensor
    v_student: Tensor
    v_teacher: Tensor | None
    x_next: Tensor


@torch.no_grad()
def walk(
    x: Tensor,
    transitions: Sequence[Transition],
    policy: Velocity,
    *,
    draw_noise: Callable[[int], Tensor],
    multistep: bool = False,
) -> Iterator[Visit]:
    """The trajectory of one policy from ``x`` to the picture, without gradient or teacher. Arguments as for rollout."""
    solver = DpmSolver2() if multistep else None
    for step, transition in enumerate(transitions):
        v = policy(x, transition.sigma)
        x_next = _next(solver, transition, x, v, step, draw_noise)
        yield Visit(step, transition, x, v, None, x_next)
        x = x_next


def rollout(
    x: Tensor,
    transitions: Sequence[Transition],
    student: Velocity,
    teacher: Velocity,
    *,
    trained: Collection[int],
    draw_noise: Callable[[int], Tensor],
    multistep: bool = False,
    finish: bool = False,
) -> Iterator[Visit]:
    """Walk from ``x`` (noise at sigma 1) along the student's trajectory, yielding the visit of every step in turn.

    The consumer calls backward on a visit before it asks for the next one, so memory is that of one step whatever their
    number. The steps in ``trained`` are supervised, the others only walked; the walk ends at the last of them unless
    ``finish`` asks for the picture. ``draw_noise(step)`` gives the step's standard normal noise and is called for
    stochastic steps only. ``multistep`` takes the next state from DPM-Solver++(2M); the supervision stays the one-step
    transition at the visited state.
    """
    solver = DpmSolver2() if multistep else None
    for step, transition in enumerate(transitions if finish else transitions[: max(trained) + 1]):
        supervised = step in trained
        v_teacher = None
        if supervised:
            with torch.no_grad():
                v_teacher = teacher(x, transition.sigma)
        # The student comes last, so that its adapter is in use when the consumer calls backward (gradient checkpointing
        # runs the forward again there).
        with torch.set_grad_enabled(supervised):
            v_student = student(x, transition.sigma)
        x_next = _next(solver, transition, x, v_student.detach(), step, draw_noise)
        yield Visit(step, transition, x, v_student, v_teacher, x_next)
        x = x_next


def _next(
    solver: DpmSolver2 | None,
    transition: Transition,
    x: Tensor,
    v: Tensor,
    step: int,
    draw_noise: Callable[[int], Tensor],
) -> Tensor:
    if solver is not None:
        return solver.step(transition, x, v)
    return transition.sample(x, v, draw_noise(step) if transition.std > 0 else None)
