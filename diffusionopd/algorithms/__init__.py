"""The algorithms by name. A new one is a file here and an entry in :data:`ALGORITHMS`."""

from __future__ import annotations

from dataclasses import dataclass

from diffusionopd.algorithms.base import Algorithm
from diffusionopd.algorithms.grpo import Grpo, GrpoGuard
from diffusionopd.algorithms.nft import Nft
from diffusionopd.algorithms.opd import Opd
from diffusionopd.algorithms.sft import Sft
from diffusionopd.config_schema import key

ALGORITHMS: dict[str, type[Algorithm]] = {cls.name: cls for cls in (Opd, Sft, Nft, Grpo, GrpoGuard)}


@dataclass(frozen=True)
class AlgorithmSettings:
    """The algorithm."""

    algorithm: str = key("train.algorithm", Opd.name, choices=tuple(ALGORITHMS))
    """One of "opd", on-policy distillation from the teachers; "sft", supervised on the teachers' samples; or, without
    teachers, from rewards: "nft" (DiffusionNFT), "grpo" (Flow-GRPO), "grpo_guard" (GRPO-Guard)."""


__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmSettings"]
