"""Whose velocity: the student's, with gradient, and that of everything frozen, asked through one primitive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusionopd.models.backbone import Backbone
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.lora import Adapters
from diffusionopd.models.teacher_models import HostWeights
from diffusionopd.stages import stage

STUDENT = "student"
"""The adapter that is trained."""


@dataclass(frozen=True)
class Request:
    """Asks a frozen policy for its velocities on ``b`` rows.

    A row is a sample of its own: rows of one request may be of different noise levels and guidance, and requests may be
    cut, joined and reordered between the call and its forwards without changing an answer beyond rounding.
    """

    policy: str | None  # an adapter's or another transformer's name; None: the bare base
    x: Tensor  # latents [b, C, h, w]
    sigma: float | Tensor  # of all rows, or [b]
    conditions: Conditions  # of b rows
    guidance: float | Tensor = 1.0  # of all rows, or [b] on the host


@dataclass(frozen=True)
class Home:
    """The transformer that a policy is on."""

    backbone: Backbone
    adapters: Adapters
    adapter: str | None  # None: the transformer as it is
    host: HostWeights | None = None  # where its weights wait while it is not asked


class Policies:
    """The student and the policies of its base, and of other transformers with the same latents and texts."""

    def __init__(self, backbone: Backbone, adapters: Adapters, others: Mapping[str, Home] | None = None) -> None:
        """``others``: by name, the policies of other transformers than the student's base."""
        self.backbone = backbone
        self.adapters = adapters
        self.others = others or {}
        self._come: HostWeights | None = None  # of the weights on the device, those that would else wait

    @property
    def evaluations(self) -> int:
        """NFE so far of all transformers, counted in single samples."""
        return sum(backbone.evaluations for backbone in {self.backbone, *(o.backbone for o in self.others.values())})

    def shard(self) -> None:
        """Shard every transformer that is to be: :meth:`Backbone.shard`."""
        for backbone in dict.fromkeys([self.backbone, *(other.backbone for other in self.others.values())]):
            backbone.shard()

    def home(self, policy: str | None) -> Home:
        """Where a policy is; what is not of another transformer is on the student's base."""
        own = self.others.get(policy) if policy is not None else None
        return own or Home(self.backbone, self.adapters, policy)

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
        policies = list(dict.fromkeys(request.policy for request in requests))  # as few switches as possible
        order = list(dict.fromkeys(self.home(policy).backbone for policy in policies))  # and moves of weights
        for policy in sorted(policies, key=lambda policy: order.index(self.home(policy).backbone)):
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
            return self.use(policy).backbone.velocity(x, sigma, conditions, guidance)

    def use(self, policy: str | None) -> Home:
        """Make the next velocity of a policy's transformer that policy's."""
        home = self.home(policy)
        if home.host is not None and home.host is not self._come:
            self._bring(home.host)
        home.adapters.use(home.adapter)
        return home

    def _bring(self, weights: HostWeights) -> None:
        """Have weights that wait on the device, in the place of others."""
        if self._come is not None:
            self._come.go()
        weights.come()
        self._come = weights
