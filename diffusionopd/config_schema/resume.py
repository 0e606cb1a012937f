"""Resuming: what may differ from the checkpoint's configuration, and how another number of processes is met.

Reads the checkpoint's JSON files alone, so that a mistake is said before processes start or weights load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusionopd.config_schema.geometry import BATCH_KEYS, adapted_batches, geometry
from diffusionopd.config_schema.problems import Problems
from diffusionopd.config_schema.run_config import read_run_config
from diffusionopd.config_schema.secrets import find_secrets
from diffusionopd.config_schema.sources import run_folder
from diffusionopd.config_schema.values import (
    NO_EFFECT,
    REWARD_ALGORITHMS,
    base_config,
    check_names,
    check_values,
    flatten,
    to_plain,
    unset,
    unused_keys,
)

# Keys that say how long a run is, what is written and watched, where it computes and how its numbers are kept stable.
# A resumed run may change them; EXPERIMENT is what the student is trained on, and towards, and stays.
FREE = NO_EFFECT | frozenset(
    """
    run_name logdir save_dir cache_dir log_with run_project collective_timeout
    num_epochs save_freq num_checkpoint_limit resume_from
    eval_freq eval_num_prompts monitor_freq sample_freq reward_timeout
    sample.eval_num_steps sample.eval_guidance_scale sample.test_batch_size
    mixed_precision allow_tf32 activation_checkpointing text_encoder_device vae_device
    train.merge_teachers train.fused_optimizer prefetch compile attention_backend
    train.learning_rate train.max_grad_norm train.loss_scale
    train.ema train.ema_decay train.ema_interval
    """.split()
)
EXPERIMENT = frozenset(
    """
    pretrained.model pretrained.revision use_lora
    train.lora_path train.lora_rank train.lora_alpha train.lora_target_modules
    train.teachers dataset prompt_fn reward_fn reward_options train.task_order
    seed resolution max_sequence_length
    sample.solver sample.num_steps sample.noise_level sample.deterministic
    sample.guidance_scale sample.teacher_guidance_scale sample.num_image_per_prompt sample.same_latent
    train.algorithm train.loss train.target train.self_normalize train.beta train.cfg
    train.timestep_fraction train.steps_per_rollout train.num_inner_epochs
    train.clip_range train.clip_range_lt train.clip_range_gt train.adv_clip_max
    train.nft_beta train.old_policy_decay sample.global_std per_prompt_stat_tracking
    train.adam_beta1 train.adam_beta2 train.adam_weight_decay train.adam_epsilon train.use_8bit_adam
    """.split()
)
# Of a reward that is trained on: where and how patiently it computes, not what it says.
_REWARD_PLACEMENT = frozenset(
    "device batch_size base_url api_key_variable timeout connect_timeout retries backoff concurrency".split()
)
REMEDY = (
    "Go on with the old values, start another run with --config.run_name, or add --allow_config_change to go on with "
    "the new ones."
)


class ResumeError(ValueError):
    """A run that cannot go on from its checkpoint as it is configured; the message says what differs and the remedy."""


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says about the run that wrote it."""

    folder: Path
    values: dict[str, Any]  # its configuration as given, flat; keys that are newer than it have their defaults
    written_for: int  # processes that the configuration's per-process keys are meant for


@dataclass(frozen=True)
class Start:
    """The configuration that a run works with, and the one that was given."""

    config: ConfigDict
    given: ConfigDict
    written_for: int  # processes that the per-process keys of ``given`` are meant for
    notes: tuple[str, ...] = ()  # what was adapted, for people


def resumed(config: ConfigDict, num_processes: int, allow_change: bool = False) -> Start:
    """``config`` as a run on ``num_processes`` processes takes it up again, if it resumes at all.

    When the per-process batch keys are those of the checkpoint but the number of processes is not, they are adapted so
    that a round stays the same. Raises ResumeError when that is impossible, or when the experiment would change and
    ``allow_change`` is False. A configuration that is wrong in itself is returned as it is, for ``check`` to report.
    """
    fresh = Start(config, config, num_processes)
    values, defaults, problems = flatten(config), flatten(base_config()), Problems()
    check_names(values, defaults, problems)
    check_values(values, defaults, problems)
    secret = next(find_secrets(values), None)  # differences from the checkpoint quote values
    saved = None if problems.found or secret else find_saved(values)
    if saved is None:
        return fresh
    start, same_keys = fresh, all(values[key] == saved.values[key] for key in BATCH_KEYS)
    if same_keys and num_processes != saved.written_for:
        start = _adapted(config, values, saved, num_processes)
    if not allow_change:
        refuse_changes(saved, flatten(start.config), num_processes)
    return start


def _adapted(config: ConfigDict, values: dict[str, Any], saved: SavedRun, num_processes: int) -> Start:
    try:
        changes = adapted_batches(values, saved.written_for, num_processes)
    except ValueError as error:
        raise ResumeError(f"{saved.folder} cannot be resumed with {num_processes} processes: {error}") from None
    adapted = ConfigDict(to_plain(config), type_safe=False)
    for key, new in changes.items():
        section, name = key.split(".")
        adapted[section][name] = new
    listed = ", ".join(f"{key} {values[key]} -> {new}" for key, new in changes.items() if new != values[key])
    note = f"processes {saved.written_for} -> {num_processes}, so that a round stays the same: {listed}"
    return Start(adapted, config, saved.written_for, (note,))


