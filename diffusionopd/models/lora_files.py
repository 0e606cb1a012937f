"""LoRA files: a function per format reads one, and every tensor is accounted for before it may touch a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
"""Under which the two formats store the transformer's modules."""
_MOST = 6  # names in a message


class AdapterError(ValueError):
    """Raised for a LoRA that cannot be read or does not fit the base model."""


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA as read from disk: per module ``A [r, in]``, ``B [out, r]`` and alpha; it adds ``alpha / r B A``."""

    source: str
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    alpha: dict[str, float]
    target_modules: Collection[str] | str | None  # None: the file does not say which modules it should cover
    rslora: bool = False


def load_lora(source: str | Path) -> LoraWeights:
    """Read a LoRA for the transformer from a local file or folder, or a hub id with an optional subfolder.

    Accepts ``<run>/checkpoints/checkpoint-<n>``, a folder with ``adapter_config.json``, a folder with or a path to
    ``pytorch_lora_weights.safetensors``, and ``owner/name[/sub/folder]``. Raises AdapterError for anything missing,
    unreadable, unpaired, non-finite or never trained (all ``lora_B`` zero).
    """
    path = _locate(str(source))
    try:
        found = next(filter(None, (read(path) for read in FORMATS)), None)
    except AdapterError:
        raise
    except Exception as error:  # whatever the libraries raise for a damaged file
        raise AdapterError(f"{path} cannot be used as a LoRA: {error!r}; fetch or save it again") from error
    if found is None:
        raise AdapterError(f"{path} holds no LoRA: expected {PEFT_CONFIG} with {PEFT_WEIGHTS}, or {DIFFUSERS_WEIGHTS}")
    return found


def _locate(source: str) -> Path:
    """The local folder or file of ``source``, downloaded first when it is a hub id."""
    path = Path(source)
    if path.exists():
        return path / "lora" if (path / "lora" / PEFT_CONFIG).is_file() else path
    owner, name, subfolder = (source.split("/", 2) + ["", ""])[:3]
    try:
        root = Path(snapshot_download(f"{owner}/{name}", allow_patterns=[f"{subfolder}/*"] if subfolder else None))
    except Exception as error:
        raise AdapterError(
            f"no LoRA at {source!r}: no such local path, and the hub gave {type(error).__name__}: {error}. "
            "Check the spelling and the connection, or download it and give the folder."
        ) from error
    if not (root / subfolder).exists():
        raise AdapterError(f"the hub repository {owner}/{name} has no folder {subfolder!r}")
    return root / subfolder


# --- formats ---------------------------------------------------------------------------------------------------------


def read_peft(path: Path) -> LoraWeights | None:
    """A folder of PEFT's: config in JSON, weights beside it."""
    if not (path / PEFT_CONFIG).is_file():
        return None
    config = LoraConfig.from_pretrained(str(path))
    pickled = path / "adapter_model.bin"
    if pickled.is_file() and not (path / PEFT_WEIGHTS).is_file():
        return _paired(path, torch.load(pickled, map_location="cpu", weights_only=True), config)
    return _paired(path, load_file(path / PEFT_WEIGHTS), config)


def read_diffusers(path: Path) -> LoraWeights | None:
    """One file of diffusers', whose header may hold the PEFT config.

    Without it and without ``.alpha`` tensors diffusers takes alpha = rank, and so does this project.
    """
    file = path / DIFFUSERS_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        return None
    with safe_open(file, "pt") as handle:
        header = json.loads((handle.metadata() or {}).get("lora_adapter_metadata", "{}"))
    own = {key.removeprefix(DIFFUSERS_PREFIX): v for key, v in header.items() if key.startswith(DIFFUSERS_PREFIX)}
    return _paired(file, load_file(file), LoraConfig.from_peft_type(**own) if own else None)


FORMATS: Sequence[Callable[[Path], LoraWeights | None]] = (read_peft, read_diffusers)
"""Each returns None for a path that is not of its format; the first that reads one is taken."""


def _paired(source: Path, tensors: Mapping[str, Tensor], config: LoraConfig | None) -> LoraWeights:
    """What a file holds, by module. AdapterError unless every tensor is an alpha or half of a usable pair."""
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    alpha: dict[str, float] = {}
    unexpected = []
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT_PREFIX).removeprefix(DIFFUSERS_PREFIX)
        if name.endswith(".alpha"):
            alpha[name.removesuffix(".alpha")] = tensor.item()
        elif (match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.[\w-]+)?\.weight", name)) and tensor.ndim == 2:
            (a if match[2] == "A" else b)[match[1]] = tensor
        else:
            unexpected.append(key)
    refuse(source, {"unexpected tensors, not of a plain LoRA": unexpected, "half of a pair": a.keys() ^ b.keys()})
    ranks = {name: tensor.shape[0] for name, tensor in a.items()}
    expected = ranks if config is None else {n: _pattern(config.rank_pattern, n, config.r) for n in a}
    for name, rank in ranks.items():
        alpha.setdefault(name, float(_pattern(config.alpha_pattern, name, config.lora_alpha) if config else rank))
    broken = [n for n in a if not (0 < alpha[n] < torch.inf and a[n].isfinite().all() and b[n].isfinite().all())]
    problems = {
        "ranks of lora_A, lora_B and the config differ": [n for n in a if not ranks[n] == b[n].shape[1] == expected[n]],
        "values that are not finite, or an alpha that is not above 0": broken,
    }
    refuse(source, problems)
    if not any(tensor.any() for tensor in b.values()):
        raise AdapterError(
            f"{source}: no lora_B that is not zero, so this LoRA changes nothing. "
            "It was never trained, or its keys were lost when it was saved."
        )
    targets, rslora = (config.target_modules, config.use_rslora) if config else (None, False)
    return LoraWeights(str(source), a, b, alpha, targets, rslora)


def _pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """A module's own rank or alpha, by PEFT's patterns."""
    return patterns.get(get_pattern_key(list(patterns), name), default)


def refuse(source: object, problems: Mapping[str, Collection[str]]) -> None:
    """Raise AdapterError for the first of ``problems``, what is wrong -> with which modules, that has any."""
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
            raise AdapterError(f"{source}: {what}: {', '.join(sorted(names)[:_MOST])}{more}")
