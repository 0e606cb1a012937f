"""One round in many ways, side by side in one run: the upstream schedule, the default, each optimisation, the floor.

    python benchmarks/round.py --json round.json                                    the tiny world, on a CPU
    python benchmarks/round.py --random sd35 --resolution 512 --device cuda --json round.json    SD3.5-M's shape
    python benchmarks/round.py --random small --ways upstream default merged floor  the same script, small, anywhere
    python benchmarks/round.py --preset verl-omni --guidance_scale 4.5 --device cuda    a setting with published seconds

Figures are ratios of medians over interleaved repeats, so that whatever else the machine does meets all alike. Every
way has a model of its own. ``floor`` is bare passes: one teacher forward, one student forward and backward per task and
trained step, with no loss, no sampling and no bookkeeping around them; only tasks side by side go below it.
Utilisation is the FLOPs of the floor over time and over what a plain matrix product reaches in the same run.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import gc
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

import torch
from tqdm import tqdm

from benchmarks.three_pass import three_pass
from benchmarks.upstream import stock, upstream_round
from benchmarks.world import World, add_flags, flops_of_a_step, seconds_of, write_figures
from diffusionopd.algorithms.opd import Opd
from diffusionopd.data.batches import Batch, choose_steps, side_by_side
from diffusionopd.models.acceleration import AccelerationError, check_compiler, compile_blocks
from diffusionopd.models.backbone import Backbone
from diffusionopd.models.merged import MergedTeachers

Round = Callable[[], object]


@dataclass(frozen=True)
class Way:
    """A way to do a round; ``build`` makes a fresh model and returns the round."""

    what: str
    build: Callable[[World], Round]
    exact: str = "yes"  # whether it trains the default's student


@dataclass(frozen=True)
class Preset:
    """A setting for which others have published seconds."""

    flags: Mapping[str, Any]
    ways: Sequence[str]
    published: Mapping[float, float]  # guidance -> seconds a round
    gpus: int
    remarks: Sequence[str]  # whose round that is, and where it differs


PRESETS = {
    "verl-omni": Preset(
        flags={"random": "sd35", "tasks": 1, "batch_size": 8, "batches": 8, "resolution": 384, "steps": 10}
        | {"max_sequence_length": 256},
        ways=("upstream", "default", "3 steps", "floor"),
        published={1.0: 24.3, 4.5: 36.2},
        gpus=4,
        remarks=(
            "SD3.5-M, 64 images at 384 pixels, one teacher: https://github.com/verl-project/verl-omni/issues/498",
            "one GPU each for student, rollout, teacher and judge, of a type that is not stated. Their step also sends",
            "weights to the rollout, decodes and judges. 10 sampling steps and 256 text tokens are of their recipe,",
            "which trains a window of 3 steps, with noise: see '3 steps'. Whether the figures are of it is not stated.",
        ),
    ),
}
REDUCED = {"batch_size": 1, "batches": 2, "resolution": 64, "max_sequence_length": 14, "repeats": 2}
"""Of a preset with ``--random small``: seconds on a CPU."""


def main() -> None:
    """Measure, print the table, and write ``--json``."""
    args = parse()
    torch.set_num_threads(args.threads)
    world = World(args)
    rounds, resident = build_all(world, {name: WAYS[name] for name in args.ways})
    seconds, peaks = time_all(rounds, resident, args.repeats, args.device)
    rounds.clear()  # their models make room for the one that is counted
    result = summarise(world, seconds, resident, peaks)
    print(table(result, world))
    machine = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    result |= {"date": time.strftime("%Y-%m-%d"), "machine": machine, "python": platform.python_version()}
    if args.preset:
        preset = PRESETS[args.preset]
        result["published"] = {"seconds": preset.published, "gpus": preset.gpus, "remarks": preset.remarks}
    write_figures(args, result | {"torch": torch.__version__, "all_s": seconds})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.epilog = "\n".join(["ways:", *(f"  {name:<18}{way.what}" for name, way in WAYS.items())])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--preset", choices=list(PRESETS), help="the setting of others' published figures; flags win")
    given = parser.parse_known_args(arguments)[0]
    if given.preset:
        preset = PRESETS[given.preset]
        parser.set_defaults(ways=list(preset.ways), **preset.flags)
        parser.set_defaults(**REDUCED if given.random == "small" else {})
    return parser.parse_args(arguments)


# ---- the ways --------------------------------------------------------------------------------------------------------


def way(
    round_: Callable[[Opd, list[Batch]], object] = Opd.round,
    change: Callable[[Backbone], None] | None = None,
    *,
    separate: bool = False,
    apart: bool = False,
    **switches: Any,
) -> Callable[[World], Round]:
    """A round, by default the project's own, with the switches of :meth:`World.setup` and a change to the backbone.

    Tasks are side by side, all of them, unless they are to be ``separate``; teachers ``apart`` have a pass each.
    """

    def build(world: World) -> Round:
        algorithm, batches = world.setup(**switches)
        algorithm.policies.side_by_side = not (separate or apart)
        batches = side_by_side(batches, 1 if separate else len(batches))
        if change is not None:
            change(algorithm.policies.backbone)
        return partial(round_, algorithm, batches)

    return build


def three_passes(algorithm: Opd, batches: list[Batch]) -> None:
    """Rollout, teachers on every state, training, each a pass of its own."""
    three_pass(algorithm, batches)
    algorithm.optimizer.step()


def bare(algorithm: Opd, batches: list[Batch]) -> None:
    """One teacher forward, one student forward and backward per task and trained step, and nothing around them."""
    for batch in batches:
        for step in batch.steps:
            sigma = algorithm.transitions[step].sigma
            algorithm.teacher(batch)(batch.noise, sigma)
            v = algorithm.student(batch)(batch.noise, sigma)
            v.backward(torch.ones_like(v))
    algorithm.optimizer.discard()


def few_steps(count: int) -> Callable[[Opd, list[Batch]], object]:
    """Of the trained steps this many, drawn anew every time and for each task; the median is over the draws too."""
    draws = itertools.count()

    def round_(algorithm: Opd, batches: list[Batch]) -> None:
        number, trained = next(draws), algorithm.sampler.trained_steps
        drawn = []
        for batch in batches:
            steps = {name: choose_steps(trained, count, number, i) for i, name in enumerate(batch.slices)}
            drawn.append(replace(batch, rows=tuple(replace(row, steps=steps[row.task]) for row in batch.rows)))
        algorithm.round(drawn)

    return round_


def compiled(backbone: Backbone) -> None:
    """Blocks through torch.compile; AccelerationError without a compiler."""
    check_compiler(backbone.device)
    compile_blocks(backbone.blocks())


def by_default(backbone: Backbone) -> None:
    """Blocks compiled where a long run has them compiled: on a GPU."""
    if backbone.device.type == "cuda":
        compiled(backbone)


WAYS = {
    "upstream": Way(
        "three passes, teacher on every step, float32 weights (autocast on a GPU), text encoders for every batch, "
        "stock layers, PEFT's set_adapter",
        upstream_round,
    ),
    "three passes": Way(
        "rollout, teacher, training one after the other; else the default",
        way(three_passes, change=by_default, separate=True),
    ),
    "default": Way(
        "one fused pass, all tasks side by side; on a GPU the base in half precision and its blocks compiled",
        way(change=by_default),
    ),
    "uncompiled": Way("the same with compile = False, as on a CPU", way()),
    "compiled": Way("the same with compile = True, as on a GPU", way(change=compiled)),
    "separate": Way(
        "a pass of its own for each task (train.tasks_per_pass = 1)", way(change=by_default, separate=True)
    ),
    "merged": Way(
        "teachers merged into copies of the adapted matrices", way(change=by_default, adapters=MergedTeachers)
    ),
    "stock layers": Way(
        "diffusers' norms and PEFT's LoRA layers, which know one adapter at a time, instead of the fused; not compiled",
        way(change=stock, apart=True),
    ),
    "plain AdamW": Way("the optimizer one tensor after the other", way(change=by_default, fused_optimizer=False)),
    "checkpointing": Way(
        "activations computed again in the backward pass, not compiled",
        way(change=lambda backbone: backbone.transformer.enable_gradient_checkpointing()),
    ),
    "3 steps": Way("train.steps_per_rollout = 3, not compiled", way(few_steps(3)), exact="in expectation"),
    "1 step": Way("train.steps_per_rollout = 1, not compiled", way(few_steps(1)), exact="in expectation"),
    "floor": Way(
        "bare forwards and backwards, a pass for each task", way(bare, change=by_default, separate=True), exact="-"
    ),
    "merged floor": Way(
        "the same, with merged teachers",
        way(bare, change=by_default, separate=True, adapters=MergedTeachers),
        exact="-",
    ),
}
REFERENCES = ("upstream", "default", "floor")


# ---- measuring -------------------------------------------------------------------------------------------------------


def build_all(world: World, ways: Mapping[str, Way]) -> tuple[dict[str, Round], dict[str, int]]:
    """Every way, warmed up, and the GPU memory that its model takes; what cannot be built is reported and left out."""
    rounds, resident = {}, {}
    device = None if world.args.device == "cpu" else world.args.device
    for name, way in tqdm(ways.items(), desc="building", unit="way"):
        before = torch.cuda.memory_allocated(device)
        try:
            round_ = way.build(world)
            round_()
        except AccelerationError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        gc.collect()
        rounds[name], resident[name] = round_, torch.cuda.memory_allocated(device) - before
    return rounds, resident


def time_all(
    rounds: Mapping[str, Round], resident: Mapping[str, int], repeats: int, device: str
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each way, interleaved, and its peak bytes of GPU memory, the models of the others left out.

    An interrupt (Ctrl-C, `timeout -s INT`) ends it early: what has been measured counts.
    """
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    try:
        for _ in tqdm(range(repeats), desc="measuring", unit="repeat"):
            for name, round_ in rounds.items():
                if device == "cpu":
                    seconds.setdefault(name, []).append(seconds_of(round_, device))
                    continue
                others = torch.cuda.memory_allocated(device) - resident[name]
                torch.cuda.reset_peak_memory_stats(device)
                seconds.setdefault(name, []).append(seconds_of(round_, device))
                peaks[name] = torch.cuda.max_memory_allocated(device) - others
    except KeyboardInterrupt:
        if not seconds:
            raise
        print("interrupted: medians of the repeats so far", file=sys.stderr)
    return seconds, peaks


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a plain square matrix product, the median of several."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / statistics.median([seconds_of(lambda: a @ b, device) for _ in range(12)][2:])


