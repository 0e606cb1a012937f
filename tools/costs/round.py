"""What one round of a run costs: evaluations by kind, FLOPs, and what is read, decoded and sent."""

from __future__ import annotations

from dataclasses import dataclass

from diffusionopd.config_schema import RunPlan
from tools.costs.architecture import Pipeline
from tools.costs.encoders import clip_flops, decoder_flops, t5_flops
from tools.costs.evaluation import Cost

MACHINE = 8
"""Processes of a machine, over which a base is sharded."""


@dataclass(frozen=True)
class Work:
    """One kind of transformer evaluation in a round, over all processes."""

    name: str
    evaluations: int  # of single pictures: two under guidance
    flops: int
    weight_passes: int  # times that one process goes through the transformer's weights for it


@dataclass(frozen=True)
class RoundCost:
    """Of a round over all processes; FLOPs and bytes, the bytes of one process."""

    work: tuple[Work, ...]
    pictures: int
    prompts: int  # distinct
    encode_flops: int  # of one prompt: paid when it is first seen, then cached on disk
    decode_flops: int  # of one picture
    decoded: int  # pictures decoded and scored: of every round from rewards, else of a round that is looked at
    finishing: int  # evaluations that such a distillation round needs beside the trained ones
    reference_flops: int  # of the same round in three passes; 0 where there is no such way
    weight_bytes_read: int
    replicated_bytes_sent: int  # every process holds the base: an all-reduce of the student's gradient
    sharded_bytes_sent: int  # the base is sharded over a machine's processes: every pass gathers it

    @property
    def evaluations(self) -> int:
        """As a run's metrics count them."""
        return sum(work.evaluations for work in self.work)

    @property
    def flops(self) -> int:
        """Of the transformer."""
        return sum(work.flops for work in self.work)

    def seconds(self, processes: int, peak: float, utilisation: float) -> float:
        """Time of the transformer's work at ``utilisation`` of ``peak`` FLOP/s a GPU, perfectly shared."""
        return self.flops / (processes * peak * utilisation)


@dataclass(frozen=True)
class RunSettings:
    """What a round's cost depends on beside the plan."""

    resolution: int
    max_sequence_length: int
    inner_epochs: int = 1
    checkpointing: bool = False
    item: int = 2  # bytes of a frozen weight


def count_round(
    plan: RunPlan, settings: RunSettings, pipeline: Pipeline, cost: Cost, teacher_lora_forward: int
) -> RoundCost:
    """The cost of each round of ``plan``. ``cost`` is the student's; a teacher's forward has an adapter of its own."""
    work = _work(plan, settings, cost, teacher_lora_forward)
    tasks = plan.images_per_round // plan.images_per_task
    decoded = plan.images_per_round if plan.from_rewards else tasks * plan.batch_size * plan.num_processes
    guided = 2 if plan.student_guidance > 1 else 1
    weights = (cost.parameters + cost.buffers) * settings.item
    share = (plan.num_processes - 1) / plan.num_processes
    passes = sum(kind.weight_passes for kind in work)
    steps = plan.backward_batches * settings.inner_epochs // plan.batches_per_step
    gradient = 4 * cost.lora_parameters
    replicated = round(2 * share * gradient * steps)
    shards = min(plan.num_processes, MACHINE)
    return RoundCost(
        work=work,
        pictures=plan.images_per_round,
        prompts=plan.groups_per_task * tasks,
        encode_flops=_encode_flops(pipeline, settings.max_sequence_length),
        decode_flops=decoder_flops(pipeline.vae, pipeline.latent_side(settings.resolution)),
        decoded=decoded,
        finishing=round(decoded * guided * (plan.num_steps - _last_step(plan))) if plan.algorithm == "opd" else 0,
        reference_flops=_three_passes(plan, cost, teacher_lora_forward),
        weight_bytes_read=passes * weights,
        replicated_bytes_sent=replicated,
        sharded_bytes_sent=replicated + round((shards - 1) / shards * passes * cost.parameters * settings.item),
    )


def _work(plan: RunPlan, settings: RunSettings, cost: Cost, teacher_lora_forward: int) -> tuple[Work, ...]:
    """Kinds of evaluation; forward and backward of the student apart, the backward with no evaluation of its own."""
    steps = plan.backward_batches * (plan.steps_per_rollout or plan.trained_steps)
    trained = steps * settings.inner_epochs
    student, again = plan.student_evaluations, cost.recomputed if settings.checkpointing else 0
    forward = cost.forward + cost.lora_forward
    walked = plan.num_steps if plan.from_rewards else _last_step(plan) - (plan.steps_per_rollout or plan.trained_steps)
    sampled = round(plan.backward_batches * walked)
    if plan.algorithm == "nft":  # its old policy is asked at every trained step too
        sampled += trained
    taught = {"opd": steps, "sft": plan.backward_batches * plan.num_steps}.get(plan.algorithm, 0)
    kinds = (
        Work("student, forward", student, student * forward, trained),
        Work("student, backward", 0, student * (cost.backward + again), trained * (2 if settings.checkpointing else 1)),
        Work(
            "teachers",
            plan.teacher_evaluations,
            plan.teacher_evaluations * (cost.forward + teacher_lora_forward),
            taught,
        ),
        Work("sampling", plan.sampling_evaluations, plan.sampling_evaluations * forward, sampled),
        Work("base, for train.beta", plan.base_evaluations, plan.base_evaluations * cost.forward, trained),
    )
    return tuple(kind for kind in kinds if kind.flops)


def _three_passes(plan: RunPlan, cost: Cost, teacher_lora_forward: int) -> int:
    """Roll out all steps, ask the teacher at all of them, then train those to be trained with a second forward."""
    if plan.algorithm != "opd":
        return 0
    drawn = plan.steps_per_rollout or plan.trained_steps
    trained, walked = plan.trained_steps / drawn, plan.num_steps / drawn
    student = plan.student_evaluations * (walked * (cost.forward + cost.lora_forward) + trained * cost.trained)
    return round(student + plan.teacher_evaluations * walked * (cost.forward + teacher_lora_forward))


def _last_step(plan: RunPlan) -> float:
    """The last supervised step of a distillation's rollout, counted from 1; on average where they are drawn."""
    drawn = plan.steps_per_rollout
    return drawn * (plan.trained_steps + 1) / (drawn + 1) if drawn else plan.trained_steps


def _encode_flops(pipeline: Pipeline, max_sequence_length: int) -> int:
    t5 = t5_flops(pipeline.t5, max_sequence_length) if pipeline.t5 else 0
    return sum(clip_flops(clip) for clip in pipeline.clips) + t5
