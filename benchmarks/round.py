"""One round in many ways, side by side in one run: the upstream schedule, the default, each optimisation, the floor.

    python benchmarks/round.py --json round.json                                    the tiny world, on a CPU
    python benchmarks/round.py --random sd35 --resolution 512 --device cuda --json round.json    SD3.5-M's shape
    python benchmarks/round.py --random small --ways upstream default merged floor  the same script, small, anywhere

Figures are ratios of medians over interleaved repeats, so that whatever else the machine does meets all alike. Every
way has a model of its own. ``floor`` is what nothing can undercut without changing the method: one teacher forward, one
student forward and backward per task and trained step, with no loss, no sampling and no bookkeeping around them.
Utilisation is the FLOPs of the floor over time and over what a plain matrix product reaches in the same run.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.three_pass import three_pass
from benchmarks.upstream import upstream_round
from benchmarks.world import World, add_flags, recorded, trained_steps
from diffusionopd.data.batches import choose_steps
from diffusionopd.models.acceleration import AccelerationError
from diffusionopd.models.merged import MergedTeachers

Round = Callable[[], object]


@dataclass(frozen=True)
class Way:
    """A way to do a round; ``build`` makes a fresh model and returns the round."""

    what: str
    build: Callable[[World], Round]
    exact: str = "yes"  # whether it trains the default's student


def main() -> None:
    """Measure, print the table, and write ``--json``."""
    args = parse()
    torch.set_num_threads(args.threads)
    world = World(args)
    rounds, resident = build_all(world, {name: WAYS[name] for name in args.ways})
    seconds, peaks = time_all(rounds, resident, args.repeats, args.device)
    rounds.clear()  # their models make room for the one that is counted
    result = summarise(world, seconds, resident, peaks)
    print(table(result, args))
    if args.json:
        machine = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name(args.device)
        result |= {"date": time.strftime("%Y-%m-%d"), "machine": machine, "python": platform.python_version()}
        result |= {"torch": torch.__version__, "settings": recorded(args), "all_s": seconds}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.epilog = "\n".join(["ways:", *(f"  {name:<18}{way.what}" for name, way in WAYS.items())])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--text_encoders", action="store_true", help="with --random: encoders of the published size")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args(arguments)


# ---- the ways --------------------------------------------------------------------------------------------------------


def distilled(**switches: Any) -> Callable[[World], Round]:
    """The project's own round with the switches of :meth:`World.setup`."""
    return lambda world: world.setup(**switches).round


def few_steps(count: int) -> Callable[[World], Round]:
    """Of the trained steps this many, drawn anew every time; the median is over the draws too."""

    def build(world: World) -> Round:
        setup, draws = world.setup(), itertools.count()
        return lambda: setup.round(steps=choose_steps(len(setup.trained), count, next(draws)))

    return build


def three_passes(world: World) -> Round:
    """Rollout, teachers on every state, training, each a pass of its own."""
    setup = world.setup()

    def round_() -> None:
        three_pass(setup.algorithm, setup.batches)
        setup.algorithm.optimizer.step()

    return round_


def floor(**switches: Any) -> Callable[[World], Round]:
    """One teacher forward, one student forward and backward per task and trained step, and nothing around them."""

    def build(world: World) -> Round:
        setup = world.setup(**switches)
        algorithm = setup.algorithm

        def round_() -> None:
            for batch in setup.batches:
                for transition in setup.trained:
                    algorithm.teacher(batch)(batch.noise, transition.sigma)
                    v = algorithm.student(batch)(batch.noise, transition.sigma)
                    v.backward(torch.ones_like(v))
            algorithm.optimizer.discard()

        return round_

    return build