def needed_flops(world: World) -> int:
    """FLOPs of a round that no way of doing it saves, counted on one visit of one image."""
    algorithm, batches = World(argparse.Namespace(**{**vars(world.args), "batch_size": 1})).setup()
    visits = world.args.batch_size * len(batches) * world.sampler.trained_steps
    return sum(flops_of_a_step(algorithm, batches[0])) * visits


def summarise(
    world: World, seconds: Mapping[str, list[float]], resident: Mapping[str, int], peaks: Mapping[str, int]
) -> dict[str, Any]:
    """Medians, ratios, utilisation and memory by way."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    flops, fastest = needed_flops(world), matrix_peak(world.args.device, world.half)
    ways: dict[str, dict[str, float]] = {}
    for name, median in medians.items():
        ways[name] = {"seconds": median}
        ways[name] |= {f"to_{other}": median / medians[other] for other in REFERENCES if other in medians}
        if WAYS[name].exact == "yes":
            ways[name]["utilisation"] = flops / median / fastest
        if name in peaks:
            ways[name] |= {"peak_bytes": peaks[name], "resident_bytes": resident[name]}
    return {"ways": ways, "needed_flops": flops, "matrix_flops_per_second": fastest}


def table(result: Mapping[str, Any], world: World) -> str:
    """The figures for people."""
    args = world.args
    images = f"{args.batch_size} images" if args.batches == 1 else f"{args.batches} x {args.batch_size} images"
    tasks, model = (args.tasks, args.random) if args.random else (len(args.teachers), Path(args.model).parent.name)
    lines = [
        f"{model}: {tasks} tasks x {images} x {world.sampler.trained_steps} trained steps at "
        f"{args.resolution} pixels, guidance {args.guidance_scale:g}, {args.device}; median of {args.repeats}",
        f"needed: {result['needed_flops'] / 1e12:.4g} TFLOP a round; a matrix product reaches "
        f"{result['matrix_flops_per_second'] / 1e12:.4g} TFLOP/s here",
        _line("way", "seconds", *(f"/{name}" for name in REFERENCES), "of peak", "peak GiB", "exact"),
    ]
    for name, figures in result["ways"].items():
        ratios = [f"{figures[key]:.3f}" if (key := f"to_{other}") in figures else "" for other in REFERENCES]
        used = f"{figures['utilisation']:.1%}" if "utilisation" in figures else ""
        peak = f"{figures['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in figures else ""
        lines.append(_line(name, f"{figures['seconds']:.3f}", *ratios, used, peak, WAYS[name].exact))
    return "\n".join(lines + (beside(args) if args.preset else []))


def beside(args: argparse.Namespace) -> list[str]:
    """The figures that others have published for the preset, and what of its setting the command line has changed."""
    preset = PRESETS[args.preset]
    lines = [
        _line(f"{args.preset} at {scale:g}", f"{seconds:.3f}", "", "", "", "", f"published: on {preset.gpus} GPUs")
        for scale, seconds in preset.published.items()
    ]
    lines += ["Published figures are of other machines and were not measured here.", *preset.remarks]
    changed = [f"{name} {getattr(args, name)}" for name, value in preset.flags.items() if getattr(args, name) != value]
    return lines + ([f"What was measured is NOT that setting: {', '.join(changed)}."] if changed else [])


def _line(name: str, *cells: str) -> str:
    return f"{name:<18}" + "".join(f"{cell:>10}" for cell in cells[:-1]) + f"  {cells[-1]}"


if __name__ == "__main__":
    main()
