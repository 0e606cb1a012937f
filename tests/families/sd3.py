"""SD3 of the tiny world's size: two CLIPs and T5, dual attention. Its runs are those of all other tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionopd.models.backbone import CLASSIFIER_FREE
from diffusionopd.tiny import models

from .common import Case, randomised


def build(folder: Path) -> None:
    """Write the pipeline's folder."""
    pipeline = models.pipeline(models.autoencoder(0), 0)
    randomised(pipeline.transformer)
    pipeline.save_pretrained(folder)


def stock(pipe: Any, x: Tensor, guidance: float, common: dict[str, Any]) -> Tensor:
    """See :class:`Case`."""
    return pipe(latents=x, guidance_scale=guidance, **common).images


CASE = Case(
    "sd3", build, stock, resolution=64, length=14, variants=(("transformer", {}, (CLASSIFIER_FREE, 40, 4.5)),)
)  # fmt: skip


def original_transformer(transformer: Any) -> dict[str, Tensor]:
    """Its tensors under the names of the original code."""
    state, result = transformer.state_dict(), {}
    last = transformer.config.num_layers - 1
    swap = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")  # scale and shift
    x, context, embed = ".x_block.", ".context_block.", "time_text_embed."
    renamed = {
        "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj",
        f"{embed}timestep_embedder.linear_1": "t_embedder.mlp.0", f"{embed}text_embedder.linear_1": "y_embedder.mlp.0",
        f"{embed}timestep_embedder.linear_2": "t_embedder.mlp.2", f"{embed}text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
        "transformer_blocks": "joint_blocks",
        ".attn.norm_added_": f"{context}attn.ln_", ".attn.norm_": f"{x}attn.ln_", ".attn2.norm_": f"{x}attn2.ln_",
        ".attn.to_out.0": f"{x}attn.proj", ".attn2.to_out.0": f"{x}attn2.proj",
        ".attn.to_add_out": f"{context}attn.proj",
        ".norm1.linear": f"{x}adaLN_modulation.1", ".norm1_context.linear": f"{context}adaLN_modulation.1",
        ".ff.net.0.proj": f"{x}mlp.fc1", ".ff_context.net.0.proj": f"{context}mlp.fc1",
        ".ff.net.2": f"{x}mlp.fc2", ".ff_context.net.2": f"{context}mlp.fc2",
        ".attn.to_q": f"{x}attn.qkv", ".attn2.to_q": f"{x}attn2.qkv", ".attn.add_q_proj": f"{context}attn.qkv",
    }  # fmt: skip
    for name, tensor in state.items():
        if any(part in name for part in ("to_k", "to_v", "add_k_proj", "add_v_proj")):
            continue
        if any(part in name for part in ("to_q", "add_q_proj")):
            thirds = [name.replace("to_q", f"to_{x}").replace("add_q_proj", f"add_{x}_proj") for x in "qkv"]
            tensor = torch.cat([state[third] for third in thirds])
        if name.startswith(swap):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for old, new in renamed.items():
            name = name.replace(old, new)
        result[name] = tensor
    return result


def original_vae(vae: Any) -> dict[str, Tensor]:
    """Likewise."""
    result, last = {}, len(vae.config.block_out_channels) - 1
    for name, tensor in vae.state_dict().items():
        for i in range(last + 1):
            name = name.replace(f"up_blocks.{i}.", f"up.{last - i}.").replace(f"down_blocks.{i}.", f"down.{i}.")
        for old, new in (
            (".resnets.", ".block."), ("mid_block.block.0", "mid.block_1"), ("mid_block.block.1", "mid.block_2"),
            (".downsamplers.0.", ".downsample."), (".upsamplers.0.", ".upsample."), ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
        ):  # fmt: skip
            name = name.replace(old, new)
        result[name] = tensor
    return result
