"""LoRA files, whichever tool wrote them: every tensor is accounted for before it may touch a model.

What is read here is the grammar that all model families share: prefixes, suffixes, alphas, PEFT's configuration.
:mod:`diffusionopd.models.lora_fit` finds the base model's modules by what is left of the names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffusionopd.models.pipeline_files import hub_remedy, some

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
WEIGHTS = (PEFT_WEIGHTS, PEFT_PICKLE, DIFFUSERS_WEIGHTS)
"""Files whose names say nothing of what they are: their folders' do."""
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
"""Under which the two formats store the transformer's modules."""

_PREFIXES = (
    PEFT_PREFIX, DIFFUSERS_PREFIX, "model.diffusion_model.", "diffusion_model.", "_orig_mod.", "module.",
    "lora_transformer_", "lora_unet_", "lycoris_",
)  # fmt: skip
"""Before a module's name: PEFT, diffusers, ComfyUI, the compiler, DDP; OneTrainer, kohya, LyCORIS. Also several."""
_HALF = re.compile(r"(.+)\.(?:lora_([AB])(?:\.([\w-]+))?|lora[_.](down|up))\.weight")  # module, half, adapter, half
_TEXT_ENCODER = re.compile(r"text_encoders?[._\d]|lora_te\d?_|te\d?[._]|bundle_emb\.")

_FIELDS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern",
)  # fmt: skip
"""What of a PEFT configuration says which modules a plain LoRA has, and how it is scaled."""
_VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "layer_replication", "lora_bias", "modules_to_save", "trainable_token_indices",
)  # fmt: skip
"""Options of a PEFT configuration, each of which makes another function of it."""
_AS_LORA = (
    "approximate it by a plain one, by peft.tuners.lora.conversion.save_as_lora(folder, model, rank) "
    "for an adapter of PEFT's, by LyCORIS' extract_locon.py from a merged model for others"
)
_OTHER_KINDS = {
    r"dora_scale$|lora_magnitude_vector": "DoRA", r"\.hada_": "LoHa", r"\.lokr_": "LoKr", r"\.oft_": "OFT",
    r"\.lora_mid\.": "Tucker layers (lora_mid)", r"\.diff(_b)?$": "whole differences (diff)",
}  # fmt: skip
_OWN_BASE = re.compile(r"pissa|olora|corda|lora_ga|loftq", re.IGNORECASE)
"""Initialisations that take a part out of the base's matrices: such an adapter belongs to what is left of them."""


