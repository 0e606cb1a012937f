"""Whole pipelines with random weights, of the families beyond SD3: transformer and autoencoder as published, or small.

Text encoders have the published width and number of layers, which are narrow inside: they run once per prompt and are
dropped. Tokenizers read bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import transformers
from tokenizers import pre_tokenizers

from diffusionopd.models.loading import part_class
from diffusionopd.tiny import models
from diffusionopd.training.costs.models import read_pipeline

_KL = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
_FLUX2 = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 48}
_SMALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FluxPipeline": (
        {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 64,
         "pooled_projection_dim": 16}, _KL,
    ),
    "Flux2Pipeline": (_FLUX2, _KL),
    "Flux2KleinPipeline": (_FLUX2, _KL),
    "ZImagePipeline": (
        {"n_layers": 1, "n_refiner_layers": 1, "dim": 128, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": 16}, _KL,
    ),
    "QwenImagePipeline": (
        {"num_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 32}, {"base_dim": 8, "num_res_blocks": 1},
    ),
}  # fmt: skip
"""Of transformer and autoencoder, what is small to try a script that is meant for a GPU on a laptop."""
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.content is string else m.content[0].text }}<|im_end|>\n{% endfor %}"
)


def random_pipeline(model: str, small: bool = False) -> Any:
    """A published model's pipeline, on torch's default device and in its default dtype."""
    published = read_pipeline(model)
    index = published.configs["index"]
    changes = _SMALL[index["_class_name"]] if small else ({}, {})
    transformer, vae = (
        part_class(index, part).from_config({**published.configs[part], **changed})
        for part, changed in zip(("transformer", "vae"), changes, strict=True)
    )
    scheduler = part_class(index, "scheduler").from_config(published.configs["scheduler"])
    text = _clip_and_t5(transformer) if "text_encoder_2" in index else _language_model(published, transformer)
    more = {name: index[name] for name in ("is_distilled",) if name in index}
    kind = getattr(diffusers, index["_class_name"])
    return kind(scheduler=scheduler, vae=vae, transformer=transformer, **text, **more)


def _clip_and_t5(transformer: Any) -> dict[str, Any]:
    """FLUX.1's."""
    clip, t5 = models.clip_tokenizer("<|endoftext|>", 77), models.t5_tokenizer(512)
    width = transformer.config.pooled_projection_dim
    config = transformers.CLIPTextConfig(
        vocab_size=len(clip), hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    sizes = {"num_layers": 1, "d_kv": 16, "num_heads": 2, "d_ff": 64}
    return {
        "text_encoder": transformers.CLIPTextModel(config),
        "tokenizer": clip,
        "text_encoder_2": models.t5_encoder(t5, seed=0, width=transformer.config.joint_attention_dim, **sizes),
        "tokenizer_2": t5,
    }


def _language_model(published: Any, transformer: Any) -> dict[str, Any]:
    """The others': narrow, with as many layers as are asked for."""
    tokenizer, index = byte_tokenizer(_CHAT), published.configs["index"]
    config = published.encoders["text_encoder"].to_dict()
    text = config.get("text_config", config)
    seen = transformer.config.get("joint_attention_dim") or transformer.config.cap_feat_dim
    text |= {
        "vocab_size": len(tokenizer), "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "hidden_size": seen // (3 if index["transformer"][1] == "Flux2Transformer2DModel" else 1),
    }  # fmt: skip
    if config["model_type"] == "qwen2_5_vl":
        half = text["hidden_size"] // 4  # of the width of a head, which is not free here
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": [half // 4, half // 4, half - half // 4 * 2]}}
    if "vision_config" in config:
        config["vision_config"] |= {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
        config["vision_config"] |= {"num_heads": 2, "depth": 1, "num_hidden_layers": 1, "fullatt_block_indexes": [0]}
        config["vision_config"] |= {"out_hidden_size": text["hidden_size"]}
    kind = getattr(transformers, index["text_encoder"][1])
    return {"text_encoder": kind(transformers.AutoConfig.for_model(**config)), "tokenizer": tokenizer}


def byte_tokenizer(chat: str) -> transformers.Qwen2Tokenizer:
    """Qwen's without merges, so that every text is representable, with a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens: Mapping[str, int] = {t: i for i, t in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=tokens, merges=[], padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = chat
    return tokenizer
