"""The student's own trajectories, visited once: its velocity and its target at each state, then the next state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusionopd.rows import put, take
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
    """One state of the trajectories of some rows. Tensors ``[b, C, h, w]``, float32.

    ``v`` are the velocities of the policy that walks; the student's carry the gradient when the step is trained.
    ``target`` is None at a step that is not trained.
    """

    step: int
    transition: Transition
    x: Tensor
    v: Branches
    x_next: Tensor
    target: Target | None = None
    rows: Sequence[int] = ()  # their numbers in the walk


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
        yield Visit(step, transition, x, Branches(v, v), x_next, rows=range(len(x)))
        x = x_next


def rollout(
    x: Tensor,
    transitions: Sequence[Transition],
    student: Callable[[Tensor, float, Sequence[int]], Branches],
    target: Callable[[Tensor, float, Sequence[int]], Target],
    *,
    trained: Sequence[Collection[int]],
    draw_noise: Callable[[int], Tensor],
    multistep: bool = False,
    finish: bool = False,
) -> Iterator[Visit]:
    """Walk from ``x`` (noise at sigma 1) along the student's trajectories, yielding the visits of every step in turn.

    The consumer calls backward on a visit before it asks for the next one, so memory is that of one step whatever their
    number. ``trained`` are the steps of each row that are supervised; at the others it is only walked, and after its
    last one it is left alone unless ``finish`` asks for the picture. A step has a visit of the rows that are supervised
    there and one of those that are not; ``student`` and ``target`` are given the states and numbers of such rows.

    ``draw_noise(step)`` gives the step's standard normal noise for all rows and is called for stochastic steps only.
    ``multistep`` takes the next state from DPM-Solver++(2M); the supervision stays the one-step transition at the
    visited state.
    """
    solver = DpmSolver2() if multistep else None
    ends = [len(transitions) if finish else max(steps) + 1 for steps in trained]
    for step, transition in enumerate(transitions[: max(ends)]):
        supervised = [row for row, steps in enumerate(trained) if step in steps]
        walking = [row for row, end in enumerate(ends) if step < end and step not in trained[row]]
        done = [row for row, end in enumerate(ends) if step >= end]
        visited = []
        # The supervised student comes last, so that its adapter is in use when the consumer calls backward (gradient
        # checkpointing runs the forward again there).
        for rows in filter(None, (walking, supervised)):
            here, pulled_to = take(x, rows), None
            if rows is supervised:
                with torch.no_grad():
                    pulled_to = target(here, transition.sigma, rows)
            with torch.set_grad_enabled(rows is supervised):
                visited.append((rows, here, student(here, transition.sigma, rows), pulled_to))
        v = [(rows, v.guided.detach()) for rows, _, v, _ in visited]
        v += [(done, take(x, done))] if done else []  # whatever
        x = _next(solver, transition, x, put(v), step, draw_noise)
        for rows, here, branches, pulled_to in visited:
            yield Visit(step, transition, here, branches, take(x, rows), pulled_to, rows)


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
