"""Kernel launches of a forward on a GPU, counted without one: with the fused layers, and with the stock ones.

    python benchmarks/launches.py                                     SD3.5-Medium's shape
    python benchmarks/launches.py --random small

A round of a few images is bound by launches, so that their number is what optimising it means. The forward runs on
tensors without data (torch's FakeTensorMode) that say to be on a GPU, through the dispatch that a GPU's tensors take,
autocast included; what arrives at its end, views left out, is a launch or two. Attention counts as one, by flash's
kernel. Needs a CUDA build of torch. The backward cannot be counted so; on a GPU `tools/profile_round.py` counts all.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.upstream import restore_layers
from benchmarks.world import RANDOM, RANK, TARGETS, TEXT_TOKENS
from diffusionopd.models.fused import fuse_norms
from diffusionopd.models.lora import Adapters

HALF = torch.bfloat16
# Operators that only describe memory that is there.
VIEWS = set(
    "_reshape_alias _unsafe_view alias as_strided chunk detach device expand permute reshape select slice split "
    "split_with_sizes squeeze t transpose unbind unflatten unsqueeze view".split()
)


def main() -> None:
    """Count, print, and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", choices=list(RANDOM), default="sd35")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if torch.version.cuda is None:
        sys.exit("error: this torch is built for CPUs alone; a CUDA build counts, on a machine without a GPU too")
    found = count(RANDOM[args.random])
    print(f"{'launches of a forward':<24}{'with a LoRA':>12}{'without':>12}")
    for layers, launches in found.items():
        print(f"{layers + ' layers':<24}{launches['adapted'].total():>12}{launches['bare'].total():>12}")
    for layers, launches in found.items():
        print(f"{layers}, with a LoRA: " + ", ".join(f"{n} {op}" for op, n in launches["adapted"].most_common(10)))
    if args.json:
        args.json.write_text(json.dumps(found | {"torch": torch.__version__}, indent=2) + "\n", encoding="utf-8")


def count(config: Mapping[str, Any]) -> dict[str, dict[str, Counter[str]]]:
    """Launches by operator: of the fused and stock layers, with a LoRA in use (adapted) and without (bare)."""
    found: dict[str, dict[str, Counter[str]]] = {}
    with pretended_gpu():
        torch.set_default_dtype(HALF)
        try:
            transformer = SD3Transformer2DModel(**config)
        finally:
            torch.set_default_dtype(torch.float32)
        fuse_norms(transformer)
        adapters = Adapters(transformer)
        adapters.add_student("lora", rank=RANK, alpha=2 * RANK, target_modules=TARGETS)
        sizes = transformer.config
        inputs = {
            "hidden_states": torch.randn(6, sizes.in_channels, 64, 64, dtype=HALF),
            "timestep": torch.randn(6),
            "encoder_hidden_states": torch.randn(6, TEXT_TOKENS, sizes.joint_attention_dim, dtype=HALF),
            "pooled_projections": torch.randn(6, sizes.pooled_projection_dim, dtype=HALF),
        }
        for layers in ("fused", "stock"):
            if layers == "stock":
                restore_layers(transformer)
            found[layers] = {}
            for name, adapter in {"adapted": "lora", "bare": None}.items():
                adapters.use(adapter)
                with torch.no_grad(), Launches() as launches:
                    transformer(**inputs)
                found[layers][name] = launches.by_operator
    return found


class Launches(TorchDispatchMode):
    """Counts operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count ``func``, then do it."""
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.by_operator[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Tensors without data on a GPU that need not be there, under its autocast."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.device("cuda"))
        # Modules of such tensors cannot be converted, and are made as they shall be; the kernel is chosen by the GPU.
        stack.enter_context(patch.object(nn.Module, "_apply", lambda self, fn, recurse=True: self))
        stack.enter_context(patch.object(nn.functional, "scaled_dot_product_attention", flash))
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", HALF)
        stack.callback(torch.set_autocast_enabled, "cuda", False)
        torch.autocast_increment_nesting()
        stack.callback(torch.autocast_decrement_nesting)
        yield


def flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Attention ``[B, heads, tokens, dim]`` by the kernel that torch takes in half precision on a GPU."""
    return torch.ops.aten._scaled_dot_product_flash_attention(*(x.to(HALF) for x in (query, key, value)))[0]


if __name__ == "__main__":
    main()
