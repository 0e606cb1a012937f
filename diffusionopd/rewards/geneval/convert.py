"""The official detector's weights, an mmdetection checkpoint, as a transformers Mask2Former.

mmdetection 2 names the parts after its own modules, keeps query, key and value of an attention in one matrix, and
merges patches in another order of channels; the numbers are the same. Checked key by key against the model.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from diffusionopd.rewards.geneval.classes import COCO
from diffusionopd.rewards.weights import load_official, renamed

CHECKPOINT = "reward_ckpts/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"

_PIXELS, _QUERIES = "model.pixel_level_module.", "model.transformer_module."

UNUSED = frozenset(
    (
        "criterion.empty_weight",  # of the training loss
        f"{_PIXELS}encoder.swin.layernorm.weight",  # the pixel decoder takes the stages' own norms
        f"{_PIXELS}encoder.swin.layernorm.bias",
    )
)
"""Entries of the transformers model that no prediction depends on, and mmdetection does not have."""


def _from_one(prefix: str) -> Any:
    """Replacement that counts from 1 what mmdetection counts from 0."""
    return lambda match: f"{prefix}{int(match[1]) + 1}"


_NAMES: dict[str, Any] = {
    # The encoder, a Swin transformer
    r"^backbone\.norm(\d)": _from_one(f"{_PIXELS}encoder.hidden_states_norms.stage"),
    r"^backbone\.patch_embed\.projection": f"{_PIXELS}encoder.swin.embeddings.patch_embeddings.projection",
    r"^backbone\.patch_embed\.norm": f"{_PIXELS}encoder.swin.embeddings.norm",
    r"^backbone\.stages\.": f"{_PIXELS}encoder.swin.encoder.layers.",
    r"attn\.w_msa\.qkv\.": "attention.{}_proj.",
    r"attn\.w_msa\.proj": "attention.o_proj",
    r"attn\.w_msa\.(relative_position_bias)_table": r"attention.\1.\1_table",
    r"(blocks\.\d+)\.norm1": r"\1.layernorm_before",
    r"(blocks\.\d+)\.norm2": r"\1.layernorm_after",
    r"(blocks\.\d+)\.ffn\.layers\.0\.0": r"\1.mlp.fc1",
    r"(blocks\.\d+)\.ffn\.layers\.1": r"\1.mlp.fc2",
    # The decoder of pixels
    r"^panoptic_head\.pixel_decoder\.": f"{_PIXELS}decoder.",
    r"\.input_convs\.(\d)\.conv": r".input_projections.\1.0",
    r"\.input_convs\.(\d)\.gn": r".input_projections.\1.1",
    r"(?<=\.)lateral_convs\.(\d)": _from_one("adapter_"),
    r"(?<=\.)output_convs\.(\d)": _from_one("layer_"),
    r"\.(adapter_\d|layer_\d)\.conv": r".\1.0",
    r"\.(adapter_\d|layer_\d)\.gn": r".\1.1",
    r"\.level_encoding\.weight": ".level_embed",
    r"\.mask_feature\.": ".mask_projection.",
    r"(encoder\.layers\.\d+)\.attentions\.0": r"\1.self_attn",
    r"(encoder\.layers\.\d+)\.norms\.0": r"\1.self_attn_layer_norm",
    r"(encoder\.layers\.\d+)\.norms\.1": r"\1.final_layer_norm",
    # The decoder of queries; its masked cross-attention, `attentions.0`, has one matrix in transformers too
    r"^panoptic_head\.transformer_decoder\.post_norm": f"{_QUERIES}decoder.layernorm",
    r"^panoptic_head\.transformer_decoder\.": f"{_QUERIES}decoder.",
    r"attentions\.0\.attn": "cross_attn",
    r"attentions\.1\.attn\.in_proj_": "self_attn.{}_proj.",
    r"attentions\.1\.attn": "self_attn",
    r"norms\.0": "cross_attn_layer_norm",
    r"norms\.1": "self_attn_layer_norm",
    r"norms\.2": "final_layer_norm",
    r"ffns\.0\.layers\.0\.0": "fc1",  # of both decoders
    r"ffns\.0\.layers\.1": "fc2",
    r"^panoptic_head\.mask_embed\.(\d)": (  # its ReLUs are counted too
        lambda match: f"{_QUERIES}decoder.mask_predictor.mask_embedder.{int(match[1]) // 2}.0"
    ),
    r"^panoptic_head\.query_embed\.": f"{_QUERIES}queries_embedder.",
    r"^panoptic_head\.query_feat\.": f"{_QUERIES}queries_features.",
    r"^panoptic_head\.level_embed\.": f"{_QUERIES}level_embed.",
    r"^panoptic_head\.cls_embed\.": "class_predictor.",
}
"""mmdetection's names -> transformers'."""


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An mmdetection 2 state dict with transformers' names and layouts.

    `relative_position_index` is left out: both compute it from the window size.
    """
    used = {key: value for key, value in state.items() if not key.endswith("relative_position_index")}
    return renamed({key: _merge_order(value) if "downsample" in key else value for key, value in used.items()}, _NAMES)


def _merge_order(value: Tensor) -> Tensor:
    """Patch merging's last axis: from (channel, row, column) of the 2 x 2 patches to (column, row, channel)."""
    return value.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3)


def swin_small_config() -> Mask2FormerConfig:
    """Of mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco (mmdetection 2, configs/mask2former)."""
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    backbone = SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], out_features=stages)
    return Mask2FormerConfig(  # transformers counts the prediction before the 9 layers as one
        backbone_config=backbone, encoder_layers=6, decoder_layers=10, num_queries=100, id2label=dict(enumerate(COCO))
    )


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """The state dict in an mmdetection checkpoint, read as weights only. Raises `RewardError` as `load_official`."""
    return load_official("geneval", path, lambda file: dict(file["state_dict"]))


def convert(path: str) -> Mask2FormerForUniversalSegmentation:
    """The model in an mmdetection checkpoint.

    Raises:
        RewardError: as `load_official`; entries that are missing, unknown, or of another shape.
    """
    model = Mask2FormerForUniversalSegmentation(swin_small_config())
    kept = {name: value for name, value in model.state_dict().items() if name in UNUSED}
    load_official("geneval", path, lambda file: model.load_state_dict(kept | convert_state(file["state_dict"])))
    return model
