"""What makes a transformer faster without changing what it computes: the attention kernel, compiled blocks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""``attention_backend`` -> torch's kernel. Without one torch takes the best that the device and the dtype allow."""

# Graphs of one block's code: kinds of block x adapters x with and without gradient x batch shapes of training, guidance
# and evaluation. Beyond torch's default of 8 it would run uncompiled, without an error.
MOST_GRAPHS = 256


class AccelerationError(ValueError):
    """A way to be faster that this machine does not have; the message says what is missing and the remedy."""


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile each block of a backbone by itself, for the shapes that it meets; called after adapters are injected.

    Blocks of the same kind share their graphs. There is one graph for each kind of block, adapter, gradient mode and
    shape; merged teachers are one adapter. Raises nothing here: compilation happens in the first passes. A forward that
    cannot be compiled runs as it is, with a warning that has the reason; a backward that cannot ends the run.
    """
    limits = torch._dynamo.config
    limits.suppress_errors = True
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * MOST_GRAPHS)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)


def no_new_graphs() -> AbstractContextManager[object]:
    """Inside, compiled blocks that meet a new shape run uncompiled: for a few passes a graph of it would not pay."""
    return torch.compiler.set_stance("eager_on_recompile")


def check_compiler(device: torch.device) -> None:
    """AccelerationError when what ``compile`` needs on ``device`` is not installed."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise AccelerationError("compile needs Triton on a GPU: pip install triton, or set --config.compile=False.")
    kind, variable, usual = ("C", "CC", "gcc, clang, cc") if device.type == "cuda" else ("C++", "CXX", "g++, clang++")
    names = os.environ.get(variable) or usual
    if not any(map(shutil.which, names.split(", "))):
        raise AccelerationError(
            f"compile needs a {kind} compiler ({names}), and there is none. Install one, name it in {variable}, or set "
            "--config.compile=False."
        )


def choose_attention(transformer: nn.Module, backend: str, *, dtype: torch.dtype, device: torch.device) -> None:
    """Make every attention layer use the kernel ``backend``, one of :data:`ATTENTION_BACKENDS`.

    The choice is the layer's own, so that it holds when a checkpointed block runs again in the backward pass. Raises
    AccelerationError when the kernel cannot run in ``dtype`` on ``device``.
    """
    layers: list[Any] = [module for module in transformer.modules() if hasattr(module, "set_processor")]
    check_attention(backend, layers[0].inner_dim // layers[0].heads, dtype=dtype, device=device)
    for processor in {id(layer.processor): layer.processor for layer in layers}.values():
        _restrict(processor, ATTENTION_BACKENDS[backend])


def check_attention(backend: str, width: int = 64, *, dtype: torch.dtype, device: torch.device) -> None:
    """AccelerationError when the kernel ``backend`` cannot run on ``device`` in ``dtype``, with heads so wide."""
    probe = torch.zeros(1, 2, 64, width, dtype=dtype, device=device, requires_grad=True)
    try:
        with sdpa_kernel(ATTENTION_BACKENDS[backend]):
            nn.functional.scaled_dot_product_attention(probe, probe, probe).sum().backward()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise AccelerationError(
            f"attention_backend {backend!r} cannot run here ({device.type}, {dtype}): {reason} "
            "Choose another, or leave it empty for torch's own choice."
        ) from error


def _restrict(processor: Any, kernel: SDPBackend) -> None:
    """Make an attention processor run with torch restricted to one kernel, in place.

    Its ``__call__`` keeps its signature: diffusers' attention silently drops what the signature does not name, such as
    masks and rotary embeddings.
    """
    kind = type(processor)

    @wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        with sdpa_kernel(kernel):
            return kind.__call__(self, *args, **kwargs)

    processor.__class__ = type(kind.__name__, (kind,), {"__call__": call})
