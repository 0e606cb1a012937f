"""A round as the upstream release schedules it, for comparison: what it does that costs time, and nothing else of it.

Three passes (rollout, teacher on every state, training); the transformer held in float32 and run under autocast on a
GPU; text encoders run for every batch and stay in memory; the layers of diffusers and PEFT as they come, adapters
switched by ``set_adapter``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks.three_pass import three_pass
from benchmarks.world import World, restore_layers, task_prompts
from diffusionopd.models.conditions import NEGATIVE
from diffusionopd.models.lora import Adapters

__all__ = ["restore_layers", "upstream_round"]

# The published sizes of SD3's text encoders: CLIP ViT-L/14, CLIP ViT-bigG/14, T5 v1.1 XXL.
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}


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
    setup = world.setup(dtype=torch.float32, adapters=PeftSwitching, fused_optimizer=False, stock=True)
    device = setup.backbone.device
    if device.type == "cuda":  # the backbone itself uses autocast for a base in half precision only
        setup.backbone._autocast = partial(torch.autocast, device.type, world.half)  # type: ignore[method-assign]
    encode = _encode(world)

    def round_() -> None:
        for task, batch in enumerate(setup.batches):
            encode(task, len(batch.rows))
        three_pass(setup.algorithm, setup.batches)
        setup.algorithm.optimizer.step()

    return round_


def _encode(world: World) -> Callable[[int, int], object]:
    """Encodes a batch of a task's prompt and the empty prompt; nothing with random weights unless asked for."""
    args = world.args
    if not args.random:
        encoder, prompts = world.text_encoder(), task_prompts(len(args.teachers))
        return lambda task, size: (encoder([prompts[task]] * size), encoder([NEGATIVE]))
    if not args.text_encoders:
        return lambda task, size: None
    encoders = random_text_encoders(args.device, world.half)

    @torch.no_grad()
    def run(task: int, size: int) -> list[Tensor]:
        ids = torch.ones(size + 1, 128, dtype=torch.long, device=args.device)
        return [encoder(ids[:, :length])[0] for encoder, length in encoders]

    return run


def random_text_encoders(device: str, dtype: torch.dtype) -> list[tuple[nn.Module, int]]:
    """SD3's three text encoders with random weights (5.6 B parameters), and the tokens that each of them reads."""
    with torch.device(device):
        clips = [
            CLIPTextModelWithProjection(CLIPTextConfig(**size, projection_dim=size["hidden_size"])).to(dtype)
            for size in (CLIP_L, CLIP_G)
        ]
        t5 = T5EncoderModel(T5Config(**T5_XXL, vocab_size=32128, feed_forward_proj="gated-gelu")).to(dtype)
    return [(clips[0].eval(), 77), (clips[1].eval(), 77), (t5.eval(), 128)]
