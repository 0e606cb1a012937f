"""What a round of a configuration costs: evaluations, FLOPs, time, memory and traffic, computed without any weights.

    python -m tools.cost --config config/opd.py:mopd --num_processes 8 [--config.KEY=VALUE ...]
    python -m tools.cost --config config/teacher.py:nft_geneval --num_processes 8 --json FILE
    python -m tools.cost --family

The first forms take any configuration, whether or not its prompts, teachers and model are on this machine; --family
prints the tables of docs/scaling.md. Time is that of the transformer alone at the utilisation that is given: a
prediction to compare a measurement with, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diffusionopd.config_schema import RunPlan, base_config, check, load_config, redacted, split_arguments  # noqa: E402
from tools.costs import (  # noqa: E402
    MACHINE,
    Cost,
    Held,
    Lora,
    Memory,
    Pipeline,
    RoundCost,
    RunSettings,
    count_round,
    measure,
    memory,
    read_pipeline,
)

FAMILY = {
    "SD3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "SD3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "SD3.5-large": "stabilityai/stable-diffusion-3.5-large",
}
GIGA = 1e9


def main() -> None:
    """Print the cost of a configuration, or the family's tables."""
    try:
        source, overrides, rest = split_arguments(sys.argv[1:])
        args = parse(rest)
        if args.family:
            print(family_table())
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
    parser.add_argument(
        "--utilisation", type=float, default=0.2, help="share of the peak that is reached; 0.2: measured"
    )
    parser.add_argument("--family", action="store_true", help="memory of the SD3 family instead of a configuration")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args(arguments)


# ---- A configuration -------------------------------------------------------------------------------------------------


def report(config: ConfigDict, args: argparse.Namespace) -> None:
    """Print what ``config`` costs and write it to ``args.json``."""
    plan = check(config, args.num_processes, sources=False)
    pipeline = read_pipeline(plan.model)
    cost, round_cost = costs_of(config, plan, pipeline)
    memories = {"replicated": memory_of(config, plan, pipeline, cost, shards=1)}
    if plan.num_processes > 1:
        memories["sharded"] = memory_of(config, plan, pipeline, cost, shards=min(plan.num_processes, MACHINE))
    seconds = round_cost.seconds(plan.num_processes, args.peak_tflops * 1e12, args.utilisation)
    print(table(describe_transformer(cost)), "\n")
    print(table(describe_round(plan, round_cost, seconds, args)), "\n")
    print(table(describe_memory(memories)))
    if args.json:
        figures = as_figures(cost, round_cost, memories, seconds)
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(f"\nwrote {args.json}")


def costs_of(config: ConfigDict, plan: RunPlan, pipeline: Pipeline) -> tuple[Cost, RoundCost]:
    """The cost of one evaluation by the student, and of a round."""
    train, shape = config.train, pipeline.transformer
    tokens = (pipeline.image_tokens(config.resolution), pipeline.text_tokens(config.max_sequence_length))
    half = config.mixed_precision != "no"
    cost = measure(shape, *tokens, Lora(train.lora_rank, tuple(train.lora_target_modules)), half)
    settings = RunSettings(
        resolution=config.resolution,
        max_sequence_length=config.max_sequence_length,
        inner_epochs=train.num_inner_epochs,
        checkpointing=config.activation_checkpointing,
        item=2 if half else 4,
    )
    # A merged teacher costs no more than the base; else its adapter is taken to be as large as the student's.
    teacher = 0 if train.merge_teachers else cost.lora_forward
    return cost, count_round(plan, settings, pipeline, cost, teacher)


def memory_of(config: ConfigDict, plan: RunPlan, pipeline: Pipeline, cost: Cost, shards: int) -> Memory:
    """What a GPU holds in a run of ``config``, with the base spread over ``shards`` processes."""
    train, item = config.train, 4 if config.mixed_precision == "no" else 2
    adapter = 4 * cost.lora_parameters + (item * cost.adapted_parameters if train.merge_teachers else 0)
    adapters = int(plan.algorithm == "nft") if plan.from_rewards else len(plan.teachers)
    held = Held(
        rows=train.batch_size * (2 if plan.student_guidance > 1 else 1),
        text_prompts=plan.images_per_round // plan.num_processes,
        text_tokens=pipeline.text_tokens(config.max_sequence_length),
        teacher_bytes=adapters * adapter,
        ema=train.ema,
        optimizer_bytes=2 if train.use_8bit_adam else 8,
        checkpointing=config.activation_checkpointing,
        item=item,
        vae=not config.vae_device,
        decoded=train.batch_size,
        kept_latents=latents_kept(plan, train.num_inner_epochs) * plan.images_per_round // plan.num_processes,
        shards=shards,
    )
    return memory(cost, pipeline, held, config.resolution)


def latents_kept(plan: RunPlan, inner_epochs: int) -> int:
    """Tensors of a latent's size that are kept for each picture of a round, its first noise among them."""
    if plan.algorithm in ("grpo", "grpo_guard"):
        return 2 + 3 * plan.trained_steps
    if plan.algorithm == "opd":
        return 1 + (4 * (plan.steps_per_rollout or plan.trained_steps) if inner_epochs > 1 else 0)
    return 2


# ---- What is printed -------------------------------------------------------------------------------------------------


def describe_transformer(cost: Cost) -> list[tuple[str, str]]:
    """Rows about one evaluation."""
    return [
        ("transformer", f"{cost.parameters / GIGA:.3f} B parameters, {cost.buffers / GIGA:.3f} B of positions"),
        ("student", f"{cost.lora_parameters / 1e6:.2f} M parameters on {cost.lora_layers} layers"),
        ("forward of a picture", f"{tera(cost.forward)}, the adapter {tera(cost.lora_forward)} more"),
        ("backward of a picture", f"{tera(cost.backward)}, {cost.backward / cost.forward:.2f} forwards"),
    ]


