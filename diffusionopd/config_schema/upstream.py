"""Keys of the upstream release that nothing here uses; its configuration files set them."""

from __future__ import annotations

from dataclasses import dataclass

from diffusionopd.config_schema.keys import FREE, key

_UNUSED = {"used": False, "resume": FREE}


@dataclass(frozen=True)
class UpstreamSettings:
    """Accepted, without effect."""

    prompt_fn_kwargs: dict = key("prompt_fn_kwargs", {}, "Tasks carry their own prompts.", **_UNUSED)
    proxy_reward_fn: dict = key("proxy_reward_fn", {}, "Tasks carry their own rewards.", **_UNUSED)
    save_eval_dir: str = key("save_eval_dir", "", "Evaluations are written to the run folder.", **_UNUSED)
    debug: bool = key("debug", False, "Of the upstream script.", **_UNUSED)
    fsdp_optimizer_offload: bool = key(
        "fsdp_optimizer_offload", False, "The optimizer of a LoRA is too small to offload.", **_UNUSED
    )
    batch_size: int = key("sample.batch_size", 1, "Of reinforcement-learning code.", **_UNUSED)
    sde_window_size: int = key("sample.sde_window_size", 0, "Of reinforcement-learning code.", **_UNUSED)
    sde_window_range: tuple = key("sample.sde_window_range", (0, 0), "Of reinforcement-learning code.", **_UNUSED)
    timestep_shift: float = key("train.timestep_shift", 1.0, "The schedule's shift is the base model's own.", **_UNUSED)
