"""The official detector's weights, an mmdetection checkpoint, as a transformers Mask2Former.

mmdetection 2 names the parts after its own modules, keeps query, key and value of an attention in one matrix, and
merges patches in another order of channels; the numbers are the same. Checked key by key against the model.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from diffusionopd.rewards.base import RewardError
from diffusionopd.rewards.geneval.classes import COCO
from diffusionopd.rewards.weights import load_official, renamed

CHECKPOINT = "reward_ckpts/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
CONVERTED = "mask2former_swin-s-coco"
_SOURCE = "converted_from.json"

UNUSED = frozenset(
    (
        "criterion.empty_weight",  # of the training loss
        "model.pixel_level_module.encoder.swin.layernorm.weight",  # the pixel decoder takes the stages' own norms
        "model.pixel_level_module.encoder.swin.layernorm.bias",
    )
)
"""Entries of the transformers model that no prediction depends on, and mmdetection does not have."""

_ENCODER = "model.pixel_level_module.encoder."
_DECODER = "model.transformer_module.decoder."


def _shifted(prefix: str) -> Any:
    """Replacement that counts from 1 what mmdetection counts from 0."""
    return lambda match: f"{prefix}{int(match[1]) + 1}"


# mmdetection's names of a part -> its prefix in transformers, and what is named otherwise within it
_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    r"backbone\.(?=norm\d)": (_ENCODER, {r"^norm(\d)": _shifted("hidden_states_norms.stage")}),
    r"backbone\.(?=patch_embed)": (
        f"{_ENCODER}swin.embeddings.",
        {r"^patch_embed\.projection": "patch_embeddings.projection", r"^patch_embed\.norm": "norm"},
    ),
    r"backbone\.stages\.": (
        f"{_ENCODER}swin.encoder.layers.",
        {
            r"attn\.w_msa\.(query|key|value)\.": lambda match: f"attention.{match[1][0]}_proj.",
            r"attn\.w_msa\.proj": "attention.o_proj",
            r"attn\.w_msa\.(relative_position_bias)_table": r"attention.\1.\1_table",
            r"blocks\.(\d+)\.norm1": r"blocks.\1.layernorm_before",
            r"blocks\.(\d+)\.norm2": r"blocks.\1.layernorm_after",
            r"ffn\.layers\.0\.0": "mlp.fc1",
            r"ffn\.layers\.1": "mlp.fc2",
        },
    ),
    r"panoptic_head\.pixel_decoder\.": (
        "model.pixel_level_module.decoder.",
        {
            r"^input_convs\.(\d)\.conv": r"input_projections.\1.0",
            r"^input_convs\.(\d)\.gn": r"input_projections.\1.1",
            r"^lateral_convs\.(\d)": _shifted("adapter_"),
            r"^output_convs\.(\d)": _shifted("layer_"),
            r"^(adapter_\d|layer_\d)\.conv": r"\1.0",
            r"^(adapter_\d|layer_\d)\.gn": r"\1.1",
            r"^level_encoding\.weight": "level_embed",
            r"^mask_feature\.": "mask_projection.",
            r"attentions\.0\.": "self_attn.",
            r"ffns\.0\.layers\.0\.0": "fc1",
            r"ffns\.0\.layers\.1": "fc2",
            r"norms\.0": "self_attn_layer_norm",
            r"norms\.1": "final_layer_norm",
        },
    ),
    r"panoptic_head\.transformer_decoder\.": (
        _DECODER,
        {
            r"^post_norm": "layernorm",
            r"attentions\.0\.attn": "cross_attn",
            r"attentions\.1\.attn\.out_proj": "self_attn.out_proj",
            r"attentions\.1\.attn\.(query|key|value)\.": lambda match: f"self_attn.{match[1][0]}_proj.",
            r"ffns\.0\.layers\.0\.0": "fc1",
            r"ffns\.0\.layers\.1": "fc2",
            r"norms\.0": "cross_attn_layer_norm",
            r"norms\.1": "self_attn_layer_norm",
            r"norms\.2": "final_layer_norm",
        },
    ),
    r"panoptic_head\.(?=mask_embed)": (
        f"{_DECODER}mask_predictor.",
        {r"^mask_embed\.(\d)": lambda match: f"mask_embedder.{int(match[1]) // 2}.0"},  # ReLUs in between
    ),
    r"panoptic_head\.query_embed\.": ("model.transformer_module.queries_embedder.", {}),
    r"panoptic_head\.query_feat\.": ("model.transformer_module.queries_features.", {}),
    r"panoptic_head\.level_embed\.": ("model.transformer_module.level_embed.", {}),
    r"panoptic_head\.cls_embed\.": ("class_predictor.", {}),
}


def transformers_name(key: str) -> str:
    """transformers' name of an mmdetection entry; one that belongs to no part keeps its own."""
    for part, (prefix, rules) in _PARTS.items():
        if match := re.match(part, key):
            return prefix + renamed(key[match.end() :], rules)
    return key


