"""A base model of a published model's size with random weights, teachers for it and prompts.

    python benchmarks/full_size.py                       6 GB in logs/full_size/sd35, a minute; --device cuda is faster
    python benchmarks/full_size.py --shape small         the same architecture, small, to try what follows on a laptop
    python benchmarks/full_size.py --shape z_image --dtype bfloat16 --device cuda      other families, by their names;
    python benchmarks/full_size.py --shape small_z_image --dtype float32               with small_ before them, small

so that the project's own scripts run at full size before anything has been downloaded, or where nothing can be:

    python -m tools.profile_round --config benchmarks/full_size_config.py:mopd         or :z_image, :small_z_image
    CONFIG=benchmarks/full_size_config.py:mopd bash scripts/single_node/mopd.sh --config.num_epochs=20

Time and memory do not depend on the values of weights. Transformer, autoencoder and LoRAs have the published shapes;
the text encoders have the published widths and one layer, since they run once per prompt and are dropped.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from benchmarks.full_size_config import FOLDER, PROMPTS, SHAPES, TASKS
from benchmarks.random_pipelines import random_pipeline
from benchmarks.world import RANDOM, random_lora, random_model
from diffusionopd.files import write_atomically
from diffusionopd.models.loading import family_of
from diffusionopd.models.lora import Adapters
from diffusionopd.tiny import models

CLIP_TOKENS, T5_TOKENS = 77, 128
# Widths of the two CLIP encoders; their sum is the pooled embedding's.
CLIP_WIDTHS = {"sd35": (768, 1280), "small": (16, 16)}


def main() -> None:
    """Build the folder and say how it is used."""
    others = [f"{prefix}{name}" for prefix in ("", "small_") for name in SHAPES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*RANDOM, *others], default="sd35")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the files")
    parser.add_argument("--device", default="cpu", help="where the random numbers are drawn")
    args = parser.parse_args()
    for library in (transformers_logging, diffusers_logging):
        library.set_verbosity_error()
    folder = FOLDER / args.shape
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        torch.manual_seed(0)
        if args.shape in RANDOM:
            pipeline: Any = build_pipeline(args.shape).to(dtype)
        else:
            pipeline = random_pipeline(
                SHAPES[args.shape.removeprefix("small_")][0], args.shape in others[len(SHAPES) :]
            )
            pipeline = pipeline.to(dtype)
    pipeline.save_pretrained(folder / "model")
    family = family_of(pipeline.transformer)
    assert family is not None
    loras = {
        task: random_lora(pipeline.transformer, seed, targets=family.LORA_TARGETS) for seed, task in enumerate(TASKS)
    }
    adapters = Adapters(pipeline.transformer)
    for task, lora in loras.items():
        adapters.add_teacher(task, lora)
        adapters.save_peft(task, folder / "teachers" / task / "lora")
        for split in ("train", "test"):
            write_atomically(folder / "dataset" / task / f"{split}.txt", "\n".join(PROMPTS) + "\n")
    name = {"sd35": "mopd", "small": "small_mopd"}.get(args.shape, args.shape)
    print(f"written to {folder}; use it with --config benchmarks/full_size_config.py:{name}")


def build_pipeline(shape: str) -> StableDiffusion3Pipeline:
    """All parts with random weights; ``shape`` one of :data:`benchmarks.world.RANDOM`."""
    transformer, vae = random_model(shape)
    first, second = (models.clip_tokenizer(pad, CLIP_TOKENS) for pad in ("<|endoftext|>", "!"))
    third = models.t5_tokenizer(T5_TOKENS)
    clips = [
        models.clip_encoder(tokenizer, seed=0, width=width, num_hidden_layers=1, num_attention_heads=2)
        for tokenizer, width in zip((first, second), CLIP_WIDTHS[shape], strict=True)
    ]
    t5_sizes = {"num_layers": 1, "d_kv": 16, "num_heads": 2, "d_ff": 64}
    t5 = models.t5_encoder(third, seed=0, width=transformer.config.joint_attention_dim, **t5_sizes)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **models.text_parts([first, second, third], [*clips, t5]),
    )


if __name__ == "__main__":
    main()
