"""Draw base, teachers and student on prompts of your own, side by side on one page, every row from the same noise.

    python -m tools.gallery logs/mopd --prompts my_prompts.txt --seeds 1 2 3 --teachers
    python -m tools.gallery logs/mopd --prompts my_prompts.txt --scales 0 0.5 1 1.5

A RUN is a run folder (its newest checkpoint) or a checkpoint; what flags leave open is as in the run. Prompts are lines
of text, or of JSON with a "prompt" in a .jsonl file. Writes gallery.html, or gallery-2.html where there is one.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

from diffusionopd.algorithms import ALGORITHMS
from diffusionopd.config_schema import flatten, is_number, read, redacted, unset
from diffusionopd.data.prompts import read_prompts
from diffusionopd.evaluation.job import Job, Model, load_policies
from diffusionopd.evaluation.results import EvaluationError
from diffusionopd.evaluation.sampling import ImageGenerator
from diffusionopd.evaluation.testsets import Benchmark, first
from diffusionopd.files import ensure_writable, located, path_flag, write_atomically
from diffusionopd.models.loading import DTYPES, is_here, read_model
from diffusionopd.models.lora_files import LoraWeights, load_lora
from diffusionopd.models.settings import BaseSettings, MemorySettings
from diffusionopd.models.teacher_models import read_teacher_model
from diffusionopd.rewards.images import to_uint8
from diffusionopd.training.checkpoint import find_lora
from diffusionopd.training.command import plain_warnings
from diffusionopd.training.keys import SCHEMA, with_paths
from diffusionopd.training.loading import teacher_lora
from diffusionopd.training.resume import read_run_config
from diffusionopd.training.settings import WatchSettings
from tools.publishing.content import run_of
from tools.publishing.public import public
from tools.report import Drawn, render_gallery
from tools.report.collect import machine_facts


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; flags left out are None, to be told from flags given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run folder, or <run>/checkpoints/checkpoint-<n>")
    parser.add_argument("--prompts", type=path_flag, required=True, metavar="FILE", help="a prompt a line, or .jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the noise, a row each (default 1)")
    scales = "what multiplies the alpha of the student's LoRA, a column each (default 1); 0 is the base, always there"
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help=scales)
    parser.add_argument("--teachers", action="store_true", help="the run's teachers too, at their own guidance")
    parser.add_argument("--output", type=path_flag, metavar="DIR", help="folder of the page (default <run>/gallery)")
    parser.add_argument("--guidance_scale", type=float, help="of all models; 1 is without")
    parser.add_argument("--num_inference_steps", type=int, help="steps of the ODE")
    parser.add_argument("--resolution", type=int, help="pixels a side")
    parser.add_argument("--batch_size", type=int, help="images at a time")
    return parser.parse_args(arguments)


def make_job(flags: argparse.Namespace) -> Job:
    """Everything checked that can be before weights load. Raises ValueErrors of the library that say what to mend."""
    folder = find_lora(located(flags.run))
    if not (folder / "config.json").is_file():
        raise EvaluationError(
            f"{folder} has no config.json that names its base: give a run folder or a checkpoint of one"
        )
    values = SCHEMA.defaults() | flatten(with_paths(read_run_config(folder / "config.json")))
    base, memory, watch = read(BaseSettings, values), read(MemorySettings, values), read(WatchSettings, values)
    prompts = read_prompts(flags.prompts, "geneval" if flags.prompts.suffix == ".jsonl" else "general_ocr")
    steps = first(flags.num_inference_steps, watch.eval_num_steps)
    guidance = first(flags.guidance_scale, watch.eval_guidance_scale)
    teachers = _teachers(values, base, flags.guidance_scale) if flags.teachers else []
    job = Job(
        **{name: value for name, value in base.source.items() if name != "model"},
        base=base.model,
        models=[Model("base"), *teachers, *_students(load_lora(folder), flags.scales)],
        benchmarks=[Benchmark("prompts", prompts, (), steps, guidance)],
        output=flags.output or run_of(folder) / "gallery",
        resolution=first(flags.resolution, base.resolution),
        seed=min(flags.seeds),
        batch_size=first(flags.batch_size, watch.test_batch_size),
        max_sequence_length=base.max_sequence_length,
        dtype=DTYPES[memory.mixed_precision],
        cache_dir=memory.cache_dir,
        text_encoder_device=memory.text_encoder_device,
        vae_device=memory.vae_device,
    )
    if is_here(job.base, job.revision, job.config):
        job.check_fits(read_model(**job.source, download=False))
    return job


def _students(lora: LoraWeights, scales: Sequence[float]) -> Iterator[Model]:
    for scale in dict.fromkeys(scales):
        if not is_number(scale):
            raise EvaluationError(f"--scales must be finite numbers, not {scale}")
        if scale != 0:
            yield Model("student" if scale == 1 else f"student at {scale:g}", lora.scaled(scale))


def _teachers(values: Mapping[str, Any], base: BaseSettings, guidance: float | None) -> Iterator[Model]:
    if not ALGORITHMS[values["train.algorithm"]].has_teachers:
        raise EvaluationError(f"a run of {values['train.algorithm']} has no teachers: leave out --teachers")
    for task in values["train.teachers"]:
        own = first(guidance, task.get("guidance_scale"), values["sample.teacher_guidance_scale"])
        beside = None if unset(model := task.get("model")) else read_teacher_model(model, read_model(**base.source))
        yield Model(f"teacher {task['name']}", teacher_lora(task), own, beside)


def draw(job: Job, seeds: Sequence[int], device: torch.device, dtype: torch.dtype) -> Iterator[Drawn]:
    """A column for each model of the job: its images of all `rows_of`, from noise that depends on the row alone.

    The image is that of `scripts/evaluate.py --seed` for a prompt of this place in its file.
    """
    (benchmark,) = job.benchmarks
    numbered = list(enumerate(benchmark.prompts))
    cache, policies = load_policies(job, dtype, device)
    with tqdm(total=len(job.models) * len(rows_of(job, seeds)), desc="drawing", unit="image") as bar:
        for model in job.models:
            backbone = policies.use(model.name).backbone
            guidance = model.guidance_on(benchmark)
            images: dict[tuple[int, int], np.ndarray] = {}  # by the numbers of prompt and seed
            for place, seed in enumerate(seeds):
                generate = ImageGenerator(backbone, cache, benchmark.num_steps, guidance, job.resolution, seed)
                for start in range(0, len(numbered), job.batch_size):
                    batch = numbered[start : start + job.batch_size]
                    drawn = generate([prompt.key for _, prompt in batch], [(number, 0) for number, _ in batch])
                    images |= {(batch[i][0], place): image for i, image in enumerate(to_uint8(drawn))}
                    bar.update(len(batch))
            yield Drawn(model.name, [images[key] for key in sorted(images)], f"guidance {guidance:g}")


def rows_of(job: Job, seeds: Sequence[int]) -> list[tuple[str, str]]:
    """Prompt and seed of each row, the seeds of a prompt below each other."""
    (benchmark,) = job.benchmarks
    return [(prompt.text, f"seed {seed}") for prompt in benchmark.prompts for seed in seeds]


def free_page(folder: Path) -> Path:
    """The first of gallery.html, gallery-2.html, ... that is not there."""
    names = (folder / f"gallery{f'-{number}' if number > 1 else ''}.html" for number in count(1))
    return next(path for path in names if not path.exists())


def _name_of(run: str) -> str:
    """A checkpoint without the folders that it lies in: `run, checkpoint-300`."""
    folder = find_lora(located(run)).resolve()
    return ", ".join(dict.fromkeys([run_of(folder).name, folder.name]))


def _facts(flags: argparse.Namespace, job: Job, seeds: Sequence[int]) -> list[tuple[str, str]]:
    (benchmark,) = job.benchmarks
    return [
        ("Base model", public(job.base)),
        ("Student", _name_of(flags.run)),
        ("Images", f"{benchmark.num_steps} steps of the ODE, {job.resolution} pixels"),
        ("Prompts", f"{len(benchmark.prompts)} of {flags.prompts.name}; seeds {', '.join(map(str, seeds))}"),
        *machine_facts(),
    ]


def _draw_page(flags: argparse.Namespace, job: Job) -> str:
    seeds = list(dict.fromkeys(flags.seeds))
    ensure_writable(job.output, "output folder", "Choose another with --output, or free space.")
    ensure_writable(job.cache_dir, "text cache", "Free space there.")
    print(f"{len(job.models)} models, {len(rows_of(job, seeds))} images each, into {job.output.absolute()}")
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    dtype = torch.float32 if device.type == "cpu" or job.dtype is None else job.dtype
    title, rows = f"{_name_of(flags.run)} on {flags.prompts.name}", rows_of(job, seeds)
    notes = ["A number after a student multiplies the alpha of its LoRA."] if flags.scales != [1] else []
    return render_gallery(title, rows, draw(job, seeds, device, dtype), _facts(flags, job, seeds), notes)


def main(arguments: list[str] | None = None) -> None:
    """Flags to a page; a mistake of the user's ends in one line, not in a traceback."""
    flags = parse_flags(arguments)
    try:
        with plain_warnings():
            job = make_job(flags)
            html = _draw_page(flags, job)
    except (ValueError, OSError) as error:
        sys.exit(redacted(f"error: {error}"))
    print(f"written to {write_atomically(free_page(job.output), html).absolute()}")


if __name__ == "__main__":
    main()
