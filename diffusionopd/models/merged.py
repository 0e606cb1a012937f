"""Teachers merged into matrices of their own: a little memory for a teacher that costs no more than the bare base."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import LoraWeights


class MergedTeachers(Adapters):
    """Adapters whose teachers have private copies ``W + alpha / r B A`` of the matrices that they adapt.

    A switch to a teacher puts its copies in the place of the base's matrices and leaves the LoRAs idle; a switch away
    puts the base's own matrices back. Modules are exchanged and never written to, so a student's graph that is alive
    across a switch keeps the matrices that it was built with. The student, saving and PEFT's state are as without.

    The copies are computed in float64 and rounded once, to the base's dtype. In float32 a merged teacher is the
    unmerged one to rounding; in half precision it is the teacher whose sums, not whose two terms, were rounded.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__(transformer)
        self._merged: dict[str, list[tuple[LoraLayer, nn.Linear]]] = {}
        self._exchanged: list[tuple[LoraLayer, nn.Module]] = []  # layers in use by a teacher, and what they held before
        self._in_use: str | None = None

    def add_teacher(self, name: str, source: str | Path | LoraWeights) -> None:
        """Add the LoRA at ``source``, merged. Errors as for :meth:`add_from`."""
        super().add_teacher(name, source)
        with self.using(None):
            self._merged[name] = [(layer, _merged_linear(layer, name)) for _, layer in self._layers(name)]

    def use(self, name: str | None) -> None:
        """See :meth:`Adapters.use`; a change to or from a teacher touches each of its layers (about 1 µs a layer)."""
        if name == self._in_use:
            return
        super().use(name)
        for layer, base in self._exchanged:
            layer._modules["base_layer"] = base
        self._exchanged = []
        if name in self._merged:
            self._active.clear()
            self._exchanged = [(layer, layer.base_layer) for layer, _ in self._merged[name]]
            for layer, merged in self._merged[name]:
                layer._modules["base_layer"] = merged
        self._in_use = name

    def can_share(self, names: Collection[str | None]) -> bool:
        """See :meth:`Adapters.can_share`; merged matrices are exchanged for a whole forward."""
        return False

    @property
    def active(self) -> str | None:
        """The adapter in use."""
        return self._in_use

    def merged_bytes(self) -> dict[str, int]:
        """What the copies of each teacher take, by its name."""
        return {name: sum(merged.weight.nbytes for _, merged in layers) for name, layers in self._merged.items()}


@torch.no_grad()
def _merged_linear(layer: LoraLayer, name: str) -> nn.Linear:
    base = layer.get_base_layer()
    delta = layer.scaling[name] * (layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double())
    merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    merged.weight = nn.Parameter((base.weight.double() + delta).to(base.weight.dtype), requires_grad=False)
    merged.bias = base.bias  # shared
    return merged.train(base.training)
