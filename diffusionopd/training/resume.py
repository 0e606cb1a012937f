"""Where a run starts: afresh, or from a checkpoint, with what is different since then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusionopd.config_schema import (
    ConfigError,
    Problems,
    find_secrets,
    flatten,
    read,
    read_json_config,
    unset,
)
from diffusionopd.data.tasks import check_saved_tasks
from diffusionopd.locks import refuse_if_held
from diffusionopd.training import checkpoint
from diffusionopd.training.changes import BATCH_KEYS, adapted_batches, changes_since
from diffusionopd.training.digests import versions
from diffusionopd.training.keys import SCHEMA, ema_repeats, is_used, unsaved, with_paths
from diffusionopd.training.settings import RunSettings

_REMEDY = (
    "Go on with the old values, start another run with --config.run_name, or add --allow_config_change to go on with "
    "the new ones."
)
_ROW = b'{"round": '  # begins a line of metrics.jsonl


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
    compiled: bool | None = None  # of the rounds before; None for a fresh start
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
    completed, written_for, passes = (scalars.get(name, -1) for name in ("round", "written_for", "tasks_per_pass"))
    digests, before, diversity = (scalars.get(name) for name in ("digests", "versions", "diversity"))
    counts = all(isinstance(n, int) for n in (completed, written_for, passes))
    if not (
        counts
        and completed >= 0 < min(written_for, passes)
        and isinstance(digests, dict)
        and isinstance(before, dict)
        and isinstance(diversity, dict)
    ):
        raise RunError(f"{folder / 'state'} is not the state of such a run; resume from another checkpoint")
    unevaluated = scalars.get("unevaluated")
    start = Resume(config, given, num_processes, folder, completed, unevaluated, digests, diversity, allow_change)
    start.tasks_per_pass, start.compiled = passes, scalars.get("compiled")
    if num_processes != written_for and all(values[name] == saved[name] for name in BATCH_KEYS):
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
