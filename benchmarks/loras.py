"""Frozen LoRAs in one forward, each on its rows, against a forward for each: time and calls of operators.

    python benchmarks/loras.py --json loras.json                            the tiny world's transformer, on a CPU
    python benchmarks/loras.py --random sd35 --resolution 512 --device cuda --counts 1 3 10

Times are medians over interleaved repeats; on a CPU they are those of this process alone, so that what else the machine
does counts little. The base without any LoRA, on the same rows, is what nothing undercuts.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.world import World, add_flags, random_lora, seconds_of, write_figures
from diffusionopd.data.noise import noise
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.lora import Adapters
from diffusionopd.models.policies import Policies, Request

WAYS = ("one forward", "a forward each", "bare base")


def main() -> None:
    """Measure, print, and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.set_defaults(batch_size=2, guidance_scale=4.5)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 3, 10, 50], help="of LoRAs")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = {count: measure(args, count) for count in args.counts}
    print(f"{args.batch_size} images a LoRA, guidance {args.guidance_scale:g}; milliseconds and calls of operators")
    print(f"{'LoRAs':<8}" + "".join(f"{way:>26}" for way in WAYS))
    for count, ways in table.items():
        cells = [f"{1000 * way['seconds']:.1f} ms, {way['operators']}" for way in ways.values()]
        print(f"{count:<8}" + "".join(f"{cell:>26}" for cell in cells))
    write_figures(args, {"loras": {str(count): ways for count, ways in table.items()}, "torch": torch.__version__})


def measure(args: argparse.Namespace, count: int) -> dict[str, dict[str, float]]:
    """Seconds and calls of operators by way, for so many LoRAs."""
    world = World(args)
    backbone = world._backbone(world.half)
    loras = [random_lora(backbone.transformer, seed) for seed in range(count)]
    adapters = Adapters(backbone.transformer)
    for seed, lora in enumerate(loras):
        adapters.add_teacher(f"lora {seed}", lora)
    text, *_, backbone.negative = world._texts
    x = noise(backbone.latent_shape(args.resolution), [(0, i) for i in range(args.batch_size)]).to(args.device)
    names: list[str | None] = [f"lora {seed}" for seed in range(count)]
    rows = torch.cat([x] * count), Conditions.cat([text] * count)
    asked = [Request(name, x, 0.7, text, args.guidance_scale) for name in names]
    together, apart = (Policies(backbone, adapters, side_by_side=together) for together in (True, False))
    rounds: list[Callable[[], Any]] = [
        lambda: together.frozen(asked),
        lambda: apart.frozen(asked),
        lambda: together.frozen([Request(None, rows[0], 0.7, rows[1], args.guidance_scale)]),
    ]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    operators = {way: count_operators(round_) for way, round_ in zip(WAYS, rounds, strict=True)}
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    for _ in range(args.repeats):
        for way, round_ in zip(WAYS, rounds, strict=True):
            seconds[way].append(seconds_of(round_, args.device, clock))
    return {way: {"seconds": statistics.median(seconds[way]), "operators": operators[way]} for way in WAYS}


class Operators(TorchDispatchMode):
    """Counts the operators called inside the block that compute or copy: views are none."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        returned = (value.alias_info for value in function._schema.returns)
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        self.count += not is_view and function._opname not in ("_unsafe_view", "empty", "empty_like")
        return function(*args, **(kwargs or {}))


def count_operators(work: Callable[[], Any]) -> int:
    """Calls of operators that compute or copy."""
    work()
    with Operators() as counted:
        work()
    return counted.count


if __name__ == "__main__":
    main()
