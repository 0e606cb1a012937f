"""What the benchmarks run on: the tiny world with its teachers, or SD3.5-Medium's shape with random weights.

Time and memory do not depend on the values of weights, so that what nobody can download everywhere is not needed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusionopd.algorithms.base import Models
from diffusionopd.algorithms.opd import Opd, OpdSettings
from diffusionopd.algorithms.optim import OptimizerSettings, StudentOptimizer
from diffusionopd.algorithms.settings import SamplerSettings
from diffusionopd.data.batches import Batch, Row
from diffusionopd.data.noise import noise
from diffusionopd.data.prompts import Prompt
from diffusionopd.data.rounds import BatchSettings, round_shape
from diffusionopd.files import write_atomically
from diffusionopd.models.backbone import Backbone
from diffusionopd.models.conditions import NEGATIVE, Conditions, TextEncoder
from diffusionopd.models.loading import load_backbone, load_text_encoder
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import LoraWeights
from diffusionopd.models.policies import STUDENT, Policies
from diffusionopd.models.sd3 import StableDiffusion3
from diffusionopd.training.costs.models import read_pipeline

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny"
TINY_TEACHERS = [str(TINY / "teachers" / task / "lora") for task in ("compose", "ocr", "scene")]
IN_PLACE = dict.fromkeys(
    (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), lambda y, a, b, **_: 2 * math.prod(a) * b[-1]
)
"""Formulas, of shapes, that torch's counter of FLOPs lacks: those of the fused LoRA layers' second product."""
PROMPTS = ("a photo of a red circle left of a blue square", 'a sign that says "347"', "a landscape")
TARGETS = StableDiffusion3.LORA_TARGETS
RANK = 32
PUBLISHED = read_pipeline("stabilityai/stable-diffusion-3.5-medium").configs
# The same architecture, small enough to try a script that is meant for a GPU on a laptop.
SMALL: dict[str, Any] = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4, "pos_embed_max_size": 96}
SMALL |= {"joint_attention_dim": 64, "caption_projection_dim": 64, "pooled_projection_dim": 32}
SMALL |= {"dual_attention_layers": (0, 1)}
RANDOM = {"sd35": dict(PUBLISHED["transformer"]), "small": {**PUBLISHED["transformer"], **SMALL}}
AUTOENCODERS = {"sd35": {}, "small": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}}


def random_model(shape: str) -> tuple[SD3Transformer2DModel, AutoencoderKL]:
    """A transformer of a :data:`RANDOM` shape and an SD3 autoencoder (8 pixels per latent, 16 channels), untrained."""
    vae = AutoencoderKL.from_config(
        {**PUBLISHED["vae"], **AUTOENCODERS[shape]}, scaling_factor=1.5305, shift_factor=0.0609
    )
    return SD3Transformer2DModel.from_config(RANDOM[shape]), vae


def random_lora(transformer: nn.Module, seed: int, gap: float = 0.1, targets: Sequence[str] = TARGETS) -> LoraWeights:
    """A LoRA on the usual layers whose ``B A`` has about ``gap`` times the size of a fresh linear layer's weights."""
    own = torch.Generator().manual_seed(seed)
    layers = {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{target}" for target in targets))
    }
    a = {n: torch.randn(RANK, m.in_features, generator=own) / RANK for n, m in layers.items()}
    b = {n: torch.randn(m.out_features, RANK, generator=own) * gap / RANK**0.5 for n, m in layers.items()}
    return LoraWeights("random", a, b, dict.fromkeys(layers, 2.0 * RANK))


def assemble(
    backbone: Backbone,
    teachers: Sequence[str | Path | LoraWeights],
    texts: Sequence[Conditions],
    noises: Sequence[Tensor],
    sampler: SamplerSettings,
    sigmas: Tensor,
    *,
    seed: int = 0,
    batches: int = 1,
    adapters: type[Adapters] = Adapters,
    fused_optimizer: bool = True,
) -> tuple[Opd, list[Batch]]:
    """A fresh student with a teacher per task: text ``[B, ...]`` and noise ``[B, C, h, w]`` of each.

    The images of a task are a round's, in so many ``batches``; those of different tasks stand next to each other.
    """
    loras = adapters(backbone.transformer)
    loras.add_student(STUDENT, rank=RANK, alpha=2 * RANK, target_modules=TARGETS, seed=seed)
    for task, teacher in enumerate(teachers):
        loras.add_teacher(f"teacher_{task}", teacher)
    settings = OptimizerSettings(learning_rate=1e-3, adam_weight_decay=0.0, fused_optimizer=fused_optimizer)
    models = Models(Policies(backbone, loras), StudentOptimizer(loras.parameters(STUDENT), settings))
    images, tasks = len(noises[0]), len(noises)
    size, count = images // batches, tasks * batches
    shape = round_shape(BatchSettings(size, count, 1, size, count), tasks, num_processes=1, num_rounds=1)
    whole = [make_batch(task, x, text, sampler) for task, (x, text) in enumerate(zip(noises, texts, strict=True))]
    parts = [batch.select(range(start, start + size)) for start in range(0, images, size) for batch in whole]
    return Opd(models, OpdSettings(), sampler, sigmas, shape), parts


