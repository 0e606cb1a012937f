"""The names, types and ranges of single keys. A key's type is that of its default in ``config/base.py``."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusionopd.config_schema.problems import ConfigError, Problems, nearest

SECTIONS = ("pretrained", "sample", "train")
NOISY_KERNELS = {"flow": "flow_sde", "dance": "dance_sde", "cps": "cps", "ddim": "ddim"}
ODE_SOLVERS = ("dpm1", "dpm2")

REWARD_ALGORITHMS = ("nft", "grpo", "grpo_guard")
ALGORITHMS = ("opd", "sft", *REWARD_ALGORITHMS)

# Keys that upstream files set and nothing uses.
NO_EFFECT = frozenset(
    "prompt_fn_kwargs proxy_reward_fn save_eval_dir debug fsdp_optimizer_offload sample.batch_size "
    "sample.sde_window_size sample.sde_window_range train.timestep_shift".split()
)
# Keys that only some algorithms use.
USED_BY = {
    **dict.fromkeys(("dataset", "prompt_fn", "reward_fn", "per_prompt_stat_tracking"), REWARD_ALGORITHMS),
    **dict.fromkeys(("sample.global_std", "train.adv_clip_max"), REWARD_ALGORITHMS),
    **dict.fromkeys(("train.clip_range_lt", "train.clip_range_gt"), ("grpo_guard",)),
    **dict.fromkeys(("train.nft_beta", "train.old_policy_decay"), ("nft",)),
    **dict.fromkeys(("train.loss", "train.target", "train.self_normalize"), ("opd",)),
    "train.clip_range": ("opd", "grpo"),
    "train.beta": ("opd", *REWARD_ALGORITHMS),
    "train.steps_per_rollout": ("opd",),
    "train.merge_teachers": ("opd", "sft"),
}

CHOICES: dict[str, tuple] = {
    "train.algorithm": ALGORITHMS,
    "train.task_order": ("together", "alternate", "cascade"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "use_lora": (True,),
    "attention_backend": ("", "flash", "efficient", "cudnn", "math"),
    "sample.solver": (*NOISY_KERNELS, *ODE_SOLVERS),
    "train.loss": ("kl", "policy_gradient"),
    "train.target": ("mean", "velocity", "x0"),
}

# Keys that name a device; whether it is there is seen when a run starts.
DEVICES = ("text_encoder_device", "vae_device")

INTERVALS = {
    "seed": "[0, inf)",
    "num_epochs": "[1, inf)",
    "save_freq": "[0, inf)",
    "eval_freq": "[0, inf)",
    "monitor_freq": "[0, inf)",
    "sample_freq": "[0, inf)",
    "num_checkpoint_limit": "[0, inf)",
    "collective_timeout": "(0, inf)",
    "reward_timeout": "(0, inf)",
    "eval_num_prompts": "[0, inf)",
    "resolution": "[16, inf)",
    "max_sequence_length": "[1, inf)",
    "sample.num_steps": "[1, inf)",
    "sample.eval_num_steps": "[1, inf)",
    "sample.guidance_scale": "[1, inf)",
    "sample.eval_guidance_scale": "[1, inf)",
    "sample.teacher_guidance_scale": "[1, inf)",
    "sample.train_batch_size": "[1, inf)",
    "sample.test_batch_size": "[1, inf)",
    "sample.num_image_per_prompt": "[1, inf)",
    "sample.num_batches_per_epoch": "[1, inf)",
    "sample.noise_level": "[0, inf)",
    "train.batch_size": "[1, inf)",
    "train.gradient_accumulation_steps": "[1, inf)",
    "train.num_inner_epochs": "[1, inf)",
    "train.timestep_fraction": "(0, 1]",
    "train.steps_per_rollout": "[0, inf)",
    "train.learning_rate": "(0, inf)",
    "train.adam_beta1": "[0, 1)",
    "train.adam_beta2": "[0, 1)",
    "train.adam_weight_decay": "[0, inf)",
    "train.adam_epsilon": "(0, inf)",
    "train.max_grad_norm": "(0, inf)",
    "train.loss_scale": "(0, inf)",
    "train.clip_range": "(0, inf)",
    "train.clip_range_lt": "(0, inf)",
    "train.clip_range_gt": "(0, inf)",
    "train.adv_clip_max": "(0, inf)",
    "train.nft_beta": "(0, inf)",
    "train.beta": "[0, inf)",
    "train.lora_rank": "[1, inf)",
    "train.lora_alpha": "(0, inf)",
    "train.ema_decay": "[0, 1)",
    "train.ema_interval": "[1, inf)",
}


def _named(value: Any) -> bool:
    return bool(value) and all(isinstance(name, str) and name for name in value)


# What lists and dicts hold.
LISTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "train.lora_target_modules": ("a list of at least one name", _named),
    "train.old_policy_decay": ("three numbers", lambda value: len(value) == 3 and all(map(is_number, value))),
    "reward_options": (
        "{reward: {option: value}}",
        lambda value: all(isinstance(options, Mapping) for options in value.values()),
    ),
}


def unused_keys(algorithm: Any) -> frozenset[str]:
    """The keys that this algorithm does not use."""
    return NO_EFFECT | {key for key, users in USED_BY.items() if algorithm not in users}


def base_config() -> ConfigDict:
    """A fresh copy of the defaults in ``config/base.py``."""
    path = Path(__file__).resolve().parent.parent.parent / "config" / "base.py"
    if not path.is_file():
        raise ConfigError([f"{path} is missing. Install from a checkout of the repository: pip install -e ."])
    return runpy.run_path(str(path))["get_config"]()


def to_plain(value: Any) -> Any:
    """``value`` with every ConfigDict in it, also inside lists, turned into a dict."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_plain(inner) for inner in value)
    return value


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Keys as on the command line: ``{"seed": .., "sample.num_steps": .., ..}``; lists and inner dicts stay values."""
    plain = to_plain(config)
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if key in SECTIONS and isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[key] = value
    return flat


def check_names(values: dict[str, Any], defaults: dict[str, Any], problems: Problems) -> None:
    """No key that the defaults do not have, and none of theirs left out."""
    for key in values.keys() - defaults.keys():
        problems.add(
            key, "is not a configuration key", nearest(key, defaults).strip() or "docs/configuration.md has all."
        )
    for key in defaults.keys() - values.keys():
        problems.add(key, "is missing", "Start from the defaults in config/base.py.")
    problems.found.sort()


def check_values(values: dict[str, Any], defaults: dict[str, Any], problems: Problems) -> None:
    """Each value has its default's type and lies in its range or among its choices."""
    unused = unused_keys(values.get("train.algorithm"))
    for key, default in defaults.items():
        if key not in values or key in unused:
            continue
        value, expected = values[key], _type_name(default)
        if not _has_type(value, default):
            problems.add(key, f"is {value!r}", f"It must be {expected}.")
        elif key in CHOICES and value not in CHOICES[key]:
            choices = ", ".join(repr(choice) for choice in CHOICES[key])
            problems.add(
                key, f"is {value!r}", f"It must be one of {choices}.{nearest(str(value), map(str, CHOICES[key]))}"
            )
        elif key in DEVICES and not re.fullmatch(r"(cpu|cuda(:\d+)?)?", value or ""):
            problems.add(key, f"is {value!r}", 'It must be "cpu", "cuda", "cuda:<n>" or empty (the training device).')
        elif key in LISTS and not LISTS[key][1](value):
            problems.add(key, f"is {value!r}", f"It must be {LISTS[key][0]}.")
        elif key in INTERVALS and not _inside(value, INTERVALS[key]):
            problems.add(key, f"is {value!r}", f"It must be {expected} in {INTERVALS[key]}.")


def _type_name(default: Any) -> str:
    names = {bool: "True or False", int: "an integer", float: "a finite number", dict: "a dict"}
    return names.get(type(default), "a list" if isinstance(default, list | tuple) else "a string or None")


def _has_type(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if isinstance(default, float):
        return is_number(value)
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple)
    if isinstance(default, dict):
        return isinstance(value, dict)
    return value is None or isinstance(value, str)


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold; not NaN, not infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval.startswith("[") else value > low
    return above and (value <= high if interval.endswith("]") else value < high)


def unset(value: str | None) -> bool:
    """Whether a string key has no value: None, blank, or the word that command lines write for None."""
    return value is None or not value.strip() or value.strip().lower() == "none"
