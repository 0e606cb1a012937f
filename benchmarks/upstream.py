"""A round as the upstream release schedules it, for comparison: what it does that costs time, and nothing else of it.

Three passes (rollout, teacher on every state, training); the transformer held in float32 and run under autocast on a
GPU; text encoders, where the model has any, run for every batch and stay in memory; the layers of diffusers and PEFT as
they come, adapters switched by ``set_adapter``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from benchmarks.three_pass import three_pass
from benchmarks.world import World
from diffusionopd.models.backbone import Backbone
from diffusionopd.models.conditions import NEGATIVE
from diffusionopd.models.fused import FusedLoraLinear
from diffusionopd.models.lora import Adapters


def restore_layers(transformer: nn.Module) -> None:
    """The stock layers of diffusers and PEFT in the place of the fused ones, with the same parameters."""
    for parent in list(transformer.modules()):
        if isinstance(parent, FusedLoraLinear):
            parent.__class__ = Linear
        for name, norm in parent.named_children():
            if type(norm) is nn.RMSNorm:
                stock = RMSNorm(norm.normalized_shape, eps=norm.eps)
                stock.weight = norm.weight
                setattr(parent, name, stock)


def stock(backbone: Backbone) -> None:
    """:func:`restore_layers`, and on a GPU the transformer under autocast, as LoRAs in float32 need it there."""
    restore_layers(backbone.transformer)
    if backbone.device.type == "cuda":
        forward = backbone.transformer.forward
        backbone.transformer.forward = torch.autocast("cuda", torch.bfloat16)(forward)


class PeftSwitching(Adapters):
    """Adapters switched as PEFT does it: a walk over all layers and their ``requires_grad`` flags, at each change."""

    in_use: str | None = ""

    def use(self, name: str | None) -> None:
        """See :meth:`Adapters.use`."""
        if name == self.in_use:
            return
        self.in_use = name
        for layer in self.transformer.modules():
            if isinstance(layer, LoraLayer):
                layer.enable_adapters(name is not None)
                if name is not None:
                    layer.set_adapter(name)


def upstream_round(world: World) -> Callable[[], None]:
    """Build it on a model of its own."""
    algorithm, batches = world.setup(dtype=torch.float32, adapters=PeftSwitching, fused_optimizer=False)
    backbone = algorithm.policies.backbone
    stock(backbone)
    encoder = None if world.args.random else world.text_encoder()

    def round_() -> None:
        for prompt, batch in zip(cycle(world.prompts), batches, strict=False):
            if encoder:
                encoder([prompt] * len(batch.rows))
                encoder([NEGATIVE])
        three_pass(algorithm, batches)
        algorithm.optimizer.step()

    return round_
