"""Where a run starts: the checkpoint it resumes from, what may have changed since, and another number of processes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from diffusionopd.algorithms import ALGORITHMS
from diffusionopd.config_schema import (
    FREE,
    REFUSE,
    REWARDS,
    ROUND,
    TEACHERS,
    ConfigError,
    Problems,
    comparable,
    find_secrets,
    flatten,
    read,
    read_json_config,
    unset,
)
from diffusionopd.data.prompts import Prompt
from diffusionopd.data.rounds import CASCADE, tasks_per_round
from diffusionopd.data.tasks import FIELDS, Task, check_saved_tasks
from diffusionopd.locks import refuse_if_held
from diffusionopd.models.policies import Policies
from diffusionopd.training import checkpoint
from diffusionopd.training.keys import SCHEMA, ema_repeats, is_used, unsaved, with_paths
from diffusionopd.training.settings import RunSettings

# In the order of their declaration: a batch, batches per round, a backward batch, backward batches per step.
_BATCH_KEYS = tuple(name for name, declared in SCHEMA.keys.items() if declared.resume == ROUND)
# Options of a reward that is trained on: placement and timeouts, not the score.
_RUNTIME_OPTIONS = frozenset(
    "device batch_size base_url api_key_variable timeout connect_timeout retries backoff concurrency".split()
)
_REMEDY = (
    "Go on with the old values, start another run with --config.run_name, or add --allow_config_change to go on with "
    "the new ones."
)
_ROW = b'{"round": '  # begins a line of metrics.jsonl
_SAMPLE = 4096  # values of each tensor of the base model: 4 million of SD3.5-Medium's 2.2 billion


class RunError(ValueError):
    """A run that must not start: it would overwrite another one, or go on from what is not its own."""


class ResumeError(RunError):
    """A run that cannot go on from its checkpoint as it is configured."""


@dataclass
class Resume:
    """Where a run starts."""

    config: ConfigDict  # as it is used: per-process keys adapted to the number of processes
    given: ConfigDict  # as it was given
    written_for: int  # processes that the per-process keys of ``given`` are meant for
    folder: Path | None = None  # the checkpoint; None for a fresh start
    completed: int = 0  # rounds done when it was saved
    unevaluated: dict[str, Any] | None = None  # metrics of the last round, when a signal interrupted its evaluation
    digests: Mapping[str, str] = field(default_factory=dict)  # of prompts and weights, when it was saved
    diversity: Mapping[str, float] = field(default_factory=dict)  # in its first monitored round
    allow_change: bool = False
    tasks_per_pass: int = 0  # of the rounds before; 0 for a fresh start
    compiled: bool | None = None  # of the rounds before; None for a fresh start, and where that is not known
    loss_scale: float = 1.0  # of the rounds before: earlier versions did not save it with the optimizer's state
    start_rescaled: bool = True  # False: saved by a version that trained a start (train.lora_path) at its own scale
    notes: list[str] = field(default_factory=list)  # what is different now, for people

    def check_digests(self, digests: Mapping[str, str]) -> None:
        """Compare what has a digest both now and in the checkpoint; RunError unless changes are allowed."""
        changed = sorted(name for name, digest in digests.items() if self.digests.get(name, digest) != digest)
        if not changed:
            return
        what = f"{', '.join(changed)}: not what {self.folder} was trained with"
        if not self.allow_change:
            raise RunError(
                f"{what}, although the configuration names the same places. Put the old files back, start another run "
                "with --config.run_name, or add --allow_config_change to go on with the new ones."
            )
        self.notes.append(f"{what}, which is allowed")

    def describe(self) -> str:
        """From where the run goes on, and what is different, one per line; empty for a fresh start."""
        if self.folder is None:
            return ""
        return "\n".join([f"resuming after round {self.completed} from {self.folder}", *self.notes])


def find_start(config: ConfigDict, num_processes: int, allow_change: bool = False, held: bool = False) -> Resume:
    """Where ``config`` starts on ``num_processes`` processes.

    When the per-process batch keys are those of the checkpoint but the number of processes is not, they are adapted so
    that a round stays the same. Raises RunError or CheckpointError where there is nothing valid to go on from or a
    start would overwrite something, and ResumeError when the round cannot stay the same, or the experiment would change
    and ``allow_change`` is False; HeldError where another process writes into the run folder, unless this run has it
    ``held``. A configuration that is wrong in itself is a fresh start, for ``check`` to report.
    """
    values, problems = flatten(config), Problems()
    given = config
    if dropped := unsaved(values):
        given = config.copy_and_resolve_references()
        given.update_from_flattened_dict({name: SCHEMA.defaults()[name] for name in dropped})
        values |= {name: SCHEMA.defaults()[name] for name in dropped}
    fresh = Resume(config, given, num_processes)
    SCHEMA.check(values, lambda name: is_used(name, values.get("train.algorithm", "")), problems)
    # Secrets are refused by check(); differences from the checkpoint would quote them.
    if problems.found or any(find_secrets(values)):
        return fresh
    run = read(RunSettings, flatten(with_paths(given)))
    if not held:
        refuse_if_held(run.run_dir)
    folder = find_checkpoint(run.resume_from, run.run_dir)
    if folder is None:
        return fresh
    saved, scalars = read_saved_config(folder), checkpoint.load_scalars(folder / "state")
    completed, written_for = scalars.get("round", -1), scalars.get("written_for", scalars.get("num_processes", 0))
    digests, before = scalars.get("digests", {}), scalars.get("versions", {})
    passes = scalars.get("tasks_per_pass", 1)  # one task after the other, before there was a choice
    counts = all(isinstance(n, int) for n in (passes, completed, written_for))
    expected = counts and completed >= 0 < min(passes, written_for)
    if not (expected and isinstance(digests, dict) and isinstance(before, dict)):
        raise RunError(f"{folder / 'state'} is not the state of such a run; resume from another checkpoint")
    unevaluated = scalars.get("unevaluated")
    diversity = scalars.get("diversity", {})
    start = Resume(config, given, num_processes, folder, completed, unevaluated, digests, diversity, allow_change)
    start.tasks_per_pass, start.compiled = passes, scalars.get("compiled")
    start.start_rescaled = scalars.get("start_rescaled", False) is True
    start.loss_scale = saved["train.loss_scale"]
    if num_processes != written_for and all(values[name] == saved[name] for name in _BATCH_KEYS):
        _adapt(start, values, written_for, num_processes)
        values = flatten(start.config)
    refused, free = changes_since(saved, written_for, values, num_processes)
    if refused and not allow_change:
        listed = "".join(f"\n  - {change}" for change in refused)
        raise ResumeError(f"this is not the experiment that {folder} belongs to:{listed}\n{_REMEDY}")
    if refused or free:
        start.notes.append("changed since then: " + ", ".join([*refused, *free]))
    now = versions()
    if other := [f"{name} {before[name]} -> {now.get(name)}" for name in before if before[name] != now.get(name)]:
        start.notes.append("saved with other versions: " + ", ".join(other))
    return start


def find_checkpoint(resume_from: str | None, run_dir: Path) -> Path | None:
    """The valid checkpoint that a run goes on from, or None for a fresh start.

    RunError where ``run_dir`` has files of other programs that a run would replace, where a fresh start, or another
    run's checkpoint, would overwrite what it holds, and where nothing valid is left to go on from; CheckpointError for
    a named checkpoint that is damaged.
    """
    _check_own(run_dir)
    root = run_dir / "checkpoints"
    present = checkpoint.folders(root)
    if resume_from == "auto":
        latest = checkpoint.find_latest(root)
        if latest is None and present:
            raise RunError(
                f"all checkpoints in {root} are damaged ({', '.join(folder.name for folder in present)}), so there is "
                "nothing to resume. Put one back from a copy, or move them away to start this run afresh."
            )
        return latest
    folder = None if unset(resume_from) else checkpoint.locate(str(resume_from))
    if folder is not None:
        if not folder.is_dir():
            return None  # check() names it
        checkpoint.verify(folder)
    if present and (folder is None or folder.resolve().parent != root.resolve()):
        raise RunError(
            f"{run_dir} already holds a run with {present[0].name}, which {folder or 'a fresh start'} would overwrite. "
            "Add --config.resume_from=auto to go on with it, or choose another --config.run_name."
        )
    return folder


def _check_own(run_dir: Path) -> None:
    """RunError unless the files in ``run_dir`` that a run replaces are a run's."""
    config, metrics = run_dir / "config.json", run_dir / "metrics.jsonl"
    foreign = []
    if config.is_file() and not {"sample", "train"} <= _object(config.read_bytes()).keys():
        foreign.append(config)
    # A line that a crash cut short, or filled with zeros, is a run's all the same.
    lines = [line.strip(b"\0\r") for line in metrics.read_bytes().split(b"\n")] if metrics.is_file() else []
    if any(line and not line.startswith(_ROW[: len(line)]) and "round" not in _object(line) for line in lines):
        foreign.append(metrics)
    if foreign:
        raise RunError(
            f"{' and '.join(map(str, foreign))} would be replaced by the run's, but no run wrote what is there. Choose "
            "another --config.run_name or --config.save_dir, or move it away."
        )


