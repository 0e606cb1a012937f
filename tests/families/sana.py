"""SANA, small: linear attention, a deep-compression autoencoder, whole numbers as time, sampling of second order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from .common import Case, randomised


def gemma_tokenizer() -> GemmaTokenizer:
    """A token for each character, behind one for the beginning."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *(chr(c) for c in range(33, 127))]
    tokens += [f"<0x{i:02X}>" for i in range(256)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocabulary, merges=[], padding_side="right", add_bos_token=True)


def build(folder: Path, **more: Any) -> None:
    """Write the pipeline's folder; ``more`` are options of the transformer."""
    tokenizer = gemma_tokenizer()
    torch.manual_seed(1)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=8192, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
        sample_size=16, patch_size=1, **more,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), upsample_block_type="interpolate",
        downsample_block_type="conv", scaling_factor=0.41407,
    )  # fmt: skip
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(config).eval(),
        vae=vae.eval(),
        transformer=randomised(transformer),
        scheduler=scheduler(),
    ).save_pretrained(folder)


def scheduler(**more: Any) -> DPMSolverMultistepScheduler:
    """As the published pipelines have it."""
    options = {"use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 2, "algorithm_type": "dpmsolver++"} | more
    return DPMSolverMultistepScheduler(beta_schedule="linear", prediction_type="flow_prediction", **options)


def stock(pipe: Any, x: Tensor, guidance: float, common: dict[str, Any]) -> Tensor:
    """See :class:`Case`; binning would draw at a resolution of the published sizes."""
    return pipe(latents=x, guidance_scale=guidance, use_resolution_binning=False, **common).images


CASE = Case("sana", build, stock, length=80)
