"""Keys of the upstream release that nothing here uses; its configuration files set them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusionopd.config_schema.keys import FREE, WRITE, key

_UNUSED: dict[str, Any] = {"used": False, "resume": FREE}


@dataclass(frozen=True)
class UpstreamSettings:
    """Accepted, without effect."""

    prompt_fn_kwargs: dict = key("prompt_fn_kwargs", {}, **_UNUSED)
    """Tasks carry their own prompts."""
    proxy_reward_fn: dict = key("proxy_reward_fn", {}, **_UNUSED)
    """Tasks carry their own rewards."""
    save_eval_dir: str = key("save_eval_dir", "", path=WRITE, **_UNUSED)
    """Evaluations are written to the run folder."""
    debug: bool = key("debug", False, **_UNUSED)
    """Of the upstream script."""
    fsdp_optimizer_offload: bool = key("fsdp_optimizer_offload", False, **_UNUSED)
    """The optimizer of a LoRA is too small to offload."""
    batch_size: int = key("sample.batch_size", 1, **_UNUSED)
    """Of reinforcement-learning code."""
    sde_window_size: int = key("sample.sde_window_size", 0, **_UNUSED)
    """Of reinforcement-learning code."""
    sde_window_range: tuple = key("sample.sde_window_range", (0, 0), **_UNUSED)
    """Of reinforcement-learning code."""
    timestep_shift: float = key("train.timestep_shift", 1.0, **_UNUSED)
    """The schedule's shift is the base model's own."""
