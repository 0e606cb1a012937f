"""What a round of a plan costs, and what a GPU holds in its training step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from diffusionopd.models.lora_files import AdapterError, load_lora
from diffusionopd.models.lora_fit import find_all
from diffusionopd.training.costs.count import Cost, Frozen, count_decode, measure, measure_frozen
from diffusionopd.training.costs.models import REWARDS, Pipeline, with_model
from diffusionopd.training.plan import Plan

MACHINE = 8
"""Processes of a machine, over which a base is sharded."""
HEADROOM = 0.85
"""The share of a GPU's memory that a counted step and the rewards' models may take: kernels' workspaces, the
allocator's losses and the decoding of an image beside a round are not in the count."""


def step_cost(plan: Plan, pipeline: Pipeline, images: int) -> Cost:
    """The cost of a training step over ``images``. Of LoRAs that the student starts from, those that are here count."""
    values = plan.values
    here = {task.adapter: task.lora_path for task in plan.starts if Path(task.lora_path).exists()}
    starts, _, _ = find_all(here, values["pretrained.model"], pipeline)
    return measure(
        pipeline,
        values["resolution"],
        values["max_sequence_length"],
        rank=values["train.lora_rank"],
        targets=values["train.lora_target_modules"],
        others={module for lora in starts.values() for module in lora.a},
        rows=images * plan.nfe(plan.sampler.guidance),
        half=values["mixed_precision"] != "no",
        checkpointing=values["activation_checkpointing"],
    )


def own_models(plan: Plan, pipeline: Pipeline) -> dict[str, Frozen]:
    """The models of teachers that have their own, by the tasks' `model`. Raises BackboneError."""
    values, half = plan.values, plan.values["mixed_precision"] != "no"
    return {
        source: measure_frozen(with_model(pipeline, source), values["resolution"], values["max_sequence_length"], half)
        for source in dict.fromkeys(task.model for task in plan.teachers if task.model)
    }


def _teacher_forward(plan: Plan, cost: Cost, own: Mapping[str, Frozen]) -> float:
    """FLOPs of a teacher's forward pass, in the mean over those of a round."""
    # A merged teacher is a base; another's LoRA is taken to be as large as the student's.
    lora = cost.forward if plan.values["train.merge_teachers"] else cost.forward + cost.lora_forward
    flops = [own[task.model].forward if task.model else lora for task in plan.tasks]
    passes = list(map(plan.teacher_nfe, plan.tasks))
    return sum(n * f for n, f in zip(passes, flops, strict=True)) / sum(passes)


def work(plan: Plan, cost: Cost, own: Mapping[str, Frozen] | None = None) -> dict[str, tuple[int, int]]:
    """Kind of forward pass -> NFE and FLOPs of a round over all processes; a backward pass is no NFE."""
    nfe, forward = plan.nfe_per_round, cost.forward + cost.lora_forward
    kinds = {
        "student, forward": (nfe.student, nfe.student * forward),
        "student, backward": (0, nfe.student * cost.backward),
        "teachers": (nfe.teacher, round(nfe.teacher * _teacher_forward(plan, cost, own or {}))),
        "sampling": (nfe.sampling, nfe.sampling * forward),
        "base, for train.beta": (nfe.base, nfe.base * cost.forward),
    }
    return {name: kind for name, kind in kinds.items() if kind[1]}


