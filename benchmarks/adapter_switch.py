"""Time to switch the adapter in use: one list assignment here, a walk over all modules in PEFT.

    python benchmarks/adapter_switch.py

A 24-block SD3 transformer with the LoRA targets of SD3.5-Medium and four adapters; width does not matter for a switch.
"""

# ruff: noqa: E402

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

from diffusers import SD3Transformer2DModel
from peft.tuners.lora import LoraLayer

from benchmarks.world import SD35_MEDIUM, SMALL, TARGETS
from diffusionopd.models.lora import Adapters

NAMES = ("student", "teacher_a", "teacher_b", "teacher_c")


def build() -> tuple[SD3Transformer2DModel, Adapters]:
    """A narrow transformer with the blocks of SD3.5-Medium, and four adapters."""
    blocks = {name: SD35_MEDIUM[name] for name in ("num_layers", "dual_attention_layers")}
    transformer = SD3Transformer2DModel(**SMALL | blocks)
    transformer._hf_peft_config_loaded = True  # diffusers sets it when it injects adapters itself
    adapters = Adapters(transformer)
    for name in NAMES:
        adapters.add_student(name, rank=4, alpha=8, target_modules=TARGETS)
    return transformer, adapters


def median_seconds(switch: Callable[[str], None], repeats: int) -> float:
    """Median time of one switch, going round all adapters."""
    seconds = []
    for i in range(repeats):
        started = time.perf_counter()
        switch(NAMES[i % len(NAMES)])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    """Print both medians."""
    transformer, adapters = build()
    layers = sum(isinstance(m, LoraLayer) for m in transformer.modules())
    ours = median_seconds(adapters.use, 4000)
    peft = median_seconds(transformer.set_adapter, 40)
    print(f"{layers} LoRA layers, {len(NAMES)} adapters, median of one switch")
    print(f"diffusionopd   {1e3 * ours:9.4f} ms")
    print(f"PEFT           {1e3 * peft:9.4f} ms")


if __name__ == "__main__":
    main()
