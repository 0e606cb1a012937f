"""open_clip's CLIP as transformers knows it: names of the tensors, and a configuration read from their shapes.

Source: open_clip's `VisionTransformer` and `CLIP`, as they are in HPSv2's repository (tgxs002/HPSv2).
"""

from torch import Tensor
from transformers import CLIPConfig

from diffusionopd.rewards.weights import StateDict, count_blocks, count_heads, patch_grid

VISION_HEAD_WIDTH = 80
TEXT_HEAD_WIDTH = 64
"""Channels of an attention head in open_clip's ViT-H-14: the only sizes that no tensor's shape tells."""

_TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_SINGLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # sic
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
"""open_clip multiplies by these from the right, without a linear layer."""


def to_transformers(state: StateDict) -> StateDict:
    """The tensors under the names of `CLIPModel`. Raises `ValueError` for one that open_clip's CLIP does not have."""
    mapped: dict[str, Tensor] = {}
    for key, value in state.items():
        try:
            mapped.update(_renamed(key, value))
        except (KeyError, ValueError) as error:
            raise ValueError(f"unexpected entry '{key}'") from error
    return mapped


def _renamed(key: str, value: Tensor) -> StateDict:
    for theirs, ours in _TOWERS.items():
        if key.startswith(theirs):
            number, part = key.removeprefix(theirs).split(".", 1)
            return {f"{ours}{number}.{name}": tensor for name, tensor in _block_tensors(part, value).items()}
    if key in _TRANSPOSED:
        return {_TRANSPOSED[key]: value.T.contiguous()}
    if key == "attn_mask":  # the causal mask, which old versions of open_clip saved
        return {}
    return {_SINGLE[key]: value}


def _block_tensors(part: str, value: Tensor) -> StateDict:
    """One tensor of a residual block; queries, keys and values are one tensor in open_clip and three here."""
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        return {f"self_attn.{name}_proj.{kind}": third for name, third in zip("qkv", value.chunk(3), strict=True)}
    name, kind = part.rsplit(".", 1)
    return {f"{_BLOCK[name]}.{kind}": value}


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
