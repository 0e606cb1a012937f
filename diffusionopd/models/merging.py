"""Merging LoRAs without training: the sum of their effects (task arithmetic), TIES and DARE, as one LoRA again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.utils import merge_utils
from torch import Tensor

from diffusionopd.models.lora_files import LoraWeights

METHODS = ("sum", "ties", "dare")
EXACT = 10**9
"""A rank at which nothing is cut."""
DENSITY = 0.5
"""The share of its values that TIES and DARE keep of each LoRA."""


@dataclass(frozen=True)
class Merged:
    """A merge of several LoRAs, with alpha = rank: it adds ``B A``."""

    weights: LoraWeights
    lost: dict[str, float]  # by module, the share of the squared norm that the rank cut off

    def describe(self) -> str:
        """What was lost, for people."""
        rank, worst = max(a.shape[0] for a in self.weights.a.values()), max(self.lost, key=self.lost.__getitem__)
        mean, most = sum(self.lost.values()) / len(self.lost), self.lost[worst]
        return f"rank {rank}; the cut loses {mean:.2%} of a module's energy on average, at most {most:.2%} ({worst})"


def merge(loras: Sequence[LoraWeights], rank: int, method: str = "sum") -> Merged:
    """The LoRA of at most ``rank`` nearest to the merge of ``loras``, module by module, in the Frobenius norm.

    ``sum``: ``sum_i dW_i``, exact where the ranks add up to at most ``rank``. ``ties`` (arXiv 2306.01708) keeps
    the largest values of each, elects signs and averages those that agree; ``dare`` (arXiv 2311.03099) drops values at
    random, rescales and sums; both by PEFT's functions, at :data:`DENSITY`, the same at every call. A module that only
    some adapt is merged from those.
    """
    a, b, lost = {}, {}, {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in sorted({name for lora in loras for name in lora.a}):
            parts = [
                (lora.b[module].double() * lora.scale_of(module), lora.a[module].double())
                for lora in loras
                if module in lora.a
            ]
            if method == "sum":
                b[module], a[module], lost[module] = _cut_product(parts, rank)
            else:
                deltas, ones = [b_i @ a_i for b_i, a_i in parts], torch.ones(len(parts), dtype=torch.float64)
                combined = (merge_utils.ties if method == "ties" else merge_utils.dare_linear)(deltas, ones, DENSITY)
                u, s, vh = torch.linalg.svd(combined, full_matrices=False)
                b[module], a[module], lost[module] = _cut(u, s, vh, rank)
    source = f"the {method} of {', '.join(lora.source for lora in loras)}"
    alpha = {module: float(factor.shape[0]) for module, factor in a.items()}
    return Merged(LoraWeights(source, a, b, alpha), lost)


def _cut_product(parts: Sequence[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor, float]:
    """:func:`_cut` of ``sum B_i A_i``, by the QR decompositions of the stacked factors: never a full matrix."""
    q_b, r_b = torch.linalg.qr(torch.cat([b for b, _ in parts], dim=1))
    q_a, r_a = torch.linalg.qr(torch.cat([a for _, a in parts]).T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    return _cut(q_b @ u, s, vh @ q_a.T, rank)


def _cut(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The first ``rank`` components as balanced ``B [out, r]`` and ``A [r, in]``, and the share that is lost."""
    root, energy = s[:rank].sqrt(), s.square().sum()
    lost = (s[rank:].square().sum() / energy).item() if energy > 0 else 0.0
    return (u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float(), lost
