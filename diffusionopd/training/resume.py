"""Where a run starts: the checkpoint to go on from, and whether everything behind it is still the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionopd.config_schema import (
    ResumeError,
    RunPlan,
    Start,
    changes_since,
    flatten,
    read_saved,
    refuse_changes,
)
from diffusionopd.data.batches import adapter_name
from diffusionopd.data.prompts import Prompt
from diffusionopd.models.backbone import Backbone
from diffusionopd.models.lora import Adapters
from diffusionopd.training import checkpoint
from diffusionopd.training.state import RunError, versions

_SAMPLE = 4096  # values of each tensor of the base model: 4 million of SD3.5-Medium's 2.2 billion


def find_checkpoint(resume_from: str | None, run_dir: Path) -> Path | None:
    """The whole checkpoint that a run goes on from, or None for a fresh start.

    RunError where a fresh start, or another run's checkpoint, would overwrite what ``run_dir`` holds, and where nothing
    whole is left to go on from; CheckpointError for a named checkpoint that is damaged.
    """
    root = run_dir / "checkpoints"
    present = checkpoint.folders(root)
    if not resume_from:
        if present:
            raise RunError(
                f"{run_dir} already holds a run with {present[0].name}. Add --config.resume_from=auto to go on with "
                "it, or choose another --config.run_name."
            )
        return None
    if resume_from == "auto":
        latest = checkpoint.find_latest(root)
        if latest is None and present:
            raise RunError(
                f"all checkpoints in {root} are damaged ({', '.join(folder.name for folder in present)}), so there is "
                "nothing to resume. Put one back from a copy, or move them away to start this run afresh."
            )
        return latest
    folder = Path(resume_from)
    checkpoint.verify(folder)
    if present and folder.resolve().parent != root.resolve():
        raise RunError(
            f"{run_dir} already holds a run with {present[0].name}, which going on from {folder} would overwrite. "
            "Choose another --config.run_name."
        )
    return folder


@dataclass
class Resume:
    """A checkpoint to go on from, with what it was trained on."""

    folder: Path
    scalars: Mapping[str, Any]  # of its state
    allow_change: bool
    notes: list[str]  # what is different now, for people

    @property
    def completed(self) -> int:
        """Rounds done when it was saved."""
        return int(self.scalars["round"])

    def check_digests(self, digests: Mapping[str, str]) -> None:
        """Compare what has a digest both now and in the checkpoint; RunError unless changes are allowed."""
        before = self.scalars.get("digests", {})
        changed = sorted(name for name, digest in digests.items() if before.get(name, digest) != digest)
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
        """From where the run goes on, and what is different, a line each."""
        return "\n".join([f"resuming after round {self.completed} from {self.folder}", *self.notes])


def open_resume(start: Start, plan: RunPlan, allow_change: bool) -> Resume | None:
    """Find and verify the checkpoint to go on from, and refuse another experiment; None for a fresh start.

    Raises RunError, CheckpointError and ResumeError, before any weight is loaded.
    """
    folder = find_checkpoint(start.config.resume_from, plan.run_dir)
    if folder is None:
        return None
    saved = read_saved(folder)
    if saved is None:
        raise ResumeError(
            f"{folder} does not say how it was trained: its config.json or state/scalars.json is missing or damaged"
        )
    values = flatten(start.config)
    if not allow_change:  # again: a damaged one may have been skipped since the configuration was compared
        refuse_changes(saved, values, plan.num_processes)
    resume = Resume(
        folder, _checked(checkpoint.load_scalars(folder / "state"), folder), allow_change, list(start.notes)
    )
    refused, free = changes_since(saved, values, plan.num_processes)
    if changed := [*refused, *free]:
        resume.notes.append("changed since then: " + ", ".join(changed))
    before, now = resume.scalars.get("versions", {}), versions()
    if other := [f"{name} {before[name]} -> {now.get(name)}" for name in before if before[name] != now.get(name)]:
        resume.notes.append("saved with other versions: " + ", ".join(other))
    return resume


def _checked(scalars: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The state's scalars; RunError unless they are such a run's."""
    completed, tables = scalars.get("round"), [scalars.get(name, {}) for name in ("digests", "versions")]
    if not isinstance(completed, int) or completed < 0 or not all(isinstance(table, dict) for table in tables):
        raise RunError(f"{folder / 'state'} is not the state of such a run; resume from another checkpoint")
    return scalars


def prompt_digests(prompts: Mapping[str, Iterable[Prompt]]) -> dict[str, str]:
    """A digest of each task's training prompts, in their order."""
    return {
        f"the prompts of {task}": _sha256([json.dumps([p.text, p.metadata], sort_keys=True).encode() for p in own])
        for task, own in prompts.items()
    }


def weight_digests(plan: RunPlan, backbone: Backbone, adapters: Adapters) -> dict[str, str]:
    """A digest of each teacher's tensors and of a sample of the base model's; the same on every device.

    The base's is by type: a run that goes on in another ``mixed_precision`` holds other numbers.
    """
    own = (
        p for module in (backbone.transformer, backbone.vae) for n, p in module.named_parameters() if ".lora_" not in n
    )
    digests = {f"the base model ({backbone.dtype})": _sha256(_bytes(_sampled(p)) for p in own)}
    for teacher in plan.teachers if not plan.from_rewards else ():
        name = adapter_name(teacher)
        config = {
            key: value for key, value in vars(adapters.configs[name]).items() if "alpha" in key or "rslora" in key
        }
        scale = json.dumps(config, sort_keys=True).encode()
        digests[f"the teacher of {teacher.name}"] = _sha256([scale, *map(_bytes, adapters.parameters(name))])
    return digests


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """A digest of every value."""
    return _sha256(map(_bytes, tensors))


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