class AdapterError(ValueError):
    """Raised for a LoRA that cannot be read or does not fit the base model."""


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA as read from disk: per module ``A [r, in]``, ``B [out, r]`` and alpha; it adds ``alpha / r B A``, with
    ``rslora`` ``alpha / sqrt(r) B A``."""

    source: str
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    alpha: dict[str, float]
    config: LoraConfig | None = None  # None: the file does not say which modules it should cover
    rslora: bool = False
    base: str = ""  # the model that it says it was trained on

    def scale_of(self, module: str) -> float:
        """What multiplies ``B A`` of a module."""
        rank = self.a[module].shape[0]
        return self.alpha[module] / (math.sqrt(rank) if self.rslora else rank)

    def scaled(self, factor: float) -> LoraWeights:
        """Its effect times ``factor``."""
        return replace(self, alpha={name: alpha * factor for name, alpha in self.alpha.items()})

    def rescaled(self, alpha: float, rank: int) -> LoraWeights:
        """The same effect, with the scale ``alpha / rank`` for every module: what that changes goes into ``B``.

        It is computed in float64 and rounded to float32: bit for bit where the scales differ by a power of two.
        """
        b = {name: (tensor.double() * (self.scale_of(name) * rank / alpha)).float() for name, tensor in self.b.items()}
        alphas = {name: alpha * a.shape[0] / rank for name, a in self.a.items()}
        return replace(self, b=b, alpha=alphas, rslora=False)


def load_lora(source: str | Path) -> LoraWeights:
    """Read a LoRA for the transformer from a local file or folder, or from the hub: docs/loras.md has the formats.

    Accepts ``<run>/checkpoints/checkpoint-<n>``, a folder with ``adapter_config.json``, with
    ``pytorch_lora_weights.safetensors`` or with one other .safetensors file, a file, and
    ``owner/name[/folder or file][@revision]``. Raises AdapterError for anything missing, unreadable, unpaired,
    non-finite, never trained (all ``lora_B`` zero) or of another kind.
    """
    path = _locate(str(source))
    try:
        file = _file_in(path)
        tensors, options = _content(file)
        _refuse_other_kinds(path, file, tensors, options)
        return _paired(path, tensors, options)
    except AdapterError:
        raise
    except Exception as error:  # whatever the libraries raise for a damaged file
        raise AdapterError(f"{path} cannot be used as a LoRA: {error!r}; fetch or save it again") from error


# --- where -----------------------------------------------------------------------------------------------------------


def _locate(source: str) -> Path:
    """The local folder or file of ``source``, downloaded first when it is a hub id."""
    path = Path(source)
    if path.exists():
        return _inside(path)
    place, _, revision = source.partition("@")
    owner, name, inside = (place.rstrip("/").split("/", 2) + ["", ""])[:3]
    try:
        if inside.startswith("/") or ".." in place.split("/"):
            raise ValueError("it leads out of a repository")
        fetch = partial(snapshot_download, f"{owner}/{name}", **({"revision": revision} if revision else {}))
        if inside:
            beside = str(PurePosixPath(inside).with_name(PEFT_CONFIG))  # has the alpha of PEFT's weights
            root = Path(fetch(allow_patterns=[inside, f"{inside}/*", beside]))
        else:  # of a whole base model, named by mistake, no other folder comes
            root = Path(fetch(allow_patterns=["lora/*"]))
            if _inside(root) == root:
                fetch(allow_patterns=["*.safetensors", "*.json", PEFT_PICKLE], ignore_patterns=["*/*"])
    except Exception as error:
        raise AdapterError(
            f"no LoRA at {source!r}: no such local path, and the hub gave {type(error).__name__}: {error}. "
            f"{hub_remedy()}"
        ) from error
    if not (root / inside).exists():
        raise AdapterError(f"the hub repository {owner}/{name} has no folder or file {inside!r}")
    return _inside(root / inside)


def _inside(path: Path) -> Path:
    """The LoRA of a checkpoint, or ``path`` itself."""
    return path / "lora" if (path / "lora" / PEFT_CONFIG).is_file() else path


def _file_in(path: Path) -> Path:
    """The weights at ``path``, a file or a folder with one."""
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin"):
            raise AdapterError(f"{path} is no .safetensors file: convert it with the tool that wrote it")
        return path
    if (path / PEFT_CONFIG).is_file():
        names: tuple[str, ...] = (PEFT_WEIGHTS, PEFT_PICKLE)
    else:
        found = sorted(file.name for file in path.glob("*.safetensors"))
        names = (DIFFUSERS_WEIGHTS, *(found if len(found) == 1 else ()))
        if len(found) > 1 and DIFFUSERS_WEIGHTS not in found:
            raise AdapterError(f"{path} holds {len(found)} files, {some(found)}: name one of them, {path / found[0]}")
    for name in names:
        if (path / name).is_file():
            return path / name
    if (path / PEFT_CONFIG).is_file():
        raise AdapterError(f"{path} has {PEFT_CONFIG}, but no {PEFT_WEIGHTS}: fetch or save it again")
    raise AdapterError(f"{path} holds no LoRA: expected {PEFT_CONFIG} with {PEFT_WEIGHTS}, or a .safetensors file")


# --- what ------------------------------------------------------------------------------------------------------------


def _content(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors, and the PEFT configuration that is beside them or in their header, if any.

    Without one and without ``.alpha`` tensors every tool but kohya's takes alpha = rank, and so does this project;
    but not for a file of PEFT's name, whose alpha is then lost. AdapterError for that.
    """
    if file.suffix == ".bin":
        header: dict[str, str] = {}
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    else:
        with safe_open(file, "pt") as handle:
            header = handle.metadata() or {}
        tensors = load_file(file)
    beside = file.parent / PEFT_CONFIG
    if file.name in (PEFT_WEIGHTS, PEFT_PICKLE) and beside.is_file():
        return tensors, dict(json.loads(beside.read_text(encoding="utf-8")))
    options = json.loads(header.get("lora_adapter_metadata", "{}"))
    own = {key.removeprefix(DIFFUSERS_PREFIX): v for key, v in options.items() if key.startswith(DIFFUSERS_PREFIX)}
    if "lora_alpha" in options:  # of a transformer's own save_lora_adapter
        own = options
    if file.name in (PEFT_WEIGHTS, PEFT_PICKLE) and not own and not any(key.endswith(".alpha") for key in tensors):
        raise AdapterError(
            f"{file} has no {PEFT_CONFIG} beside it, which holds the alpha of PEFT's LoRAs and so their strength: "
            "fetch that file too, or rename this one if its alpha is its rank"
        )
    return tensors, own or None


