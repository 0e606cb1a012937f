"""The models of a run: devices and engines that they need, LoRAs, teachers of their own weights, texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from diffusionopd.config_schema import unset
from diffusionopd.evaluation.testsets import first
from diffusionopd.models.acceleration import check_attention, check_compiler, choose_attention, compile_blocks
from diffusionopd.models.backbone import Backbone
from diffusionopd.models.loading import (
    DTYPES,
    BackboneError,
    find_device,
    load_backbone,
    read_model,
)
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import AdapterError, LoraWeights, load_lora
from diffusionopd.models.lora_fit import find_all
from diffusionopd.models.merged import MergedTeachers
from diffusionopd.models.policies import STUDENT, Home
from diffusionopd.models.settings import BaseSettings, LoraSettings, MemorySettings
from diffusionopd.models.sharding import EngineError, Sharding, requested_sharding
from diffusionopd.models.teacher_models import HostWeights, TeacherModel, read_teacher_model
from diffusionopd.models.text_cache import TextCache, filled
from diffusionopd.training.checkpoint import locate
from diffusionopd.training.plan import Plan


def check_devices(plan: Plan, device: torch.device) -> None:
    """The devices, compilers and engine that the configuration needs are there: said before anything is loaded.

    Raises BackboneError, AccelerationError or EngineError.
    """
    memory = plan.read(MemorySettings)
    find_device(memory.text_encoder_device, device, "text_encoder_device")
    find_device(memory.vae_device, device, "vae_device")
    if memory.attention_backend:
        check_attention(memory.attention_backend, dtype=DTYPES[memory.mixed_precision], device=device)
    if memory.compile:
        check_compiler(device)
    if memory.compile and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise EngineError("compile does not go with DeepSpeed: set it to False, or start with ENGINE=fsdp2")
    find_sharding(plan)
    if any(task.model for task in plan.teachers) and requested_sharding() is not None:
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise EngineError("a teacher with a model of its own does not go with DeepSpeed: start with ENGINE=fsdp2")
        if memory.teacher_device:
            raise EngineError("teacher_device 'cpu' does not go with a sharded base: leave it empty, or use no engine")


def find_sharding(plan: Plan) -> Sharding | None:
    """How the launcher wants the base sharded, if at all; EngineError for what cannot be."""
    sharding = requested_sharding()
    if sharding is not None and _merges(plan):
        raise EngineError("train.merge_teachers needs a whole base in every process: set it to False, or use no engine")
    return sharding if plan.shape.num_processes > 1 else None


def find_teacher_models(plan: Plan) -> dict[str, TeacherModel]:
    """The models of teachers that have their own, by the tasks' ``model``, those of the hub too. BackboneError."""
    wanted = dict.fromkeys(task.model for task in plan.teachers if task.model)
    found = dict(plan.teacher_models)
    for source in (source for source in wanted if source not in found):
        base = read_model(**plan.read(BaseSettings).source)
        model = read_teacher_model(source, base)
        assert model is not None  # it was downloaded
        model.family.shape_of(plan.read(BaseSettings).resolution, model.configs)
        for task in (task for task in plan.teachers if task.model == source):
            if problem := model.guidance_problem(task.guidance_scale):
                what = f"the guidance_scale of {task.name} is {task.guidance_scale:g}, but {problem}"
                raise BackboneError(f"{what}. Set it to 1.0.")
        found[source] = model
    return found


def load_loras(plan: Plan, models: Mapping[str, TeacherModel]) -> dict[str, LoraWeights]:
    """The LoRAs of a run by adapter, those of the hub too; AdapterError that names each that cannot be used.

    ``models``: those of teachers that have their own. The start of the student has the scale of a fresh one,
    ``lora_alpha / lora_rank``.
    """
    base, lora = plan.read(BaseSettings), plan.read(LoraSettings)
    sources: dict[str, dict[str, str]] = {"": {}}
    for task in plan.teachers:
        if task.has_lora:
            sources.setdefault(task.model, {})[task.adapter] = task.lora_path
        if task.reference_adapter:
            sources[""][task.reference_adapter] = task.reference
    if not unset(lora.lora_path):
        sources[""][STUDENT] = lora.lora_path
    found: dict[str, LoraWeights] = {}
    problems: list[str] = []
    for source, named in sources.items():
        model = models[source] if source else plan.model or (read_model(**base.source) if named else None)
        own, wrong, _ = find_all(named, source or base.model, model)
        found |= own
        problems += wrong.values()
    if problems:
        raise AdapterError("\n".join(problems))
    found |= {task.adapter: found[task.adapter].scaled(task.scale) for task in plan.teachers if task.has_lora}
    if STUDENT in found:
        found[STUDENT] = found[STUDENT].rescaled(lora.lora_alpha, lora.lora_rank)
    return found


