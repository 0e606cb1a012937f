"""What a round of a configuration costs: NFE, FLOPs, time, memory and traffic, counted without any weights.

    python -m tools.cost --config config/opd.py:mopd --num_processes 8 [--config.KEY=VALUE ...]
    python -m tools.cost --config config/teacher.py:nft_geneval --num_processes 8 --json FILE
    python -m tools.cost --family

The first forms take any configuration, whether or not its prompts, teachers and model are on this machine; --family
prints the table of docs/scaling.md. Time is that of the transformer alone at the utilisation that is given: a
prediction to compare a measurement with, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

from ml_collections import ConfigDict

from diffusionopd.config_schema import RunPlan, redacted, split_arguments
from diffusionopd.training import check, load_config
from tools.costs.count import Cost
from tools.costs.models import read_pipeline
from tools.costs.round import MACHINE, RoundCost, count_round, encoder_bytes, measure_step, memory

ROOT = Path(__file__).resolve().parent.parent
FAMILY = {
    "SD3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "SD3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "SD3.5-large": "stabilityai/stable-diffusion-3.5-large",
}


def main() -> None:
    """Print the cost of a configuration, or the family's table."""
    try:
        source, overrides, rest = split_arguments(sys.argv[1:])
        args = parse(rest)
        if args.family:
            for line in family_table(FAMILY):
                print(line, flush=True)
        if source is not None:
            report(load_config(source, overrides), args)
        elif not args.family:
            sys.exit("error: name a configuration (--config config/opd.py:mopd) or --family")
    except ValueError as error:
        sys.exit(f"error: {redacted(error)}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags beside --config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_processes", type=int, default=1, help="of the run, one a GPU")
    parser.add_argument("--peak_tflops", type=float, default=790.0, help="of a GPU; 790: bf16 products of an H200")
    parser.add_argument("--utilisation", type=float, default=0.2, help="share of the peak reached; 0.2: measured")
    parser.add_argument("--family", action="store_true", help="memory of the SD3 family; takes minutes")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args(arguments)


def report(config: ConfigDict, args: argparse.Namespace) -> None:
    """Print what ``config`` costs and write it to ``args.json``."""
    plan = check(config, args.num_processes, sources=False)
    pipeline = read_pipeline(plan.model)
    cost = measure_step(config, plan, pipeline)
    round_cost = count_round(config, plan, pipeline, cost)
    seconds = round_cost.seconds(plan.num_processes, args.peak_tflops * 1e12, args.utilisation)
    ways = {"replicated": 1} | ({"sharded": min(plan.num_processes, MACHINE)} if plan.num_processes > 1 else {})
    held = {way: memory(config, plan, pipeline, cost, shards) for way, shards in ways.items()}
    beside = {
        "decoding images, on top": round_cost.decode_bytes,
        "text encoders, at the start": encoder_bytes(config, pipeline),
    }
    tables = [
        describe_transformer(cost),
        describe_round(plan, round_cost, seconds, args),
        describe_memory(held, beside),
    ]
    print("\n\n".join(map(table, tables)))
    if args.json:
        figures = {
            "parameters": cost.parameters,
            "lora_parameters": cost.lora_parameters,
            "forward_flops": cost.forward,
            "backward_flops": cost.backward,
            "evaluations": round_cost.nfe,
            "round_flops": round_cost.flops,
            "reference_flops": round_cost.reference_flops,
            "estimated_seconds": seconds,
            "sent_bytes": {"replicated": round_cost.replicated_bytes_sent, "sharded": round_cost.sharded_bytes_sent},
            "memory_bytes": {way: rows | {"peak": sum(rows.values())} for way, rows in held.items()},
        }
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(f"\nwrote {args.json}")


def describe_transformer(cost: Cost) -> list[tuple[str, ...]]:
    """Rows about one pass."""
    return [
        ("transformer", f"{cost.parameters / 1e9:.3f} B parameters, {cost.buffers / 1e9:.3f} B of buffers"),
        ("student", f"{cost.lora_parameters / 1e6:.2f} M parameters on {cost.lora_layers} layers"),
        ("forward of an image", f"{tera(cost.forward)}, the adapter {tera(cost.lora_forward)} more"),
        ("backward of an image", f"{tera(cost.backward)}, {cost.backward / cost.forward:.2f} forwards"),
    ]


