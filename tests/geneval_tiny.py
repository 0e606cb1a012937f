"""A tiny Mask2Former of random weights, and the same as an mmdetection checkpoint."""

import re
from pathlib import Path

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from diffusionopd.rewards.geneval import mask2former
from diffusionopd.rewards.geneval.classes import COCO
from diffusionopd.rewards.geneval.convert import UNUSED


def tiny_config() -> Mask2FormerConfig:
    stages = [f"stage{i}" for i in range(1, 5)]
    swin = SwinConfig(embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 2], out_features=stages)
    return Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=48,
        dim_feedforward=40, encoder_layers=2, decoder_layers=3, num_attention_heads=2, num_queries=12,
        id2label=dict(enumerate(COCO)),
    )  # fmt: skip


def tiny_model(seed: int = 0) -> Mask2FormerForUniversalSegmentation:
    """Every parameter random, and class logits far apart: some detections are sure."""
    torch.manual_seed(seed)
    model = Mask2FormerForUniversalSegmentation(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.class_predictor.weight.mul_(20)
    return model.eval()


_ENCODER, _PIXELS = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder"
_QUERIES = "model.transformer_module"
NAMES = {
    f"{_ENCODER}.swin.embeddings.patch_embeddings.projection": "backbone.patch_embed.projection",
    f"{_ENCODER}.swin.embeddings.norm": "backbone.patch_embed.norm",
    f"{_ENCODER}.swin.encoder.layers": "backbone.stages",
    **{f"{_ENCODER}.hidden_states_norms.stage{i + 1}": f"backbone.norm{i}" for i in range(4)},
    "attention.o_proj": "attn.w_msa.proj",
    "attention.relative_position_bias.relative_position_bias_table": "attn.w_msa.relative_position_bias_table",
    "attention.q_proj": "attn.w_msa.qkv",
    "layernorm_before": "norm1", "layernorm_after": "norm2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1",
    f"{_PIXELS}.level_embed": "panoptic_head.pixel_decoder.level_encoding.weight",
    f"{_PIXELS}.mask_projection": "panoptic_head.pixel_decoder.mask_feature",
    f"{_PIXELS}.adapter_1.0": "panoptic_head.pixel_decoder.lateral_convs.0.conv",
    f"{_PIXELS}.adapter_1.1": "panoptic_head.pixel_decoder.lateral_convs.0.gn",
    f"{_PIXELS}.layer_1.0": "panoptic_head.pixel_decoder.output_convs.0.conv",
    f"{_PIXELS}.layer_1.1": "panoptic_head.pixel_decoder.output_convs.0.gn",
    r"input_projections.(\d).0": r"input_convs.\1.conv", r"input_projections.(\d).1": r"input_convs.\1.gn",
    r"(encoder.layers.\d+).self_attn_layer_norm": r"\1.norms.0",
    r"(encoder.layers.\d+).self_attn": r"\1.attentions.0",
    r"(encoder.layers.\d+).final_layer_norm": r"\1.norms.1",
    _PIXELS: "panoptic_head.pixel_decoder",
    r"(decoder.layers.\d+).cross_attn_layer_norm": r"\1.norms.0",
    r"(decoder.layers.\d+).self_attn_layer_norm": r"\1.norms.1",
    r"(decoder.layers.\d+).final_layer_norm": r"\1.norms.2",
    r"(decoder.layers.\d+).cross_attn": r"\1.attentions.0.attn",
    r"(decoder.layers.\d+).self_attn.q_proj.": r"\1.attentions.1.attn.in_proj_",
    r"(decoder.layers.\d+).self_attn": r"\1.attentions.1.attn",
    r"\.fc1": ".ffns.0.layers.0.0", r"\.fc2": ".ffns.0.layers.1",
    f"{_QUERIES}.decoder.layernorm": "panoptic_head.transformer_decoder.post_norm",
    **{f"{_QUERIES}.decoder.mask_predictor.mask_embedder.{i}.0": f"panoptic_head.mask_embed.{2 * i}" for i in range(3)},
    f"{_QUERIES}.decoder": "panoptic_head.transformer_decoder",
    f"{_QUERIES}.queries_embedder": "panoptic_head.query_embed",
    f"{_QUERIES}.queries_features": "panoptic_head.query_feat",
    f"{_QUERIES}.level_embed": "panoptic_head.level_embed",
    "^class_predictor": "panoptic_head.cls_embed",
}  # fmt: skip
"""transformers' name -> mmdetection's, one rule after the other."""


def mmdet_state(model: Mask2FormerForUniversalSegmentation) -> dict[str, torch.Tensor]:
    """The model's weights as mmdetection 2 has them."""
    state, result = model.state_dict(), {}
    for key, value in state.items():
        joint = key.startswith("model.transformer_module") or "swin" in key  # attentions with q, k and v in one
        if key in UNUSED or (joint and re.search(r"\.[kv]_proj\.", key)):
            continue
        if joint and ".q_proj." in key:
            value = torch.cat([state[key.replace("q_proj", f"{name}_proj")] for name in "qkv"])
        if "downsample" in key:
            value = _unfold_order(value)
        for pattern, name in NAMES.items():
            key = re.sub(pattern, name, key)
        result[key] = value.clone()
        if key.endswith("relative_position_bias_table"):
            result[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    return result


def _unfold_order(value: torch.Tensor) -> torch.Tensor:
    """From the channels of the pixels (0, 0), (1, 0), (0, 1), (1, 1) to `nn.Unfold`'s order, channel by channel."""
    channels = value.shape[-1] // 4
    return torch.stack(
        [value[..., block * channels + channel] for channel in range(channels) for block in (0, 2, 1, 3)], dim=-1
    )


def see_small(monkeypatch) -> None:
    """Images are enlarged to 96 pixels instead of 800: the same code, a hundredth of the time."""
    monkeypatch.setattr(mask2former, "LONG_SIDE", 160)
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 96)


def save_checkpoint(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """As mmcv writes it, description and all."""
    meta = {"mmdet_version": "2.24.1", "CLASSES": tuple(COCO), "epoch": 50, "hook_msgs": {}, "config": "model = dict()"}
    torch.save({"meta": meta, "state_dict": state}, path)
    return path
