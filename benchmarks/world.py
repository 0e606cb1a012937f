"""What the benchmarks run on: the tiny world with its teachers, or SD3.5-Medium's shape with random weights.

Time and memory do not depend on the values of weights, so that what nobody can download everywhere is not needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora import Linear
from torch import Tensor, nn

from diffusionopd.algorithms.base import Models, SamplerSettings
from diffusionopd.algorithms.opd import Opd, OpdSettings
from diffusionopd.algorithms.optim import OptimizerSettings, StudentOptimizer
from diffusionopd.data.batches import Batch, Row
from diffusionopd.data.noise import noise
from diffusionopd.data.prompts import Prompt
from diffusionopd.data.rounds import RoundShape
from diffusionopd.models.acceleration import check_compiler, compile_blocks
from diffusionopd.models.backbone import Backbone, TextEncoder, load_backbone, load_text_encoder
from diffusionopd.models.conditions import NEGATIVE, Conditions
from diffusionopd.models.fused import FusedLoraLinear, FusedRMSNorm
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import LoraWeights
from diffusionopd.models.policies import STUDENT, Policies
from diffusionopd.models.sd3 import StableDiffusion3
from diffusionopd.transitions import Transition, schedule

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny"
TINY_TEACHERS = [str(TINY / "teachers" / task / "lora") for task in ("compose", "ocr", "scene")]
PROMPTS = ("a photo of a red circle left of a blue square", 'a sign that says "347"', "a landscape")
TARGETS = StableDiffusion3.LORA_TARGETS
RANK = 32
TEXT_TOKENS = 77 + 128  # CLIP's and T5's

# Where stabilityai/stable-diffusion-3.5-medium's transformer (2.2 B parameters) differs from diffusers' defaults.
SD35_MEDIUM: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
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


# ---- a student and its teachers: all that knows how the project builds them ------------------------------------------


@dataclass
class Setup:
    """A student, its teachers and the batches of one round, on one backbone."""

    algorithm: Opd
    batches: list[Batch]

    def round(self, batches: Sequence[Batch] | None = None, steps: Sequence[int] = ()) -> None:
        """The project's own round, of these batches or others; of the trained steps only ``steps`` where given."""
        chosen = batches or self.batches
        self.algorithm.round([replace(batch, steps=tuple(steps)) for batch in chosen] if steps else chosen)

    @property
    def trained(self) -> Sequence[Transition]:
        """The transitions of the trained steps."""
        return [self.algorithm.transitions[step] for step in self.batches[0].steps]

    @property
    def backbone(self) -> Backbone:
        """What all policies share."""
        return self.algorithm.policies.backbone


def assemble(
    backbone: Backbone,
    teachers: Sequence[str | Path | LoraWeights],
    texts: Sequence[Conditions],
    noises: Sequence[Tensor],
    steps: Sequence[Transition],
    trained_steps: int,
    *,
    guidance: float = 1.0,
    seed: int = 0,
    learning_rate: float = 1e-4,
    adapters: type[Adapters] = Adapters,
    fused_optimizer: bool = True,
) -> Setup:
    """A fresh student with a teacher and a batch per task: text ``[B, ...]`` and noise ``[B, C, h, w]`` of each."""
    loras = adapters(backbone.transformer, backbone.inert_modules())
    loras.add_student(STUDENT, rank=RANK, alpha=2 * RANK, target_modules=TARGETS, seed=seed)
    for task, teacher in enumerate(teachers):
        loras.add_teacher(f"teacher_{task}", teacher)
    settings = OptimizerSettings(learning_rate=learning_rate, adam_weight_decay=0.0, fused_optimizer=fused_optimizer)
    models = Models(Policies(backbone, loras), StudentOptimizer(loras.parameters(STUDENT), settings))
    size, tasks = len(noises[0]), len(noises)
    shape = RoundShape(1, 1, tasks, batch_size=size, backward_size=size, batches_per_task=1, images_per_prompt=1,
                       accumulation=tasks)  # fmt: skip
    sampler = SamplerSettings(num_steps=len(steps), noise_level=0.0, guidance_scale=guidance)
    algorithm = Opd(models, OpdSettings(), sampler, torch.linspace(1, 0, len(steps) + 1), shape)
    algorithm.transitions = list(steps)
    batches = [
        Batch(
            tuple(Row(f"task {task}", i, Prompt(""), f"teacher_{task}", guidance) for i in range(len(x))),
            x,
            text,
            tuple(range(trained_steps)),
            draw=lambda stream, step, x=x: x,
        )
        for task, (x, text) in enumerate(zip(noises, texts, strict=True))
    ]
    return Setup(algorithm, batches)


# ---- models ----------------------------------------------------------------------------------------------------------


