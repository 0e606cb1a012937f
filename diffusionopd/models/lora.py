"""LoRA adapters on one backbone: a trained student and any number of frozen teachers, switched in about a microsecond.

A LoRA is read from a PEFT folder, a diffusers file or a hub id, every tensor of it is accounted for before it
touches the model, and it is written as both formats. PEFT does the injection and the arithmetic; this file does the
bookkeeping.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusionopd.models.fused import fuse_lora

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# Names under which the two formats store the transformer's modules.
_PREFIXES = ("base_model.model.", "transformer.")
# PEFT options that change the arithmetic of a layer in ways that (A, B, alpha) alone do not describe.
_UNSUPPORTED = ("use_dora", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens", "lora_bias")


class AdapterError(ValueError):
    """A LoRA that cannot be used as it is; the message says what is wrong, where, and the remedy."""


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
    """Read a LoRA for the transformer from a PEFT folder, a diffusers file, or a hub id with an optional subfolder.

    Accepts ``<run>/checkpoints/checkpoint-<n>``, a folder with ``adapter_config.json``, a folder with or a path to
    ``pytorch_lora_weights.safetensors``, and ``owner/name[/sub/folder]``. Raises AdapterError for anything missing,
    unreadable, unpaired, non-finite or never trained (all ``lora_B`` zero).
    """
    path = _locate(str(source))
    weights = _read_peft(path) if (path / PEFT_CONFIG).is_file() else _read_diffusers(path)
    _check_values(weights)
    return weights


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


def _read_peft(folder: Path) -> LoraWeights:
    try:
        text = (folder / PEFT_CONFIG).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / PEFT_CONFIG} cannot be read: {error}") from error
    config = {"alpha_pattern": None, "rank_pattern": None} | _parse_config(text, str(folder / PEFT_CONFIG))
    if missing := {"r", "lora_alpha"} - config.keys():
        raise AdapterError(f"{folder / PEFT_CONFIG} has no {_some(list(missing))}; save the adapter again")
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA" or used or config.get("bias", "none") != "none":
        raise AdapterError(
            f"{folder}: only plain LoRA without biases is supported, this adapter has "
            f"peft_type={config.get('peft_type')}, bias={config.get('bias')}, {', '.join(used) or 'no other option'}"
        )
    tensors = _read_tensors(folder / PEFT_WEIGHTS, folder / "adapter_model.bin")
    a, b = _pair(tensors, str(folder))
    alpha = {name: float(_by_pattern(config["alpha_pattern"], name, config["lora_alpha"])) for name in a}
    wrong = [n for n, x in a.items() if x.shape[0] != _by_pattern(config["rank_pattern"], n, config["r"])]
    if wrong:
        raise AdapterError(f"{folder}: the rank of {_some(wrong)} is not the {config['r']} of {PEFT_CONFIG}")
    targets = config.get("target_modules")
    return LoraWeights(str(folder), a, b, alpha, targets, bool(config.get("use_rslora")))


def _read_diffusers(path: Path) -> LoraWeights:
    file = path / DIFFUSERS_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise AdapterError(f"{path} holds no LoRA: expected {PEFT_CONFIG} with {PEFT_WEIGHTS}, or {DIFFUSERS_WEIGHTS}")
    tensors = _read_tensors(file)
    scalars = {n: t for n, t in tensors.items() if n.endswith(".alpha")}
    if odd := [n for n, t in scalars.items() if t.numel() != 1 or not math.isfinite(t.item())]:
        raise AdapterError(f"{file}: not one finite number: {_some(odd)}")
    stored_alpha = {_module_name(n.removesuffix(".alpha")): float(t) for n, t in scalars.items()}
    a, b = _pair({n: t for n, t in tensors.items() if not n.endswith(".alpha")}, str(file))
    config = _diffusers_metadata(file)
    default = {name: float(config.get("lora_alpha", x.shape[0])) for name, x in a.items()}
    pattern = config.get("alpha_pattern") or {}
    alpha = {n: stored_alpha.get(n, float(_by_pattern(pattern, n, default[n]))) for n in a}
    return LoraWeights(str(file), a, b, alpha, config.get("target_modules"), bool(config.get("use_rslora")))


def _diffusers_metadata(file: Path) -> dict:
    """The transformer's PEFT config that diffusers stores in the file's header; empty when it is absent.

    Without it (and without ``.alpha`` tensors) diffusers takes alpha = rank, and so does this project.
    """
    with safe_open(file, "pt") as handle:
        header = (handle.metadata() or {}).get("lora_adapter_metadata")
    return _parse_config(header, f"the header of {file}", "transformer.") if header else {}


def _parse_config(text: str, where: str, prefix: str = "") -> dict[str, Any]:
    """The PEFT config in a JSON text, of its keys those with the prefix; AdapterError for values that PEFT refuses."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is no JSON: {error}; save the adapter again") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{where} is a {type(found).__name__}, not a JSON object; save the adapter again")
    config = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    wrong = [key for key, valid in _VALID.items() if key in config and not valid(config[key])]
    if wrong:
        shown = ", ".join(f"{key}={str(config[key])[:80]}" for key in wrong)
        raise AdapterError(f"{where} is no config of a LoRA: {shown}")
    return config


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_pattern(value: object) -> bool:
    """Whether it is {regular expression: number}, or None."""
    return value is None or (
        isinstance(value, dict) and all(map(_is_expression, value)) and all(map(_is_positive, value.values()))
    )


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_target(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return value is None or isinstance(value, str) and _is_expression(value)


_VALID: Mapping[str, Callable[[Any], bool]] = {
    "r": lambda value: _is_positive(value) and isinstance(value, int),
    "lora_alpha": _is_positive,
    "rank_pattern": _is_pattern,
    "alpha_pattern": _is_pattern,
    "target_modules": _is_target,
}
"""The keys of a PEFT config that are read, with what they may hold."""


def _read_tensors(file: Path, pickle_file: Path | None = None) -> dict[str, Tensor]:
    try:
        if file.is_file():
            with safe_open(file, "pt") as handle:
                return _floats({name: handle.get_tensor(name) for name in handle.keys()}, file)  # noqa: SIM118
        if pickle_file is not None and pickle_file.is_file():
            return _floats(torch.load(pickle_file, map_location="cpu", weights_only=True), pickle_file)
    except pickle.UnpicklingError as error:
        raise AdapterError(f"{pickle_file} holds more than weights, which is not run; get it as {file.name}") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, LookupError, TypeError) as error:
        raise AdapterError(f"{file} is truncated or no safetensors file ({error}); fetch or save it again") from error
    raise AdapterError(f"{file} does not exist; the adapter's weights are missing")


