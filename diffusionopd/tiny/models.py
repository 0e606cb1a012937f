"""The parts of the tiny Stable Diffusion 3: stock diffusers and transformers classes with small numbers in them.

`[B, 8, 16, 16]` latents, `[B, 2 * context, 128]` prompt embeddings, `[B, 128]` pooled embeddings.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from diffusionopd.tiny.grammar import WORDS
from diffusionopd.tiny.render import RESOLUTION

#: Length of every token sequence (`max_sequence_length` of a run on the tiny world). The longest caption has 12 words.
CONTEXT = 14
LATENT_CHANNELS = 8
LATENT_SIDE = 16
SHIFT = 3.0
_CLIP_WIDTH = 64
_T5_WIDTH = 128
_CHARACTERS = tuple(chr(c) for c in range(33, 127))


# ---------------------------------------------------------------------------------------------------------- tokenizers


def _byte_pair_merges() -> list[tuple[str, str]]:
    """Byte-pair training (Sennrich et al., arXiv 1508.07909) on the word list until every word is one token."""
    spelled = [" ".join([*word[:-1], word[-1] + "</w>"]) for word in dict.fromkeys(WORDS)]
    merges = []
    while any(" " in word for word in spelled):
        counts = Counter(neighbours for word in spelled for neighbours in itertools.pairwise(word.split()))
        best = max(sorted(counts), key=counts.__getitem__)
        merges.append(best)
        pattern = rf"(?<!\S){re.escape(' '.join(best))}(?!\S)"
        spelled = [re.sub(pattern, "".join(best), word) for word in spelled]
    return merges


def clip_tokenizer(pad_token: str, length: int = CONTEXT) -> transformers.CLIPTokenizer:
    """Every word of the grammar is one token, every other printable character is one: digits and quotes survive."""
    merges = _byte_pair_merges()
    tokens = ["<|startoftext|>", "<|endoftext|>"]
    tokens += [t for c in _CHARACTERS for t in (c, c + "</w>")]
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length, pad_token=pad_token)


def t5_tokenizer(length: int = CONTEXT) -> transformers.T5Tokenizer:
    """A unigram model: whole words are likelier than characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -1.0) for word in dict.fromkeys(WORDS)]
    pieces += [(character, -3.0) for character in _CHARACTERS]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


# --------------------------------------------------------------------------------------------------------------- parts


def clip_encoder(
    tokenizer: transformers.CLIPTokenizer, seed: int, width: int = _CLIP_WIDTH, **settings: int
) -> transformers.CLIPTextModelWithProjection:
    """The CLIP text model with its projection, untrained: two layers; ``settings`` are more of CLIPTextConfig."""
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, **settings}
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
        **sizes,
    )
    model = transformers.CLIPTextModelWithProjection(config)
    # The default of 0.02 leaves words and places nearly indistinguishable for the first thousand steps.
    embeddings = model.text_model.embeddings
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=1.0)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.7)
    return model.eval()


def t5_encoder(
    tokenizer: transformers.T5Tokenizer, seed: int, width: int = _T5_WIDTH, **settings: int
) -> transformers.T5EncoderModel:
    """T5's encoder, untrained: two layers; ``settings`` are more of T5Config."""
    torch.manual_seed(seed)
    sizes = {"d_kv": 32, "num_heads": 4, "d_ff": 2 * width, "num_layers": 2, **settings}
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=width, feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes
    )
    model = transformers.T5EncoderModel(config)
    # T5 knows order through this bias alone, and starts it at almost nothing.
    torch.nn.init.normal_(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    return model.eval()


def transformer(seed: int) -> SD3Transformer2DModel:
    """SD3.5's transformer, dual attention and all, with four blocks of width 128, untrained."""
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=_T5_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * _CLIP_WIDTH,
        pos_embed_max_size=LATENT_SIDE,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def autoencoder(seed: int) -> AutoencoderKL:
    """64 x 64 pixels to 8 x 16 x 16 latents; the two factors are set after training."""
    torch.manual_seed(seed)
    blocks = (8, 16, 32)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        block_out_channels=blocks,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def pipeline(vae: AutoencoderKL, seed: int) -> StableDiffusion3Pipeline:
    """An untrained pipeline around a trained autoencoder."""
    tokenizers = [clip_tokenizer("<|endoftext|>"), clip_tokenizer("!"), t5_tokenizer()]
    network = transformer(seed)
    builders = (clip_encoder, clip_encoder, t5_encoder)
    encoders = [build(tokenizers[i], seed + 1 + i) for i, build in enumerate(builders)]
    return StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        **text_parts(tokenizers, encoders),
    )


def text_parts(tokenizers: Sequence[Any], encoders: Sequence[Any]) -> dict[str, Any]:
    """Three tokenizers and three encoders by the names that the pipeline's constructor has for them."""
    parts = {"tokenizer": tokenizers, "text_encoder": encoders}
    return {f"{name}{suffix}": values[i] for name, values in parts.items() for i, suffix in enumerate(("", "_2", "_3"))}
