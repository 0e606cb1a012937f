"""Layers of the transformer that do the same in fewer kernels: RMS norms and LoRAs.

A round of SD3.5-Medium at a few images is bound by launches, of which the stock layers make many: eight a norm,
seven a LoRA, where one and four do (``docs/performance.md`` has the counts). Numbers are the stock layers' to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn


class FusedRMSNorm(nn.RMSNorm):
    """torch's own, one kernel on a GPU. It computes in float32 whatever it is given.

    Autocast would widen its input and its output, each by a kernel of its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in the dtype of ``x``."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def fuse_norms(transformer: nn.Module) -> None:
    """Replace diffusers' RMS norms, in place; the parameters stay the same objects under the same names."""
    for parent in list(transformer.modules()):
        for name, norm in parent.named_children():
            if type(norm) is RMSNorm and norm.weight is not None and norm.bias is None:
                fused = FusedRMSNorm(tuple(norm.dim), eps=norm.eps, device="meta")
                fused.weight = norm.weight
                setattr(parent, name, fused.train(norm.training))


class Chosen(NamedTuple):
    """Which of the adapters side by side the samples of a forward have."""

    samples: int
    adapters: Tensor  # on the device, their numbers; for consecutive groups of samples of one size


class FusedLoraLinear(Linear):
    """PEFT's LoRA layer with scaling and sum inside the second product: ``W x + b + s B (A x)``.

    It is PEFT's in every other respect, so that loading, saving and merging find what they expect.
    """

    stacked: tuple[Tensor, Tensor] | None = None
    """Of adapters side by side, ``A`` ``[n, r, in]`` and scaled ``B`` ``[n, r, out]``, ranks filled up with zeros."""
    chosen: Sequence[Chosen] = ()
    """Which of them each sample has, if any; one list that all layers share."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in]`` to ``[..., out]``, with the adapters in use that this layer has: one, or none; or with
        one of those side by side for each sample, the first dimension."""
        rows, device = x.flatten(0, -2), x.device.type
        if torch.is_autocast_enabled(device):  # which would narrow the same rows for each product
            rows = rows.to(torch.get_autocast_dtype(device))
        y = self.base_layer(rows)
        if self.chosen and self.stacked is not None:
            (chosen,) = self.chosen
            if len(x) != chosen.samples:
                raise ValueError(
                    f"a layer is given {tuple(x.shape)} for {chosen.samples} samples, so that they cannot have a LoRA "
                    "each: set --config.train.tasks_per_pass=1"
                )
            a, b = (part.index_select(0, chosen.adapters) for part in self.stacked)
            groups = rows.unflatten(0, (len(a), -1))
            y.unflatten(0, (len(a), -1)).baddbmm_(torch.bmm(groups, a.mT), b)
        for name in self._active_adapter:
            if name in self.lora_A:
                a, b = self.lora_A[name].weight, self.lora_B[name].weight
                y = torch.addmm(y, nn.functional.linear(rows, a), b.t(), alpha=self.scaling[name])
        return y.unflatten(0, x.shape[:-1])


def fuse_lora(layer: LoraLayer) -> None:
    """Make a layer that PEFT injected a :class:`FusedLoraLinear`, in place; other kinds of layers stay as they are."""
    if type(layer) is Linear:
        layer.__class__ = FusedLoraLinear