def memory(plan: Plan, cost: Cost, shards: int, own: Mapping[str, Frozen] | None = None) -> dict[str, int]:
    """Bytes of one GPU in a training step by what they are, with the base sharded over ``shards`` processes.

    Their sum is the peak. CUDA's context, kernels' workspaces and the allocator's losses come on top.
    """
    values, item, nfe = plan.values, _item(plan), plan.nfe_per_round
    images = plan.shape.images_per_round // plan.shape.num_processes
    states = 4 + 4 + (2 if values["train.use_8bit_adam"] else 8) + (4 if values["train.ema"] else 0)
    references = [task.reference for task in plan.teachers if task.reference_adapter]
    sources = [task.lora_path for task in plan.teachers if task.has_lora] + references
    loras = sum(_values_of(source) or cost.lora_parameters for source in sources)
    own_weights = sum(not task.model for task in plan.teachers) + len(references)
    merged = own_weights if values["train.merge_teachers"] else 0
    alone = plan.shape.tasks_per_pass == 1 and item == 4
    models = [model.parameters * item // shards + model.buffers * item for model in (own or {}).values()]
    rows = {
        "base transformer": cost.parameters * item // shards + cost.buffers * item,
        # The block that computes and the next one, which is fetched meanwhile.
        "blocks gathered from other GPUs": 2 * cost.largest_block * item if shards > 1 else 0,
        "VAE, float32": 0 if values["vae_device"] else 4 * cost.vae_parameters,
        "student: LoRA, gradient, optimizer, EMA": states * cost.lora_parameters,
        "teachers": loras * 4 + merged * item * cost.adapted_parameters,
        # In each layer: side by side, so that each row of a pass can have its own; in half precision also one by one.
        "teachers in the base's type": 0 if alone or merged else loras * item,
        # Of those that wait on the host, one at a time is here.
        "teachers' own models": max(models, default=0) if values["teacher_device"] else sum(models),
        "other frozen adapters": nfe.extra_adapters * 4 * cost.lora_parameters,
        "prompt embeddings": images * cost.embedding * item,
        "latents kept for training": nfe.kept_latents * images * cost.latent * 4,
        "activations of a step": cost.activations,
    }
    return {name: size for name, size in rows.items() if size}


@cache
def _values_of(source: str) -> int | None:
    """How many values a LoRA has, None if it is not here, or cannot be used, which is said elsewhere."""
    with suppress(AdapterError):
        if Path(source).exists():
            lora = load_lora(source)
            return sum(matrix.numel() for matrices in (lora.a, lora.b) for matrix in matrices.values())
    return None


def scorers(plan: Plan) -> int:
    """Bytes of the models of known rewards that stay on the training device, beside every training step."""
    watch = plan.watch
    if not (plan.algorithm.has_rewards or watch.monitor_freq or watch.eval_freq):
        return 0
    held = dict[tuple[str, int], int]()
    for name in {name for task in plan.tasks for name in task.proxy_reward} & REWARDS.keys():
        options = {"device": "cuda", "dtype": REWARDS[name]["dtype"]} | dict(watch.reward_options.get(name, {}))
        if options["device"] == "cuda":
            item = 4 if options["dtype"] == "float32" else 2
            # Rewards share models.
            held |= {(part, item): size * item for part, size in REWARDS[name]["parameters"].items()}
    return sum(held.values())


def tasks_that_fit(plan: Plan, cost: Cost, own: Mapping[str, Frozen], free: float, shards: int = 1) -> int:
    """How many tasks can walk side by side in ``free`` bytes, at least 1; ``cost`` is that of one task's rows."""
    held = sum(memory(plan, cost, shards, own).values()) - cost.activations + scorers(plan)
    return max(1, int((HEADROOM * free - held) // cost.activations))


def outside_training(plan: Plan, pipeline: Pipeline) -> dict[str, int]:
    """Bytes that a GPU holds at other moments: beside the step while images are decoded, and before any of it."""
    decoded = 0
    if not plan.values["vae_device"]:  # beside training one at a time
        decoded = count_decode(pipeline, plan.values["resolution"], 1).peak
    rows = {
        "rewards' models, on top": scorers(plan),
        "decoding an image, on top": decoded,
        "text encoders, at the start": _item(plan) * pipeline.encoder_parameters(),
    }
    return {name: size for name, size in rows.items() if size}


def _item(plan: Plan) -> int:
    """Bytes of a frozen value."""
    return 4 if plan.values["mixed_precision"] == "no" else 2
