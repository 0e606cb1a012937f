"""A round as the upstream release schedules it, for comparison: what it does that costs time, and nothing else of it.

Three passes (rollout, teacher on every state, training); the transformer held in float32 and run under autocast on a
GPU; text encoders run for every batch and stay in memory; the layers of diffusers and PEFT as they come, adapters
switched by ``set_adapter``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks.three_pass import three_pass
from benchmarks.world import World
from diffusionopd.models.conditions import NEGATIVE
from diffusionopd.models.fused import FusedLoraLinear, FusedRMSNorm
from diffusionopd.models.lora import Adapters

# The published sizes of SD3's text encoders: CLIP ViT-L/14, CLIP ViT-bigG/14, T5 v1.1 XXL.
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}


def restore_layers(transformer: nn.Module) -> None:
    """The stock layers of diffusers and PEFT in the place of the fused ones, with the same parameters."""
    for parent in list(transformer.modules()):
        if isinstance(parent, FusedLoraLinear):
            parent.__class__ = Linear
        for name, norm in parent.named_children():
            if isinstance(norm, FusedRMSNorm):
                stock = RMSNorm(norm.normalized_shape, eps=norm.eps)
                stock.weight = norm.weight
                setattr(parent, name, stock)


class PeftSwitching(Adapters):
    """Adapters switched as PEFT does it: a walk over all layers and their ``requires_grad`` flags."""

    def use(self, name: str | None) -> None:
        """See :meth:`Adapters.use`."""
        for layer in self.transformer.modules():
            if isinstance(layer, LoraLayer):
                layer.enable_adapters(name is not None)
                if name is not None:
                    layer.set_adapter(name)


def upstream_round(world: World) -> Callable[[], None]:
    """Build it on a model of its own."""
    algorithm, batches = world.setup(dtype=torch.float32, adapters=PeftSwitching, fused_optimizer=False)
    backbone = algorithm.policies.backbone
    restore_layers(backbone.transformer)
    if backbone.device.type == "cuda":  # the backbone itself uses autocast for a base in half precision only
        backbone._autocast = partial(torch.autocast, "cuda", world.half)  # type: ignore[method-assign]
    encode = _text_encoding(world)

    def round_() -> None:
        for task, batch in enumerate(batches):
            encode(task, len(batch.rows))
        three_pass(algorithm, batches)
        algorithm.optimizer.step()

    return round_


def _text_encoding(world: World) -> Callable[[int, int], object]:
    """Encodes a batch of a task's prompt, and the negative one; nothing with random weights unless asked for."""
    args = world.args
    if not args.random:
        encoder = world.text_encoder()
        return lambda task, size: (encoder([world.prompts[task]] * size), encoder([NEGATIVE]))
    if not args.text_encoders:
        return lambda task, size: None
    with torch.device(args.device):  # 5.6 B parameters
        clips = [CLIPTextConfig(**size, projection_dim=size["hidden_size"]) for size in (CLIP_L, CLIP_G)]
        t5 = T5EncoderModel(T5Config(**T5_XXL, feed_forward_proj="gated-gelu"))
        encoders = [*map(CLIPTextModelWithProjection, clips), t5]
    encoders = [encoder.to(world.half).eval() for encoder in encoders]

    @torch.no_grad()
    def encode(task: int, size: int) -> list[Tensor]:
        ids = torch.ones(size + 1, 128, dtype=torch.long, device=args.device)
        return [encoder(ids[:, :length])[0] for encoder, length in zip(encoders, (77, 77, 128), strict=True)]

    return encode
