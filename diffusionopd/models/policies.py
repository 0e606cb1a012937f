"""Whose velocity: the student's, with gradient, and that of everything frozen, asked through one primitive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
_TOGETHER = object()


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

    def __init__(
        self,
        backbone: Backbone,
        adapters: Adapters,
        others: Mapping[str, Home] | None = None,
        *,
        side_by_side: bool = True,
    ) -> None:
        """``others``: by name, the policies of other transformers than the student's base. ``side_by_side``: frozen
        policies of one transformer may share a forward."""
        self.backbone = backbone
        self.adapters = adapters
        self.others = others or {}
        self.side_by_side = side_by_side
        self._come: Home | None = None  # whose weights are on the device, of those that would else wait

    def _backbones(self) -> list[Backbone]:
        return list(dict.fromkeys([self.backbone, *(other.backbone for other in self.others.values())]))

    @property
    def nfe(self) -> int:
        """NFE so far of all transformers, counted in single samples."""
        return sum(backbone.nfe for backbone in self._backbones())

    def shard(self) -> None:
        """Shard every transformer that is to be: :meth:`Backbone.shard`."""
        for backbone in self._backbones():
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
        for numbers in self._passes(requests):
            if len(numbers) == 1:
                r = requests[numbers[0]]
                answers[numbers[0]] = self._ask(r.policy, r.x, r.sigma, r.conditions, r.guidance)
            else:
                answers |= zip(numbers, self._ask_side_by_side([requests[i] for i in numbers]), strict=True)
        if STUDENT in self.adapters.configs:
            self.adapters.use(STUDENT)
        return [answers[i] for i in range(len(requests))]

    def _passes(self, requests: Sequence[Request]) -> list[list[int]]:
        """The numbers of the requests of each forward, with as few switches and moves of weights as possible."""
        passes: dict[Backbone, dict[object, list[list[int]]]] = {}  # of a transformer, of a policy or of several
        for i, request in enumerate(requests):
            home = self.home(request.policy)
            own = passes.setdefault(home.backbone, {})
            if self.side_by_side and home.adapters.can_share([home.adapter]):
                own.setdefault(_TOGETHER, [[]])[0].append(i)
            else:
                own.setdefault(request.policy, []).append([i])
        return [numbers for own in passes.values() for several in own.values() for numbers in several]

    def _ask_side_by_side(self, requests: Sequence[Request]) -> Iterator[tuple[Tensor, Tensor]]:
        """The answers to requests of one transformer, in one forward where samples may have an adapter each."""
        counts = [len(request.x) for request in requests]
        home = self._come_to(self.home(requests[0].policy))
        names = [self.home(r.policy).adapter for r, count in zip(requests, counts, strict=True) for _ in range(count)]
        with stage("forward, frozen policies"):
            found = home.backbone.velocity(
                torch.cat([request.x for request in requests]),
                _of_each([request.sigma for request in requests], counts),
                Conditions.cat([request.conditions for request in requests]),
                _of_each([request.guidance for request in requests], counts),
                lambda samples: home.adapters.use_each([names[sample] for sample in samples]),
            )
        return zip(*(v.split(counts) for v in found), strict=True)

    def _ask(
        self, policy: str | None, x: Tensor, sigma: float | Tensor, conditions: Conditions, guidance: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        with stage(f"forward, {policy or 'base'}"):
            return self.use(policy).backbone.velocity(x, sigma, conditions, guidance)

    def use(self, policy: str | None) -> Home:
        """Make the next velocity of a policy's transformer that policy's."""
        home = self._come_to(self.home(policy))
        home.adapters.use(home.adapter)
        return home

    def _come_to(self, home: Home) -> Home:
        """Have the weights of a policy's transformer on the device, in the place of others that would wait."""
        before = self._come.host if self._come else None
        if home.host is not None and home.host is not before:
            if self._come and before:
                self._come.adapters.apart()
                before.go()
            home.host.come()
            self._come = home
        return home


def _of_each(values: Sequence[float | Tensor], counts: Sequence[int]) -> float | Tensor:
    """One number for all rows, or ``[b]`` of them, of what each request says."""
    if not any(isinstance(value, Tensor) for value in values) and len(set(values)) == 1:
        return values[0]
    return torch.cat([torch.as_tensor(v, dtype=torch.float64).expand(n) for v, n in zip(values, counts, strict=True)])
