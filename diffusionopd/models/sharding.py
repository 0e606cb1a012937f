"""How the frozen base is held: whole in every process, or sharded over them by FSDP2 or DeepSpeed's ZeRO-3.

`accelerate launch` says which, in environment variables. Only the base is sharded, since it alone may not fit: LoRAs,
their gradients and the optimizer's state stay whole in every process, as plain tensors on its device. So optimizer,
average, checkpoints and messages are the same with and without, and a run may be resumed either way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate.utils import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    is_deepspeed_available,
    is_torch_version,
    parse_flag_from_env,
)
from peft.tuners.lora import LoraLayer
from torch import nn

Sharding = Callable[[nn.Module, Sequence[nn.Module], torch.device, int], object]
"""``(transformer, its blocks, device, processes)``: shards the frozen transformer in place; keep what it returns alive.

Its weights may be anywhere and move piece by piece: no device ever holds the whole model. Its LoRA tensors move to the
device whole. From then on every forward and backward is a collective: all processes make the same number of them.
"""


class EngineError(ValueError):
    """An `accelerate` configuration that cannot be run as it says; the message names the remedy."""


def requested_sharding() -> Sharding | None:
    """What `accelerate launch` asks for; None for a base that every process holds whole.

    Raises EngineError for what is not supported, and for settings that would silently do something else.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return _checked_deepspeed()
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return _checked_fsdp()
    return None


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def _checked_fsdp() -> Sharding:
    plugin = FullyShardedDataParallelPlugin()
    problem = None
    if not is_torch_version(">=", "2.7"):
        problem = f"torch {torch.__version__} cannot leave LoRAs whole; 2.7 or later can"
    elif plugin.fsdp_version != 2:
        problem = "fsdp_version must be 2"
    elif plugin.activation_checkpointing:
        problem = "leave fsdp_activation_checkpointing false and use --config.activation_checkpointing=True"
    elif plugin.cpu_ram_efficient_loading:
        problem = "fsdp_cpu_ram_efficient_loading must be false: it leaves all processes but one without text encoders"
    if problem:
        raise EngineError(f"FSDP: {problem}. scripts/accelerate/fsdp2.yaml has settings that work (ENGINE=fsdp2).")
    return partial(_shard_fsdp, plugin)


def _shard_fsdp(
    plugin: FullyShardedDataParallelPlugin,
    transformer: nn.Module,
    blocks: Sequence[nn.Module],
    device: torch.device,
    processes: int,
) -> None:
    """A process holds its share of each block, the block at work, and its share of the layers outside the blocks.

    Shares are cut among the processes of a machine: gathering them between machines would be slow, and several machines
    hold the base several times.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    whole = {p for layer in layers for part in (layer.lora_A, layer.lora_B) for p in part.parameters()}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    mesh = init_device_mesh(device.type, (processes // here, here), mesh_dim_names=("machines", "shards"))
    options = {"mesh": mesh, "offload_policy": plugin.cpu_offload, "ignored_params": whole}
    for block in blocks:
        fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(transformer, **options)


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


def _checked_deepspeed() -> Sharding:
    if not is_deepspeed_available():
        raise EngineError("DeepSpeed is not installed: pip install deepspeed, or start with ENGINE=fsdp2")
    plugin = DeepSpeedPlugin()
    problem = None
    if plugin.zero_stage != 3:
        problem = (
            f"ZeRO stage {plugin.zero_stage} shards gradients and optimizer state, here those of a LoRA: 0.2 GB a GPU "
            "could be saved (docs/scaling.md). Use stage 3, which shards the base, or no engine"
        )
    elif plugin.zero3_init_flag:
        problem = "zero3_init_flag must be false: it would shard the text encoders too, which are not run in step"
    if problem:
        raise EngineError(f"DeepSpeed: {problem}. scripts/accelerate/deepspeed_zero3.yaml has settings that work.")
    return partial(_shard_zero3, plugin.deepspeed_config["zero_optimization"])


def _shard_zero3(
    zero: dict, transformer: nn.Module, blocks: Sequence[nn.Module], device: torch.device, processes: int
) -> object:
    """A process holds its share of each matrix, and those at work; DeepSpeed's engine is used for nothing else."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9, "zero_optimization": zero}
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    hidden = []  # DeepSpeed shards every parameter that it finds: these it must not find
    for layer in layers:
        hidden.append({part: layer._modules.pop(part).to(device) for part in ("lora_A", "lora_B")})
    engine, *_ = deepspeed.initialize(model=transformer, config=config)
    for layer, loras in zip(layers, hidden, strict=True):
        layer._modules |= loras
    return engine