def describe_round(plan: RunPlan, cost: RoundCost, seconds: float, args: argparse.Namespace) -> list[tuple[str, ...]]:
    """Rows about a round over all processes."""
    rows = [("a round", f"{cost.images} images of {cost.prompts} prompts, {plan.num_processes} processes")]
    for work in cost.work:
        nfe = f"{work.nfe} NFE, " if work.nfe else ""
        rows.append((work.name, f"{nfe}{tera(work.flops)}, {work.flops / cost.flops:.0%}"))
    rows += [("together", f"{cost.nfe} NFE, {tera(cost.flops)}"), ("per image", tera(cost.flops / cost.images))]
    if cost.reference_flops:
        rows.append(("in three passes", f"{tera(cost.reference_flops)}, {cost.reference_flops / cost.flops:.2f} times"))
    at = f"{args.utilisation:.0%} of {args.peak_tflops:g} TFLOP/s a GPU"
    rows.append(("time", f"{seconds:.3g} s a round, {3600 / seconds:.0f} rounds an hour, at {at}"))
    when = "every round" if plan.from_rewards else "a monitored round"
    rows.append(("decoding and scoring", f"{cost.decoded} images, {tera(cost.decode_flops)} each, {when}"))
    if cost.finishing:
        rows.append(("", f"and {cost.finishing} NFE to finish them"))
    return [
        *rows,
        ("text encoding", f"{tera(cost.encode_flops)} a prompt when first seen; nothing once cached"),
        ("weights read", f"{giga(cost.weight_bytes_read)} a process"),
        ("sent, replicated", f"{giga(cost.replicated_bytes_sent)} a process"),
        ("sent, sharded", f"{giga(cost.sharded_bytes_sent)} a process"),
    ]


def describe_memory(held: dict[str, dict[str, int]], beside: dict[str, int]) -> list[tuple[str, ...]]:
    """A row for each thing that a GPU holds, a column for each way of holding it."""
    names = dict.fromkeys(name for rows in held.values() for name in rows)
    return [
        ("memory a GPU", *held),
        *((name, *(giga(rows.get(name, 0)) for rows in held.values())) for name in names),
        ("peak of a training step", *(giga(sum(rows.values())) for rows in held.values())),
        *((name, *[giga(size)] * len(held)) for name, size in beside.items()),
    ]


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def tera(flops: float) -> str:
    """FLOPs in units that fit."""
    return f"{flops / 1e15:.2f} PFLOP" if flops >= 1e15 else f"{flops / 1e12:.3g} TFLOP"


def giga(size: float) -> str:
    """Bytes in units that fit."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def family_table(models: dict[str, str], resolutions: tuple[int, ...] = (512, 1024)) -> Iterator[str]:
    """Lines of Markdown: FLOPs of a pass and memory a GPU of ``mopd`` on each of the models, in bf16."""
    ways = "replicated | checkpointed | FSDP2 over 8 | checkpointed"
    yield f"| model | pixels | forward / backward, TFLOP | batch | {ways} |"
    yield "| --- " * 8 + "|"
    config = load_config(f"{ROOT}/config/opd.py:mopd")
    plan = check(config, MACHINE, sources=False)
    for name, model in models.items():
        pipeline = read_pipeline(model)
        for config.resolution in resolutions:
            costs = {}
            for config.activation_checkpointing in (False, True):
                for config.train.batch_size in (1, 2):
                    costs[config.activation_checkpointing, config.train.batch_size] = measure_step(
                        config, plan, pipeline
                    )
            cost = costs[False, 1]
            flops = f"{(cost.forward + cost.lora_forward) / 1e12:.1f} / {cost.backward / 1e12:.1f}"
            for batch in (1, 3, 12):
                cells = []
                for shards in (1, MACHINE):
                    for again in (False, True):
                        one, two = (
                            costs[again, 1].activations,
                            costs[again, 2].activations,
                        )  # affine in the rows (tested)
                        cost = replace(costs[again, 1], activations=one + (batch - 1) * (two - one))
                        cells.append(f"{sum(memory(config, plan, pipeline, cost, shards).values()) / 1e9:.2f}")
                yield f"| {name} | {config.resolution} | {flops} | {batch} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
