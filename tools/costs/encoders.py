"""FLOPs and parameters of what stands beside the transformer: the VAE's decoder and the text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def decoder_flops(vae: Mapping[str, Any], side: int) -> int:
    """FLOPs of decoding one picture of ``side`` x ``side`` latents by diffusers' ``AutoencoderKL``."""
    channels = list(reversed(vae["block_out_channels"]))
    latent, area = vae["latent_channels"], side**2
    total = _conv(area, latent, latent, 1) if vae["use_post_quant_conv"] else 0
    total += _conv(area, latent, channels[0], 3) + 2 * _resnet(area, channels[0], channels[0])
    if vae.get("mid_block_add_attention", True):
        total += 4 * _conv(area, channels[0], channels[0], 1) + 4 * area**2 * channels[0]
    before = channels[0]
    for level, now in enumerate(channels):
        total += _resnet(area, before, now) + vae["layers_per_block"] * _resnet(area, now, now)
        if level < len(channels) - 1:
            area *= 4
            total += _conv(area, now, now, 3)
        before = now
    return total + _conv(area, before, vae["out_channels"], 3)


def _conv(area: int, inputs: int, outputs: int, kernel: int) -> int:
    return 2 * area * inputs * outputs * kernel**2


def _resnet(area: int, inputs: int, outputs: int) -> int:
    shortcut = _conv(area, inputs, outputs, 1) if inputs != outputs else 0
    return _conv(area, inputs, outputs, 3) + _conv(area, outputs, outputs, 3) + shortcut


def decoder_workspace(vae: Mapping[str, Any], resolution: int, pictures: int) -> int:
    """Bytes of a float32 decode at its widest: the first norm at full size, its input, result and a copy."""
    widest = max(vae["block_out_channels"][:2])
    return 3 * 4 * widest * resolution**2 * pictures


def vae_parameters(vae: Mapping[str, Any]) -> int:
    """Parameters of encoder and decoder."""
    levels, layers, latent = list(vae["block_out_channels"]), vae["layers_per_block"], vae["latent_channels"]
    total = _count_half(levels, layers, 3, 2 * latent, resample=levels[:-1], vae=vae)
    down = list(reversed(levels))
    total += _count_half(down, layers + 1, latent, vae["out_channels"], resample=down[:-1], vae=vae)
    total += 2 * latent * (2 * latent + 1) if vae.get("use_quant_conv", vae["use_post_quant_conv"]) else 0
    return total + (latent * (latent + 1) if vae["use_post_quant_conv"] else 0)


def _count_half(
    levels: list[int], layers: int, inputs: int, outputs: int, resample: list[int], vae: Mapping[str, Any]
) -> int:
    """Parameters of an encoder (``levels`` as they are) or a decoder (reversed)."""
    encoder = inputs == 3
    middle = levels[-1] if encoder else levels[0]
    total = (9 * inputs + 1) * levels[0] + 2 * levels[-1] + (9 * levels[-1] + 1) * outputs
    total += 2 * _count_resnet(middle, middle)
    if vae.get("mid_block_add_attention", True):
        total += 4 * (middle + 1) * middle + 2 * middle
    before = levels[0]
    for now in levels:
        total += _count_resnet(before, now) + (layers - 1) * _count_resnet(now, now)
        before = now
    return total + sum((9 * width + 1) * width for width in resample)


def _count_resnet(inputs: int, outputs: int) -> int:
    norms_and_convs = 2 * inputs + (9 * inputs + 1) * outputs + 2 * outputs + (9 * outputs + 1) * outputs
    return norms_and_convs + ((inputs + 1) * outputs if inputs != outputs else 0)


def clip_flops(clip: Mapping[str, Any]) -> int:
    """FLOPs of encoding one prompt by a CLIP text model with its projection."""
    width, tokens = clip["hidden_size"], clip["max_position_embeddings"]
    layer = 2 * tokens * width * (4 * width + 2 * clip["intermediate_size"]) + 4 * tokens**2 * width
    return clip["num_hidden_layers"] * layer + 2 * width * clip["projection_dim"]


def t5_flops(t5: Mapping[str, Any], tokens: int) -> int:
    """FLOPs of encoding one prompt of ``tokens`` tokens by a T5 encoder."""
    width, inner = t5["d_model"], t5["d_kv"] * t5["num_heads"]
    feed_forward = (3 if t5.get("is_gated_act") else 2) * t5["d_ff"]
    return t5["num_layers"] * (2 * tokens * width * (4 * inner + feed_forward) + 4 * tokens**2 * inner)


def clip_parameters(clip: Mapping[str, Any]) -> int:
    """Parameters of a CLIP text model with its projection."""
    width, inner = clip["hidden_size"], clip["intermediate_size"]
    layer = 4 * (width + 1) * width + (width + 1) * inner + (inner + 1) * width + 4 * width
    embeddings = (clip["vocab_size"] + clip["max_position_embeddings"]) * width
    return clip["num_hidden_layers"] * layer + embeddings + 2 * width + width * clip["projection_dim"]


def t5_parameters(t5: Mapping[str, Any]) -> int:
    """Parameters of a T5 encoder."""
    width, inner = t5["d_model"], t5["d_kv"] * t5["num_heads"]
    feed_forward = (3 if t5.get("is_gated_act") else 2) * t5["d_ff"]
    layer = width * (4 * inner + feed_forward) + 2 * width
    positions = t5.get("relative_attention_num_buckets", 32) * t5["num_heads"]
    return t5["num_layers"] * layer + t5["vocab_size"] * width + width + positions