def random_model(shape: str, vae: str = "small") -> tuple[SD3Transformer2DModel, AutoencoderKL]:
    """A transformer of a :data:`RANDOM` shape and an SD3 autoencoder (8 pixels per latent, 16 channels), untrained."""
    halvings = len(AUTOENCODERS[vae]["block_out_channels"])
    return SD3Transformer2DModel(**RANDOM[shape]), AutoencoderKL(
        **AUTOENCODERS[vae],
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


def restore_layers(transformer: nn.Module) -> None:
    """The stock layers of diffusers and PEFT in the place of the fused ones, with the same parameters."""
    for parent in list(transformer.modules()):
        if isinstance(parent, FusedLoraLinear):
            parent.__class__ = Linear
        for name, norm in parent.named_children():
            if isinstance(norm, FusedRMSNorm):
                stock = RMSNorm(norm.normalized_shape, eps=norm.eps)
                stock.weight = norm.weight
                setattr(parent, name, stock)


# ---- the command line's choice ---------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line that :class:`World` reads."""
    parser.add_argument("--model", default=str(TINY / "model"), help="diffusers pipeline folder")
    parser.add_argument("--teachers", nargs="+", default=TINY_TEACHERS, help="LoRA folders, one per task")
    parser.add_argument("--random", choices=list(RANDOM), help="random weights of this shape instead of --model")
    parser.add_argument("--tasks", type=int, default=3, help="with --random: how many teachers")
    parser.add_argument("--gap", type=float, default=0.1, help="with --random: relative size of a teacher's lora_B")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=6, help="images per task, and of a backward pass")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--timestep_fraction", type=float, default=0.99)
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="of student and teachers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")


def trained_steps(args: argparse.Namespace) -> int:
    """How many of the steps are trained."""
    return int(args.steps * args.timestep_fraction)


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

    @property
    def half(self) -> torch.dtype:
        """The precision that the device is used with: bf16 on a GPU."""
        return torch.float32 if self.args.device == "cpu" else torch.bfloat16

    def setup(
        self,
        *,
        dtype: torch.dtype | None = None,
        checkpointing: bool = False,
        stock: bool = False,
        compiled: bool = False,
        only: int | None = None,
        **switches: Any,
    ) -> Setup:
        """Student, teachers and one batch per task.

        ``stock`` has the layers of diffusers and PEFT instead of the fused ones; ``only`` one of the steps is walked
        and trained where given; ``switches`` are those of :func:`assemble`. Raises AccelerationError where
        ``compiled`` finds no compiler.
        """
        args = self.args
        if compiled:
            check_compiler(torch.device(args.device))
        backbone = self._backbone(dtype or self.half)
        if checkpointing:
            backbone.transformer.enable_gradient_checkpointing()
        if args.random:
            teachers = [random_lora(backbone.transformer, seed, args.gap) for seed in range(args.tasks)]
        else:
            teachers = args.teachers
        *texts, backbone.negative = self._texts
        shape = backbone.latent_shape(args.resolution)
        noises = [noise(shape, [(t, i) for i in range(args.batch_size)]).to(args.device) for t in range(len(texts))]
        steps, trained = schedule("ode", backbone.sigmas(args.steps, args.resolution)), trained_steps(args)
        if only is not None:
            steps, trained = steps[only : only + 1], 1
        setup = assemble(backbone, teachers, texts, noises, steps, trained, guidance=args.guidance_scale, **switches)
        if stock:
            restore_layers(backbone.transformer)
        if compiled:
            compile_blocks(backbone.blocks())
        return setup

    def text_encoder(self) -> TextEncoder:
        """The model's own text encoders."""
        length = 14 if self.args.resolution == 64 else 128
        return load_text_encoder(self.args.model, dtype=self.half, device=self.args.device, max_sequence_length=length)

    def _backbone(self, dtype: torch.dtype) -> Backbone:
        if not self.args.random:
            return load_backbone(self.args.model, dtype=dtype, device=self.args.device)
        with torch.random.fork_rng(), torch.device(self.args.device):
            torch.manual_seed(0)
            transformer, vae = random_model(self.args.random)
            if dtype != torch.float32:
                transformer = transformer.to(dtype)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return StableDiffusion3(transformer, vae, scheduler, dtype=dtype, device=self.args.device)

    @cached_property
    def _texts(self) -> list[Conditions]:
        """Conditions of each task's prompt for a whole batch, then those of the negative prompt."""
        args, own = self.args, torch.Generator().manual_seed(1)
        if args.random:
            widths = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048} | RANDOM[args.random]
            shapes = {
                "tokens": (TEXT_TOKENS, widths["joint_attention_dim"]),
                "pooled": (widths["pooled_projection_dim"],),
            }
            rows = [
                {name: torch.randn(shape, generator=own) for name, shape in shapes.items()}
                for _ in range(args.tasks + 1)
            ]
        else:
            rows = self.text_encoder()([*task_prompts(len(args.teachers)), NEGATIVE])
        found = [Conditions.of([row]).to(args.device, self.half) for row in rows]
        return [*(text.expand(args.batch_size) for text in found[:-1]), found[-1]]


def task_prompts(tasks: int) -> list[str]:
    """A prompt for each of so many tasks."""
    return [PROMPTS[task % len(PROMPTS)] for task in range(tasks)]
