"""Whose velocity: the student's, with gradient, and that of everything frozen, asked through one primitive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusionopd.models.backbone import Backbone
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.lora import Adapters
from diffusionopd.stages import stage

STUDENT = "student"
"""The adapter that is trained."""


@dataclass(frozen=True)
class Request:
    """Asks a frozen policy for its velocities on ``b`` rows.

    A row is a sample of its own: rows of one request may be of different noise levels and guidance, and requests may be
    cut, joined and reordered between the call and its forwards without changing an answer beyond rounding.
    """

    policy: str | None  # an adapter's name; None: the bare base
    x: Tensor  # latents [b, C, h, w]
    sigma: float | Tensor  # of all rows, or [b]
    conditions: Conditions  # of b rows
    guidance: float | Tensor = 1.0  # of all rows, or [b] on the host


class Policies:
    """The policies of one backbone. Requests may name no other transformer yet."""

    def __init__(self, backbone: Backbone, adapters: Adapters) -> None:
        self.backbone = backbone
        self.adapters = adapters

    def student(
        self, x: Tensor, sigma: float | Tensor, conditions: Conditions, guidance: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The student's guided and conditional velocity: :meth:`Backbone.velocity`, with the caller's gradient."""
        return self._ask(STUDENT, x, sigma, conditions, guidance)

    @torch.no_grad()
    def frozen(self, requests: Sequence[Request]) -> list[tuple[Tensor, Tensor]]:
        """Each request's guided and conditional velocity, float32 ``[b, C, h, w]``, in their order, without gradient.

        The number of forwards depends on the requests' policies and shapes alone, so that processes that ask alike stay
        in step. Afterwards the student's adapter is in use: checkpointed blocks run again in its backward pass.
        """
        answers: dict[int, tuple[Tensor, Tensor]] = {}
        for policy in dict.fromkeys(request.policy for request in requests):  # as few switches as possible
            for i, r in enumerate(requests):
                if r.policy == policy:
                    answers[i] = self._ask(policy, r.x, r.sigma, r.conditions, r.guidance)
        if STUDENT in self.adapters.configs:
            self.adapters.use(STUDENT)
        return [answers[i] for i in range(len(requests))]

    def _ask(
        self, policy: str | None, x: Tensor, sigma: float | Tensor, conditions: Conditions, guidance: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        with stage(f"forward, {policy or 'base'}"):
            self.adapters.use(policy)
            return self.backbone.velocity(x, sigma, conditions, guidance)
