"""Generate the images of test sets with one model or several and score them.

    python scripts/evaluate.py --checkpoint_path logs/mopd --dataset geneval ocr --output_dir logs/mopd/evaluation
    python scripts/evaluate.py --base --config config/tiny.py:mopd --dataset compose ocr scene --output_dir logs/base
    python scripts/evaluate.py --base --teacher ocr --checkpoint_path logs/mopd --dataset ocr --output_dir logs/all
    python scripts/evaluate.py --merge ties --lora a.safetensors b.safetensors --dataset ocr --output_dir logs/ties

Several models are evaluated one after the other, each into a folder of its name in --output_dir: base, teacher-<name>,
student (--checkpoint_path), merge-<method>, or that of the LoRA's folder or file. Start it with `accelerate launch`
(scripts/single_node/eval.sh) to share the images among processes. A run's own settings (base model, resolution, steps,
guidance) are found beside its checkpoint; flags go before them. The noise is that of --seed for every model.
"""

import argparse
import ast
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from diffusionopd.config_schema import redacted, unset
from diffusionopd.distributed import LONGEST_TIMEOUT
from diffusionopd.evaluation.job import Job, Merge, Model, check, run
from diffusionopd.evaluation.results import EvaluationError, format_table
from diffusionopd.evaluation.testsets import BENCHMARKS, Benchmark, find_benchmark, first
from diffusionopd.failures import ending_together
from diffusionopd.files import located, user_path
from diffusionopd.models.loading import DTYPES, read_model
from diffusionopd.models.lora_files import WEIGHTS, LoraWeights, load_lora
from diffusionopd.models.merging import METHODS
from diffusionopd.models.teacher_models import read_teacher_model
from diffusionopd.rewards import check_options
from diffusionopd.signals import end_at_signals
from diffusionopd.training import load_config
from diffusionopd.training.checkpoint import find_lora, locate
from diffusionopd.training.command import plain_warnings
from diffusionopd.training.keys import with_paths
from diffusionopd.training.loading import teacher_lora
from diffusionopd.training.resume import read_run_config

