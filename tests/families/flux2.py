"""FLUX.2-klein and -dev, small: latents of the VAE's batch norm, three layers of Qwen3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from diffusionopd.models.backbone import CLASSIFIER_FREE, EMBEDDED, NO_GUIDANCE

from .common import Case, autoencoder, dynamic_scheduler, qwen3, qwen_tokenizer, randomised

DEV_CHAT = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}"
    "[/{{ m.role }}]{% endfor %}"
)


def parts(width: int, **more: Any) -> dict[str, Any]:
    """Transformer of conditions of a width, VAE and scheduler, which dev and klein have."""
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=width, axes_dims_rope=(4, 4, 4, 4), **more,
    )  # fmt: skip
    vae = autoencoder(AutoencoderKLFlux2)
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 3, 16))
    return {"transformer": randomised(transformer), "vae": vae, "scheduler": dynamic_scheduler(shift=3.0)}


def build(folder: Path) -> None:
    """Write klein's folder."""
    tokenizer = qwen_tokenizer()
    text_encoder = qwen3(Qwen3ForCausalLM, tokenizer, layers=28)
    Flux2KleinPipeline(
        text_encoder=text_encoder, tokenizer=tokenizer, is_distilled=False, **parts(48, guidance_embeds=False)
    ).save_pretrained(folder)


def build_dev(folder: Path) -> None:
    """Write dev's folder: guidance is an input, the text encoder is Mistral's, its tokenizer a processor's."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = DEV_CHAT
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": len(tokenizer), "intermediate_size": 32,
                     "num_hidden_layers": 30, "num_key_value_heads": 1, **sizes},
        vision_config={"model_type": "pixtral", "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28,
                       "patch_size": 14, **sizes},
    )  # fmt: skip
    text_encoder = Mistral3ForConditionalGeneration(config).eval()
    Flux2Pipeline(
        text_encoder=text_encoder, tokenizer=tokenizer, **parts(48, guidance_embeds=True)
    ).save_pretrained(folder)  # fmt: skip
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    content["tokenizer"] = ["transformers", "PixtralProcessor"]  # needs torchvision, which is not here
    index.write_text(json.dumps(content))


def stock(pipe: Any, x: Tensor, guidance: float, common: dict[str, Any]) -> Tensor:
    """See :class:`Case`."""
    return pipe(latents=x, guidance_scale=guidance, **common).images


CASE = Case(
    "flux2", build, stock, length=128, latents=lambda backbone, x: backbone.unnormalised(x),  # type: ignore[attr-defined]
    variants=(
        ("index", {"is_distilled": False}, (CLASSIFIER_FREE, 50, 4.0)),
        ("index", {"is_distilled": True}, (NO_GUIDANCE, 4, 1.0)),
        ("transformer", {"guidance_embeds": True}, (EMBEDDED, 50, 4.0)),  # dev
    ),
)  # fmt: skip


def stock_dev(pipe: Any, x: Tensor, guidance: float, common: dict[str, Any]) -> Tensor:
    """See :class:`Case`: packed latents, where klein's are the VAE's."""
    return stock(pipe, x, guidance, common).mT.reshape(x.shape)


DEV = Case("flux2", build_dev, stock_dev, guidances=(1.0, 4.0), length=400)
"""Beside the cases: what differs in it has a test of its own."""
