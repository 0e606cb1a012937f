"""FLOPs and bytes of a model, counted while it runs on tensors without values, at its full size and on any machine.

Tensors are torch's fake ones: shapes and dtypes of CPU tensors, under its autocast. Where a GPU computes otherwise, the
count follows the GPU: attention and RMS norms in one kernel each, layer norms in float32 under autocast.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from diffusionopd.models.fused import fuse_norms
from diffusionopd.models.lora import Adapters
from tools.costs.models import build, transformer_inputs

aten = torch.ops.aten
# Attention's one kernel has another name on a CPU, which torch's own table lacks.
FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad.shape, q.shape, k.shape, v.shape
    ),
}


class Tally(TorchDispatchMode):
    """FLOPs by torch's own formulas, and bytes alive, now and at most, of the tensors made inside the block.

    ``FlopCounterMode`` gives the same FLOPs (tested), but follows modules, which takes long and keeps tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        kwargs = kwargs or {}
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        if formula := FLOPS.get(function._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            name, size = storage._cdata, storage.nbytes()
            if name not in self._known | given:  # neither a view nor in place
                self._known.add(name)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, name, size)
        return result

    def _forget(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _RmsNorm(torch.autograd.Function):
    """What a GPU's kernel keeps: its input and a float32 a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(grads[0])


@contextmanager
def as_on_a_gpu(half: bool) -> Iterator[None]:
    """Fake CPU tensors that go through a GPU's kernels; ``half`` is under autocast."""
    layer_norm = F.layer_norm

    def wide_layer_norm(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        return layer_norm(x.float() if half else x, *rest, **options)

    with (
        FakeTensorMode(),
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        patch.object(F, "layer_norm", wide_layer_norm),
        patch.object(F, "rms_norm", lambda x, *_, **__: _RmsNorm.apply(x)),
    ):
        yield


def _without_values(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace tensors on the meta device by fake ones; frozen ones in ``dtype``, trained ones with a gradient."""
    replaced: dict[Tensor, Tensor] = {}  # a tied one once
    for part in module.modules():
        named: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in named:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in replaced:
                    replaced[tensor] = _without_value(tensor, dtype)
                tensors[name] = replaced[tensor]


def _without_value(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    kept = tensor.requires_grad or not tensor.is_floating_point()
    value = torch.zeros(tensor.shape, dtype=tensor.dtype if kept else dtype)
    if not isinstance(tensor, nn.Parameter):
        return value
    parameter = nn.Parameter(value, tensor.requires_grad)
    parameter.grad = torch.zeros_like(value) if tensor.requires_grad else None
    return parameter


def count(model: nn.Module, call: Callable[[], object]) -> Tally:
    """FLOPs and peak bytes of a call of ``model``, which is on the meta device, in float32 without gradient."""
    with as_on_a_gpu(half=False), torch.no_grad():
        _without_values(model.requires_grad_(False).eval(), torch.float32)
        with Tally() as tally:
            call()
    return tally


@dataclass(frozen=True)
class Cost:
    """Of a transformer with the student's LoRA. FLOPs of one image without guidance (under it, of two), sizes in bytes.

    ``kept`` and ``activations`` are those of ``measure``'s number of rows: what the backward pass needs when it begins,
    and the most that is alive in a step beside weights and gradients. Kernels' workspaces and what the allocator loses
    to rounding come on top.
    """

    parameters: int  # of the frozen base
    buffers: int  # values that are no parameters
    largest_block: int  # parameters of it
    lora_parameters: int
    lora_layers: int
    adapted_parameters: int  # of the base's matrices that have an adapter
    forward: int  # of the base alone
    lora_forward: int
    backward: int  # with what checkpointing computes again
    kept: int
    activations: int


def measure(
    config: Mapping[str, Any],
    latent: Sequence[int],
    text_tokens: int,
    *,
    rank: int,
    targets: Sequence[str],
    rows: int = 1,
    half: bool = True,
    checkpointing: bool = False,
) -> Cost:
    """Count a training step of a transformer with a LoRA: forward and backward over ``rows`` latents.

    Args:
        config: the transformer's configuration.
        latent: shape ``(C, h, w)`` of a latent.
        text_tokens: tokens of a prompt.
        rows: forward passes of single images in the step, two an image under guidance.
        half: bf16 or fp16 under autocast on a GPU, else float32.
        checkpointing: compute activations again in the backward pass.
    """
    transformer = build(config).requires_grad_(False).eval()
    sizes = {
        "parameters": _size(transformer.parameters()),
        "buffers": _size(transformer.buffers()),
        "largest_block": max(
            _size(block.parameters())
            for blocks in transformer.modules()
            if isinstance(blocks, nn.ModuleList)
            for block in blocks
        ),
    }
    fuse_norms(transformer)
    adapters = Adapters(transformer)
    adapters.add_student("student", rank=rank, alpha=rank, target_modules=list(targets))
    adapters.use("student")
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    dtype = torch.bfloat16 if half else torch.float32
    with as_on_a_gpu(half):
        _without_values(transformer, dtype)

        def forward(rows: int) -> Tensor:
            inputs = transformer_inputs(config, latent, text_tokens, rows, dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return transformer(**inputs, return_dict=False)[0].float()

        with adapters.using(None), torch.no_grad(), Tally() as base:
            forward(1)
        with Tally() as step:
            velocity = forward(rows)
            ahead, kept = step.flops, step.live
            velocity.sum().backward()
    return Cost(
        **sizes,
        lora_parameters=_size(adapters.parameters("student")),
        lora_layers=len(layers),
        adapted_parameters=sum(layer.get_base_layer().weight.numel() for layer in layers),
        forward=base.flops,
        lora_forward=ahead // rows - base.flops,
        backward=(step.flops - ahead) // rows,
        kept=kept,
        activations=step.peak,
    )


def _size(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