DEFAULT_MODEL = "stabilityai/stable-diffusion-3.5-medium"


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; flags left out are None, to be told from flags given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    many: dict[str, Any] = {"action": "extend", "nargs": "+"}
    which = parser.add_argument_group("models", "at least one")
    which.add_argument("--checkpoint_path", help="run folder, checkpoint-<n>, its lora/, or <run>/checkpoints/latest")
    which.add_argument(
        "--lora_hf_path", action="append", help="LoRA on the hub: owner/name[/folder or file][@revision]"
    )
    which.add_argument("--lora", **many, help="LoRA as a folder or a file, of any format in docs/loras.md")
    which.add_argument("--teacher", action="append", help="this teacher of the config, at its own guidance")
    which.add_argument("--own_task", action="store_true", help="each teacher on the dataset of its own name alone")
    which.add_argument("--base", action="store_true", help="the base model without a LoRA")
    what = "the LoRAs of --lora and --lora_hf_path, or else the config's teachers, merged into one without training"
    which.add_argument("--merge", **many, choices=METHODS, default=[], help=f"{what}, in the place of each by itself")
    which.add_argument("--merge_scale", **many, type=float, help="times the merge, a model for each (1)")
    parser.add_argument("--dataset", **many, required=True, help=f"{', '.join(BENCHMARKS)}, a task, or a folder")
    files = "gets the files; a folder each for several models and datasets"
    parser.add_argument("--output_dir", required=True, dest="output", metavar="OUTPUT_DIR", help=files)
    parser.add_argument("--config", help="FILE:NAME or a run's config.json, for what flags leave open")
    parser.add_argument("--model_type", choices=["sd3"], default="sd3", help="without effect: read from the base")
    parser.add_argument("--model", help=f"base model: hub id, folder or .safetensors (default {DEFAULT_MODEL})")
    parser.add_argument("--revision", help="branch, tag or commit of the base model on the hub")
    parser.add_argument("--variant", help='of its weight files, such as "fp16"')
    parser.add_argument("--model_config", help="pipeline folder or hub id for a base model that is a single file")
    parser.add_argument("--num_inference_steps", type=int, help="steps of the ODE (default: the model's, 40)")
    parser.add_argument("--guidance_scale", type=float, help="guidance; 1 is without (default: the model's, 4.5)")
    parser.add_argument("--resolution", type=int, help="pixels a side (default 512)")
    parser.add_argument("--max_sequence_length", type=int, help="tokens of a prompt (default: the model's, 128)")
    parser.add_argument(
        "--mixed_precision", choices=DTYPES, help="of the model (default: its own on a GPU, no on a CPU)"
    )
    parser.add_argument("--seed", type=int, help="of the initial noise (default 42)")
    parser.add_argument("--limit", type=int, help="score the first prompts only")
    parser.add_argument("--num_images_per_prompt", type=int, dest="images_per_prompt", help="(default 1)")
    parser.add_argument("--batch_size", type=int, help="images a process makes at a time (default 16)")
    parser.add_argument("--rewards", **many, default=[], help="in place of the datasets' own")
    parser.add_argument("--without", **many, default=[], metavar="REWARD", help="leave these rewards out")
    form = "REWARD.OPTION=VALUE, as docs/rewards.md has them"
    parser.add_argument("--reward_options", **many, default=[], metavar="OPTION", help=form)
    parser.add_argument("--save_images", action="store_true", help="write images/%%05d.jpg")
    parser.add_argument("--resume", action="store_true", help="go on where the same evaluation stopped")
    parser.add_argument(
        "--dry_run", action="store_true", help="check all but the base's weights, scorers too, and stop"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the evaluation that is in the folder")
    parser.add_argument("--cache_dir", help="folder of the prompt embeddings (default .cache/text)")
    parser.add_argument("--text_encoder_device", help="cpu, cuda:<n>; default: the process's own GPU")
    parser.add_argument("--vae_device", help="likewise, for decoding")
    flags = parser.parse_args(arguments)
    if not (flags.base or flags.teacher or flags.checkpoint_path or flags.lora or flags.lora_hf_path or flags.merge):
        parser.error("no model to evaluate: --base, --teacher, --checkpoint_path, --lora, --lora_hf_path or --merge")
    return flags


def place(flags: argparse.Namespace) -> None:
    """Make the paths among the flags lead from here (``~``, the project's own). FolderError or CheckpointError."""
    for name in ("model", "checkpoint_path", "config"):
        if given := vars(flags)[name]:
            setattr(flags, name, located(given))
    flags.lora = [str(locate(located(source))) for source in flags.lora or []]
    flags.cache_dir = flags.cache_dir and user_path(flags.cache_dir)
    flags.output = Path(user_path(flags.output)).absolute()


def find_config(flags: argparse.Namespace) -> dict[str, Any]:
    """The configuration named by flag, else the one saved with the checkpoint, else an empty one, as nested dicts.

    Raises:
        ConfigError: there is no such file or name, or a JSON file that is no configuration.
    """
    source = flags.config
    if not source and flags.checkpoint_path:
        saved = find_lora(flags.checkpoint_path) / "config.json"
        source = str(saved) if saved.is_file() else None
    if not source:
        return {}
    return with_paths(read_run_config(Path(source)) if source.endswith(".json") else load_config(source))


def read_options(given: list[str], configured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configuration's `reward_options` with what `REWARD.OPTION=VALUE` flags change.

    Raises:
        EvaluationError: a flag of another form.
    """
    options = {name: dict(values) for name, values in configured.items()}
    for text in given:
        if not (match := re.fullmatch(r"(\w+)\.(\w+)=(.*)", text)):
            raise EvaluationError(f"--reward_options takes REWARD.OPTION=VALUE, not {text!r}")
        name, option, value = match.groups()
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # a plain word, path or address
        options.setdefault(name, {})[option] = value
    return options


def find_models(flags: argparse.Namespace, config: dict[str, Any], source: dict[str, Any]) -> list[Model]:
    """The models that flags name; ``source``: where the base is.

    Raises `EvaluationError`, `AdapterError` or `BackboneError` if one is missing.
    """
    found = [Model("base")] if flags.base else []
    teachers = {teacher["name"]: teacher for teacher in config.get("train", {}).get("teachers", [])}
    sample = config.get("sample", {})
    for name in flags.teacher or []:
        teacher = teachers.get(name, {})
        if unset(teacher.get("lora_path")) and unset(teacher.get("model")):
            known = ", ".join(teachers) or "none; name a configuration with --config"
            what = f"no teacher '{name}' with a lora_path or model in the configuration"
            raise EvaluationError(f"{what}; its teachers: {known}")
        common = sample.get("teacher_guidance_scale"), sample.get("eval_guidance_scale")
        scale = first(flags.guidance_scale, teacher.get("guidance_scale"), *common)
        only_on = name if flags.own_task else None
        own = None if unset(model := teacher.get("model")) else read_teacher_model(model, read_model(**source))
        found.append(Model(f"teacher-{name}", teacher_lora(teacher), scale, own=own, only_on=only_on))
    if flags.checkpoint_path:
        found.append(Model("student", load_lora(find_lora(flags.checkpoint_path))))
    loras = [*flags.lora, *(flags.lora_hf_path or [])]
    if flags.merge:
        return found + _merges(flags, [load_lora(each) for each in loras] or _teacher_loras(teachers))
    return found + [Model(name, load_lora(each)) for name, each in zip(_names(loras), loras, strict=True)]


def _names(loras: Sequence[str]) -> list[str]:
    """What LoRAs are called: the ends of their paths, with folders above where these are the same."""
    paths = [Path(each).absolute() for each in loras]
    paths = [path.parent if path.name in WEIGHTS else path for path in paths]
    parts = [[*path.parts[1:-1], path.name.removesuffix(".safetensors")] for path in paths]
    names = [own[-1] for own in parts]
    for depth in range(2, 1 + max(map(len, parts), default=0)):
        names = ["-".join(own[-depth:]) if names.count(n) > 1 else n for own, n in zip(parts, names, strict=True)]
    return names


def find_benchmarks(
    flags: argparse.Namespace,
    config: dict[str, Any],
    options: dict[str, dict[str, Any]],
    defaults: Callable[[], Any],
) -> list[Benchmark]:
    """The data sets that flags name. EvaluationError that says all that is wrong with them and the rewards' options.

    ``options``: of rewards. ``defaults``: reads those of the base.
    """
    own = flags.rewards, flags.limit, flags.num_inference_steps, flags.guidance_scale
    found, problems = [], []
    for dataset in flags.dataset:
        try:
            found.append(
                find_benchmark(dataset, config, *own, options=options, defaults=defaults, without=flags.without)
            )
        except ValueError as error:
            problems.append(str(error))
    try:
        check_options(options, [*flags.rewards, *(name for benchmark in found for name in benchmark.rewards)])
    except ValueError as error:
        problems += str(error).splitlines()
    if problems:
        raise EvaluationError("\n".join(dict.fromkeys(problems)))
    return found


def _teacher_loras(teachers: dict[str, dict[str, Any]]) -> list[LoraWeights]:
    """The LoRAs of all teachers, by their scales. EvaluationError for one that is no LoRA of the base."""
    if other := [n for n, t in teachers.items() if unset(t.get("lora_path")) or not unset(t.get("model"))]:
        what = f"only LoRAs of the base can be merged: the teachers {', '.join(other)}"
        raise EvaluationError(f"{what} have no lora_path, or a model of their own")
    return [lora for teacher in teachers.values() if (lora := teacher_lora(teacher))]


def _merges(flags: argparse.Namespace, loras: list[LoraWeights]) -> list[Model]:
    """A model for each method and scale. EvaluationError without two LoRAs."""
    if len(loras) < 2:
        what = f"--merge takes at least two LoRAs, here are {len(loras)}"
        raise EvaluationError(f"{what}: name them with --lora, or a configuration with teachers with --config")
    scales = dict.fromkeys(flags.merge_scale or [1.0])
    if bad := [scale for scale in scales if not 0 < abs(scale) < math.inf]:
        raise EvaluationError(f"--merge_scale {' '.join(map(str, bad))}: give finite numbers other than 0")
    return [
        Model(f"merge-{method}" + (f"-{scale:g}" if scale != 1 else ""), merge=Merge(method, loras, scale))
        for method in dict.fromkeys(flags.merge)
        for scale in scales
    ]


def make_job(flags: argparse.Namespace) -> Job:
    """Everything checked that can be before weights load. Raises ValueErrors of the library that say what to mend."""
    place(flags)
    config = find_config(flags)
    pretrained = config.get("pretrained", {})
    own_base = pretrained if flags.model in (None, pretrained.get("model")) else {}
    source = {
        "revision": flags.revision or own_base.get("revision") or None,
        "variant": flags.variant or own_base.get("variant") or None,
        "config": flags.model_config or own_base.get("config") or None,
    }
    base = flags.model or pretrained.get("model") or DEFAULT_MODEL
    read_base = cache(partial(read_model, base, **source))
    models = find_models(flags, config, {"model": base, **source})
    options = read_options(flags.reward_options, config.get("reward_options", {}))
    benchmarks = find_benchmarks(flags, config, options, lambda: read_base().defaults)
    # Most fields of a job are flags of the same name; some are keys of a configuration, too.
    named = {field.name: first(vars(flags).get(field.name), config.get(field.name)) for field in fields(Job)}
    named["seed"] = flags.seed  # one noise for all models, whatever they were trained with
    for name in ("max_sequence_length", "resolution"):  # None in a configuration, or in none
        if named[name] is None and (name in config or name != "resolution"):
            named[name] = getattr(read_base().defaults, name)
    named |= {
        **source,
        "base": base,
        "models": models,
        "benchmarks": benchmarks,
        "dtype": DTYPES.get(flags.mixed_precision),
        "reward_options": options,
    }
    job = Job(**{name: value for name, value in named.items() if value is not None})
    if idle := {model.name for model in models} - {model.name for model, _ in job.evaluations}:
        raise EvaluationError(f"--own_task leaves nothing to evaluate {', '.join(sorted(idle))} on: name its --dataset")
    job.check_fits(read_base())
    return job


def _tables(job: Job, state: PartialState) -> list[str]:
    """The scores, as they are printed."""
    results = run(job, state)
    heads = {name: f"\n{name}" if len(results) > 1 else "" for name in results}
    return [
        *(f"{heads[name]}\n{format_table(scores)}" for name, scores in results.items()),
        f"\nwritten to {job.output}",
    ]


def main() -> None:
    """Flags to job to tables; a mistake of the user's ends in one line, not in a traceback."""
    flags = parse_flags()
    try:
        with plain_warnings():
            job = make_job(flags)
        with end_at_signals("what is scored so far is kept; the same command with --resume goes on from there"):
            state = PartialState(
                cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(seconds=LONGEST_TIMEOUT)
            )
            with ending_together():
                lines = [*check(job, state), "dry run: nothing was made"] if flags.dry_run else _tables(job, state)
    except ValueError as error:
        sys.exit(f"error: {redacted(error)}")
    state.print("\n".join(lines))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