def describe_round(plan: RunPlan, cost: RoundCost, seconds: float, args: argparse.Namespace) -> list[tuple[str, str]]:
    """Rows about a round over all processes."""
    rows = [("a round", f"{cost.pictures} pictures of {cost.prompts} prompts, {plan.num_processes} processes")]
    for work in cost.work:
        count = f"{work.evaluations} evaluations, " if work.evaluations else ""
        rows.append((work.name, f"{count}{tera(work.flops)}, {work.flops / cost.flops:.0%}"))
    rows.append(("together", f"{cost.evaluations} evaluations, {tera(cost.flops)}"))
    rows.append(("a picture", tera(cost.flops / cost.pictures)))
    if cost.reference_flops:
        rows.append(("in three passes", f"{tera(cost.reference_flops)}, {cost.reference_flops / cost.flops:.2f} times"))
    at = f"{args.utilisation:.0%} of {args.peak_tflops:g} TFLOP/s a GPU"
    rows.append(("time", f"{seconds:.1f} s a round, {3600 / seconds:.0f} rounds an hour, at {at}"))
    when = "every round" if plan.from_rewards else "a round that is looked at"
    rows.append(("decoding and scoring", f"{cost.decoded} pictures, {tera(cost.decode_flops)} each, {when}"))
    if cost.finishing:
        rows.append(("", f"and {cost.finishing} evaluations to finish them"))
    rows.append(("text encoding", f"{tera(cost.encode_flops)} a prompt when first seen; nothing once cached"))
    rows.append(("weights read", f"{giga(cost.weight_bytes_read)} a process"))
    rows.append(("sent, replicated", f"{giga(cost.replicated_bytes_sent)} a process"))
    rows.append(("sent, sharded", f"{giga(cost.sharded_bytes_sent)} a process"))
    return rows


def describe_memory(memories: dict[str, Memory]) -> list[tuple[str, ...]]:
    """A row for each thing that a GPU holds, a column for each way of holding it."""
    names = dict.fromkeys(name for found in memories.values() for name, _ in found.rows)
    rows: list[tuple[str, ...]] = [("memory a GPU", *memories)]
    for name in names:
        rows.append((name, *(giga(dict(found.rows).get(name, 0)) for found in memories.values())))
    rows.append(("peak of a training step", *(giga(found.peak) for found in memories.values())))
    rows.append(("decoding pictures, on top", *(giga(found.decoding) for found in memories.values())))
    rows.append(("text encoders, at the start", *(giga(found.encoding) for found in memories.values())))
    return rows


def as_figures(cost: Cost, round_cost: RoundCost, memories: dict[str, Memory], seconds: float) -> dict[str, Any]:
    """The figures for --json, FLOPs and bytes as they are."""
    return {
        "parameters": cost.parameters,
        "lora_parameters": cost.lora_parameters,
        "forward_flops": cost.forward,
        "backward_flops": cost.backward,
        "evaluations": round_cost.evaluations,
        "round_flops": round_cost.flops,
        "reference_flops": round_cost.reference_flops,
        "estimated_seconds": seconds,
        "sent_bytes": {"replicated": round_cost.replicated_bytes_sent, "sharded": round_cost.sharded_bytes_sent},
        "memory_bytes": {way: dict(found.rows) | {"peak": found.peak} for way, found in memories.items()},
    }


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def tera(flops: float) -> str:
    """FLOPs in units that fit."""
    return f"{flops / 1e15:.2f} PFLOP" if flops >= 1e15 else f"{flops / 1e12:.3g} TFLOP"


def giga(size: float) -> str:
    """Bytes in units that fit."""
    return f"{size / GIGA:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


# ---- The family ------------------------------------------------------------------------------------------------------


def family_table() -> str:
    """Markdown: FLOPs of an evaluation and memory a GPU of the published models, three teachers, guidance, bf16."""
    ways = "replicated | checkpointed | FSDP2 over 8 | checkpointed"
    lines = [f"| model | pixels | forward / backward, TFLOP | batch | {ways} |", "| --- " * 8 + "|"]
    lora = Lora(32, tuple(base_config().train.lora_target_modules))
    for name, model in FAMILY.items():
        pipeline = read_pipeline(model)
        for resolution in (512, 1024):
            cost = measure(
                pipeline.transformer, pipeline.image_tokens(resolution), pipeline.text_tokens(128), lora, True
            )
            for batch in (1, 3, 12):
                cells = [giga(found.peak).removesuffix(" GB") for found in four_ways(cost, pipeline, resolution, batch)]
                flops = f"{(cost.forward + cost.lora_forward) / 1e12:.1f} / {cost.backward / 1e12:.1f}"
                lines.append(f"| {name} | {resolution} | {flops} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def four_ways(cost: Cost, pipeline: Pipeline, resolution: int, batch: int) -> list[Memory]:
    """Memory of a distillation from three teachers: replicated, then sharded over 8 GPUs; plain, then checkpointed."""
    held = Held(
        rows=2 * batch,
        text_prompts=9,
        text_tokens=pipeline.text_tokens(128),
        teacher_bytes=3 * 4 * cost.lora_parameters,
        ema=True,
    )
    ways = [(shards, checkpointing) for shards in (1, 8) for checkpointing in (False, True)]
    return [memory(cost, pipeline, replace(held, shards=s, checkpointing=c), resolution) for s, c in ways]


if __name__ == "__main__":
    main()