def _object(content: bytes) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_run_config(path: Path) -> dict[str, Any]:
    """The configuration in a run's ``config.json`` as nested dicts.

    Keys that this version knows are checked by type and range, others are kept as they are, and what is missing stays
    missing: another version or the upstream release may have written it. Raises ConfigError naming the file.
    """
    config = read_json_config(path)
    values = flatten(config)
    problems = Problems()
    for name, declared in SCHEMA.keys.items():
        if name in values and declared.used and (problem := declared.problem(values[name])):
            problems.add(name, *problem)
    if problems.good("train.teachers"):
        check_saved_tasks(values.get("train.teachers", []), problems)
    if problems.found:
        raise ConfigError(f"{path}: {problem}" for problem in problems.found)
    return config


def read_saved_config(folder: Path) -> dict[str, Any]:
    """The flat configuration of a checkpoint; keys that are newer than it have their defaults. Raises ResumeError."""
    try:
        return SCHEMA.defaults() | flatten(read_run_config(folder / "config.json"))
    except ConfigError as error:
        raise ResumeError(f"{folder} does not say how it was trained: {error}") from error


# --- another number of processes --------------------------------------------------------------------------------------


def _adapt(start: Resume, values: Mapping[str, Any], before: int, now: int) -> None:
    """Give ``start`` the configuration with which ``now`` processes make the same round."""
    try:
        changes = adapted_batches(values, before, now)
    except ValueError as error:
        raise ResumeError(f"{start.folder} cannot be resumed with {now} processes: {error}") from None
    if values["train.ema"] and (repeats := ema_repeats(values)) != ema_repeats({**values, **changes}):
        changes["train.ema_repeats"] = repeats
    start.config, start.written_for = start.given.copy_and_resolve_references(), before
    start.config.update_from_flattened_dict(changes)
    listed = ", ".join(f"{name} {values[name]} -> {new}" for name, new in changes.items() if new != values[name])
    start.notes.append(f"processes {before} -> {now}, so that a round stays the same: {listed}")


