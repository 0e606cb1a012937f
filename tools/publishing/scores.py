"""Scores of a card: only of evaluations that are known to be of this base, these teachers and this very student."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusionopd.config_schema import unset
from diffusionopd.evaluation.job import lora_hash
from diffusionopd.evaluation.results import AVERAGES
from diffusionopd.evaluation.testsets import first
from diffusionopd.files import located
from diffusionopd.models.lora_files import load_lora
from diffusionopd.training.checkpoint import locate
from tools.publishing.content import Student
from tools.report import Evaluation, Model
from tools.report.comparison import Column, unequal_settings
from tools.report.evaluated import read_evaluation

BASE, TEACHER, STUDENT = "base", "teacher-", "student"
_TITLES = {
    "num_inference_steps": "{} steps of the ODE",
    "resolution": "{} pixels",
    "seed": "seed {}",
    "dtype": "{}",
}


class Scores(NamedTuple):
    """One data set: how it was evaluated, the scores, and of each model its guidance and their values as text."""

    data_set: str
    how: str
    titles: list[str]
    rows: list[tuple[str, str, list[str]]]


def read_scores(student: Student, folder: Path) -> tuple[list[Scores], list[str], list[str]]:
    """The tables of the evaluations in a folder, at any depth; what makes rows unequal; what is left out and why.

    Raises:
        ComparisonError, EvaluationError: a file that cannot be read.
    """
    found: dict[str, dict[str, Evaluation]] = {}  # model -> data set -> evaluation
    left_out, teachers = [], dict(_teachers(student))
    for file in sorted(folder.rglob(AVERAGES)):
        evaluation, where = read_evaluation(file.parent), file.parent.relative_to(folder)
        name, why = _model_of(student, teachers, evaluation)
        data_set = str(evaluation.settings.get("dataset", ""))
        if not why and data_set in found.get(name, {}):
            why = f"there are two of {name} on {data_set}"
        if why:
            left_out.append(f"{folder.name / where}: {why}")
        else:
            found.setdefault(name, {})[data_set] = evaluation
    order = [BASE, *(TEACHER + task["name"] for task in student.values["train.teachers"]), STUDENT]
    models = [Model(name, found[name]) for name in order if name in found]
    data_sets = sorted({data_set for model in models for data_set in model.evaluations})
    return [_table(data_set, models) for data_set in data_sets], unequal_settings(models), left_out


def _teachers(student: Student) -> Iterator[tuple[str, tuple[str, str]]]:
    """Name -> source, and the hash of its tensors where it is on this machine."""
    for task in student.values["train.teachers"]:
        if not unset(task.get("model")):  # of weights of its own, whose evaluations are not matched
            continue
        source, path = str(task.get("lora_path") or ""), locate(located(str(task.get("lora_path") or "")))
        if not unset(source):
            digest = lora_hash(load_lora(path).scaled(first(task.get("scale"), 1.0))) if path.exists() else ""
            yield TEACHER + task["name"], (source, digest)


def _model_of(student: Student, teachers: Mapping[str, tuple[str, str]], evaluation: Evaluation) -> tuple[str, str]:
    """Which model was evaluated, and why that does not belong into the card; the latter is empty if it does."""
    settings = evaluation.settings
    if not settings:
        return "", "no evaluation_settings.json says of what it is"
    base = str(student.values["pretrained.model"])
    if settings.get("model") not in (base, located(base)):
        return "", f"it is of another base, {settings.get('model')}"
    if (revision := settings.get("revision") or None) != (student.values["pretrained.revision"] or None):
        return "", f"it is of another revision of the base, {revision}"
    if settings.get("own_model"):
        return "", f"it is of a model of its own, {settings['own_model']}"
    if isinstance(settings.get("lora_hash"), list):
        return "", f"it is of a merge, {settings['lora']}"
    if settings.get("lora") is None:
        return BASE, ""
    if settings.get("lora_hash") == lora_hash(student.lora):
        return STUDENT, ""
    for name, (source, digest) in teachers.items():
        if settings.get("lora_hash") == digest if digest else _is_of_hub(source, settings["lora"]):
            return name, ""
    return "", "it is of another LoRA, or of this student at another round"


def _is_of_hub(source: str, lora: str) -> bool:
    """Whether a folder of the hub's cache holds what a hub id names."""
    if "/" not in source:
        return False
    owner, name, *inside = source.partition("@")[0].rstrip("/").split("/")
    _, repository, path = lora.partition(f"/models--{owner}--{name}/snapshots/")
    return bool(repository) and path.split("/")[1:] == inside  # after the commit


def _table(data_set: str, models: Sequence[Model]) -> Scores:
    rows = {model.name: model.evaluations[data_set] for model in models if data_set in model.evaluations}
    columns = [
        Column(score, score, data_set) for score in dict.fromkeys(s for each in rows.values() for s in each.scores)
    ]
    own = [model for model in models if model.name in rows]
    values = [[_value(column, model) for column in columns] for model in own]
    guidance = [f"{rows[model.name].settings['guidance_scale']:g}" for model in own]
    how = ", ".join(dict.fromkeys(text for each in rows.values() for text in _how(each)))
    named = [model.name.replace(TEACHER, "teacher ", 1) for model in own]
    return Scores(data_set, how, [column.title for column in columns], list(zip(named, guidance, values, strict=True)))


def _value(column: Column, model: Model) -> str:
    found = column.of(model)
    if found is None:
        return "–"
    error = f" ± {found.standard_error:.{column.digits}f}" if found.count > 1 else ""
    return f"{found.mean:.{column.digits}f}{error}"


def _how(evaluation: Evaluation) -> Iterator[str]:
    """What all rows of a table should have in common."""
    settings, images = evaluation.settings, max((score.count for score in evaluation.scores.values()), default=0)
    if evaluation.records:
        yield f"{len(set(evaluation.prompts))} distinct prompts"
    yield f"{len(evaluation.records) or images} images"
    yield from (text.format(settings[key]) for key, text in _TITLES.items() if key in settings)
