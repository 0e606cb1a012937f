"""What a configuration leaves to the machine: whether blocks are compiled, how many tasks walk side by side."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from accelerate.utils import parse_flag_from_env

from diffusionopd.distributed import gather_over_processes, together
from diffusionopd.models.acceleration import AccelerationError, check_compiler
from diffusionopd.models.loading import BackboneError
from diffusionopd.models.settings import BaseSettings, MemorySettings
from diffusionopd.models.sharding import requested_sharding
from diffusionopd.training.costs import ladder
from diffusionopd.training.costs.count import UncountableError
from diffusionopd.training.costs.models import read_pipeline
from diffusionopd.training.costs.round import MACHINE, own_models, step_cost, tasks_that_fit
from diffusionopd.training.plan import Plan
from diffusionopd.training.resume import Resume

ROUNDS_WORTH_COMPILING = 100
"""Compiling takes minutes and saves about a second of each round."""


def with_compile(plan: Plan, resume: Resume, device: torch.device) -> Plan:
    """``compile``, where it is None: as before, or on a GPU unless something speaks against it. Collective."""
    if plan.values["compile"] is not None:
        return plan
    reasons = gather_over_processes([_why_not_compile(plan, resume, device)])
    reason = next(filter(None, reasons), "")
    notes = plan.notes + ((f"blocks are not compiled: {reason}",) if reason and device.type == "cuda" else ())
    return replace(plan, values={**plan.values, "compile": not reason}, notes=notes)


def _why_not_compile(plan: Plan, resume: Resume, device: torch.device) -> str:
    if device.type != "cuda":
        return "there is no GPU"
    if resume.compiled is False:
        return "those of the rounds before were not (--config.compile=True)"
    if not resume.compiled and (reason := speaks_against_compiling(plan)):
        return reason
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed has no compiled blocks"
    try:
        check_compiler(device)
    except AccelerationError as error:
        return str(error)
    return ""


def speaks_against_compiling(plan: Plan) -> str:
    """Why blocks would not be compiled on a GPU, by the configuration alone; empty for nothing."""
    if plan.shape.num_rounds < ROUNDS_WORTH_COMPILING:
        return f"fewer than {ROUNDS_WORTH_COMPILING} rounds would not pay for it (--config.compile=True)"
    if _draws_steps(plan):
        return "train.steps_per_rollout draws steps: passes have many sizes, each with graphs of its own"
    if not _has_one_length(plan):
        return "prompts of this model differ in length: passes have many sizes, each with graphs of its own"
    return ""


def _draws_steps(plan: Plan) -> bool:
    return len(plan.algorithm.steps(plan, (0, 0, 0))) < plan.sampler.trained_steps


def _has_one_length(plan: Plan) -> bool:
    try:
        return read_pipeline(**plan.read(BaseSettings).source).family.FIXED_LENGTH
    except BackboneError:  # not here yet: it is asked again when it is
        return True


def with_passes(plan: Plan, resume: Resume, device: torch.device) -> Plan:
    """The plan with ``train.tasks_per_pass`` resolved; the same on every process. Collective."""
    tasks = plan.shape.tasks_per_round
    chosen = plan.values["train.tasks_per_pass"] or resume.tasks_per_pass
    if not chosen:
        chosen = min(gather_over_processes([together(lambda: _fitting(plan, device), "counting a step's memory")]))
        chosen = math.ceil(tasks / math.ceil(tasks / chosen))  # passes of about the same size
    return replace(plan, shape=replace(plan.shape, tasks_per_pass=min(chosen, tasks)))


def _fitting(plan: Plan, device: torch.device) -> int:
    """How many tasks this process can have side by side, at least 1."""
    memory, tasks = plan.read(MemorySettings), plan.shape.tasks_per_round
    if memory.teacher_device and len({task.model for task in plan.teachers if task.model}) > 1:
        return 1  # their weights would move at every step
    if memory.compile and _draws_steps(plan):
        return 1  # a batch would have many sizes, each with graphs of its own
    if device.type != "cuda" or tasks == 1:
        return tasks
    pipeline = read_pipeline(**plan.read(BaseSettings).source)
    try:
        cost, own = step_cost(plan, pipeline, plan.shape.backward_size), own_models(plan, pipeline)
    except UncountableError:
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return min(tasks, tasks_that_fit(plan, cost, own, free, _shards(plan)))


def _shards(plan: Plan) -> int:
    return min(plan.shape.num_processes, MACHINE) if requested_sharding() else 1


def memory_lines(plan: Plan, device: torch.device) -> list[str]:
    """For people: the peak of a resolved plan, and what fits into this GPU or, without one, into common ones. Nothing
    for a run on a CPU, and for a model that is not here or cannot be counted."""
    rooms, chosen = dict[str, float](ladder.GPUS), plan.shape.tasks_per_pass
    if device.type == "cuda":
        rooms = {"this GPU": torch.cuda.mem_get_info(device)[0]}
    elif plan.read(MemorySettings).mixed_precision == "no":
        return []
    elif not plan.values["train.tasks_per_pass"] and chosen == plan.shape.tasks_per_round:
        plan = replace(plan, shape=replace(plan.shape, tasks_per_pass=0))  # a GPU would choose
    try:
        return ladder.lines(plan, read_pipeline(**plan.read(BaseSettings).source), rooms, _shards(plan))
    except (BackboneError, UncountableError):
        return []
