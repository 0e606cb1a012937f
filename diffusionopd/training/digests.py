"""Digests of what a run depends on beside its configuration: prompts, weights, versions."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata

import torch
from torch import Tensor, nn

from diffusionopd.data.prompts import Prompt
from diffusionopd.data.tasks import Task
from diffusionopd.models.policies import Policies

_SAMPLE = 4096  # values of each tensor of the base model: 4 million of SD3.5-Medium's 2.2 billion


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
        scale = {name: getattr(config, name) for name in ("alpha_pattern", "lora_alpha", "use_rslora")}
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
