"""open_clip's CLIP as transformers knows it: names of the tensors, and a configuration read from their shapes.

Source: open_clip's `VisionTransformer` and `CLIP`, as they are in HPSv2's repository (tgxs002/HPSv2).
"""

from torch import Tensor
from transformers import CLIPConfig

from diffusionopd.rewards.weights import StateDict, count_blocks, count_heads, patch_grid, renamed

VISION_HEAD_WIDTH = 80
TEXT_HEAD_WIDTH = 64
"""Channels of an attention head in open_clip's ViT-H-14: the only sizes that no tensor's shape tells."""

_NAMES = {
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",  # sic
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
}
_TRANSPOSED = ("visual.proj", "text_projection")
"""open_clip multiplies by these from the right, without a linear layer."""


def to_transformers(state: StateDict) -> StateDict:
    """The tensors under the names of `CLIPModel`; one that open_clip's CLIP does not have keeps its own."""
    mapped: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, joint, kind = key.partition("attn.in_proj_")
        if joint:  # queries, keys and values are one tensor in open_clip and three here
            for name, third in zip("qkv", value.chunk(3), strict=True):
                mapped[renamed(f"{stem}self_attn.{name}_proj.{kind}", _NAMES)] = third
        elif key != "attn_mask":  # the causal mask, which old versions of open_clip saved
            mapped[renamed(key, _NAMES)] = value.T.contiguous() if key in _TRANSPOSED else value
    return mapped


def read_config(state: StateDict) -> CLIPConfig:
    """The configuration of a CLIP with these (open_clip's) tensors; EOT is the last token of the vocabulary."""
    width, _, patch, _ = state["visual.conv1.weight"].shape
    vocabulary, text_width = state["token_embedding.weight"].shape
    vision = {
        "hidden_size": width,
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": count_blocks(state, "visual.transformer.resblocks."),
        "num_attention_heads": count_heads(width, VISION_HEAD_WIDTH),
        "image_size": patch_grid(len(state["visual.positional_embedding"]), patch),
        "patch_size": patch,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": count_blocks(state, "transformer.resblocks."),
        "num_attention_heads": count_heads(text_width, TEXT_HEAD_WIDTH),
        "max_position_embeddings": len(state["positional_embedding"]),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_act": "gelu",
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=state["text_projection"].shape[1])
