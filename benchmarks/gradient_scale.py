"""How large a round's gradient is against AdamW's epsilon.

    python benchmarks/gradient_scale.py                                  the embedded tiny world
    python benchmarks/gradient_scale.py --random sd35 --resolution 256 --batch_size 1   SD3.5-Medium's shape (13 GiB)

Prints the root mean square over all trained values of the gradient of the unscaled loss, the share of an AdamW
update that epsilon 1e-8 takes away at that size, and the relative gap ``|v_S - v_T| / |v_T|`` behind it: the
gradient is proportional to the gap, so that a figure from random weights can be carried over to real ones.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from benchmarks.round import TARGETS, TINY, TINY_TEACHERS, build, recorded
from diffusionopd.adapters import Adapters
from diffusionopd.backbone import Backbone
from diffusionopd.batches import Batch
from diffusionopd.conditioning import TextEmbeddings
from diffusionopd.distributed import noise
from diffusionopd.learner import STUDENT, Parts
from diffusionopd.opd import Distiller, Recipe
from diffusionopd.optim import StudentOptimizer
from diffusionopd.transitions import schedule

EPSILON = 1e-8
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


def main() -> None:
    """Measure one round and print its figures."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    distiller, batches = random_sd35(args) if args.random else build(args)
    optimizer, gaps = distiller.optimizer, []
    started = time.perf_counter()
    for batch in batches:
        for visit in distiller._visits(batch):
            loss = distiller._loss(batch, visit, visit.v_student).mean()
            optimizer.backward(loss / (len(batches) * distiller.recipe.trained_steps))
            gaps.append(((visit.v_student - visit.v_teacher).norm() / visit.v_teacher.norm()).item())
    # A fresh student's lora_A has no gradient yet (lora_B is zero): it must not dilute the figure.
    gradients = [p.grad for p in optimizer.parameters if p.grad is not None and p.grad.any()]
    total = sum(g.numel() for g in gradients)
    rms = (sum(g.double().square().sum().item() for g in gradients) / total) ** 0.5 / optimizer.loss_scale
    result = {
        "gradient_rms": rms,
        "taken_by_epsilon": EPSILON / (rms + EPSILON),
        "relative_gap": sum(gaps) / len(gaps),
        "last_loss": loss.item(),
        "trained_values": total,
        "seconds": time.perf_counter() - started,
        "settings": recorded(args),
    }
    print(f"gradient RMS {rms:.3g}: epsilon {EPSILON:g} takes {100 * result['taken_by_epsilon']:.2g}% of an update")
    print(f"relative gap {result['relative_gap']:.3g}, {total:,} values with a gradient")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY / "model"))
    parser.add_argument("--teachers", nargs="+", default=TINY_TEACHERS)
    parser.add_argument("--random", choices=["sd35"], help="random weights of this shape instead of --model")
    parser.add_argument("--gap", type=float, default=0.1, help="with --random: relative size of the teacher's lora_B")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--timestep_fraction", type=float, default=0.99)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    return parser.parse_args()


def random_sd35(args: argparse.Namespace) -> tuple[Distiller, list[Batch]]:
    """One task on the shape of SD3.5-Medium with random weights; the teacher differs from the base by a random LoRA."""
    transformer = SD3Transformer2DModel(**SD35_MEDIUM)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), latent_channels=16, norm_num_groups=4)
    backbone = Backbone(transformer, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), device=args.device)
    adapters = Adapters(transformer)
    for name in (STUDENT, "teacher"):
        adapters.add_student(name, rank=32, alpha=64, target_modules=TARGETS)
    with torch.no_grad():
        for parameter in adapters.parameters("teacher")[1::2]:
            parameter.normal_(std=args.gap / parameter.shape[1] ** 0.5)
    optimizer = StudentOptimizer(adapters.parameters(STUDENT), lr=1e-4)
    shape = backbone.latent_shape(args.resolution)
    x = noise(shape, [(s,) for s in range(args.batch_size)])
    text = TextEmbeddings(torch.randn(1, 205, 4096), torch.randn(1, 2048)).expand(args.batch_size)
    batch = Batch("random", "teacher", args.guidance_scale, x, text, draw_noise=lambda step: x)
    # One step of middling length stands for the round: all steps of a CPU run would take half an hour.
    steps = schedule("ode", backbone.sigmas(args.steps, args.resolution))
    recipe = Recipe([steps[(args.steps - 1) // 2]], 1)
    return Distiller(Parts(backbone, adapters, optimizer, text.index(0)), recipe), [batch]


if __name__ == "__main__":
    main()
