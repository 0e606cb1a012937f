"""Layers as the models' original codes name them, which kohya's sd-scripts and ComfyUI use: what modules they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

RowSplit = Callable[[Tensor], dict[str, Tensor]]
"""The rows of a matrix ``[out, ...]`` of another tool's layer -> those of each of the transformer's modules."""
Shapes = Mapping[str, tuple[int, ...]]
"""The transformer's modules -> the shapes of their matrices."""


def rows_of(modules: Sequence[str], shapes: Shapes) -> RowSplit:
    """A layer that is several modules, one below the other; rows that are too many or too few go to the last ones."""
    ends = [*accumulate(shapes.get(module, (0,))[0] for module in modules[:-1])]
    return lambda rows: dict(zip(modules, torch.tensor_split(rows, ends), strict=True))


def swapped(module: str) -> RowSplit:
    """A layer whose halves, scale and shift, are the other way round."""
    return lambda rows: {module: torch.cat(rows.chunk(2)[::-1])}


def renamed(layers: Mapping[str, str], shapes: Shapes) -> dict[str, RowSplit]:
    """Layers by other names; the names of several modules are separated by spaces."""
    return {name: rows_of(own.split(), shapes) for name, own in layers.items()}


def in_blocks(theirs: str, ours: str, layers: Mapping[str, str], shapes: Shapes) -> dict[str, RowSplit]:
    """The same for every block of a list."""
    found: dict[str, RowSplit] = {}
    for i in range(count_blocks(ours, shapes)):
        own = {f"{theirs}_{i}_{name}": " ".join(f"{ours}.{i}.{n}" for n in o.split()) for name, o in layers.items()}
        found |= renamed(own, shapes)
    return found


def count_blocks(ours: str, shapes: Shapes) -> int:
    """Blocks in the list called ``ours``."""
    return len({name.removeprefix(f"{ours}.").split(".")[0] for name in shapes if name.startswith(f"{ours}.")})
