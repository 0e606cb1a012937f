"""What a round of a plan costs, and what a GPU holds in its training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ml_collections import ConfigDict

from diffusionopd.config_schema import RunPlan
from tools.costs.count import Cost, count, measure
from tools.costs.models import Pipeline, prompt_tokens, text_tokens

MACHINE = 8
"""Processes of a machine, over which a base is sharded."""
DECODED_AT_ONCE = 8
"""Images at most; ``Backbone.decode`` cuts larger batches."""


@dataclass(frozen=True)
class Work:
    """One kind of transformer pass in a round, over all processes."""

    name: str
    nfe: int  # passes of single images: two under guidance
    flops: int
    weight_passes: float  # times that one process goes through the transformer's weights for it


@dataclass(frozen=True)
class RoundCost:
    """Of a round over all processes; FLOPs and bytes, the bytes of one process."""

    work: tuple[Work, ...]
    images: int
    prompts: int  # distinct
    encode_flops: int  # of one prompt: paid when it is first seen, then cached on disk
    decode_flops: int  # of one image
    decode_bytes: int  # at most, beside weights, while a batch is decoded
    decoded: int  # images decoded and scored: of every round from rewards, else of a monitored round
    finishing: int  # NFE that a monitored round of a distillation needs beside the trained ones
    reference_flops: int  # of the same round in three passes: rollout, teachers, training; 0 where there is no such way
    weight_bytes_read: int
    replicated_bytes_sent: int  # every process holds the base: an all-reduce of the student's gradient
    sharded_bytes_sent: int  # the base is sharded over a machine's processes: every pass gathers it

    @property
    def nfe(self) -> int:
        """Number of function evaluations, as a run's metrics count them."""
        return sum(work.nfe for work in self.work)

    @property
    def flops(self) -> int:
        """Of the transformer."""
        return sum(work.flops for work in self.work)

    def seconds(self, processes: int, peak: float, utilisation: float) -> float:
        """Time of the transformer's work at ``utilisation`` of ``peak`` FLOP/s a GPU, perfectly shared."""
        return self.flops / (processes * peak * utilisation)


def rows_of(config: ConfigDict, plan: RunPlan) -> int:
    """Rows of one backward pass: images, twice that under guidance."""
    return config.train.batch_size * (2 if plan.student_guidance > 1 else 1)


def item_of(config: ConfigDict) -> int:
    """Bytes of a frozen value."""
    return 4 if config.mixed_precision == "no" else 2


def measure_step(config: ConfigDict, plan: RunPlan, pipeline: Pipeline) -> Cost:
    """The cost of a training step of ``config``."""
    return measure(
        pipeline.transformer,
        pipeline.latent_shape(config.resolution),
        text_tokens(pipeline, config.max_sequence_length),
        rank=config.train.lora_rank,
        targets=config.train.lora_target_modules,
        rows=rows_of(config, plan),
        half=config.mixed_precision != "no",
        checkpointing=config.activation_checkpointing,
    )


def count_round(config: ConfigDict, plan: RunPlan, pipeline: Pipeline, cost: Cost) -> RoundCost:
    """The cost of each round of ``plan``; ``cost`` is that of :func:`measure_step`."""
    work = _work(config, plan, cost)
    tasks = plan.images_per_round // plan.images_per_task
    decoded = plan.images_per_round if plan.from_rewards else tasks * plan.batch_size * plan.num_processes
    guided = 2 if plan.student_guidance > 1 else 1
    passes = sum(kind.weight_passes for kind in work)
    steps = plan.backward_batches * config.train.num_inner_epochs // plan.batches_per_step
    gradients = 2 * (plan.num_processes - 1) / plan.num_processes * 4 * cost.lora_parameters * steps
    shards, item = min(plan.num_processes, MACHINE), item_of(config)
    gathered = (shards - 1) / shards * passes * cost.parameters * item
    together = 0 if config.vae_device else min(config.train.batch_size, DECODED_AT_ONCE)
    latents = (together or 1, *pipeline.latent_shape(config.resolution))
    decode = count(pipeline.vae, lambda: pipeline.vae.decode(torch.zeros(latents)))
    encode_flops = 0
    for encoder in pipeline.encoders:
        tokens = 1, prompt_tokens(encoder, config.max_sequence_length)
        encode_flops += count(encoder, lambda e=encoder, n=tokens: e(torch.zeros(n, dtype=torch.long))).flops  # type: ignore[misc]
    return RoundCost(
        work=work,
        images=plan.images_per_round,
        prompts=plan.groups_per_task * tasks,
        encode_flops=encode_flops,
        decode_flops=decode.flops // (together or 1),
        decode_bytes=decode.peak if together else 0,
        decoded=decoded,
        finishing=round(decoded * guided * (plan.num_steps - _last_step(plan))) if plan.algorithm == "opd" else 0,
        reference_flops=_three_passes(config, plan, cost),
        weight_bytes_read=round(passes * (cost.parameters + cost.buffers) * item),
        replicated_bytes_sent=round(gradients),
        sharded_bytes_sent=round(gradients + gathered),
    )


