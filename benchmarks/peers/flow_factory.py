"""A round of Flow-Factory's ``diffusion-opd`` trainer beside ours: the same model, teachers, prompts, noise and grid.

    git clone https://github.com/X-GenGroup/Flow-Factory && pip install datasets einops imageio
    python benchmarks/peers/flow_factory.py --checkout Flow-Factory

Nothing of it is part of this project: it runs from your checkout, its own loop, one round at a time, on a CPU. What
differs is made equal from outside, as README.md here lists; before anything is timed, the losses of the first round
must agree.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script from anywhere

import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.world import RANK, TARGETS, World, add_flags, write_figures
from diffusionopd.data.batches import side_by_side
from diffusionopd.models.lora_files import PEFT_CONFIG, PEFT_WEIGHTS

NEEDED = ("trainers/opd/trainer.py", "trainers/loader.py", "hparams/args.py", "models/stable_diffusion/sd3_5.py")
PACKAGES = ("datasets", "einops", "imageio")
"""What it needs beside this project's own; torchvision, torchaudio and deepspeed it does not, for this."""
Round = Callable[[], float]
"""Does a round and returns its loss, the mean over tasks, images and steps."""


def main() -> None:
    """Build both, compare their first losses, measure, print, and write ``--json``."""
    args = parse()
    check(args.checkout)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        teachers = [str(padded(Path(path), Path(folder) / f"teacher_{i}")) for i, path in enumerate(args.teachers)]
        world = World(argparse.Namespace(**{**vars(args), "teachers": teachers}))
        algorithm, batches = world.setup()
        noises = {f"task_{i}": batch.noise for i, batch in enumerate(batches)}
        together = side_by_side(batches, len(batches))
        ours: Round = lambda: algorithm.round(together).losses.mean  # type: ignore[union-attr]  # noqa: E731
        rounds = {"Flow-Factory": peer(world, noises, Path(folder)), "this project": ours}
        first = {name: round_() for name, round_ in rounds.items()}
        print(f"loss of the first round: {first}")
        theirs, own = first.values()
        if not abs(theirs - own) < 1e-4 * own:
            sys.exit("These are not the same work: losses of the first round must agree. Is this a later checkout?")
        seconds = time_all(rounds, args.repeats)
    figures = summarise(seconds)
    print(f"{len(noises)} tasks x {args.batch_size} images, {args.steps} steps, guidance {args.guidance_scale:g}:")
    print(*(f"{name:<14}{value:8.3f} s a round" for name, value in figures["seconds"].items()), sep="\n")
    lowest, highest = min(figures["ratios"]), max(figures["ratios"])
    print(f"ours / theirs {figures['ratio']:.3f}, of the pairs {lowest:.3f} to {highest:.3f}; process time")
    args.checkout = args.checkout.name
    write_figures(args, figures | {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "all_s": seconds})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of Flow-Factory's repository")
    add_flags(parser)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(arguments)
    if args.random or args.device != "cpu" or args.batches != 1:
        parser.error("this runs on a CPU, on a pipeline's folder (--model), one batch a task: see README.md here")
    return args


def check(checkout: Path) -> None:
    """SystemExit if the folder has not the modules that are used, or these are without the packages that they need."""
    source = checkout / "src" / "flow_factory"
    if missing := [name for name in NEEDED if not (source / name).is_file()]:
        remedy = "Give a checkout of June 2026 or later, which has the diffusion-opd trainer."
        sys.exit(f"--checkout {checkout} is not Flow-Factory's repository: {source} has no {missing}. {remedy}")
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        sys.exit(f"Flow-Factory needs packages that are not installed here: pip install {' '.join(missing)}")


# ---- what is made equal ----------------------------------------------------------------------------------------------


def padded(teacher: Path, folder: Path) -> Path:
    """The same adapter at the student's rank, filled up with zeros: the peer loads teachers into the student's slot."""
    config = json.loads((teacher / PEFT_CONFIG).read_text())
    more = RANK - config["r"]
    if more < 0 or config["rank_pattern"] or config["alpha_pattern"]:
        sys.exit(f"{teacher} cannot be padded to rank {RANK}: its rank is {config['r']}, or differs between layers.")
    weights = load_file(teacher / PEFT_WEIGHTS)
    rows = {name: (0, 0, 0, more) if ".lora_A." in name else (0, more) for name in weights}
    folder.mkdir()
    save_file({name: pad(tensor, rows[name]).contiguous() for name, tensor in weights.items()}, folder / PEFT_WEIGHTS)
    config |= {"r": RANK, "lora_alpha": config["lora_alpha"] * RANK / config["r"]}
    (folder / PEFT_CONFIG).write_text(json.dumps(config))
    return folder


