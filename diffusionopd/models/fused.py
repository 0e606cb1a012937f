"""Layers of the transformer that do the same in fewer kernels: RMS norms and LoRAs.

A round of SD3.5-Medium at a few images is bound by launches, of which the stock layers make many: eight a norm,
seven a LoRA, where one and four do (``docs/performance.md`` has the counts). Numbers are the stock layers' to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn


def fuse_norms(transformer: nn.Module) -> None:
    """Replace diffusers' RMS norms by torch's, one kernel on a GPU, in place.

    The parameters stay the same objects under the same names.
    """
    for parent in list(transformer.modules()):
        for name, norm in parent.named_children():
            if type(norm) is RMSNorm and norm.weight is not None and norm.bias is None:
                fused = nn.RMSNorm(tuple(norm.dim), eps=norm.eps, device="meta")
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

    narrowed: dict[str, tuple[Tensor, Tensor]] = {}
    """On a base in half precision: ``A`` and ``B`` of adapters in its dtype, made before each forward that has them."""
    stacked: tuple[Tensor, Tensor] | None = None
    """Of adapters side by side, ``A`` ``[n, r, in]`` and scaled ``B`` ``[n, r, out]``, ranks filled up with zeros."""
    chosen: Sequence[Chosen] = ()
    """Which of them each sample has, if any; one list that all layers share."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in]`` to ``[..., out]``, with the adapters in use that this layer has: one, or none; or with
        one of those side by side for each sample, the first dimension."""
        rows = x.flatten(0, -2)
        y = self.base_layer(rows)
        if self.chosen and self.stacked is not None:
            (chosen,) = self.chosen
            if len(x) != chosen.samples:
                raise ValueError(
                    f"a layer is given {tuple(x.shape)} for {chosen.samples} samples, so that they cannot have a LoRA "
                    "each, which its family does not say: set --config.train.tasks_per_pass=1"
                )
            a, b = (part.index_select(0, chosen.adapters) for part in self.stacked)
            groups = rows.unflatten(0, (len(a), -1))
            y = _plus(y.unflatten(0, (len(a), -1)), torch.bmm(groups, a.mT), b).flatten(0, 1)
        for name in self._active_adapter:
            if name in self.lora_A:
                a, b = self.narrowed.get(name) or (self.lora_A[name].weight, self.lora_B[name].weight)
                y = _plus(y, nn.functional.linear(rows, a), b.t(), self.scaling[name])
        return y.unflatten(0, x.shape[:-1])


def _plus(y: Tensor, h: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """``y + scale * h b``, in place of ``y``; compiled code, which would copy ``y`` first, adds in the kernel that is
    next to read it."""
    if torch.compiler.is_compiling():
        return y + scale * (h @ b)
    return (torch.Tensor.addmm_ if y.ndim == 2 else torch.Tensor.baddbmm_)(y, h, b, alpha=scale)


class _Narrowed(torch.autograd.Function):
    """Weights in another dtype, all in a few kernels, and their gradients in float32 likewise."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # what the loss does not reach has no gradient
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        reached = [grad for grad in grads if grad is not None]
        wide = [torch.empty_like(grad, dtype=torch.float32) for grad in reached]
        if wide:
            torch._foreach_copy_(wide, reached)
        found = iter(wide)
        return None, *(None if grad is None else next(found) for grad in grads)


def narrow(layers: Sequence[FusedLoraLinear], name: str) -> None:
    """Give layers on a base in half precision an adapter's float32 weights in its dtype, as they are now.

    They carry gradients to the weights where the caller has these enabled. Each layer would cast its own twice in a
    forward and a backward: 764 kernels for SD3.5-Medium.
    """
    weights = [part[name].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
    copies = iter(_Narrowed.apply(layers[0].get_base_layer().weight.dtype, *weights))
    for layer in layers:
        layer.narrowed[name] = next(copies), next(copies)


def fuse_lora(layer: LoraLayer) -> None:
    """Make a layer that PEFT injected a :class:`FusedLoraLinear`, in place; other kinds of layers stay as they are."""
    if type(layer) is Linear:
        layer.__class__ = FusedLoraLinear
        layer.narrowed = {}