def _split(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Query, key and value of a joint projection; other entries as they are.

    The masked cross-attention, `attentions.0` of the transformer decoder, stays joint in transformers too.
    """
    joint = re.search(r"w_msa\.qkv\.|attentions\.1\.attn\.in_proj_", key)
    if joint is None:
        yield key, value
        return
    stem = key[: joint.end()].removesuffix("qkv.").removesuffix("in_proj_")
    for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
        yield f"{stem}{name}.{key[joint.end() :]}", part


def _merge_order(value: Tensor) -> Tensor:
    """Patch merging's last axis: from (channel, row, column) of the 2 x 2 patches to (column, row, channel)."""
    return value.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3)


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An mmdetection 2 state dict with transformers' names and layouts.

    `relative_position_index` is left out: both compute it from the window size.
    """
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("relative_position_index"):
            continue
        if re.search(r"downsample\.(reduction|norm)\.", key):
            value = _merge_order(value)
        result |= {transformers_name(name): part.contiguous() for name, part in _split(key, value)}
    return result


def swin_small_config() -> Mask2FormerConfig:
    """Of mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco (mmdetection 2, configs/mask2former)."""
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    backbone = SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], out_features=stages)
    return Mask2FormerConfig(  # transformers counts the prediction before the 9 layers as one
        backbone_config=backbone, encoder_layers=6, decoder_layers=10, num_queries=100, id2label=dict(enumerate(COCO))
    )


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """The state dict in an mmdetection checkpoint, read as weights only. Raises `RewardError` as `load_official`."""
    return load_official("geneval", path, _state_of)


def _state_of(file: Any) -> dict[str, Tensor]:
    state = dict(file["state_dict"])
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError("its state_dict holds other things than tensors")
    return state


def convert(path: str, config: Mask2FormerConfig) -> Mask2FormerForUniversalSegmentation:
    """The model in an mmdetection checkpoint, with every entry accounted for.

    Raises:
        RewardError: as `load_official`; entries that are missing, unknown, or of another shape.
    """
    model = Mask2FormerForUniversalSegmentation(config)
    missing, unknown = load_official(
        "geneval", path, lambda file: model.load_state_dict(convert_state(_state_of(file)), strict=False)
    )
    check_entries(path, set(missing), set(unknown))
    return model


def check_entries(source: str, missing: set[str], unknown: set[str]) -> None:
    """Raises `RewardError` unless only `UNUSED` entries are missing and none is unknown."""
    for what, names in (("lacks", missing - UNUSED), ("has the unknown", unknown)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise RewardError(f"{source} is not the Mask2Former expected: it {what} {some} ({len(names)} in all)")


def converted_folder(checkpoint: str, config: Mask2FormerConfig | None = None) -> Path:
    """The folder with the checkpoint in transformers' format, beside it; made at the first call.

    Processes may race: each writes a folder of its own, one is renamed into place, the others are dropped.

    Args:
        checkpoint: the .pth file. It is not needed any more once the folder is there.
        config: of the model in it; default `swin_small_config()`.

    Raises:
        RewardError: as `convert`; the folder was made from another checkpoint, or cannot be written.
    """
    folder, source = Path(checkpoint).parent / CONVERTED, Path(checkpoint).name
    if not folder.is_dir():
        write_model(convert(checkpoint, config or swin_small_config()), source, folder)
    note = folder / _SOURCE
    found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else "an unknown file"
    if found != source:
        raise RewardError(f"{folder} was converted from {found}, not from {source}: remove it, and it is made anew")
    return folder


def write_model(model: Mask2FormerForUniversalSegmentation, source: str, folder: Path) -> None:
    """Write a model atomically, with the name of the file it comes from; a folder that is there by then stays."""
    partial = folder.parent / f".{folder.name}-{os.getpid()}-{uuid.uuid4().hex}"
    try:
        model.save_pretrained(partial)
        (partial / _SOURCE).write_text(json.dumps(source) + "\n", encoding="utf-8")
        os.rename(partial, folder)
    except OSError as error:
        if not folder.is_dir():  # no other process was faster
            raise RewardError(f"cannot write the converted weights to {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