def configuration(world: World, tasks: Sequence[str], folder: Path) -> dict[str, Any]:
    """The peer's configuration of the world's round; prompts are written beside it."""
    args = world.args
    for task, prompt in zip(tasks, world.prompts, strict=True):
        (folder / task).mkdir()
        (folder / task / "train.txt").write_text(f"{prompt}\n" * args.batch_size)
    train = {
        "trainer_type": "diffusion-opd",
        "teachers": [
            {"name": task, "path": path, "applicable_datasets": [task], "guidance_scale": args.guidance_scale}
            for task, path in zip(tasks, args.teachers, strict=True)
        ],
        "resolution": args.resolution,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "timestep_range": world.sampler.timestep_fraction,
        "per_device_batch_size": args.batch_size,
        "unique_sample_num_per_epoch": args.batch_size * len(tasks),
        "group_size": 1,
        "gradient_step_per_epoch": 1,
        "latent_storage_dtype": "fp32",  # its default rounds the states of a rollout to fp16
        **{"learning_rate": 1e-3, "adam_weight_decay": 0.0, "max_grad_norm": 1.0, "ema_decay": 0},
        "teacher_param_device": "cpu",
    }
    model = {"model_name_or_path": args.model, "model_type": "sd3-5", "finetune_type": "lora", "lora_rank": RANK}
    model |= {"lora_alpha": 2 * RANK, "target_modules": list(TARGETS), "master_weight_dtype": "fp32"}
    datasets = [{"name": task, "dataset_dir": str(folder / task), "train": {"weight": 1}} for task in tasks]
    return {
        "mixed_precision": "no",
        "num_processes": 1,
        "data": {"datasets": datasets, "dataloader_num_workers": 0, "cache_dir": str(folder / "cache")},
        "model": model,
        "log": {
            "run_name": "peer",
            "logging_backend": "none",
            "save_dir": str(folder),
            "save_freq": 0,
            "verbose": False,
        },
        "train": train,
        "scheduler": {"dynamics_type": "ODE", "noise_level": 0.0},
        "eval": {"eval_freq": 0, "resolution": args.resolution},
    }


def peer(world: World, noises: Mapping[str, Tensor], folder: Path) -> Round:
    """The peer's trainer of the same round, changed from outside; ``noises`` ``[B, C, h, w]`` of each task."""
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    logging.disable(logging.INFO)
    sys.path.insert(0, str(world.args.checkout.resolve() / "src"))
    # Its SD3.5 adapter encodes 256 tokens with T5, whatever its configuration says.
    encode = partialmethod(StableDiffusion3Pipeline.encode_prompt, max_sequence_length=world.text_length)
    StableDiffusion3Pipeline.encode_prompt = encode  # type: ignore[assignment]
    file = folder / "peer.yaml"
    file.write_text(json.dumps(configuration(world, list(noises), folder)))  # JSON is YAML
    from flow_factory.hparams import Arguments
    from flow_factory.trainers import load_trainer

    trainer = load_trainer(Arguments.load_from_yaml(str(file)))
    trainer.autocast = contextlib.nullcontext  # else bf16, whatever mixed_precision says
    trainer.adapter.scheduler.register_to_config(use_flow_sigmas=True)  # the scheduler's own grid, not linspace(1, 1/N)
    sample, logged = trainer.sample_batch, dict[str, Any]()

    def sample_batch(batch: dict[str, Any], **options: Any) -> Any:
        noise = noises[(batch.get("__source__") or list(noises))[0]]
        trainer.adapter.pipeline.prepare_latents = lambda *_: noise
        return sample(batch, **options)

    def round_() -> float:
        trainer.training_args.max_epochs = trainer.epoch + 1
        trainer.start()
        return float(logged["train/kl_div"])

    trainer.sample_batch, trainer.log_data = sample_batch, lambda data, step: logged.update(data)
    return round_


# ---- measuring -------------------------------------------------------------------------------------------------------


def time_all(rounds: Mapping[str, Round], repeats: int) -> dict[str, list[float]]:
    """Seconds of this process, so that what else the machine does counts less; one unmeasured round, then in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for repeat in range(repeats + 1):
        for name, round_ in rounds.items():
            started = time.process_time()
            round_()
            if repeat:
                seconds[name].append(time.process_time() - started)
    return seconds


def summarise(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians, their ratio, and the ratio of each pair of rounds."""
    theirs, ours = seconds.values()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = [own / other for own, other in zip(ours, theirs, strict=True)]
    return {"seconds": medians, "ratio": statistics.median(ours) / statistics.median(theirs), "ratios": pairs}


if __name__ == "__main__":
    main()
