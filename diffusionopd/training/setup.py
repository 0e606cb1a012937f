"""What a run is built from, before its first round: prompts, rewards, text embeddings, models, scorers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import parse_flag_from_env
from ml_collections import ConfigDict

from diffusionopd import distributed
from diffusionopd.algorithms.base import STUDENT
from diffusionopd.config_schema import RunPlan
from diffusionopd.data.batches import adapter_name
from diffusionopd.data.prompts import Prompt, load_prompts
from diffusionopd.data.sampler import PromptSampler
from diffusionopd.models.acceleration import check_compiler, choose_attention, compile_blocks
from diffusionopd.models.backbone import (
    Backbone,
    encoder_place,
    find_device,
    load_backbone,
    load_text_encoder,
    text_key,
)
from diffusionopd.models.lora import Adapters
from diffusionopd.models.merged import MergedTeachers
from diffusionopd.models.sharding import EngineError, Sharding, requested_sharding
from diffusionopd.models.text_cache import TextCache
from diffusionopd.rewards import RewardError, RewardWorker, build_composite, build_scorer

ENCODING_PATIENCE = 3 * 3600.0
"""Seconds that a process may wait for the slowest while a large prompt set is encoded for the first time."""


@dataclass(frozen=True)
class PromptSets:
    """Prompts by task, and the order in which training sees them."""

    train: Mapping[str, Sequence[Prompt]]
    test: Mapping[str, Sequence[Prompt]]  # empty when nothing is evaluated
    samplers: Mapping[str, PromptSampler]

    def used_from(self, plan: RunPlan, completed: int) -> list[str]:
        """Every text that rounds from ``completed`` on and evaluations encode, the empty prompt first."""
        texts = [""]
        for task, (name, sampler) in enumerate(self.samplers.items()):
            texts += [self.train[name][i].text for i in sampler.used_by(plan.rounds_of(task, completed))]
            texts += [prompt.text for prompt in self.test.get(name, [])]
        return texts


def check_devices(config: ConfigDict, device: torch.device) -> None:
    """The devices and compilers that the configuration needs are there: said before anything is loaded.

    Raises BackboneError or AccelerationError.
    """
    find_device(config.text_encoder_device, device, "text_encoder_device")
    find_device(config.vae_device, device, "vae_device")
    if config.compile:
        check_compiler(device)


def read_prompts(config: ConfigDict, plan: RunPlan) -> PromptSets:
    """Read and index the prompts of all tasks."""
    train, test, samplers = {}, {}, {}
    for index, task in enumerate(plan.teachers):
        prompts = load_prompts(task.dataset, task.prompt_fn, "train")
        train[task.name] = prompts
        samplers[task.name] = PromptSampler(prompts, config.seed, index, plan.groups_per_task)
        if config.eval_freq:
            held_out = load_prompts(task.dataset, task.prompt_fn, "test")
            test[task.name] = held_out[: config.eval_num_prompts or None]
    return PromptSets(train, test, samplers)


def build_rewards(plan: RunPlan, device: str, timeout: float) -> dict[str, RewardWorker]:
    """The rewards that are trained on, by task, before any weight is loaded; RewardError for one that cannot be had."""
    workers = {}
    for task in plan.teachers if plan.from_rewards else ():
        scorer, name = build_composite(task.proxy_reward, device, plan.reward_options), ", ".join(task.proxy_reward)
        workers[task.name] = RewardWorker(scorer, name=name, timeout=timeout, retry_unavailable=True)
    return workers


def build_evaluation_scorers(plan: RunPlan, device: str, timeout: float) -> dict[str, dict[str, RewardWorker]]:
    """Per task its proxy rewards; one that is not available is said and left out, as for monitoring."""
    scorers: dict[str, dict[str, RewardWorker]] = {teacher.name: {} for teacher in plan.teachers}
    for teacher in plan.teachers:
        for name in teacher.proxy_reward:
            try:
                scorer = build_scorer(name, device, plan.reward_options.get(name))
                scorers[teacher.name][name] = RewardWorker(scorer, 1, name=name, timeout=timeout)
            except RewardError as error:
                warnings.warn(f"task {teacher.name!r} is trained without evaluating {name}: {error}", stacklevel=2)
    return {task: found for task, found in scorers.items() if found}


def fill_text_cache(
    config: ConfigDict, texts: Sequence[str], *, dtype: torch.dtype, device: torch.device, rank: int, world: int
) -> TextCache:
    """Encode what is not cached yet, each process a share; the encoders are gone from memory afterwards."""
    model, revision = config.pretrained.model, config.pretrained.revision or None
    key, length = text_key(model, revision), config.max_sequence_length
    place, precision = encoder_place(config.text_encoder_device, device, dtype)
    load = partial(load_text_encoder, model, revision, dtype=precision, device=place, max_sequence_length=length)
    cache = TextCache(config.cache_dir, key, length, dtype)
    distributed.together(
        lambda: cache.fill(texts, load, rank=rank, world=world), "encoding the prompts", ENCODING_PATIENCE
    )
    return cache


def find_sharding(config: ConfigDict) -> Sharding | None:
    """How the launcher wants the base sharded, if at all; EngineError for what cannot be."""
    sharding = requested_sharding()
    if sharding is not None and config.train.merge_teachers:
        raise EngineError("train.merge_teachers needs a whole base in every process: set it to False, or use no engine")
    if config.compile and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise EngineError("compile does not go with DeepSpeed: set it to False, or start with ENGINE=fsdp2")
    return sharding


def load_models(
    config: ConfigDict, plan: RunPlan, *, dtype: torch.dtype, device: torch.device
) -> tuple[Backbone, Adapters]:
    """The base model with the student and, in a distillation, the teachers on it; to be sharded yet, if at all."""
    backbone = load_backbone(
        config.pretrained.model,
        config.pretrained.revision or None,
        dtype=dtype,
        device=device,
        vae_device=find_device(config.vae_device, device, "vae_device"),
        sharding=find_sharding(config) if plan.num_processes > 1 else None,
    )
    if config.activation_checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
    train = config.train
    adapters = MergedTeachers(backbone.transformer) if train.merge_teachers else Adapters(backbone.transformer)
    if train.lora_path:
        adapters.add_from(STUDENT, train.lora_path, trainable=True)
    else:
        adapters.add_student(
            STUDENT,
            rank=train.lora_rank,
            alpha=train.lora_alpha,
            target_modules=train.lora_target_modules,
            seed=config.seed,
        )
    for teacher in plan.teachers if not plan.from_rewards else ():
        adapters.add_teacher(adapter_name(teacher), teacher.lora_path)
    if config.attention_backend:
        choose_attention(backbone.transformer, config.attention_backend, dtype=dtype, device=device)
    if config.compile:
        compile_blocks(backbone.transformer)
    return backbone, adapters


def merged_note(adapters: Adapters) -> str:
    """What merged teachers take, for the line that a run begins with; empty without any."""
    if not isinstance(adapters, MergedTeachers):
        return ""
    sizes = adapters.merged_bytes().values()
    return f", {len(sizes)} merged teachers in {sum(sizes) / 1e9:.3g} GB"
