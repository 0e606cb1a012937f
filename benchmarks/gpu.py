"""What one GPU makes of a round at the size of SD3.5-Medium: seconds, utilisation, peak memory, precision.

    python benchmarks/gpu.py --json gpu.json             about twelve minutes on an H100, of which compiling takes half
    python benchmarks/gpu.py --parts published merged    some of it
    python benchmarks/gpu.py --tiny                      the same script, small, on a CPU

One process on one model with random weights, so that each shape is compiled once; ``benchmarks/round.py`` has more ways
to do a round. A line is printed, and written, as soon as it is known: a limit of time loses what comes later only.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

import torch
from torch import Tensor, nn

from benchmarks.round import bare, compiled, matrix_peak
from benchmarks.upstream import stock, upstream_round
from benchmarks.world import World, add_flags, flops_of_a_step, make_batch, seconds_of
from diffusionopd.algorithms.base import Models
from diffusionopd.algorithms.opd import Opd, OpdSettings
from diffusionopd.data.batches import Batch, side_by_side
from diffusionopd.data.noise import noise
from diffusionopd.files import write_atomically
from diffusionopd.models.merged import MergedTeachers
from diffusionopd.models.policies import STUDENT


@dataclass(frozen=True)
class Setting:
    """A round: ``batches`` of ``images`` for each of ``tasks``, ``together`` of them in a pass.

    ``teachers``: their guidance; 0: the student's. ``strength``: of their targets.
    """

    name: str
    tasks: int
    images: int
    resolution: int
    guidance: float
    batches: int = 1
    together: int = 1
    teachers: float = 0.0
    strength: float = 1.0

    @property
    def all_images(self) -> int:
        """Of a round."""
        return self.tasks * self.images * self.batches

    @property
    def forwards(self) -> tuple[int, int]:
        """Of an image's state: frozen ones, and the student's."""
        guided = [1 + (guidance > 1) for guidance in (self.teachers or self.guidance, self.guidance)]
        return guided[0] * (1 + (self.strength != 1)), guided[1]


PUBLISHED = Setting("published round", 3, 3, 512, 4.5, together=3)
WHOLE = replace(PUBLISHED, name="72 images", batches=8)
TARGETS = [
    replace(PUBLISHED, name="strength 1.5", strength=1.5),
    replace(PUBLISHED, name="folded", guidance=1.0, teachers=4.5),
    replace(PUBLISHED, name="folded, strength 1.25", guidance=1.0, teachers=4.5, strength=1.25),
]
SEPARATE = Setting("one task in a pass", 3, 3, 512, 4.5)
LARGE = Setting("12 images in a pass", 1, 12, 512, 4.5, batches=3)
OTHERS = [  # with --max_sequence_length 256, the settings of verl-omni's published seconds
    Setting("64 at 384, guidance 4.5", 1, 16, 384, 4.5, batches=4),
    Setting("64 at 384, no guidance", 1, 32, 384, 1.0, batches=2),  # as many samples in a pass: the same graphs
]
TINY = {"random": "small", "device": "cpu", "steps": 3, "resolution": 64}


@dataclass
class Bench:
    """The model, and the figures so far."""

    args: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    exact: tuple[Tensor, Tensor] | None = None  # the student's answers in float32

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.world = World(self.args)
        self.peak = matrix_peak(self.args.device, self.world.half)
        name = "CPU" if self.args.device == "cpu" else torch.cuda.get_device_name(self.args.device)
        self.facts |= {"machine": name, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        self.facts["matrix_flops_per_second"] = self.peak
        self.algorithm, _ = self.world.setup()
        self.backbone = self.algorithm.policies.backbone
        self.flops = {r: self._flops_of_a_step(r) for r in {s.resolution for s in [PUBLISHED, *OTHERS]}}

    def _flops_of_a_step(self, resolution: int) -> tuple[int, int]:
        """Of an image's state without guidance: a frozen forward; the student's forward and backward."""
        algorithm, (batch,) = self.round_of(replace(PUBLISHED, tasks=1, images=1, resolution=resolution, guidance=1.0))
        flops = flops_of_a_step(algorithm, batch)
        algorithm.optimizer.discard()
        algorithm.velocities.clear()
        return flops

    def round_of(self, setting: Setting) -> tuple[Opd, list[Batch]]:
        """The algorithm of a setting on the one model, and the batches of a round."""
        before = self.algorithm
        sampler = replace(before.sampler, guidance_scale=setting.guidance)
        resolution = setting.resolution // (8 if self.args.tiny else 1)
        sigmas = self.backbone.sigmas(self.args.steps, resolution)
        models = Models(before.policies, before.optimizer)
        shape, images = self.backbone.latent_shape(resolution), range(setting.images)
        batches = []
        for number in range(setting.batches):
            of_tasks = []
            for task in range(setting.tasks):
                text = self.world._texts[task].index([0] * setting.images)
                x = noise(shape, [(task, number, i) for i in images]).to(self.args.device)
                target = {"guidance": setting.teachers or setting.guidance, "strength": setting.strength}
                of_tasks.append(make_batch(task, x, text, sampler, **target))
            batches += side_by_side(of_tasks, setting.together)
        return Opd(models, OpdSettings(), sampler, sigmas, before.shape), batches

    def time(self, setting: Setting, what: str, repeats: int, round_: Any = None, beside: int = 0) -> None:
        """Warm up, measure and print a line; ``beside``: bytes on the GPU that are not the round's."""
        if time.perf_counter() - self.started > self.args.seconds:
            print(f"{setting.name}, {what}: left out, time is up", flush=True)
            return
        if round_ is None:
            algorithm, batches = self.round_of(setting)
            round_ = lambda: algorithm.round(batches)  # noqa: E731
        first, *seconds = [self._seconds(round_) for _ in range(1 + repeats)]
        needed = sum(n * flops for n, flops in zip(setting.forwards, self.flops[setting.resolution], strict=True))
        needed *= setting.all_images * self.algorithm.sampler.trained_steps
        median = statistics.median(seconds)
        row = {"setting": setting.name, "what": what, "first_seconds": first, "seconds": median, "all": seconds}
        row |= {"tflop": needed / 1e12, "utilisation": needed / median / self.peak}
        peak = torch.cuda.max_memory_allocated() - beside if self.args.device != "cpu" else 0
        row |= {"peak_gib": peak / 2**30}
        self.rows.append(row)
        print(
            f"[{time.perf_counter() - self.started:4.0f} s] {setting.name:24} {what:14} {median:8.3f} s  "
            f"{row['utilisation']:6.1%} of peak  {row['peak_gib']:6.2f} GiB  (first {first:.1f} s)",
            flush=True,
        )
        self.write()

    def _seconds(self, round_: Any) -> float:
        if self.args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        return seconds_of(round_, self.args.device)

    def answers(self, transformer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The student's velocity at a state of the published round, and the gradient of its mean square."""
        own, self.backbone.transformer, self.backbone.dtype = self.backbone.transformer, transformer, dtype
        algorithm, batches = self.round_of(PUBLISHED)
        self.algorithm.policies.adapters.use(STUDENT)
        text = batches[0].text.to(self.args.device, dtype)
        v, _ = self.backbone.velocity(batches[0].noise, 0.7, text, PUBLISHED.guidance)
        v.square().mean().backward()
        trained = [p for p in transformer.parameters() if p.requires_grad]
        gradient = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        for parameter in trained:
            parameter.grad = None
        self.backbone.transformer, self.backbone.dtype = own, self.world.half
        return v.detach(), gradient

    def allocated(self) -> int:
        """Bytes on the GPU."""
        return torch.cuda.memory_allocated() if self.args.device != "cpu" else 0

    def copied(self) -> nn.Module:
        """A copy of the transformer with the student in use."""
        self.algorithm.policies.adapters.use(STUDENT)
        for module in self.backbone.transformer.modules():
            if hasattr(module, "narrowed"):
                module.narrowed.clear()
        return copy.deepcopy(self.backbone.transformer)

    def compare(self, what: str, transformer: nn.Module) -> None:
        """Print how far the student's velocity and gradient are from float32's."""
        if self.exact is None:
            self.exact = self.answers(self.copied().float(), torch.float32)
        mine = self.answers(transformer, self.world.half)
        far = [((a - b).norm() / b.norm()).item() for a, b in zip(mine, self.exact, strict=True)]
        self.facts[f"{what}, from float32"] = dict(zip(("velocity", "gradient"), far, strict=True))
        print(f"{what}: velocity {far[0]:.2%}, gradient {far[1]:.2%} from float32", flush=True)
        self.write()

    def write(self) -> None:
        """The figures so far."""
        if self.args.json:
            write_atomically(self.args.json, json.dumps(self.facts | {"rows": self.rows}, indent=2) + "\n")


def precision(bench: Bench) -> None:
    """How far from float32 the layers are as they stand and the stock ones under autocast; before any is compiled."""
    bench.compare("not compiled", bench.backbone.transformer)
    stocked = bench.copied()
    bench.backbone.transformer, own = stocked, bench.backbone.transformer
    stock(bench.backbone)
    bench.backbone.transformer = own
    bench.compare("stock layers, autocast", stocked)


def published(bench: Bench) -> None:
    """The default round."""
    if bench.exact is not None:
        bench.compare("default", bench.backbone.transformer)  # of the same weights as before
    bench.time(PUBLISHED, "default", 3)


def separate(bench: Bench) -> None:
    """A pass for each task, and its bare passes: the floor."""
    bench.time(SEPARATE, "default", 3)
    algorithm, batches = bench.round_of(SEPARATE)
    bench.time(SEPARATE, "floor", 3, lambda: bare(algorithm, batches))


def merged(bench: Bench) -> None:
    """The default with teachers merged into copies of what they adapt, on a model of its own."""
    ours, own = bench.allocated(), bench.algorithm
    bench.algorithm, _ = bench.world.setup(adapters=MergedTeachers)
    if not bench.args.tiny:
        compiled(bench.algorithm.policies.backbone)
    algorithm, batches = bench.round_of(PUBLISHED)
    bench.algorithm = own
    bench.time(PUBLISHED, "merged", 3, lambda: algorithm.round(batches), beside=ours)


def upstream(bench: Bench) -> None:
    """The upstream schedule, on a model of its own."""
    ours = bench.allocated()
    bench.time(PUBLISHED, "upstream", 2, upstream_round(bench.world), beside=ours)


def by_default(*settings: Setting) -> Callable[[Bench], None]:
    """The default in other settings."""

    def time_all(bench: Bench) -> None:
        for setting in settings:
            bench.time(setting, "default", 3)

    return time_all


PARTS: dict[str, Callable[[Bench], None]] = {
    "uncompiled": lambda bench: bench.time(PUBLISHED, "not compiled", 2),
    "precision": precision,
    "published": published,
    "separate": separate,
    "384": by_default(*OTHERS),
    "upstream": upstream,
    "merged": merged,
    "large": by_default(LARGE),
    "targets": by_default(*TARGETS),
    "whole": lambda bench: bench.time(WHOLE, "default", 1),
}
UNCOMPILED = ("uncompiled", "precision")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU, nothing compiled")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--seconds", type=float, default=900.0, help="after these nothing new is begun")
    parser.set_defaults(random="sd35", device="cuda", resolution=512, batch_size=3, guidance_scale=4.5)
    args = parser.parse_args(arguments)
    vars(args).update(tasks=PUBLISHED.tasks, batch_size=PUBLISHED.images, batches=1, guidance_scale=PUBLISHED.guidance)
    if args.tiny:
        vars(args).update(TINY)
    return args


def main() -> None:
    """The parts that are asked for, those that compiled blocks would change first."""
    bench = Bench(parse())
    print(f"{bench.facts['machine']}: matrix products {bench.peak / 1e12:.0f} TFLOP/s", flush=True)
    for name in UNCOMPILED:
        if name in bench.args.parts:
            PARTS[name](bench)
    if not bench.args.tiny:
        compiled(bench.backbone)
    for name, part in PARTS.items():
        if name in bench.args.parts and name not in UNCOMPILED:
            part(bench)


if __name__ == "__main__":
    main()
