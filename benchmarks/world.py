"""What the benchmarks run on: the tiny world with its teachers, or SD3.5-Medium's shape with random weights.

Time and memory do not depend on the values of weights, so that what nobody can download everywhere is not needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn

from diffusionopd.algorithms.base import STUDENT, Parts
from diffusionopd.algorithms.opd import Distiller, Recipe
from diffusionopd.algorithms.optim import StudentOptimizer
from diffusionopd.data.batches import Batch
from diffusionopd.data.noise import noise
from diffusionopd.models.backbone import Backbone, TextEncoder, load_backbone, load_text_encoder
from diffusionopd.models.conditions import NEGATIVE, Conditions
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import LoraWeights
from diffusionopd.models.sd3 import StableDiffusion3
from diffusionopd.training import base_config
from diffusionopd.transitions import schedule

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny"
TINY_TEACHERS = [str(TINY / "teachers" / task / "lora") for task in ("compose", "ocr", "scene")]
PROMPTS = ("a photo of a red circle left of a blue square", 'a sign that says "347"', "a landscape")
TARGETS = base_config().train.lora_target_modules
RANK = 32

# The published configuration of stabilityai/stable-diffusion-3.5-medium's transformer: 2.2 B parameters.
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
# The same architecture, small enough to try a script that is meant for a GPU on a laptop.
SMALL = SD35_MEDIUM | {
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (0, 1),
}
RANDOM = {"sd35": SD35_MEDIUM, "small": SMALL}
# The published autoencoder of the SD3 family, and one with as many halvings that a laptop decodes with.
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "sd35": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    "small": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
}
TEXT_TOKENS = 77 + 128  # CLIP's and T5's


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line that :class:`World` reads."""
    parser.add_argument("--model", default=str(TINY / "model"), help="diffusers pipeline folder")
    parser.add_argument("--teachers", nargs="+", default=TINY_TEACHERS, help="LoRA folders, one task each")
    parser.add_argument("--random", choices=list(RANDOM), help="random weights of this shape instead of --model")
    parser.add_argument("--tasks", type=int, default=3, help="with --random: how many teachers")
    parser.add_argument("--gap", type=float, default=0.1, help="with --random: relative size of a teacher's lora_B")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=6, help="pictures of a task, and of a backward pass")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--timestep_fraction", type=float, default=0.99)
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="of student and teachers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")


def recorded(args: argparse.Namespace) -> dict[str, object]:
    """The settings to keep with a measurement; files of this repository by their names in it, not on this machine."""

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(part) for part in value]
        return value.removeprefix(f"{ROOT}/") if isinstance(value, str) else value

    return {key: plain(value) for key, value in vars(args).items() if key != "json"}


