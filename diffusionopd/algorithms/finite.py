"""Which policy's velocity is not finite, found out without making each step wait for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a velocity: by which policy, for which task, at which noise level."""

    policy: str
    task: str
    sigma: float


class VelocityChecks:
    """Remembers, on the device, whether each velocity of a round was finite, and reads the answers when asked."""

    def __init__(self) -> None:
        self._seen: list[Evaluation] = []
        self._finite: list[Tensor] = []

    def note(self, evaluation: Evaluation, velocity: Tensor) -> None:
        """Check a velocity of any shape; the device is not waited for."""
        self._seen.append(evaluation)
        self._finite.append(velocity.detach().isfinite().all())

    def first_broken(self) -> list[Evaluation]:
        """The first of the noted velocities that is not finite, and those of other policies at the same state.

        What comes after may be so because of it. Several policies, on different adapters, point to what they share.
        """
        if not self._seen:
            return []
        broken = [e for e, finite in zip(self._seen, torch.stack(self._finite).tolist(), strict=True) if not finite]
        return [e for e in dict.fromkeys(broken) if (e.task, e.sigma) == (broken[0].task, broken[0].sigma)]

    def clear(self) -> None:
        """Forget what was noted."""
        self._seen.clear()
        self._finite.clear()
