"""What a round of a configuration costs: NFE, FLOPs, time and memory, counted without any weights.

    python -m tools.cost --config config/opd.py:mopd --num_processes 8 [--config.KEY=VALUE ...]
    python -m tools.cost --config config/teacher.py:nft_geneval --num_processes 8 --json FILE

For any configuration, whether or not its prompts, teachers and weights are on this machine. Time is that of the
transformer alone at the utilisation that is given: a prediction to compare a measurement with, not a measurement.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

from diffusionopd.config_schema import flatten, read, redacted, split_arguments
from diffusionopd.files import path_flag, write_json
from diffusionopd.models.settings import BaseSettings
from diffusionopd.training import check, load_config
from diffusionopd.training.costs import ladder
from diffusionopd.training.costs.count import Cost
from diffusionopd.training.costs.ladder import giga
from diffusionopd.training.costs.models import Pipeline, read_pipeline
from diffusionopd.training.costs.round import (
    MACHINE,
    memory,
    outside_training,
    own_models,
    step_cost,
    tasks_that_fit,
    work,
)
from diffusionopd.training.keys import with_paths
from diffusionopd.training.passes import speaks_against_compiling
from diffusionopd.training.plan import Plan

UTILISATION = {True: 0.47, False: 0.33}
"""Compiled or not -> the share of 790 TFLOP/s that a round of SD3.5-Medium reached on an H100 (docs/performance.md)."""


def main() -> None:
    """Print the cost of a configuration."""
    try:
        source, overrides, rest = split_arguments(sys.argv[1:])
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--num_processes", type=int, default=1, help="of the run, one per GPU")
        parser.add_argument("--peak_tflops", type=float, default=790.0, help="of a GPU; 790: bf16 products, H100, H200")
        parser.add_argument(
            "--utilisation", type=float, help="share of the peak; default, measured on an H100: 0.47, not compiled 0.33"
        )
        parser.add_argument("--gpu_gb", type=float, default=80.0, help="memory of a GPU, in GB of 1024^3 bytes")
        parser.add_argument("--json", type=path_flag, help="write the figures to this file")
        args = parser.parse_args(rest)
        if source is None:
            sys.exit("error: name a configuration (--config config/opd.py:mopd)")
        config = load_config(source, overrides)
        pipeline = read_pipeline(**read(BaseSettings, flatten(with_paths(config))).source)
        plan = check(config, args.num_processes, sources=False, model=pipeline)
        report(plan, pipeline, args)
    except ValueError as error:
        sys.exit(f"error: {redacted(error)}")


def report(plan: Plan, pipeline: Pipeline, args: argparse.Namespace) -> None:
    """Print what ``plan`` costs and write it to ``args.json``."""
    shape = plan.shape
    cost, own = step_cost(plan, pipeline, shape.backward_size), own_models(plan, pipeline)
    fitting = tasks_that_fit(plan, cost, own, args.gpu_gb * 2**30)
    tasks = min(shape.tasks_per_pass or fitting, shape.tasks_per_round)
    if tasks > 1:
        cost = step_cost(plan, pipeline, tasks * shape.backward_size)
    unresolved, plan = plan, replace(plan, shape=replace(shape, tasks_per_pass=tasks))
    kinds = work(plan, cost, own)
    nfe, flops = (sum(column) for column in zip(*kinds.values(), strict=True))
    compiled = not speaks_against_compiling(plan) if plan.values["compile"] is None else plan.values["compile"]
    utilisation = args.utilisation or UTILISATION[compiled]
    seconds = flops / (shape.num_processes * args.peak_tflops * 1e12 * utilisation)
    ways = {"replicated": 1} | ({"sharded": min(shape.num_processes, MACHINE)} if shape.num_processes > 1 else {})
    held = {way: memory(plan, cost, shards, own) for way, shards in ways.items()}
    outside = outside_training(plan, pipeline)
    print_table(
        ("transformer", f"{cost.parameters / 1e9:.3f} B parameters, {cost.buffers / 1e9:.3f} B of buffers"),
        ("student", f"{cost.lora_parameters / 1e6:.2f} M parameters on {cost.lora_layers} layers"),
        ("forward of an image", f"{tera(cost.forward)}, the adapter {tera(cost.lora_forward)} more"),
        ("backward of an image", f"{tera(cost.backward)}, {cost.backward / cost.forward:.2f} forwards"),
    )
    at = f"{utilisation:.0%} of {args.peak_tflops:g} TFLOP/s per GPU, {'' if compiled else 'not '}compiled"
    print_table(
        ("images a round", f"{shape.images_per_round}"),
        ("processes", f"{shape.num_processes}"),
        ("tasks side by side", f"{tasks} of {shape.tasks_per_round}; {fitting} would fit into {args.gpu_gb:g} GB"),
        *((name, f"{f'{n} NFE, ' if n else ''}{tera(f)}, {f / flops:.0%}") for name, (n, f) in kinds.items()),
        ("together", f"{nfe} NFE, {tera(flops)}, {tera(flops / shape.images_per_round)} per image"),
        ("time", f"{seconds:.3g} s per round, {3600 / seconds:.0f} rounds per hour, at {at}"),
        ("all rounds", f"{shape.num_rounds} in {shape.num_rounds * seconds / 3600:.3g} hours, without evaluations"),
        *evaluations(plan, cost, shape.num_processes * args.peak_tflops * 1e12, args.utilisation, seconds),
    )
    names = dict.fromkeys(name for rows in held.values() for name in rows)
    print_table(
        ("memory per GPU", *held),
        *((name, *(giga(rows.get(name, 0)) for rows in held.values())) for name in names),
        ("peak of a training step", *(giga(sum(rows.values())) for rows in held.values())),
        *((name, *[giga(size)] * len(held)) for name, size in outside.items()),
    )
    rooms = {**ladder.GPUS, f"{args.gpu_gb:g} GB": args.gpu_gb * 2**30}
    for way, shards in ways.items():
        print(f"{way}:" if len(ways) > 1 else "", *ladder.lines(unresolved, pipeline, rooms, shards), sep="\n")
    if args.json:
        figures = {
            "parameters": cost.parameters,
            "lora_parameters": cost.lora_parameters,
            "forward_flops": cost.forward,
            "backward_flops": cost.backward,
            "evaluations": nfe,
            "tasks_per_pass": tasks,
            "round_flops": flops,
            "estimated_seconds": seconds,
            "memory_bytes": {way: rows | {"peak": sum(rows.values())} for way, rows in held.items()},
        }
        print(f"wrote {write_json(args.json, figures)}")


def evaluations(
    plan: Plan, cost: Cost, peak: float, utilisation: float | None, seconds: float
) -> list[tuple[str, str]]:
    """What evaluations, which make no graphs of their own, take beside rounds of ``seconds``; without scoring."""
    every, nfe = plan.watch.eval_freq, plan.evaluation_nfe
    if not every:
        return []
    if not nfe:
        return [("an evaluation", "of all test prompts, which are not here")]
    flops = nfe * (cost.forward + cost.lora_forward)
    own = flops / (peak * (utilisation or UTILISATION[False]))
    share = f"{own / (every * seconds):.0%} of the {every} rounds between two"
    images = f"{sum(plan.num_evaluated)} images, {nfe} NFE"
    return [("an evaluation", f"{images}, {tera(flops)}, {own:.3g} s, {share}; scoring not counted")]


def print_table(*rows: tuple[str, ...]) -> None:
    """Print rows with aligned columns, and an empty line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def tera(flops: float) -> str:
    """FLOPs in units that fit."""
    return f"{flops / 1e15:.2f} PFLOP" if flops >= 1e15 else f"{flops / 1e12:.3g} TFLOP"


if __name__ == "__main__":
    main()
