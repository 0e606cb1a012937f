"""What the small pipelines of all families are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config

from diffusionopd.models.backbone import Backbone
from diffusionopd.models.loading import load_backbone
from diffusionopd.models.lora import Adapters

PROMPTS = ["a red circle", "a photo of two green squares left of a blue triangle above a word"]
"""Of different lengths."""
STEPS = 5


@dataclass(frozen=True)
class Case:
    """A family's small pipeline, and how its stock pipeline is asked."""

    family: str  # the file among the models
    build: Callable[[Path], None]  # writes the folder
    stock: Callable[[Any, Tensor, float, dict[str, Any]], Tensor]
    """The stock pipeline's latents after :data:`STEPS` steps from ``x`` in our layout, at our guidance; the last
    argument has the keywords that all pipelines take."""
    guidances: tuple[float, ...] = (1.0, 3.5)
    resolution: int = 32
    length: int = 28  # tokens
    latents: Callable[[Backbone, Tensor], Tensor] = lambda backbone, x: x
    """What the stock pipeline calls latents, of ours."""
    prompts: Callable[[Path], list[str]] = lambda folder: list(PROMPTS)
    """What it draws, with the files beside them in the folder."""
    parts: Callable[[Path], dict[str, Any]] = lambda folder: {}
    """What diffusers is given, and does not load from the folder."""
    refused: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Parts, and what is another in their configurations for models of the same classes that are refused."""
    variants: tuple[tuple[str, dict[str, Any], tuple[str, int, float]], ...] = ()
    """Likewise for variants of the family -> their kind of guidance, its steps and scale by default."""


def randomised(module: nn.Module, seed: int = 7, scale: float = 0.2) -> Any:
    """Weights under which every module matters: gates and output layers are zero or small as they come."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.data = noise * min(1.0, parameter[0].numel() ** -0.5)
        elif "norm" not in name:
            parameter.data = noise * scale
        else:
            parameter.data += noise * 0.1
    return module.eval()


def random_lora(backbone: Backbone, name: str, seed: int = 0) -> Adapters:
    """In use on a backbone; it changes what that draws, and is as training leaves it: zero where nothing reaches."""
    adapters, inert = Adapters(backbone.transformer), backbone.inert_of(backbone.transformer)
    adapters.add_student(name, rank=4, alpha=8, target_modules=backbone.LORA_TARGETS, seed=seed)
    torch.manual_seed(seed)
    for module, layer in adapters._layers(name):
        if module not in inert:
            nn.init.normal_(layer.lora_B[name].weight, std=0.1)
    adapters.use(name)
    return adapters


def write_lora(folder: Path, target: Path, seed: int) -> str:
    """Such a one for the model in a folder, as a run saves its student."""
    random_lora(load_backbone(str(folder)), "made", seed).save_peft("made", target)
    return str(target)


def autoencoder(kind: Any, **more: Any) -> Any:
    """A VAE of two scales and four channels."""
    torch.manual_seed(5)
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        mid_block_add_attention=False, **more,
    ).eval()  # fmt: skip


FLUX_VAE = {
    "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159, "scaling_factor": 0.3611,
}  # fmt: skip
"""Options of the VAE that FLUX.1 and Z-Image share."""


def dynamic_scheduler(**more: Any) -> FlowMatchEulerDiscreteScheduler:
    """Shifted by the number of image tokens."""
    options = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096} | more
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The form of Qwen's chat template."""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes without merges: every text is representable."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    tokenizer = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def bare_processor(kind: Any, tokenizer: Any, image_processor: Any = None) -> Any:
    """A pipeline's own processor as far as it reads texts and images; its constructor asks for what needs
    torchvision."""
    processor: Any = object.__new__(kind)
    processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template
    processor.image_processor, processor.video_processor = image_processor, None
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return processor


def vision_language(kind: Any, config: Any, tokenizer: Any, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """A language model of width 32 that sees images; ``text`` and ``vision`` are options of its own."""
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    }  # fmt: skip
    sides = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    image = {"image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>")}
    return kind(config(text_config=sizes | text, vision_config=sides | vision, **image)).eval()


LATENTS = {"z_dim": 4, "latents_mean": [-0.7, 0.1, 0.3, 1.5], "latents_std": [2.8, 1.4, 2.3, 2.6]}
"""Options of the VAEs of Qwen-Image."""


def qwen3(kind: Any, tokenizer: Qwen2Tokenizer, layers: int) -> Any:
    """A language model of width 16."""
    torch.manual_seed(1)
    return kind(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=2048,
    )).eval()  # fmt: skip