def _geometry(values: Mapping[str, Any], num_processes: int) -> dict[str, Fraction]:
    """What a round is over all processes; the keys are for people."""
    size, batches, part, accumulation = (values[name] for name in _BATCH_KEYS)
    return {
        "images per task and round": Fraction(batches * size * num_processes, tasks_per_round(values)),
        "optimizer steps per round": Fraction(batches * size, part * accumulation),
    }


def adapted_batches(values: Mapping[str, Any], before: int, now: int) -> dict[str, int]:
    """The batch keys with which ``now`` processes make the round that ``values`` describe for ``before`` processes.

    A process's batches stay as large as they are, or become smaller if they must, and so do its backward batches: what
    fitted into a GPU's memory still does. Raises ValueError naming the numbers of processes that work.
    """
    found = next(_solutions(values, before, now), None)
    if found is None:
        images, _ = _geometry(values, before).values()
        working = [str(n) for n in range(1, int(images) + 1) if next(_solutions(values, before, n), None)]
        raise ValueError(
            f"the {images} images of a task in a round cannot be shared equally by them. "
            f"Use {', '.join(working[:-1])}{' or ' * (len(working) > 1)}{working[-1]} processes."
        )
    return found


def _solutions(values: Mapping[str, Any], before: int, now: int) -> Iterator[dict[str, int]]:
    """Solutions for batches and backward batches of at most their present size, the largest first."""
    old_size, _, old_part, _ = (values[name] for name in _BATCH_KEYS)
    images, steps = _geometry(values, before).values()
    for size in range(old_size, 0, -1):
        batches = images / (size * now)  # per task
        if batches.denominator > 1:
            continue
        for part in (n for n in range(min(size, old_part), 0, -1) if size % n == 0):
            accumulation = tasks_per_round(values) * batches * size / part / steps
            if accumulation.denominator == 1:
                total = tasks_per_round(values) * int(batches)
                yield dict(zip(_BATCH_KEYS, (size, total, part, int(accumulation)), strict=True))


# --- what may change --------------------------------------------------------------------------------------------------


def changes_since(
    saved: Mapping[str, Any], written_for: int, values: Mapping[str, Any], num_processes: int
) -> tuple[list[str], list[str]]:
    """``key: old -> new``, first of what changes the experiment, then of what does not."""
    before, now = _expanded(saved), _expanded(values)
    refused: list[str] = []
    free: list[str] = []
    for name in sorted(before | now):
        old, new = comparable(before.get(name)), comparable(now.get(name))
        if old != new and name not in _BATCH_KEYS:
            (refused if _is_experiment(name, before, now) else free).append(f"{name}: {old!r} -> {new!r}")
    old_round, new_round = _geometry(saved, written_for), _geometry(values, num_processes)
    refused += [f"{name}: {old_round[name]} -> {new}" for name, new in new_round.items() if old_round[name] != new]
    return refused, free


