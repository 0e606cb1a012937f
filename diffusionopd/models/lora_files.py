"""LoRA files: a function per format reads one, and every tensor is accounted for before it may touch a model."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
"""Under which the two formats store the transformer's modules."""
# PEFT options that change the arithmetic of a layer in ways that (A, B, alpha) alone do not describe.
_UNSUPPORTED = ("use_dora", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens", "lora_bias")
# What the libraries and a config's odd values raise while a file is read.
_UNREADABLE = (
    SafetensorError, pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError,
    AttributeError, OverflowError, re.error,
)  # fmt: skip


class AdapterError(ValueError):
    """Raised for a LoRA that cannot be read or does not fit the base model."""


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA as read from disk: per module ``A [r, in]``, ``B [out, r]`` and alpha; it adds ``alpha / r B A``."""

    source: str
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    alpha: dict[str, float]
    target_modules: list[str] | str | None  # None: the file does not say which modules it should cover
    rslora: bool = False

    @property
    def rank(self) -> dict[str, int]:
        """Rank r of every module, by its name."""
        return {name: a.shape[0] for name, a in self.a.items()}


def load_lora(source: str | Path) -> LoraWeights:
    """Read a LoRA for the transformer from a local file or folder, or a hub id with an optional subfolder.

    Accepts ``<run>/checkpoints/checkpoint-<n>``, a folder with ``adapter_config.json``, a folder with or a path to
    ``pytorch_lora_weights.safetensors``, and ``owner/name[/sub/folder]``. Raises AdapterError for anything missing,
    unreadable, unpaired, non-finite or never trained (all ``lora_B`` zero).
    """
    path = _locate(str(source))
    for read in FORMATS:
        if (weights := read(path)) is not None:
            _check_values(weights)
            return weights
    raise AdapterError(f"{path} holds no LoRA: expected {PEFT_CONFIG} with {PEFT_WEIGHTS}, or {DIFFUSERS_WEIGHTS}")


def _locate(source: str) -> Path:
    """The local folder or file of ``source``, downloaded first when it is a hub id."""
    path = Path(source)
    if os.path.exists(path):  # unlike Path.exists, False for what can be no path
        return path / "lora" if (path / "lora" / PEFT_CONFIG).is_file() else path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)*", source) or source.startswith(".") or ".." in source.split("/"):
        raise AdapterError(f"no LoRA at {source!r}: neither a file or folder nor a hub id such as owner/name/subfolder")
    owner, name, *subfolder = source.split("/")
    patterns = ["/".join([*subfolder, "*"])] if subfolder else None
    try:
        root = Path(snapshot_download(f"{owner}/{name}", allow_patterns=patterns))
    except Exception as error:
        raise AdapterError(
            f"no LoRA at {source!r}: no such local path, and the hub gave {type(error).__name__}: {error}. "
            "Check the spelling and the connection, or download it and give the folder."
        ) from error
    path = root.joinpath(*subfolder)
    if not path.exists():
        raise AdapterError(f"the hub repository {owner}/{name} has no folder {'/'.join(subfolder)!r}")
    return path


# --- formats ---------------------------------------------------------------------------------------------------------


def read_peft(path: Path) -> LoraWeights | None:
    """A folder of PEFT's: config in JSON, weights beside it."""
    file = path / PEFT_CONFIG
    if not file.is_file():
        return None
    with _reading(file):
        config = json.loads(file.read_text(encoding="utf-8"))
        used = [key for key in _UNSUPPORTED if config.get(key)]
        kind, bias = config.get("peft_type", "LORA"), config.get("bias", "none")
        if kind != "LORA" or used or bias != "none":
            raise ValueError(f"only plain LoRA without biases is supported, not {kind}, bias={bias}, {used}")
        rank, alpha = config["r"], config["lora_alpha"]
    safe, pickled = path / PEFT_WEIGHTS, path / "adapter_model.bin"
    a, b = _pair(_read_tensors(pickled if pickled.is_file() and not safe.is_file() else safe), path)
    with _reading(file):
        wrong = [name for name, x in a.items() if x.shape[0] != _by_pattern(config, "rank_pattern", name, rank)]
        if wrong:
            raise ValueError(f"the rank of {some(wrong)} is not {rank}")
        alphas = {name: _by_pattern(config, "alpha_pattern", name, alpha) for name in a}
        return LoraWeights(str(path), a, b, alphas, _targets(config), bool(config.get("use_rslora")))


def read_diffusers(path: Path) -> LoraWeights | None:
    """One file of diffusers', whose header may hold the PEFT config.

    Without it and without ``.alpha`` tensors diffusers takes alpha = rank, and so does this project.
    """
    file = path / DIFFUSERS_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        return None
    tensors = _read_tensors(file)
    with _reading(file):
        with safe_open(file, "pt") as handle:
            header = json.loads((handle.metadata() or {}).get("lora_adapter_metadata") or "{}")
        config = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in header.items()}
        stored = {_module(key.removesuffix(".alpha")): t.item() for key, t in tensors.items() if key.endswith(".alpha")}
    a, b = _pair({key: t for key, t in tensors.items() if not key.endswith(".alpha")}, file)
    with _reading(file):
        alphas = {
            name: _positive(stored[name])
            if name in stored
            else _by_pattern(config, "alpha_pattern", name, config.get("lora_alpha", x.shape[0]))
            for name, x in a.items()
        }
        return LoraWeights(str(file), a, b, alphas, _targets(config), bool(config.get("use_rslora")))


