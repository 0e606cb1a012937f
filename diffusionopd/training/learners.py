"""From a checked configuration to the learner of its algorithm."""

from __future__ import annotations

import torch
from ml_collections import ConfigDict

from diffusionopd.algorithms import Grpo, Nft, RewardRecipe, Score, Supervised
from diffusionopd.algorithms.base import STUDENT, Learner, Parts
from diffusionopd.algorithms.opd import Distiller, Recipe
from diffusionopd.algorithms.optim import StudentOptimizer
from diffusionopd.config_schema import RunPlan
from diffusionopd.models.lora import Adapters
from diffusionopd.transitions import Transition, schedule


def build_optimizer(config: ConfigDict, adapters: Adapters, dtype: torch.dtype) -> StudentOptimizer:
    """The student's optimizer; fp16 gets a dynamic loss scale besides the constant one."""
    train = config.train
    return StudentOptimizer(
        adapters.parameters(STUDENT),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay,
        epsilon=train.adam_epsilon,
        max_grad_norm=train.max_grad_norm,
        loss_scale=train.loss_scale,
        dynamic_scale=dtype == torch.float16,
        use_8bit=train.use_8bit_adam,
        fused=train.fused_optimizer,
    )


def build_learner(config: ConfigDict, plan: RunPlan, parts: Parts, score: Score) -> Learner:
    """The learner that ``train.algorithm`` names; ``score`` is for those that learn from rewards."""
    transitions = schedule(plan.kernel, parts.backbone.sigmas(plan.num_steps, config.resolution), plan.noise_level)
    if plan.algorithm == "opd":
        return _distiller(config, plan, parts, transitions)
    if plan.algorithm == "sft":
        return Supervised(
            parts,
            transitions,
            plan.trained_steps,
            guidance_scale=plan.student_guidance,
            multistep=plan.multistep,
            accumulation=plan.batches_per_step,
            inner_epochs=config.train.num_inner_epochs,
        )
    train, recipe = config.train, _reward_recipe(config, plan, transitions)
    if plan.algorithm == "nft":
        start, slope, maximum = train.old_policy_decay
        return Nft(parts, recipe, score, beta=train.nft_beta, decay=(start, slope, maximum))
    guard = plan.algorithm == "grpo_guard"
    low, high = (train.clip_range_lt, train.clip_range_gt) if guard else (train.clip_range, train.clip_range)
    return Grpo(parts, recipe, score, clip_low=low, clip_high=high, guard=guard)


def _distiller(config: ConfigDict, plan: RunPlan, parts: Parts, transitions: list[Transition]) -> Distiller:
    train = config.train
    recipe = Recipe(
        transitions=transitions,
        trained_steps=plan.trained_steps,
        multistep=plan.multistep,
        student_guidance=plan.student_guidance,
        loss=train.loss,
        target=train.target,
        self_normalize=train.self_normalize,
        clip_range=train.clip_range,
        beta=train.beta,
        inner_epochs=train.num_inner_epochs,
    )
    return Distiller(parts, recipe)


def _reward_recipe(config: ConfigDict, plan: RunPlan, transitions: list[Transition]) -> RewardRecipe:
    train, sample = config.train, config.sample
    return RewardRecipe(
        transitions=transitions,
        trained_steps=plan.trained_steps,
        images_per_task=plan.images_per_task,
        images_per_prompt=sample.num_image_per_prompt if config.per_prompt_stat_tracking else plan.images_per_task,
        guidance_scale=plan.student_guidance,
        multistep=plan.multistep,
        advantage_scale="global" if sample.global_std else "prompt",
        advantage_clip=train.adv_clip_max,
        reference_weight=train.beta,
        accumulation=plan.batches_per_step,
        inner_epochs=train.num_inner_epochs,
    )