def _expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with a key for each field of each task, and the default of what it leaves out."""
    flat = {name: value for name, value in values.items() if name not in ("train.teachers", "reward_options")}
    tasks = [task for task in values["train.teachers"] if isinstance(task, Mapping)]  # the others are check()'s
    for i, task in enumerate(tasks):
        fields = {name: field.default for name, field in FIELDS.items()}
        fields |= {"guidance_scale": values["sample.teacher_guidance_scale"]}
        fields |= {name: value for name, value in task.items() if value is not None}
        flat |= {f"train.teachers[{i}].{name}": value for name, value in fields.items()}
    if tasks:
        del flat["sample.teacher_guidance_scale"]
    for reward, options in values["reward_options"].items():
        flat |= {f"reward_options.{reward}.{name}": value for name, value in options.items()}
    return flat


def _is_experiment(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a change of an expanded key changes what the student is trained on, or towards."""
    algorithms = [values["train.algorithm"] for values in (before, now)]
    known = [(ALGORITHMS.get(values["train.algorithm"]), values) for values in (before, now)]
    from_rewards = any(cls and cls.has_rewards for cls, _ in known)
    with_teachers = any(cls and cls.uses_teachers(values) for cls, values in known)
    if name == "num_epochs":  # by which a cascade's tasks share the rounds
        return CASCADE in (before["train.task_order"], now["train.task_order"])
    if name.startswith("reward_options."):
        reward, option = name.split(".")[1:3]
        return from_rewards and option not in _RUNTIME_OPTIONS and reward in _trained_on(before) | _trained_on(now)
    if name in SCHEMA.keys and not any(is_used(name, algorithm) for algorithm in algorithms):
        return False
    declared = SCHEMA.keys.get(name) or FIELDS.get(name.rpartition("].")[2])
    rule = declared.resume if declared else FREE
    return rule == REFUSE or rule == REWARDS and from_rewards or rule == TEACHERS and with_teachers


def _trained_on(expanded: Mapping[str, Any]) -> set[str]:
    tasks = [value for name, value in expanded.items() if name.endswith(".proxy_reward")] or [expanded["reward_fn"]]
    return {reward for rewards in tasks for reward in rewards}


# --- digests ----------------------------------------------------------------------------------------------------------


def prompt_digests(prompts: Mapping[str, Iterable[Prompt]]) -> dict[str, str]:
    """A digest of each task's training prompts, in their order."""
    return {
        f"the prompts of {task}": _sha256([json.dumps([p.text, p.metadata], sort_keys=True).encode() for p in own])
        for task, own in prompts.items()
    }


def weight_digests(tasks: Sequence[Task], policies: Policies) -> dict[str, str]:
    """A digest of the tensors of each task's teacher and of a sample of those of the models; the same on every device.

    The models' are by type: a run that goes on in another ``mixed_precision`` holds other numbers.
    """
    kind, base = policies.backbone.dtype, policies.backbone
    digests = {f"the base model ({kind})": _sampled_digest(base.transformer, base.vae)}
    models = {task.model: policies.home(task.adapter).backbone.transformer for task in tasks if task.model}
    sampled = {source: _sampled_digest(transformer) for source, transformer in models.items()}
    digests |= {f"the model of {task.name} ({kind})": sampled[task.model] for task in tasks if task.model}
    frozen = {f"the teacher of {task.name}": task.adapter for task in tasks if task.has_lora}
    frozen |= {f"the reference of {task.name}": task.reference_adapter for task in tasks if task.reference_adapter}
    for what, adapter in frozen.items():
        adapters = policies.home(adapter).adapters
        config = adapters.configs[adapter]
        # By plain names, as runs have them that began before the patterns were whole names.
        alphas = {name.removeprefix("^"): alpha for name, alpha in config.alpha_pattern.items()}
        scale = {"alpha_pattern": alphas, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
        digests[what] = _sha256(
            [json.dumps(scale, sort_keys=True).encode(), *map(_bytes, adapters.parameters(adapter))]
        )
    return digests


def _sampled_digest(*modules: nn.Module) -> str:
    named = (parameter for module in modules for parameter in module.named_parameters())
    return _sha256(_bytes(_sampled(parameter)) for name, parameter in named if ".lora_" not in name)


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """A digest of every value."""
    return _sha256(map(_bytes, tensors))


def versions() -> dict[str, str]:
    """The versions on which a run's numbers depend."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def _sampled(tensor: Tensor) -> Tensor:
    """Evenly spread values, always the first."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // _SAMPLE)]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
