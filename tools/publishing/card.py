"""The model card: what the run's own files say, in the form that the hub shows."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from diffusionopd.algorithms import ALGORITHMS, Algorithm
from diffusionopd.algorithms.optim import EmaSettings, OptimizerSettings
from diffusionopd.algorithms.settings import SamplerSettings
from diffusionopd.config_schema import comparable, keys_of, read, unset
from diffusionopd.data.tasks import single_task
from diffusionopd.evaluation.testsets import first
from diffusionopd.models.lora_files import DIFFUSERS_WEIGHTS
from diffusionopd.models.settings import FROM_TEACHERS, LoraSettings
from diffusionopd.training.settings import WatchSettings
from tools.publishing.content import METRICS, PICTURE, Student, picture_of
from tools.publishing.public import public
from tools.publishing.scores import Scores

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),  # the card is Markdown: values are in code marks instead
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ALWAYS = ("train.loss", "train.target")  # of the algorithm's settings; the others where they are not the default


def render_card(
    student: Student,
    repo: str,
    license: str | None = None,
    scores: Sequence[Scores] = (),
    warnings: Sequence[str] = (),
) -> str:
    """The card as Markdown with the hub's YAML header.

    Args:
        repo: `owner/name` that it is published as.
        license: as the hub names it; None leaves the field out.
        scores, warnings: of `read_scores`.
    """
    values, picture = student.values, picture_of(student)
    algorithm, watch = ALGORITHMS[values["train.algorithm"]], read(WatchSettings, values)
    return _TEMPLATES.get_template("card.md.j2").render(
        metadata=_metadata(student, license, algorithm.has_teachers),
        repo=repo,
        base=_base(student),
        load_base=_load_base(student),
        diffusers_file=DIFFUSERS_WEIGHTS,
        steps=watch.eval_num_steps,
        arguments=_arguments(student, watch.eval_guidance_scale),
        edits=bool(student.model and student.model.family.READS_IMAGES),
        resolution=values["resolution"],
        strengths=[f"{strength:.4g}" for strength in student.strengths],
        rounds=student.rounds,
        algorithm=_name_of(algorithm),
        picture=picture and PICTURE,
        picture_round=picture and int(picture.stem.split("-")[1]),
        sampled_by=algorithm.sampled_by,
        recipe=list(_recipe(student)),
        has_metrics=(student.run / METRICS).is_file(),
        has_teachers=algorithm.has_teachers,
        tasks=[_task(task, values, algorithm.has_teachers) for task in values["train.teachers"] or single_task(values)],
        scores=scores,
        rated=any("unifiedreward" in table.titles for table in scores),
        warnings=warnings,
    )


def _metadata(student: Student, license: str | None, has_teachers: bool) -> str:
    tags = [
        "lora",
        "text-to-image",
        "diffusion-opd",
        *(["distillation"] if has_teachers else ["reinforcement-learning"]),
    ]
    on_hub = (
        {"base_model": _repository(student.base_model), "base_model_relation": "adapter"} if student.base_model else {}
    )
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, license=license, **on_hub)
    return data.to_yaml()


def _repository(base_model: str) -> str:
    """The repository of a pipeline, or of a single file, on the hub."""
    return "/".join(base_model.split("/")[:2])


def _base(student: Student) -> str:
    if student.base_model is None:
        return f"{_code(student.values['pretrained.model'])} (a local base model)"
    return f"[{student.base_model}](https://huggingface.co/{_repository(student.base_model)})"


def _load_base(student: Student) -> str:
    """The Python expression that loads the base."""
    model, revision = student.base_model, student.values["pretrained.revision"]
    given = {"revision": revision, "variant": student.values["pretrained.variant"]}
    if model is None:
        return 'DiffusionPipeline.from_pretrained("the folder of the base model")'
    if model.endswith(".safetensors"):
        repository, file = _repository(model), "/".join(model.split("/")[2:])
        address = f"https://huggingface.co/{repository}/blob/{revision or 'main'}/{file}"
        pipeline = student.model.configs["index"]["_class_name"] if student.model else "ItsPipeline"
        return f'{pipeline}.from_single_file("{address}")'
    options = "".join(f', {name}="{value}"' for name, value in given.items() if value)
    return f'DiffusionPipeline.from_pretrained("{model}"{options})'


def _arguments(student: Student, scale: float) -> str:
    """Guidance and length of prompts, as the base's pipeline takes them."""
    if student.model is None:
        return f"**guidance_of_the_base,  # {scale:g}, by its pipeline's names"
    arguments, kind = student.model.family.pipeline_guidance(scale), student.model.configs["index"]["_class_name"]
    if (name := "max_sequence_length") in inspect.signature(getattr(diffusers, kind).__call__).parameters:
        arguments[name] = student.values[name]
    return "".join(f"{name}={value!r}, " for name, value in arguments.items()).rstrip()