def refuse_changes(saved: SavedRun, values: dict[str, Any], num_processes: int) -> None:
    """ResumeError with ``old -> new`` of everything that would make it another experiment."""
    refused, _ = changes_since(saved, values, num_processes)
    if refused:
        listed = "".join(f"\n  - {change}" for change in refused)
        raise ResumeError(f"this is not the experiment that {saved.folder} belongs to:{listed}\n{REMEDY}")


def changes_since(saved: SavedRun, values: dict[str, Any], num_processes: int) -> tuple[list[str], list[str]]:
    """``key: old -> new``, first of what changes the experiment, then of what does not."""
    before, now = _expanded(saved.values), _expanded(values)
    refused: list[str] = []
    free: list[str] = []
    for key in sorted(before | now):
        old, new = _plain(before.get(key)), _plain(now.get(key))
        if old != new and key not in BATCH_KEYS:
            (refused if _is_experiment(key, before, now) else free).append(f"{key}: {old!r} -> {new!r}")
    old_round, new_round = geometry(saved.values, saved.written_for), geometry(values, num_processes)
    refused += [f"{name}: {old_round[name]} -> {new}" for name, new in new_round.items() if old_round[name] != new]
    return refused, free


def find_saved(values: dict[str, Any]) -> SavedRun | None:
    """The checkpoint that ``resume_from`` asks for, as far as its JSON files tell; it is verified when it is loaded."""
    wanted = values["resume_from"]
    if unset(wanted):
        return None
    if wanted != "auto":
        return read_saved(Path(wanted))
    if unset(values["save_dir"]) and (unset(values["run_name"]) or unset(values["logdir"])):
        return None
    root = run_folder(values["save_dir"], values["logdir"], values["run_name"]) / "checkpoints"
    return next(filter(None, map(read_saved, _newest_first(root))), None)


def read_saved(folder: Path) -> SavedRun | None:
    """What a checkpoint says about its run; None when its JSON files are not there, damaged or of something else."""
    try:
        config = read_run_config(folder / "config.json")
        scalars = json.loads((folder / "state" / "scalars.json").read_text("utf-8"))
        values = flatten(base_config()) | flatten(config)
        return SavedRun(folder, values, int(scalars.get("written_for", scalars["num_processes"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _newest_first(root: Path) -> list[Path]:
    """The checkpoints of a run by the name in ``latest``, then by number."""
    try:
        latest = (root / "latest").read_text("utf-8").strip()
    except (OSError, ValueError):
        latest = ""
    folders = [folder for folder in root.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda f: (f.name == latest, int(f.name.removeprefix("checkpoint-"))), reverse=True)


def _expanded(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with a key for each field of each task, and the guidance that each teacher really has."""
    flat = {key: value for key, value in values.items() if key not in ("train.teachers", "reward_options")}
    tasks = [task for task in values["train.teachers"] if isinstance(task, Mapping)]
    for i, task in enumerate(tasks):
        fields = {"guidance_scale": values["sample.teacher_guidance_scale"]}
        fields |= {name: value for name, value in task.items() if value is not None}
        flat |= {f"train.teachers[{i}].{name}": value for name, value in fields.items()}
    if tasks:
        del flat["sample.teacher_guidance_scale"]
    for reward, options in values["reward_options"].items():
        flat |= {f"reward_options.{reward}.{name}": value for name, value in dict(options).items()}
    return flat


def _is_experiment(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a change of an expanded key changes what the student is trained on, or towards."""
    algorithms = before["train.algorithm"], now["train.algorithm"]
    from_rewards = any(algorithm in REWARD_ALGORITHMS for algorithm in algorithms)
    if all(key in unused_keys(algorithm) for algorithm in algorithms):
        return False
    if key == "num_epochs":  # by which a cascade's tasks share the rounds
        return "cascade" in (before["train.task_order"], now["train.task_order"])
    if key.startswith("train.teachers["):
        field = key.rpartition("].")[2]
        teacher, task = ("lora_path", "guidance_scale"), ("name", "dataset", "prompt_fn")
        return field in (*task, *(("proxy_reward",) if from_rewards else teacher))
    if key.startswith("reward_options."):
        reward, option = key.split(".")[1:3]
        return from_rewards and option not in _REWARD_PLACEMENT and reward in _trained_on(before) | _trained_on(now)
    return key in EXPERIMENT


def _trained_on(expanded: dict[str, Any]) -> set[str]:
    tasks = [value for key, value in expanded.items() if key.endswith(".proxy_reward")] or [expanded["reward_fn"]]
    return {reward for rewards in tasks for reward in rewards}


def _plain(value: Any) -> Any:
    """``value`` as it comes back from JSON; None is unset."""
    return "" if value is None else json.loads(json.dumps(value, default=str))