def _floats(tensors: Any, file: Path) -> dict[str, Tensor]:
    """The tensors by name, if they are that, of floating-point types that can be computed with."""
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(t, Tensor) and t.dtype in types for t in tensors.values()):
        raise AdapterError(f"{file}: only named tensors of float16, bfloat16, float32 or float64 make a LoRA")
    return tensors


def _module_name(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _pair(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split tensors into ``A`` and ``B`` by module name; every one must be half of a pair of one rank."""
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    unexpected = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.[\w-]+)?\.weight", _module_name(key))
        if match is None or tensor.ndim != 2:
            unexpected.append(key)
        else:
            (a if match[2] == "A" else b)[match[1]] = tensor
    if unexpected:
        raise AdapterError(f"{where}: unexpected tensors, not two-dimensional lora_A or lora_B: {_some(unexpected)}")
    lonely = [f"{n}.lora_B" for n in a.keys() - b.keys()] + [f"{n}.lora_A" for n in b.keys() - a.keys()]
    lonely += [
        f"{n} (rank {a[n].shape[0]} and {b[n].shape[1]})" for n in a if n in b and a[n].shape[0] != b[n].shape[1]
    ]
    if lonely or not a:
        raise AdapterError(f"{where}: missing or mismatched tensors: {_some(lonely) or 'the file is empty'}")
    return a, b


def _check_values(weights: LoraWeights) -> None:
    names = [(n, t) for pair in (weights.a, weights.b) for n, t in pair.items()]
    broken = sorted({n for n, t in names if not torch.isfinite(t).all()})
    if broken:
        raise AdapterError(f"{weights.source}: non-finite values in {_some(broken)}")
    if not any(t.any() for t in weights.b.values()):
        raise AdapterError(
            f"{weights.source}: every lora_B is zero, so this LoRA changes nothing. "
            "It was never trained, or its keys were lost when it was saved."
        )


def _by_pattern(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """PEFT's rank and alpha patterns: keys are regular expressions that match the end of a module's name."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", name):
            return value
    return default


def _some(names: Sequence[str], most: int = 6) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Adapters:
    """The LoRA adapters of one transformer; exactly one of them, or none, is in use at a time.

    All injected layers share one list of active names, so a switch is one list assignment whatever the number of layers
    (PEFT's own ``set_adapter`` walks the modules and their ``requires_grad``, milliseconds for 190 layers).
    """

    def __init__(self, transformer: nn.Module, inert: Collection[str] = ()) -> None:
        """``inert``: modules without influence on the output, whose LoRA stays zero however long it is trained."""
        self.transformer = transformer.requires_grad_(False)
        self.inert = frozenset(inert)
        self._active: list[str] = []
        self.configs: dict[str, LoraConfig] = {}
        self._trainable: dict[str, bool] = {}

    def add_student(self, name: str, *, rank: int, alpha: float, target_modules: Sequence[str], seed: int = 0) -> None:
        """Add a trainable float32 LoRA: gaussian ``A``, a function of ``seed``; zero ``B``: it starts as the base."""
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules), init_lora_weights="gaussian")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._inject(name, config, trainable=True)

    def add_from(self, name: str, source: str | Path | LoraWeights, *, trainable: bool = False) -> None:
        """Add the LoRA at ``source`` (see :func:`load_lora`), frozen unless ``trainable``.

        Raises AdapterError when it does not fit the transformer: modules that the base does not have, modules its own
        config names but that have no tensors, or shapes of another base.
        """
        weights = source if isinstance(source, LoraWeights) else load_lora(source)
        self._check_fit(weights)
        self._inject(name, _config_of(weights), trainable)
        for module, layer in self._layers(name):
            with torch.no_grad():
                layer.lora_A[name].weight.copy_(weights.a[module])
                layer.lora_B[name].weight.copy_(weights.b[module])

    def add_copy(self, name: str, of: str) -> None:
        """Add a frozen copy of the adapter ``of``, with its tensors as they are now."""
        config = LoraConfig(**{k: v for k, v in self.configs[of].to_dict().items() if k in _LORA_FIELDS})
        self._inject(name, config, trainable=False)
        for mine, other in zip(self.parameters(name), self.parameters(of), strict=True):
            mine.data = other.detach().clone()  # also onto its device, which an offloaded base need not be on

    def add_teacher(self, name: str, source: str | Path | LoraWeights) -> None:
        """Add the frozen LoRA at ``source``."""
        self.add_from(name, source)

    def use(self, name: str | None) -> None:
        """Make ``name`` the adapter of the next forward, or none of them (the bare base) for None."""
        if name is not None and name not in self.configs:
            raise AdapterError(f"no adapter {name!r}; there are {', '.join(self.configs) or 'none'}")
        self._active[:] = [] if name is None else [name]

    @property
    def active(self) -> str | None:
        """The adapter in use."""
        return self._active[0] if self._active else None

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """``use(name)`` inside the block, the previous adapter after it."""
        before = self.active
        self.use(name)
        try:
            yield
        finally:
            self.use(before)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's tensors in module order: A and B of each layer."""
        return [p for _, layer in self._layers(name) for p in (layer.lora_A[name].weight, layer.lora_B[name].weight)]

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """``<module>.lora_A.weight`` and ``<module>.lora_B.weight`` of the adapter, detached."""
        pairs = [(m, part, layer) for m, layer in self._layers(name) for part in ("lora_A", "lora_B")]
        return {f"{m}.{part}.weight": getattr(layer, part)[name].weight.detach() for m, part, layer in pairs}

    def save_peft(self, name: str, folder: Path, base_model: str | None = None) -> None:
        """Write a folder in PEFT's own form, for ``PeftModel.from_pretrained``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._described(name, base_model).save_pretrained(str(folder))
        tensors = {f"{_PREFIXES[0]}{n}": t.cpu().contiguous() for n, t in self.state_dict(name).items()}
        save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})

    def save_diffusers(self, name: str, folder: Path, base_model: str | None = None) -> None:
        """Write ``pytorch_lora_weights.safetensors`` for stock ``StableDiffusion3Pipeline.load_lora_weights``.

        The PEFT config goes into the header: without it diffusers reloads alpha = rank, here half the strength.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{_PREFIXES[1]}{n}": t.cpu().contiguous() for n, t in self.state_dict(name).items()}
        config = {f"transformer.{k}": _plain(v) for k, v in self._described(name, base_model).to_dict().items()}
        header = {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}
        save_file(tensors, folder / DIFFUSERS_WEIGHTS, metadata=header)

    def _described(self, name: str, base_model: str | None) -> LoraConfig:
        config = LoraConfig(**{k: v for k, v in self.configs[name].to_dict().items() if k in _LORA_FIELDS})
        config.base_model_name_or_path = base_model
        config.inference_mode = True
        return config

    def _check_fit(self, weights: LoraWeights) -> None:
        linear = {n: m for n, m in self._modules() if isinstance(m, nn.Linear)}
        unknown = weights.a.keys() - linear.keys()
        if unknown:
            raise AdapterError(f"{weights.source}: this base model has no modules {_some(list(unknown))}")
        missing = _targets(weights.target_modules, linear) - weights.a.keys()
        if missing:
            raise AdapterError(
                f"{weights.source}: its config names modules that have no tensors in the file: {_some(list(missing))}. "
                "Loaded as it is they would silently stay untrained; save the adapter again."
            )
        wrong = [
            f"{n} (LoRA {tuple(weights.b[n].shape[:1]) + tuple(a.shape[1:])}, base {tuple(linear[n].weight.shape)})"
            for n, a in weights.a.items()
            if (weights.b[n].shape[0], a.shape[1]) != tuple(linear[n].weight.shape)
        ]
        if wrong:
            raise AdapterError(f"{weights.source}: shapes of another base model: {_some(wrong)}")
        dead = {n for n, b in weights.b.items() if not b.any()} - self.inert
        if dead:
            raise AdapterError(
                f"{weights.source}: lora_B is all zero in {_some(list(dead))}: these modules were never trained, or "
                "their tensors were lost when the adapter was saved."
            )

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The base's modules by their original names, with injected layers looked through."""
        inner = tuple(f"{n}." for n, m in self.transformer.named_modules() if isinstance(m, LoraLayer))
        for name, module in self.transformer.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module.get_base_layer()
            elif not name.startswith(inner):
                yield name, module

    def _layers(self, name: str) -> Iterator[tuple[str, LoraLayer]]:
        for module, layer in self.transformer.named_modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                yield module, layer

    def _inject(self, name: str, config: LoraConfig, trainable: bool) -> None:
        if name in self.configs:
            raise AdapterError(f"there is already an adapter named {name!r}")
        if "." in name or not name:
            raise AdapterError(f"an adapter's name must not be empty or contain a dot: {name!r}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            inject_adapter_in_model(config, self.transformer, adapter_name=name)
        self.configs[name] = config
        self._trainable[name] = trainable
        for _, layer in self._layers(name):
            layer.lora_A[name].float()
            layer.lora_B[name].float()
            fuse_lora(layer)
        for layer in self.transformer.modules():
            if isinstance(layer, LoraLayer):
                layer._active_adapter = self._active
                layer._disable_adapters = False
        for other, wants_grad in self._trainable.items():  # injecting resets requires_grad everywhere
            for parameter in self.parameters(other):
                parameter.requires_grad_(wants_grad)


_LORA_FIELDS = ("r", "lora_alpha", "target_modules", "init_lora_weights", "rank_pattern", "alpha_pattern", "use_rslora")


def _config_of(weights: LoraWeights) -> LoraConfig:
    """A PEFT config that covers exactly the modules of ``weights``, with their own ranks and alphas."""
    ranks, alphas = weights.rank, weights.alpha
    rank, alpha = max(ranks.values()), max(alphas.values())
    escaped = {n: re.escape(n) for n in ranks}
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == math.floor(alpha) else alpha,
        target_modules=sorted(ranks),
        rank_pattern={escaped[n]: r for n, r in ranks.items() if r != rank},
        alpha_pattern={escaped[n]: x for n, x in alphas.items() if x != alpha},
        use_rslora=weights.rslora,
    )


def _targets(target_modules: list[str] | str | None, linear: Mapping[str, nn.Linear]) -> set[str]:
    """The linear modules that PEFT's ``target_modules`` (name endings, or one regular expression) selects."""
    if target_modules is None:
        return set()
    if target_modules == "all-linear":
        return set(linear)
    if isinstance(target_modules, str):
        return {n for n in linear if re.fullmatch(target_modules, n)}
    return {n for n in linear if any(n == t or n.endswith(f".{t}") for t in target_modules)}


def _plain(value: object) -> object:
    """JSON-ready copy of a PEFT config: sets sorted, enums as strings."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)  # type: ignore[type-var]
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