def teacher_lora(task: Mapping[str, Any]) -> LoraWeights | None:
    """The LoRA of an entry of ``train.teachers`` by its scale, None if it has none. AdapterError, CheckpointError."""
    if unset(task.get("lora_path")):
        return None
    return load_lora(locate(task["lora_path"])).scaled(first(task.get("scale"), 1.0))


def load_models(
    plan: Plan, device: torch.device, dtype: torch.dtype, loras: Mapping[str, LoraWeights]
) -> tuple[Backbone, Adapters]:
    """The base model with the student and the teachers that are LoRAs on it; to be sharded yet, if at all.

    ``loras``: the teachers by adapter, and what the student starts from, if anything.
    """
    base, memory, lora = plan.read(BaseSettings), plan.read(MemorySettings), plan.read(LoraSettings)
    backbone = load_backbone(
        **base.source,
        dtype=dtype,
        device=device,
        vae_device=find_device(memory.vae_device, device, "vae_device"),
        sharding=find_sharding(plan),
    )
    if memory.activation_checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
    adapters = (MergedTeachers if _merges(plan) else Adapters)(backbone.transformer)
    if STUDENT in loras:
        adapters.add_from(STUDENT, loras[STUDENT], trainable=True)
    else:
        adapters.add_student(
            STUDENT,
            rank=lora.lora_rank,
            alpha=lora.lora_alpha,
            target_modules=lora.lora_target_modules or backbone.LORA_TARGETS,
            others={module for task in plan.starts for module in loras[task.adapter].a},
            seed=plan.values["seed"],
        )
    for task in plan.teachers:
        if not task.model:
            adapters.add_teacher(task.adapter, loras[task.adapter])
        if task.reference_adapter:
            adapters.add_teacher(task.reference_adapter, loras[task.reference_adapter])
    _accelerate(backbone, memory)
    return backbone, adapters


def _accelerate(backbone: Backbone, memory: MemorySettings) -> None:
    if memory.attention_backend:
        kernel = memory.attention_backend
        choose_attention(backbone.transformer, kernel, dtype=backbone.dtype, device=backbone.device)
    if memory.compile:
        compile_blocks(backbone.blocks())


def load_teacher_models(
    plan: Plan, base: Backbone, models: Mapping[str, TeacherModel], loras: Mapping[str, LoraWeights]
) -> dict[str, Home]:
    """The teachers that have models of their own, by adapter; each model is loaded once. To be sharded yet, if at all.

    ``base`` has its negative prompt. ``loras``: by adapter, those on these models among them.
    """
    memory, homes = plan.read(MemorySettings), {}
    waits = memory.teacher_device == "cpu"
    for source, model in models.items():
        backbone = model.load(base, waits=waits)
        adapters = Adapters(backbone.transformer)
        tasks = [task for task in plan.teachers if task.model == source]
        for task in tasks:
            if task.has_lora:
                adapters.add_teacher(task.adapter, loras[task.adapter])
        _accelerate(backbone, memory)
        host = HostWeights(backbone.transformer, backbone.device) if waits else None
        for task in tasks:
            homes[task.adapter] = Home(backbone, adapters, task.adapter if task.has_lora else None, host)
    return homes


def _merges(plan: Plan) -> bool:
    return bool(plan.teachers) and plan.values["train.merge_teachers"]


def fill_text_cache(
    plan: Plan, texts: Sequence[str], device: torch.device, dtype: torch.dtype, rank: int = 0, world: int = 1
) -> TextCache:
    """The conditions of a run's prompts: `text_cache.filled`."""
    base, memory = plan.read(BaseSettings), plan.read(MemorySettings)
    where, length, encode_on = memory.cache_dir, base.max_sequence_length, memory.text_encoder_device
    return filled(
        base.source, texts, where, length, encode_on=encode_on, device=device, dtype=dtype, rank=rank, world=world
    )