WAYS = {
    "upstream": Way(
        "three passes, teacher on every step, float32 weights (autocast on a GPU), text encoders for every batch, "
        "stock layers, PEFT's set_adapter",
        upstream_round,
    ),
    "three passes": Way("rollout, teacher, training one after the other; else the default", three_passes),
    "default": Way("one fused pass, base in half precision on a GPU", distilled()),
    "separate": Way("a pass of its own for each task (train.tasks_per_pass = 1)", distilled()),
    "merged": Way("teachers merged into copies of the adapted matrices", distilled(adapters=MergedTeachers)),
    "compiled": Way("blocks through torch.compile", distilled(compiled=True)),
    "merged, compiled": Way("both", distilled(compiled=True, adapters=MergedTeachers)),
    "stock layers": Way("diffusers' norms and PEFT's LoRA layers instead of the fused ones", distilled(stock=True)),
    "plain AdamW": Way("the optimizer one tensor after the other", distilled(fused_optimizer=False)),
    "checkpointing": Way("activations computed again in the backward pass", distilled(checkpointing=True)),
    "3 steps": Way("train.steps_per_rollout = 3", few_steps(3), exact="in expectation"),
    "1 step": Way("train.steps_per_rollout = 1", few_steps(1), exact="in expectation"),
    "floor": Way("bare forwards and backwards", floor(), exact="-"),
    "merged floor": Way("the same, with merged teachers", floor(adapters=MergedTeachers), exact="-"),
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def build_all(world: World, ways: Mapping[str, Way]) -> tuple[dict[str, Round], dict[str, int]]:
    """Every way, warmed up, and the GPU memory that its model takes; what cannot be built is reported and left out."""
    rounds, resident = {}, {}
    for name, way in tqdm(ways.items(), desc="building", unit="way"):
        before = _allocated(world.args.device)
        try:
            round_ = way.build(world)
            round_()
        except AccelerationError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        gc.collect()
        rounds[name], resident[name] = round_, _allocated(world.args.device) - before
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
                others = _allocated(device) - resident[name]
                if device != "cpu":
                    torch.cuda.reset_peak_memory_stats(device)
                seconds.setdefault(name, []).append(_seconds(round_, device))
                if device != "cpu":
                    peaks[name] = torch.cuda.max_memory_allocated(device) - others
    except KeyboardInterrupt:
        if not seconds:
            raise
        print("interrupted: medians of the repeats so far", file=sys.stderr)
    return seconds, peaks


def _seconds(round_: Round, device: str) -> float:
    """On a GPU between two events on its own clock."""
    if device == "cpu":
        started = time.perf_counter()
        round_()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    round_()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def _allocated(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.memory_allocated(device)


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a plain square matrix product, the median of several."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [_seconds(lambda: a @ b, device) for _ in range(12)][2:]
    return 2 * size**3 / statistics.median(seconds)


def needed_flops(world: World) -> int:
    """FLOPs of a round that no way of doing it saves: teacher forwards without LoRA, student forwards and backwards.

    Counted on one visit of one image.
    """
    setup = World(argparse.Namespace(**{**vars(world.args), "batch_size": 1})).setup()
    batch, sigma = setup.batches[0], setup.trained[0].sigma
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        setup.algorithm.base(batch)(batch.noise, sigma)
        setup.algorithm.student(batch)(batch.noise, sigma).sum().backward()
    return counter.get_total_flops() * world.args.batch_size * len(setup.batches) * trained_steps(world.args)


def summarise(
    world: World, seconds: Mapping[str, list[float]], resident: Mapping[str, int], peaks: Mapping[str, int]
) -> dict[str, Any]:
    """Medians, ratios, utilisation and memory by way."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    flops, fastest = needed_flops(world), matrix_peak(world.args.device, world.half)
    references = [name for name in ("upstream", "default", "floor") if name in medians]
    ways: dict[str, dict[str, float]] = {}
    for name, median in medians.items():
        ways[name] = {"seconds": median, **{f"to_{other}": median / medians[other] for other in references}}
        if WAYS[name].exact == "yes":
            ways[name]["utilisation"] = flops / median / fastest
        if name in peaks:
            ways[name] |= {"peak_bytes": peaks[name], "resident_bytes": resident[name]}
    return {"ways": ways, "needed_flops": flops, "matrix_flops_per_second": fastest}


def table(result: Mapping[str, Any], args: argparse.Namespace) -> str:
    """The figures for people."""
    tasks = args.tasks if args.random else len(args.teachers)
    model = args.random or Path(args.model).parent.name
    lines = [
        f"{model}: {tasks} tasks x {args.batch_size} images x {trained_steps(args)} trained steps at "
        f"{args.resolution} pixels, guidance {args.guidance_scale:g}, {args.device}; median of {args.repeats}",
        f"needed: {result['needed_flops'] / 1e12:.4g} TFLOP a round; a matrix product reaches "
        f"{result['matrix_flops_per_second'] / 1e12:.4g} TFLOP/s here",
        f"{'way':<18}{'seconds':>9}{'/upstream':>11}{'/default':>10}{'/floor':>8}{'of peak':>9}{'peak GiB':>10}  exact",
    ]
    for name, figures in result["ways"].items():
        ratios = [figures.get(f"to_{other}") for other in ("upstream", "default", "floor")]
        cells = [f"{ratio:.3f}" if ratio else "" for ratio in ratios]
        share, peak = figures.get("utilisation"), figures.get("peak_bytes")
        lines.append(
            f"{name:<18}{figures['seconds']:9.3f}{cells[0]:>11}{cells[1]:>10}{cells[2]:>8}"
            f"{f'{share:.1%}' if share else '':>9}{f'{peak / 2**30:.2f}' if peak else '':>10}  {WAYS[name].exact}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
