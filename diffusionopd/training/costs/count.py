"""FLOPs and bytes of a model, counted while it runs on tensors without values, at its full size and on any machine.

Tensors are torch's fake ones: shapes and dtypes of CPU tensors. Where a GPU computes otherwise, the count follows the
GPU: attention and RMS norms in one kernel each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from diffusionopd.models.lora import Adapters
from diffusionopd.training.costs.models import Pipeline

aten = torch.ops.aten
# Torch's own table lacks products that are added in place, and attention's one kernel by its name on a CPU.
FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
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
            if name not in self._known and name not in given:  # neither a view nor in place
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
    """What a GPU's kernel keeps: its input and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(grads[0])


class UncountableError(ValueError):
    """Raised for a model whose shapes depend on values, which fake tensors do not have."""


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Fake CPU tensors that go through a GPU's kernels. UncountableError where these cannot be followed."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        patch.object(F, "rms_norm", lambda x, *_, **__: _RmsNorm.apply(x)),
    ):
        try:
            yield
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UncountableError(f"its shapes depend on values ({error.func}), so its cost is not known") from error


def count_decode(pipeline: Pipeline, resolution: int, images: int) -> Tally:
    """FLOPs, and peak bytes beside weights, of decoding ``images`` latents at a time."""
    backbone = pipeline.backbone(torch.float32)
    with as_on_a_gpu():
        backbone.vae.to_empty(device="cpu")
        backbone.vae_device = torch.device("cpu")
        with Tally() as tally:
            backbone.decode(torch.zeros(images, *backbone.latent_shape(resolution)))
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
    vae_parameters: int
    lora_parameters: int
    lora_layers: int
    adapted_parameters: int  # of the base's matrices that have an adapter
    latent: int  # values of an image's latent
    embedding: int  # values of a prompt's embedding
    forward: int  # of the base alone
    lora_forward: int
    backward: int  # with what checkpointing computes again
    kept: int
    activations: int


@dataclass(frozen=True)
class Frozen:
    """Of a frozen transformer: as of :class:`Cost`."""

    parameters: int
    buffers: int
    forward: int


def measure_frozen(pipeline: Pipeline, resolution: int, max_sequence_length: int, half: bool = True) -> Frozen:
    """Count a forward pass over one latent; arguments as of :func:`measure`."""
    dtype = torch.bfloat16 if half else torch.float32
    backbone = pipeline.backbone(dtype)
    transformer = backbone.transformer
    with as_on_a_gpu(), torch.no_grad():
        transformer.to_empty(device="cpu")
        backbone.device = torch.device("cpu")
        conditions = pipeline.conditions(1, max_sequence_length, dtype)
        with Tally() as tally:
            backbone.velocity(torch.zeros(1, *backbone.latent_shape(resolution), dtype=dtype), 0.5, conditions)
    return Frozen(_size(transformer.parameters()), _size(transformer.buffers()), tally.flops)


def measure(
    pipeline: Pipeline,
    resolution: int,
    max_sequence_length: int,
    *,
    rank: int,
    targets: Sequence[str] | None = None,
    others: Collection[str] = (),
    rows: int = 1,
    half: bool = True,
    checkpointing: bool = False,
) -> Cost:
    """Count a training step of a transformer with a LoRA: forward and backward over ``rows`` latents.

    Args:
        resolution: pixels of a side of an image.
        max_sequence_length: as the key of this name.
        targets: modules that the LoRA adapts; None for the family's own.
        others: full names of further ones.
        rows: forward passes of single images in the step, two per image under guidance.
        half: bf16 or fp16, else float32.
        checkpointing: compute activations again in the backward pass.
    """
    dtype = torch.bfloat16 if half else torch.float32
    backbone = pipeline.backbone(dtype)
    transformer, latent = backbone.transformer, backbone.latent_shape(resolution)
    sizes = {
        "parameters": _size(transformer.parameters()),
        "buffers": _size(transformer.buffers()),
        "largest_block": max(_size(block.parameters()) for block in backbone.blocks()),
        "vae_parameters": _size(backbone.vae.parameters()),
    }
    adapters = Adapters(transformer)
    targets = targets or pipeline.family.LORA_TARGETS
    adapters.add_student("student", rank=rank, alpha=rank, target_modules=targets, others=others)
    adapters.use("student")
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    with as_on_a_gpu():
        transformer.to_empty(device="cpu")
        backbone.device = torch.device("cpu")
        for parameter in adapters.parameters("student"):
            parameter.grad = torch.zeros_like(parameter)

        def forward(rows: int) -> Tensor:
            conditions = pipeline.conditions(rows, max_sequence_length, dtype)
            return backbone.velocity(torch.zeros(rows, *latent, dtype=dtype), 0.5, conditions)[0]

        with adapters.using(None), torch.no_grad(), Tally() as base:
            forward(1)
        with Tally() as step:
            velocity = forward(rows)
            ahead, kept = step.flops, step.live
            velocity.sum().backward()
        conditions = pipeline.conditions(1, max_sequence_length, dtype)
        return Cost(
            **sizes,
            lora_parameters=_size(adapters.parameters("student")),
            lora_layers=len(layers),
            adapted_parameters=_size(layer.get_base_layer().weight for layer in layers),
            latent=torch.Size(latent).numel(),
            embedding=_size(conditions.parts.values()),
            forward=base.flops,
            lora_forward=ahead // rows - base.flops,
            backward=(step.flops - ahead) // rows,
            kept=kept,
            activations=step.peak,
        )


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
