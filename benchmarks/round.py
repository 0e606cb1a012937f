"""One round three ways, side by side in one run: three passes, the fused round, the bare forwards and backwards.

    python benchmarks/round.py --json round.json

The figures are ratios of medians over interleaved repeats, so that whatever else the machine does meets all three
alike. ``floor`` is what nothing can undercut without changing the method: one teacher forward, one student forward and
backward a trained step, with no loss, no sampling and no bookkeeping around them.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

import torch

from benchmarks.three_pass import three_pass
from diffusionopd.adapters import Adapters
from diffusionopd.backbone import Backbone, load_backbone, load_text_encoder
from diffusionopd.batches import Batch
from diffusionopd.config_schema import base_config
from diffusionopd.distributed import noise
from diffusionopd.learner import STUDENT, Parts
from diffusionopd.opd import Distiller, Recipe
from diffusionopd.optim import StudentOptimizer
from diffusionopd.transitions import schedule

TARGETS = base_config().train.lora_target_modules
TINY = ROOT / "assets" / "tiny"
TINY_TEACHERS = [str(TINY / "teachers" / task / "lora") for task in ("compose", "ocr", "scene")]
PROMPTS = ("a photo of a red circle left of a blue square", 'a sign that says "347"', "a landscape")


def main() -> None:
    """Measure, print a short table, and write ``--json``."""
    args = parse()
    torch.set_num_threads(args.threads)
    distiller, batches = build(args)
    ways: dict[str, Callable[[], None]] = {
        "reference": lambda: reference_round(distiller, batches),
        "fused": lambda: None if distiller.round(batches) else None,
        "floor": lambda: floor_round(distiller, batches),
    }
    seconds = measure(ways, args.repeats, distiller.backbone.device)
    result = {f"{name}_s": statistics.median(times) for name, times in seconds.items()}
    result |= {"fused_to_reference": result["fused_s"] / result["reference_s"]}
    result |= {"fused_to_floor": result["fused_s"] / result["floor_s"]}
    print(f"{len(batches)} tasks x {args.batch_size} pictures x {args.steps} steps, median of {args.repeats}")
    for name in ways:
        print(f"{name:10s} {result[f'{name}_s']:8.3f} s")
    print(f"fused / reference {result['fused_to_reference']:.3f}    fused / floor {result['fused_to_floor']:.3f}")
    if args.json:
        settings = recorded(args)
        machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        dated = {"date": time.strftime("%Y-%m-%d"), **machine, "settings": settings, "all_s": seconds}
        Path(args.json).write_text(json.dumps(result | dated, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")


def recorded(args: argparse.Namespace) -> dict[str, object]:
    """The settings to keep with a measurement; files of this repository by their names in it, not on this machine."""

    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(part) for part in value]
        return value.removeprefix(f"{ROOT}/") if isinstance(value, str) else value

    return {key: plain(value) for key, value in vars(args).items() if key != "json"}


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY / "model"), help="diffusers pipeline folder")
    parser.add_argument("--teachers", nargs="+", default=TINY_TEACHERS, help="LoRA folders, one task each")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--timestep_fraction", type=float, default=0.99)
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="of student and teachers")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def build(args: argparse.Namespace) -> tuple[Distiller, list[Batch]]:
    """Student, teachers and one batch a task, on the model's own text embeddings."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    backbone = load_backbone(args.model, dtype=dtype, device=args.device)
    adapters = Adapters(backbone.transformer)
    adapters.add_student(STUDENT, rank=32, alpha=64, target_modules=TARGETS)
    optimizer = StudentOptimizer(adapters.parameters(STUDENT), lr=1e-4, loss_scale=1e4)
    transitions = schedule("ode", backbone.sigmas(args.steps, args.resolution))
    length = min(128, 14 if args.resolution == 64 else 128)
    encoder = load_text_encoder(args.model, dtype=dtype, device=args.device, max_sequence_length=length)
    batches = []
    for i, source in enumerate(args.teachers):
        adapters.add_teacher(f"teacher_{i}", source)
        x = noise(backbone.latent_shape(args.resolution), [(i, s) for s in range(args.batch_size)]).to(args.device)
        text = encoder([PROMPTS[i % len(PROMPTS)]]).to(args.device, dtype).expand(args.batch_size)
        batches.append(Batch(f"task {i}", f"teacher_{i}", args.guidance_scale, x, text, draw_noise=lambda step, x=x: x))
    negative = encoder([""]).to(args.device, dtype)
    trained = int(args.steps * args.timestep_fraction)
    recipe = Recipe(transitions, trained, student_guidance=args.guidance_scale)
    return Distiller(Parts(backbone, adapters, optimizer, negative), recipe), batches


def reference_round(distiller: Distiller, batches: list[Batch]) -> None:
    """Rollout, teacher pass, training pass, optimizer step."""
    three_pass(distiller, batches)
    distiller.optimizer.step()


def floor_round(distiller: Distiller, batches: list[Batch]) -> None:
    """Only the forwards and backwards that the fused round cannot do without."""
    backbone, recipe = distiller.backbone, distiller.recipe
    for batch in batches:
        v_out = torch.ones_like(batch.x)
        for transition in recipe.transitions[: recipe.trained_steps]:
            with torch.no_grad():
                distiller.adapters.use(batch.teacher)
                _velocity(backbone, distiller, batch, transition.sigma, batch.teacher_guidance)
            distiller.adapters.use(STUDENT)
            v = _velocity(backbone, distiller, batch, transition.sigma, recipe.student_guidance)
            v.backward(v_out)
    distiller.optimizer.discard()


def _velocity(backbone: Backbone, distiller: Distiller, batch: Batch, sigma: float, guidance: float) -> torch.Tensor:
    return backbone.velocity(batch.x, sigma, batch.text, guidance, distiller.negative)


def measure(ways: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way, interleaved, after one warm-up of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
