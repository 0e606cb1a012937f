"""Whether velocities are finite, and whose was the first that was not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusionopd.data.batches import Row
from diffusionopd.models.policies import STUDENT
from diffusionopd.transitions import Transition

_BASE, _TEACHER, _REFERENCE = "base model", "teacher", "reference"


REMEDIES = {
    _TEACHER: "Check that task's teacher (lora_path or model in train.teachers), or choose mixed_precision bf16 or no.",
    _REFERENCE: "Check that task's reference in train.teachers, or choose mixed_precision bf16 or no.",
    _BASE: "Check the base model (pretrained.model), or choose mixed_precision bf16 or no.",
    STUDENT: "Resume from the last checkpoint with a lower learning rate, or choose mixed_precision bf16 or no.",
}


class VelocityChecks:
    """Remembers, on the device, whether each velocity of a round was finite, and reads the answers when asked."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, str, float]] = []  # (policy, task, sigma) of each row
        self._finite: list[Tensor] = []

    def note(self, policy: str | None, rows: Sequence[Row], sigma: float, velocity: Tensor) -> None:
        """Check velocities of rows, ``[B, ...]``; the device is not waited for."""
        for row in rows:
            named = {row.reference: _REFERENCE, row.teacher: _TEACHER}
            self._seen.append((named.get(policy, policy) if policy is not None else _BASE, row.task, sigma))
        self._finite.append(velocity.detach().isfinite().flatten(1).all(1))

    def first_broken(self) -> list[tuple[str, str, float]]:
        """(policy, task, sigma) of the first velocity that is not finite, and of other policies' at the same state.

        What comes after may be so because of it. Several policies, on different adapters, point to what they share.
        """
        if not self._seen:
            return []
        broken = [e for e, finite in zip(self._seen, torch.cat(self._finite).tolist(), strict=True) if not finite]
        return [e for e in dict.fromkeys(broken) if e[1:] == broken[0][1:]]

    def describe(self, transitions: Sequence[Transition]) -> str:
        """What is not finite, where, and the remedy; empty if nothing is."""
        broken = self.first_broken()
        if not broken:
            return ""
        names, (_, task, sigma) = [policy for policy, _, _ in broken], broken[0]
        steps = [f"step {i}, " for i, transition in enumerate(transitions) if transition.sigma == sigma]
        remedy = REMEDIES.get(names[0] if len(names) == 1 else _BASE, REMEDIES[STUDENT])
        where = f"for task {task!r} is not finite at {''.join(steps[:1])}sigma {sigma:.4f}"
        return f"the velocity of the {' and the '.join(names)} {where}. {remedy}"

    def clear(self) -> None:
        """Forget what was noted."""
        self._seen.clear()
        self._finite.clear()