def _work(config: ConfigDict, plan: RunPlan, cost: Cost) -> tuple[Work, ...]:
    """Kinds of pass; the student's backward has no NFE of its own."""
    drawn = plan.steps_per_rollout or plan.trained_steps
    steps = plan.backward_batches * drawn
    trained, student = steps * config.train.num_inner_epochs, plan.student_evaluations
    walked = plan.num_steps if plan.from_rewards else _last_step(plan) - drawn
    sampled = plan.backward_batches * walked + (trained if plan.algorithm == "nft" else 0)  # nft asks its old policy
    taught = plan.backward_batches * plan.num_steps if plan.algorithm == "sft" else steps
    forward = cost.forward + cost.lora_forward
    again = 2 if config.activation_checkpointing else 1
    kinds = (
        Work("student, forward", student, student * forward, trained),
        Work("student, backward", 0, student * cost.backward, trained * again),
        Work("teachers", plan.teacher_evaluations, plan.teacher_evaluations * _teacher(config, cost), taught),
        Work("sampling", plan.sampling_evaluations, plan.sampling_evaluations * forward, sampled),
        Work("base, for train.beta", plan.base_evaluations, plan.base_evaluations * cost.forward, trained),
    )
    return tuple(kind for kind in kinds if kind.flops)


def _teacher(config: ConfigDict, cost: Cost) -> int:
    """FLOPs of a teacher's pass: a merged one is a base, else its LoRA is taken to be as large as the student's."""
    return cost.forward + (0 if config.train.merge_teachers else cost.lora_forward)


def _three_passes(config: ConfigDict, plan: RunPlan, cost: Cost) -> int:
    """Roll out all steps, ask the teacher at all of them, then train those to be trained with a second forward."""
    if plan.algorithm != "opd":
        return 0
    drawn, forward = plan.steps_per_rollout or plan.trained_steps, cost.forward + cost.lora_forward
    walked, trained = plan.num_steps / drawn, plan.trained_steps / drawn
    student = plan.student_evaluations * (walked * forward + trained * (forward + cost.backward))
    return round(student + plan.teacher_evaluations * walked * _teacher(config, cost))


def _last_step(plan: RunPlan) -> float:
    """The last supervised step of a distillation's rollout, counted from 1; on average where they are drawn."""
    drawn = plan.steps_per_rollout
    return drawn * (plan.trained_steps + 1) / (drawn + 1) if drawn else plan.trained_steps


# ---- Memory ----------------------------------------------------------------------------------------------------------


def memory(config: ConfigDict, plan: RunPlan, pipeline: Pipeline, cost: Cost, shards: int) -> dict[str, int]:
    """Bytes of one GPU in a training step by what they are, with the base spread over ``shards`` processes.

    Their sum is the peak. CUDA's context, kernels' workspaces and the allocator's losses come on top.
    """
    train, item = config.train, item_of(config)
    images = plan.images_per_round // plan.num_processes
    states = 4 + 4 + (2 if train.use_8bit_adam else 8) + (4 if train.ema else 0)
    adapter = 4 * cost.lora_parameters + (item * cost.adapted_parameters if train.merge_teachers else 0)
    adapters = int(plan.algorithm == "nft") if plan.from_rewards else len(plan.teachers)
    config_of, tokens = pipeline.transformer, text_tokens(pipeline, config.max_sequence_length)
    embedding = tokens * config_of["joint_attention_dim"] + config_of["pooled_projection_dim"]
    channels, height, width = pipeline.latent_shape(config.resolution)
    rows = {
        "base transformer": cost.parameters * item // shards + cost.buffers * item,
        # The block that computes and the next one, which is fetched meanwhile.
        "blocks gathered from other GPUs": 2 * cost.largest_block * item if shards > 1 else 0,
        "VAE, float32": 0 if config.vae_device else 4 * _parameters(pipeline.vae),
        "student: LoRA, gradient, optimizer, EMA": states * cost.lora_parameters,
        "teachers, or nft's old policy": adapters * adapter,
        "prompt embeddings": images * embedding * item,
        "latents kept for training": _latents_kept(config, plan) * images * channels * height * width * 4,
        "activations of a step": cost.activations,
    }
    return {name: size for name, size in rows.items() if size}


def _latents_kept(config: ConfigDict, plan: RunPlan) -> int:
    """Tensors of a latent's size that are kept for each image of a round, its first noise among them."""
    if plan.algorithm in ("grpo", "grpo_guard"):
        return 2 + 3 * plan.trained_steps
    if plan.algorithm == "opd":
        return 1 + (4 * (plan.steps_per_rollout or plan.trained_steps) if config.train.num_inner_epochs > 1 else 0)
    return 2


def encoder_bytes(config: ConfigDict, pipeline: Pipeline) -> int:
    """The text encoders' weights, held before anything else is loaded, while prompts without embeddings are encoded."""
    return item_of(config) * sum(map(_parameters, pipeline.encoders))


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