def make_batch(task: int, x: Tensor, text: Conditions, sampler: SamplerSettings, **target: float) -> Batch:
    """A task's images from noise ``[B, C, h, w]`` and text ``[B, ...]``; ``target``: the teacher's fields of a row."""
    target = {"guidance": sampler.guidance, **target}
    steps, teacher = tuple(range(sampler.trained_steps)), f"teacher_{task}"
    rows = [Row(f"task {task}", i, Prompt(""), teacher, steps=steps, **target) for i in range(len(x))]
    return Batch(tuple(rows), x, text, draw=lambda stream, step: torch.zeros(()))  # the sampler adds no noise


def flops_of_a_step(algorithm: Opd, batch: Batch) -> tuple[int, int]:
    """What no way of a step saves: a frozen forward without a LoRA; the student's forward and backward.

    SDPA's kernels have formulas of their own: the plain products are counted.
    """
    sigma = algorithm.transitions[0].sigma
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with counter, sdpa_kernel(SDPBackend.MATH):
        algorithm.base(batch)(batch.noise, sigma)
        frozen = counter.get_total_flops()
        algorithm.student(batch)(batch.noise, sigma).sum().backward()
    return frozen, counter.get_total_flops() - frozen


def seconds_of(work: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that work takes, on a GPU to its end."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    started = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return clock() - started


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line that :class:`World` reads."""
    parser.add_argument("--model", default=str(TINY / "model"), help="diffusers pipeline folder")
    parser.add_argument("--teachers", nargs="+", default=TINY_TEACHERS, help="LoRA folders, one per task")
    parser.add_argument("--random", choices=list(RANDOM), help="random weights of this shape instead of --model")
    parser.add_argument("--tasks", type=int, default=3, help="with --random: how many teachers")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=6, help="images of a backward pass")
    parser.add_argument("--batches", type=int, default=1, help="batches per task in a round")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="of student and teachers")
    parser.add_argument(
        "--max_sequence_length", type=int, help="of T5; by default the tiny world's 14 at 64 pixels, else 128"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def write_figures(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write figures and settings to ``args.json``, if it is given; this repository's files by their names in it."""
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        text = json.dumps(figures | {"settings": settings}, indent=2).replace(f"{ROOT}/", "")
        write_atomically(args.json, text + "\n")
        print(f"wrote {args.json}")


@dataclass
class World:
    """Makes the same student, teachers and batches as often as asked, each time on a model of its own."""

    args: argparse.Namespace

    @property
    def half(self) -> torch.dtype:
        """The precision that the device is used with: bf16 on a GPU."""
        return torch.float32 if self.args.device == "cpu" else torch.bfloat16

    @property
    def sampler(self) -> SamplerSettings:
        """The Euler ODE."""
        options = {"noise_level": 0.0, "timestep_fraction": 0.99}
        return SamplerSettings(num_steps=self.args.steps, guidance_scale=self.args.guidance_scale, **options)

    @property
    def prompts(self) -> list[str]:
        """One per task of the tiny world."""
        return list(islice(cycle(PROMPTS), len(self.args.teachers)))

    @property
    def text_length(self) -> int:
        """Tokens of T5."""
        return self.args.max_sequence_length or (14 if self.args.resolution == 64 and not self.args.random else 128)

    def setup(self, *, dtype: torch.dtype | None = None, **switches: Any) -> tuple[Opd, list[Batch]]:
        """Student and teachers, and the batches of each task; ``switches`` are those of :func:`assemble`."""
        args = self.args
        backbone = self._backbone(dtype or self.half)
        teachers = args.teachers
        if args.random:
            teachers = [random_lora(backbone.transformer, seed) for seed in range(args.tasks)]
        *texts, backbone.negative = self._texts
        shape = backbone.latent_shape(args.resolution)
        images = args.batch_size * args.batches
        noises = [noise(shape, [(t, i) for i in range(images)]).to(args.device) for t in range(len(texts))]
        sigmas = backbone.sigmas(args.steps, args.resolution)
        switches["batches"] = args.batches
        return assemble(backbone, teachers, texts, noises, self.sampler, sigmas, **switches)

    def text_encoder(self) -> TextEncoder:
        """The model's own text encoders."""
        placed: dict[str, Any] = {"dtype": self.half, "device": self.args.device}
        return load_text_encoder(self.args.model, max_sequence_length=self.text_length, **placed)

    def _backbone(self, dtype: torch.dtype) -> Backbone:
        placed: dict[str, Any] = {"dtype": dtype, "device": self.args.device}
        if not self.args.random:
            return load_backbone(self.args.model, **placed)
        with torch.random.fork_rng(), torch.device(self.args.device):
            torch.manual_seed(0)
            transformer, vae = random_model(self.args.random)
        if dtype != torch.float32:
            transformer = transformer.to(dtype)
        return StableDiffusion3(transformer, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), **placed)

    @cached_property
    def _texts(self) -> list[Conditions]:
        """Conditions of each task's prompt for a whole batch, then those of the negative prompt."""
        args, own = self.args, torch.Generator().manual_seed(1)
        if args.random:
            configs = {"transformer": RANDOM[args.random], "text_encoder": {"max_position_embeddings": 77}}
            shapes = StableDiffusion3.row_shapes(self.text_length, configs)
            rows = [{n: torch.randn(s, generator=own) for n, s in shapes.items()} for _ in range(args.tasks + 1)]
        else:
            rows = self.text_encoder()([*self.prompts, NEGATIVE])
        found = [Conditions.of([row]).to(args.device, self.half) for row in rows]
        return [*(text.expand(args.batch_size * args.batches) for text in found[:-1]), found[-1]]
