"""ImageReward's BLIP as transformers knows it: names of the tensors, and configurations read from their shapes.

Source: BLIP's `VisionTransformer` and `BertModel` (`med.py`), as they are in THUDM/ImageReward.
"""

import re

from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig

from diffusionopd.rewards.weights import StateDict, count_blocks, count_heads, patch_grid, renamed

HEAD_WIDTH = 64
"""Channels of an attention head, in both parts: 16 heads of 1024 and 12 of 768 (transformers' default is 8)."""

_PARTS = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
_UNUSED = re.compile(r"blip\.(vision|text)_proj\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
"""Projections of BLIP's contrastive loss, and a constant; the score reads neither."""

_VISION = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.(\d+)\.": r"encoder.layers.\1.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}


def split_parts(state: StateDict) -> tuple[StateDict, StateDict, StateDict]:
    """The tensors of `BlipVisionModel`, of `BlipTextModel` and of the head, under their names.

    Raises:
        ValueError: a tensor that belongs to none of them.
    """
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in _PARTS}
    for key, value in state.items():
        if not _UNUSED.fullmatch(key):
            prefix = next((prefix for prefix in _PARTS if key.startswith(prefix)), None)
            if prefix is None:
                raise ValueError(f"unexpected entry '{key}'")
            parts[prefix][key.removeprefix(prefix)] = value
    vision, text, head = parts.values()
    return {renamed(key, _VISION): value for key, value in vision.items()}, text, head


def read_vision_config(vision: StateDict) -> BlipVisionConfig:
    """The configuration of a `BlipVisionModel` with these tensors."""
    width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=count_blocks(vision, "encoder.layers."),
        num_attention_heads=count_heads(width, HEAD_WIDTH),
        image_size=patch_grid(vision["embeddings.position_embedding"].shape[1], patch),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # timm's; transformers' default is 1e-5
    )


def read_text_config(text: StateDict) -> BlipTextConfig:
    """The configuration of a `BlipTextModel` with these tensors. `is_decoder` is what gives it cross-attention."""
    vocabulary, width = text["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=text["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(text["encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=count_blocks(text, "encoder.layer."),
        num_attention_heads=count_heads(width, HEAD_WIDTH),
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,
    )