@dataclass
class World:
    """Makes the same student, teachers and batches as often as asked, each time on a model of its own."""

    args: argparse.Namespace
    transformer_config: Mapping[str, Any] = field(default_factory=dict)  # of the last model
    latent_shape: Sequence[int] = ()  # of a picture, C, h, w

    @property
    def half(self) -> torch.dtype:
        """The precision that the device is used with: bf16 on a GPU."""
        return torch.float32 if self.args.device == "cpu" else torch.bfloat16

    def backbone(self, dtype: torch.dtype | None = None) -> Backbone:
        """A model of its own, in :attr:`half` unless said."""
        dtype = dtype or self.half
        if not self.args.random:
            return load_backbone(self.args.model, dtype=dtype, device=self.args.device)
        with torch.random.fork_rng(), torch.device(self.args.device):
            torch.manual_seed(0)
            transformer = SD3Transformer2DModel(**RANDOM[self.args.random])
            if dtype != torch.float32:
                transformer = transformer.to(dtype)
            vae = build_autoencoder("small")
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return StableDiffusion3(transformer, vae, scheduler, dtype=dtype, device=self.args.device)

    def distiller(
        self,
        *,
        dtype: torch.dtype | None = None,
        adapters: type[Adapters] = Adapters,
        fused_optimizer: bool = True,
        checkpointing: bool = False,
        only: int | None = None,
    ) -> tuple[Distiller, list[Batch]]:
        """Student, teachers and one batch a task; ``only`` one of the steps is walked and trained where given."""
        args, backbone = self.args, self.backbone(dtype)
        if checkpointing:
            backbone.transformer.enable_gradient_checkpointing()
        loras = adapters(backbone.transformer, backbone.inert_modules())
        teachers = self.teachers(backbone.transformer)
        loras.add_student(STUDENT, rank=RANK, alpha=2 * RANK, target_modules=TARGETS)
        for task, teacher in enumerate(teachers):
            loras.add_teacher(f"teacher_{task}", teacher)
        optimizer = StudentOptimizer(loras.parameters(STUDENT), lr=1e-4, loss_scale=1e4, fused=fused_optimizer)
        *texts, negative = self.texts
        self.transformer_config = backbone.transformer.config
        self.latent_shape = backbone.latent_shape(args.resolution)
        batches = [self._batch(task, text) for task, text in enumerate(texts)]
        steps = schedule("ode", backbone.sigmas(args.steps, args.resolution))
        trained = int(args.steps * args.timestep_fraction)
        if only is not None:
            steps, trained = steps[only : only + 1], 1
        recipe = Recipe(steps, trained, student_guidance=args.guidance_scale)
        return Distiller(Parts(backbone, loras, optimizer, negative), recipe), batches

    def teachers(self, transformer: nn.Module) -> Sequence[str | LoraWeights]:
        """A LoRA a task: the folders given, or random ones."""
        if not self.args.random:
            return self.args.teachers
        return [random_lora(transformer, seed, self.args.gap) for seed in range(self.args.tasks)]

    @cached_property
    def texts(self) -> list[Conditions]:
        """Conditions of each task's prompt for a batch, then those of the negative prompt."""
        if self.args.random:
            config, own = RANDOM[self.args.random], torch.Generator().manual_seed(1)
            tokens, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
            rows = [
                {
                    "tokens": torch.randn(TEXT_TOKENS, tokens, generator=own),
                    "pooled": torch.randn(pooled, generator=own),
                }
                for _ in range(self.args.tasks + 1)
            ]
        else:
            encode = self.text_encoder()
            prompts = [*(PROMPTS[task % len(PROMPTS)] for task in range(len(self.args.teachers))), NEGATIVE]
            rows = [encode([prompt])[0] for prompt in prompts]
        found = [Conditions.of([row]).to(self.args.device, self.half) for row in rows]
        return [*(text.expand(self.args.batch_size) for text in found[:-1]), found[-1]]

    def text_encoder(self) -> TextEncoder:
        """The model's own text encoders."""
        length = 14 if self.args.resolution == 64 else 128
        return load_text_encoder(self.args.model, dtype=self.half, device=self.args.device, max_sequence_length=length)

    def _batch(self, task: int, text: Conditions) -> Batch:
        x = noise(self.latent_shape, [(task, sample) for sample in range(self.args.batch_size)]).to(self.args.device)
        return Batch(f"task {task}", f"teacher_{task}", self.args.guidance_scale, x, text, draw_noise=lambda step: x)


def build_autoencoder(shape: str) -> AutoencoderKL:
    """An autoencoder of the SD3 family with random weights: 8 pixels a latent position, 16 channels."""
    widths = AUTOENCODERS[shape]
    halvings = len(widths["block_out_channels"])
    return AutoencoderKL(
        **widths,
        down_block_types=("DownEncoderBlock2D",) * halvings,
        up_block_types=("UpDecoderBlock2D",) * halvings,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def random_lora(transformer: nn.Module, seed: int, gap: float) -> LoraWeights:
    """A LoRA on the usual layers whose ``B A`` has about ``gap`` times the size of a fresh linear layer's weights."""
    own = torch.Generator().manual_seed(seed)
    layers = {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{target}" for target in TARGETS))
    }
    a = {n: torch.randn(RANK, m.in_features, generator=own) / RANK for n, m in layers.items()}
    b = {n: torch.randn(m.out_features, RANK, generator=own) * gap / RANK**0.5 for n, m in layers.items()}
    return LoraWeights("random", a, b, dict.fromkeys(layers, 2.0 * RANK), list(TARGETS))