def _refuse_other_kinds(path: Path, file: Path, tensors: Collection[str], options: Mapping[str, Any] | None) -> None:
    """AdapterError, with the way out, for what is another function of the base than a plain LoRA of its transformer."""
    options = options or {}
    peft_type = str(options.get("peft_type") or "LORA").rpartition(".")[2]  # it may be written as PeftType.LORA
    kinds = [kind for pattern, kind in _OTHER_KINDS.items() if any(re.search(pattern, key) for key in tensors)]
    kinds += [f"peft_type {peft_type}"] if peft_type != "LORA" else []
    kinds += [name for name in _VARIANTS if options.get(name)]
    if kinds:
        raise AdapterError(f"{path} is no plain LoRA, but has {', '.join(kinds)}: {_AS_LORA}")
    init = options.get("init_lora_weights")
    if isinstance(init, str) and _OWN_BASE.match(init):
        remedy = (
            "save it with its base as an ordinary LoRA: PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=<the adapter as it was before training>)"
        )
        if init.lower().startswith("loftq"):
            remedy = "merge it into that base with PEFT, and use the result as pretrained.model"
        raise AdapterError(
            f"{path} has init_lora_weights {init!r}, which changes the base: its tensors belong to the changed "
            f"matrices, not to this model's; {remedy}"
        )
    if text := [key for key in tensors if _TEXT_ENCODER.match(key)]:
        keep = (
            "from safetensors import safe_open; from safetensors.torch import save_file; "
            f"f = safe_open({str(file)!r}, 'pt'); save_file({{k: f.get_tensor(k) for k in f.keys() "
            "if not k.startswith(('te', 'lora_te', 'bundle_emb'))}, 'transformer_only.safetensors', f.metadata())"
        )
        raise AdapterError(
            f"{path} also adapts text encoders ({len(text)} tensors, {text[0]}): teachers and student share one set of "
            f'embeddings, which no LoRA may change. Keep the transformer\'s part alone: python -c "{keep}"'
        )


def _plain_name(key: str) -> str:
    """A key without what tools put before or, the compiler, into a module's name."""
    while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), ""):
        key = key.removeprefix(prefix)
    return key.replace("._orig_mod.", ".")


def _paired(source: Path, tensors: Mapping[str, Tensor], options: Mapping[str, Any] | None) -> LoraWeights:
    """What a file holds, by module. AdapterError unless every tensor is an alpha or half of a usable pair."""
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    adapters, twice, unexpected = set(), [], []
    for key, tensor in tensors.items():
        name = _plain_name(key)
        if name.endswith(".alpha"):
            part, name = alphas, name.removesuffix(".alpha")
            usable = tensor.numel() == 1
        else:
            match = _HALF.fullmatch(name)
            usable = match is not None and tensor.ndim == 2 and tensor.is_floating_point()
            if match:
                adapters.add(match[3])
                part, name = (a if (match[2] or match[4]) in ("A", "down") else b), match[1]
        if not usable:
            unexpected.append(key)
        elif name in part:
            twice.append(key)
        else:
            part[name] = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no arithmetic
    if len(adapters) > 1:
        raise AdapterError(
            f"{source} holds several adapters, {some(map(str, adapters))}: keep one, as PEFT's "
            "save_pretrained(selected_adapters=[...]) does"
        )
    problems = {
        "unexpected tensors, not of a plain LoRA": unexpected,
        "two tensors for one place": twice,
        "half of a pair": (a.keys() ^ b.keys()) | (alphas.keys() - a.keys() - b.keys()),
    }
    refuse(source, problems)
    config = None if options is None else LoraConfig(**{n: options[n] for n in _FIELDS if options.get(n) is not None})
    ranks = {name: tensor.shape[0] for name, tensor in a.items()}
    expected = ranks if config is None else {n: _pattern(config.rank_pattern, n, config.r) for n in a}
    alpha = {name: float(tensor.item()) for name, tensor in alphas.items()}
    for name, rank in ranks.items():
        alpha.setdefault(name, float(_pattern(config.alpha_pattern, name, config.lora_alpha) if config else rank))
    problems = {
        "ranks of lora_A, lora_B and the config differ": [n for n in a if not ranks[n] == b[n].shape[1] == expected[n]],
        "an alpha that is not above 0, so of no effect (a trainer may mean the rank by 0: write that there)": [
            name for name in a if not 0 < alpha[name] < torch.inf
        ],
        "values that are not finite": [n for n in a if not (a[n].isfinite().all() and b[n].isfinite().all())],
    }
    refuse(source, problems)
    if not any(tensor.any() for tensor in b.values()):
        raise AdapterError(
            f"{source}: no lora_B that is not zero, so this LoRA changes nothing. "
            "It was never trained, or its keys were lost when it was saved."
        )
    base = str((options or {}).get("base_model_name_or_path") or "")
    return LoraWeights(str(source), a, b, alpha, config, bool(config and config.use_rslora), base)


def _pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """A module's own rank or alpha, by PEFT's patterns."""
    return patterns.get(get_pattern_key(list(patterns), name), default)


def refuse(source: object, problems: Mapping[str, Collection[str]]) -> None:
    """Raise AdapterError for those of ``problems``, what is wrong -> with which modules, that have any."""
    if found := [f"{what}: {some(names)}" for what, names in problems.items() if names]:
        raise AdapterError(f"{source}: {'; '.join(found)}")