FORMATS: Sequence[Callable[[Path], LoraWeights | None]] = (read_peft, read_diffusers)
"""Each returns None for a path that is not of its format; the first that reads one is taken."""


# --- what the formats share ------------------------------------------------------------------------------------------


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what goes wrong inside into AdapterError naming the file."""
    try:
        yield
    except _UNREADABLE as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise AdapterError(f"{file} cannot be used as a LoRA: {reason}; fetch or save it again") from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickled one that holds nothing else."""
    with _reading(file):
        if file.suffix == ".bin":
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        else:
            with safe_open(file, "pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                raise ValueError(f"{name} is of type {tensor.dtype}")
        return tensors


def _module(key: str) -> str:
    """The transformer's own name of a module."""
    return key.removeprefix(PEFT_PREFIX).removeprefix(DIFFUSERS_PREFIX)


def _pair(tensors: Mapping[str, Tensor], where: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split tensors into ``A`` and ``B`` by module name; every one must be half of a pair of one rank."""
    halves: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    unexpected = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.[\w-]+)?\.weight", _module(key))
        if match is None or tensor.ndim != 2:
            unexpected.append(key)
        else:
            halves[match[2]][match[1]] = tensor
    a, b = halves["A"], halves["B"]
    unpaired = [f"{n}.lora_{'B' if n in a else 'A'}" for n in a.keys() ^ b.keys()]
    unpaired += [
        f"{n} (rank {a[n].shape[0]} and {b[n].shape[1]})" for n in a.keys() & b.keys() if a[n].shape[0] != b[n].shape[1]
    ]
    if unexpected:
        raise AdapterError(f"{where}: unexpected tensors, not two-dimensional lora_A or lora_B: {some(unexpected)}")
    if unpaired or not a:
        raise AdapterError(f"{where}: missing or mismatched tensors: {some(unpaired) or 'the file is empty'}")
    return a, b


def _check_values(weights: LoraWeights) -> None:
    broken = {n for half in (weights.a, weights.b) for n, tensor in half.items() if not torch.isfinite(tensor).all()}
    if broken:
        raise AdapterError(f"{weights.source}: non-finite values in {some(broken)}")
    if not any(tensor.any() for tensor in weights.b.values()):
        raise AdapterError(
            f"{weights.source}: every lora_B is zero, so this LoRA changes nothing. "
            "It was never trained, or its keys were lost when it was saved."
        )


def _by_pattern(config: Mapping[str, Any], kind: str, name: str, default: Any) -> float:
    """PEFT's rank and alpha patterns: keys are regular expressions that match the end of a module's name."""
    for key, value in (config.get(kind) or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", name):
            return _positive(value)
    return _positive(default)


def _positive(value: Any) -> float:
    if isinstance(value, bool | str) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value!r} is no rank or alpha")
    return float(value)


def _targets(config: Mapping[str, Any]) -> list[str] | str | None:
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else [targets or ""]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"target_modules is {str(targets)[:80]}")
    if isinstance(targets, str):
        re.compile(targets)
    return targets


def some(names: Sequence[str] | set[str], most: int = 6) -> str:
    """The first names for a message, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
