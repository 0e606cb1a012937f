"""LoRA adapters on one transformer: a trained student and any number of frozen ones, switched in about a microsecond.

PEFT does the injection and the arithmetic; this file does the bookkeeping, and writes PEFT's and diffusers' format.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusionopd.models.fused import Chosen, FusedLoraLinear, fuse_lora, narrow
from diffusionopd.models.loading import family_of
from diffusionopd.models.lora_files import (
    DIFFUSERS_PREFIX,
    DIFFUSERS_WEIGHTS,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    AdapterError,
    LoraWeights,
    load_lora,
    refuse,
)
from diffusionopd.models.lora_fit import ends_in, find_targets, fit


class Adapters:
    """The LoRA adapters of one transformer; exactly one of them, or none, is in use at a time.

    All injected layers share one list of active names, so a switch is one list assignment whatever the number of layers
    (PEFT's own ``set_adapter`` walks the modules and their ``requires_grad``, milliseconds for 190 layers).
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer.requires_grad_(False)
        self._active: list[str] = []
        self._teachers: list[str] = []  # those that can be side by side, in this order
        self._chosen: list[Chosen] = []
        self._stacked_on: torch.device | None = None  # where they are; None: they are not
        self.configs: dict[str, LoraConfig] = {}
        self._narrowed: dict[str, list[FusedLoraLinear]] = {}  # layers of each adapter on a base in half precision
        transformer.register_forward_pre_hook(lambda *_: self._narrow())

    def add_student(
        self,
        name: str,
        *,
        rank: int,
        alpha: float,
        target_modules: Sequence[str],
        others: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        """Add a trainable float32 LoRA: gaussian ``A``, a function of ``seed``; zero ``B``: it starts as the base.

        ``target_modules`` are ends of names, ``others`` full names. Errors as of :func:`find_targets`.
        """
        found = find_targets(self.transformer, target_modules)
        every = set(others).union(*found.values())
        targets = _exactly(every) if every.difference(*found.values()) else _for_peft(self.transformer, found)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._inject(name, config, trainable=True)

    def add_from(self, name: str, source: str | Path | LoraWeights, *, trainable: bool = False) -> None:
        """Add the LoRA at ``source`` (see :func:`load_lora`), frozen unless ``trainable``.

        Raises AdapterError when it does not :func:`~diffusionopd.models.lora_fit.fit` the transformer.
        """
        weights = fit(source if isinstance(source, LoraWeights) else load_lora(source), self.transformer)
        self._inject(name, _config_of(weights), trainable)
        for module, layer in self._layers(name):
            with torch.no_grad():
                layer.lora_A[name].weight.copy_(weights.a[module])
                layer.lora_B[name].weight.copy_(weights.b[module])

    @torch.no_grad()
    def start_from(self, name: str, weights: LoraWeights, scale: float = 1.0) -> None:
        """Give the fresh adapter ``name`` the effect ``scale * B A`` of ``weights``, whose alphas are their ranks.

        Its rank is at least theirs; components that it leaves over stay as they are: fresh. Raises AdapterError for
        modules that it does not have.
        """
        layers = dict(self._layers(name))
        refuse(weights.source, {f"modules that {name} does not adapt": weights.a.keys() - layers.keys()})
        for module, a in weights.a.items():
            own_a, own_b = layers[module].lora_A[name].weight, layers[module].lora_B[name].weight
            share = (scale / layers[module].scaling[name]) ** 0.5
            own_a[: len(a)] = a * share
            own_b[:, : len(a)] = weights.b[module] * share

    def add_copy(self, name: str, of: str) -> None:
        """Add a frozen copy of the adapter ``of``, with its tensors as they are now."""
        self._inject(name, copy.deepcopy(self.configs[of]), trainable=False)
        for mine, other in zip(self.parameters(name), self.parameters(of), strict=True):
            mine.data = other.detach().clone()  # also onto its device, which an offloaded base need not be on

    def add_teacher(self, name: str, source: str | Path | LoraWeights) -> None:
        """Add the frozen LoRA at ``source``."""
        self.add_from(name, source)
        family = family_of(self.transformer)
        mixing = family.mixing_in(self.transformer) if family else set()
        if all(isinstance(layer, FusedLoraLinear) and not mixing & {*n.split(".")} for n, layer in self._layers(name)):
            self._teachers.append(name)  # a layer of PEFT's own knows one adapter at a time
        self.apart()

    def use(self, name: str | None) -> None:
        """Make ``name`` the adapter of the next forward, or none of them (the bare base) for None."""
        if name is not None and name not in self.configs:
            raise AdapterError(f"no adapter {name!r}; there are {', '.join(self.configs) or 'none'}")
        self._active[:] = [] if name is None else [name]
        self._chosen.clear()

    def can_share(self, names: Collection[str | None]) -> bool:
        """Whether samples of one forward can have these adapters, the bare base for None: :meth:`use_each`."""
        return set(names) <= {*self._teachers, None}

    def use_each(self, names: Sequence[str | None]) -> None:
        """Give each sample of the next forward its adapter, or none; frozen teachers can share a forward.

        The adapters are side by side in each layer, and a layer adds two products over all samples whatever their
        number; adapters of smaller ranks, and those that a layer does not have, are filled up with zeros.
        """
        if len(set(names)) == 1:
            self.use(names[0])
            return
        if self._stacked_on is None:
            self._stack()
        places = [len(self._teachers) if name is None else self._teachers.index(name) for name in names]
        # Groups of equal samples, as large as all can be: fewer and larger products.
        size = math.gcd(*(len(list(group)) for _, group in itertools.groupby(places)))
        self.use(None)
        adapters = torch.tensor(places[::size]).to(self._stacked_on, non_blocking=True)
        self._chosen.append(Chosen(len(places), adapters))

    @torch.no_grad()
    def _stack(self) -> None:
        """Have the teachers side by side in each layer, where it is now, in the type of the base; the last is empty."""
        for layer in self.transformer.modules():
            if isinstance(layer, FusedLoraLinear):
                layer.stacked = _stacked(layer, self._teachers)
                if layer.stacked is not None:
                    self._stacked_on = layer.stacked[0].device

    def apart(self) -> None:
        """Free what :meth:`use_each` has made, which it makes again: it stays where it is when the weights move."""
        if self._stacked_on is not None:
            for layer in self.transformer.modules():
                if isinstance(layer, FusedLoraLinear):
                    layer.stacked = None
            self._stacked_on = None

    def _narrow(self) -> None:
        """Before each forward on a base in half precision: the weights of the adapter in use, in its dtype."""
        for name in self._active:
            if name not in self._narrowed:  # finding layers takes longer than a forward may wait
                layers = [layer for _, layer in self._layers(name) if isinstance(layer, FusedLoraLinear)]
                half = layers and layers[0].get_base_layer().weight.dtype != torch.float32
                self._narrowed[name] = layers if half else []
            if self._narrowed[name]:
                narrow(self._narrowed[name], name)

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

    @torch.no_grad()
    def base_norm(self, name: str) -> float:
        """Frobenius norm of the base's matrices that an adapter adds to, all together."""
        weights = [layer.get_base_layer().weight for _, layer in self._layers(name)]
        return sum(torch.linalg.vector_norm(w, dtype=torch.float32).item() ** 2 for w in weights) ** 0.5

    @torch.no_grad()
    def added_norm(self, name: str) -> float:
        """Frobenius norm of what an adapter adds to them, ``alpha / r B A``, without making these matrices."""
        squares = []
        for _, layer in self._layers(name):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            squares.append(layer.scaling[name] ** 2 * ((b.T @ b) * (a @ a.T)).sum())
        return torch.stack(squares).sum().clamp(min=0).sqrt().item()

    def save_peft(self, name: str, folder: Path, base_model: str | None = None) -> None:
        """Write a folder in PEFT's own form, for ``PeftModel.from_pretrained``; its scale is 1, as below."""
        ranks = self.configs[name].rank_pattern
        self._described(name, base_model, rank_pattern=ranks, alpha_pattern=dict(ranks)).save_pretrained(str(folder))
        save_file(self._stored(name, PEFT_PREFIX), folder / PEFT_WEIGHTS, {"format": "pt"})

    def save_diffusers(self, name: str, folder: Path, base_model: str | None = None) -> None:
        """Write ``pytorch_lora_weights.safetensors`` for a stock pipeline's ``load_lora_weights``, and for ComfyUI.

        Most tools read no header and diffusers' SD3 loader refuses ``.alpha`` tensors, so alpha must be what all of
        them take for granted: the rank, and one for all modules. What scale there is goes into ``lora_B``; smaller
        ranks are filled with zeros.
        """
        folder.mkdir(parents=True, exist_ok=True)
        options = self._described(name, base_model).to_dict().items()
        config = {f"{DIFFUSERS_PREFIX}{key}": sorted(v) if isinstance(v, set) else v for key, v in options}
        header = {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}
        tensors = self._stored(name, DIFFUSERS_PREFIX)
        for key, tensor in tensors.items():
            missing = self.configs[name].r - tensor.shape[0 if ".lora_A." in key else 1]
            tensors[key] = nn.functional.pad(tensor, (0, 0, 0, missing) if ".lora_A." in key else (0, missing))
        save_file(tensors, folder / DIFFUSERS_WEIGHTS, header)

    def _stored(self, name: str, prefix: str) -> dict[str, Tensor]:
        """The tensors at scale 1: ``lora_B`` times the module's own, in float64, rounded to float32."""
        stored = {}
        for module, layer in self._layers(name):
            a, b = (part[name].weight.detach().cpu() for part in (layer.lora_A, layer.lora_B))
            stored[f"{prefix}{module}.lora_A.weight"] = a.contiguous()
            stored[f"{prefix}{module}.lora_B.weight"] = (b.double() * layer.scaling[name]).float().contiguous()
        return stored

    def _described(self, name: str, base_model: str | None, **changes: Any) -> LoraConfig:
        """The configuration of the adapter at scale 1."""
        rank = self.configs[name].r
        plain = {"lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, **changes}
        return replace(self.configs[name], base_model_name_or_path=base_model, inference_mode=True, **plain)

    def _layers(self, name: str) -> Iterator[tuple[str, LoraLayer]]:
        for module, layer in self.transformer.named_modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                yield module, layer

    def _inject(self, name: str, config: LoraConfig, trainable: bool) -> None:
        if name in self.configs:
            raise AdapterError(f"there is already an adapter named {name!r}")
        config.inference_mode = not trainable
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            inject_adapter_in_model(config, self.transformer, adapter_name=name)
        self.configs[name] = config
        for _, layer in self._layers(name):
            layer.lora_A[name].float()
            layer.lora_B[name].float()
            fuse_lora(layer)
        for layer in self.transformer.modules():
            if isinstance(layer, LoraLayer):
                layer._active_adapter, layer.chosen = self._active, self._chosen
                layer._disable_adapters = False
        for other, own in self.configs.items():  # injecting resets requires_grad everywhere
            for parameter in self.parameters(other):
                parameter.requires_grad_(not own.inference_mode)


def _for_peft(transformer: nn.Module, found: Mapping[str, Collection[str]]) -> list[str]:
    """The ends of names, one that other modules have too by the full names of the linear layers: PEFT refuses others.

    In FLUX.2 "attn.to_out" is a layer of single blocks, and a list with one in joint blocks.
    """
    modules = {name.removesuffix(".base_layer") for name, _ in transformer.named_modules()}
    alone = {end for end, layers in found.items() if len(layers) == sum(ends_in(name, end) for name in modules)}
    return [target for end, layers in found.items() for target in ([end] if end in alone else sorted(layers))]


def _exactly(names: Collection[str]) -> str:
    """Full names for PEFT, which takes those of a list for ends: "proj_out" is also a layer of FLUX.1's blocks."""
    return "|".join(map(re.escape, sorted(names)))


def _stacked(layer: LoraLayer, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
    """``A`` ``[n + 1, r, in]`` and ``s B`` ``[n + 1, r, out]`` of a layer's adapters, zeros where it has none."""
    own = [name for name in names if name in layer.lora_A]
    if not own:
        return None
    parts = {name: (layer.lora_A[name].weight, layer.scaling[name] * layer.lora_B[name].weight.mT) for name in own}
    rank, dtype = max(len(a) for a, _ in parts.values()), layer.get_base_layer().weight.dtype
    stacks = []
    for part in zip(*parts.values(), strict=True):
        stack = part[0].new_zeros(len(names) + 1, rank, part[0].shape[1], dtype=dtype)
        for name, tensor in zip(own, part, strict=True):
            stack[names.index(name), : len(tensor)] = tensor
        stacks.append(stack)
    return stacks[0], stacks[1]


def _config_of(weights: LoraWeights) -> LoraConfig:
    """A PEFT config that covers exactly the modules of ``weights``, with their own ranks and alphas."""
    ranks = {name: a.shape[0] for name, a in weights.a.items()}
    rank, alpha = max(ranks.values()), max(weights.alpha.values())
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=_exactly(ranks),
        rank_pattern={f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(name)}": x for name, x in weights.alpha.items() if x != alpha},
        use_rslora=weights.rslora,
    )