def _recipe(student: Student) -> Iterator[tuple[str, str]]:
    """What a reader wants to know of the training first."""
    values, lora = student.values, read(LoraSettings, student.values)
    algorithm, sampler = ALGORITHMS[values["train.algorithm"]], read(SamplerSettings, values)
    optimizer, ema = read(OptimizerSettings, values), read(EmaSettings, values)
    yield "algorithm", f"{_code(algorithm.name)}, {_name_of(algorithm)}"
    yield "rounds", str(student.rounds)
    yield "student", f"LoRA, rank {_span(len(a) for a in student.lora.a.values())}; {_start(lora)}"
    if settings := list(_settings(algorithm, values)):
        yield "loss", ", ".join(_code(f"{name} = {value!r}") for name, value in settings)
    yield "guidance of the student", f"{sampler.guidance:g}" if sampler.guidance != 1 else "none (1)"
    noise = f", noise level {sampler.noise_level:g}" if sampler.kernel != "ode" else ""
    steps = f"{sampler.num_steps} steps, the first {sampler.trained_steps} of them trained"
    yield "sampler", f"{_code(sampler.kernel)}{noise}, {steps}"
    average = f"; its moving average, decay {ema.ema_decay:g}, is what is published" if ema.ema else ""
    yield "optimizer", f"AdamW, learning rate {optimizer.learning_rate:g}{average}"
    yield "images", f"{values['resolution']} pixels a side, prompts of at most {values['max_sequence_length']} tokens"


def _start(lora: LoraSettings) -> str:
    if not unset(lora.lora_path):
        return f"started from {_code(lora.lora_path)}"
    return "started at the sum of its teachers" if lora.student_init == FROM_TEACHERS else "started fresh"


def _settings(algorithm: type[Algorithm], values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The algorithm's own settings that a reader needs: what decides the loss, and what is not the default."""
    for group in algorithm.groups:
        for declared in keys_of(group).values():
            value = values[declared.name]
            if declared.name in _ALWAYS or comparable(value) != comparable(declared.default):
                yield declared.name, value


def _task(task: Mapping[str, Any], values: Mapping[str, Any], has_teachers: bool) -> list[str]:
    """A row of the table of tasks."""
    weight, scale = first(task.get("weight"), 1.0), first(task.get("scale"), 1.0)
    name = f"{task['name']} (weight {weight:g})" if weight != 1 else str(task["name"])
    prompts = ", ".join(map(_code, task.get("datasets") or [task.get("dataset")]))
    prompts += f", with {_code(task['trigger'])}" if task.get("trigger") else ""
    if not has_teachers:
        return [name, ", ".join(f"{reward} {weight:g}" for reward, weight in task["proxy_reward"].items()), prompts]
    guidance = first(task.get("guidance_scale"), values["sample.teacher_guidance_scale"])
    strength, reference = first(task.get("strength"), 1.0), task.get("reference")
    beyond = f" from {_code(reference)}" if not unset(reference) else ""
    sources = [_code(task[name]) for name in ("model", "lora_path") if not unset(task.get(name))]
    teacher = " with ".join(sources) + (f" times {scale:g}" if scale != 1 else "")
    return [name, teacher, f"{guidance:g}", f"{strength:g}{beyond}", prompts]


def _name_of(algorithm: type[Algorithm]) -> str:
    """In words, from the text of its settings."""
    name = str(algorithm.groups[0].__doc__).rstrip(".")
    return name[0].lower() + name[1:] if name.split()[0][1:].islower() else name  # not DiffusionNFT


def _span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _code(value: object) -> str:
    """A value without local paths as code, on one line of a table."""
    return "`" + re.sub(r"[`|\s]+", " ", str(public(value))) + "`"
