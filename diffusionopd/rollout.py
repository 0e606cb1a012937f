"""The student's own trajectory, visited once: its velocity and its target at each state, then the next state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusionopd.transitions import DpmSolver2, Transition

Velocity = Callable[[Tensor, float], Tensor]
"""``(x [B, C, h, w], sigma) -> velocity [B, C, h, w]`` of one policy: an adapter, its prompts and its guidance."""


class Branches(NamedTuple):
    """A policy's velocities at a state, ``[B, C, h, w]``; one tensor where guidance needs no second branch."""

    guided: Tensor
    conditional: Tensor


class Target(NamedTuple):
    """Where the student is pulled to at a state, ``[B, C, h, w]``, without gradient."""

    v: Branches
    v_teacher: Tensor  # the teacher's guided velocity, from which the target may be away


@dataclass(frozen=True)
class Visit:
    """One state of the trajectory. Tensors ``[B, C, h, w]``, float32.

    ``v`` are the velocities of the policy that walks; the student's carry the gradient when the step is trained.
    ``target`` is None at a step that is not trained.
    """

    step: int
    transition: Transition
    x: Tensor
    v: Branches
    x_next: Tensor
    target: Target | None = None


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
        yield Visit(step, transition, x, Branches(v, v), x_next)
        x = x_next


def rollout(
    x: Tensor,
    transitions: Sequence[Transition],
    student: Callable[[Tensor, float], Branches],
    target: Callable[[Tensor, float], Target],
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
        pulled_to = None
        if supervised:
            with torch.no_grad():
                pulled_to = target(x, transition.sigma)
        # The student comes last, so that its adapter is in use when the consumer calls backward (gradient checkpointing
        # runs the forward again there).
        with torch.set_grad_enabled(supervised):
            v = student(x, transition.sigma)
        x_next = _next(solver, transition, x, v.guided.detach(), step, draw_noise)
        yield Visit(step, transition, x, v, x_next, pulled_to)
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
