"""A report's data, read from a run folder and the evaluations of base, teachers and student."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusionopd.config_schema import ConfigError, is_number, read_run_config
from diffusionopd.evaluation.results import AVERAGES, RESULTS, EvaluationError, Summary, read_averages, read_records
from tools.report.data import BASE, STUDENT, Picture, Report, Task, duration, teacher_folder

PACKAGES = ("diffusionopd", "torch", "diffusers", "transformers", "peft", "accelerate")


class ReportError(ValueError):
    """A report that cannot be made; the message names what is missing."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rounds of a run's `metrics.jsonl` in order, each once (a resumed run may repeat some; the last counts).

    Raises:
        ReportError: there is no such file, or not one whole round in it.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ReportError(f"{path} does not exist: has the run been trained?")
    rounds = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a line cut short by a kill
            continue
        if isinstance(row, dict) and isinstance(row.get("round"), int) and not isinstance(row["round"], bool):
            rounds[row["round"]] = row
    if not rounds:
        raise ReportError(f"{path} holds no finished round")
    return [rounds[number] for number in sorted(rounds)]


def points(rows: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(round, value) of a metric where it was measured."""
    return [(row["round"], row[key]) for row in rows if is_number(row.get(key))]


def collect(run: Path, evaluations: Path, title: str, seconds: float = 0.0, num_pictures: int = 6) -> Report:
    """Read a run folder and `<evaluations>/{base,teacher-<task>,student}/<task>/`.

    Args:
        seconds: wall-clock time of the distillation, where known to be more than its rounds together.
        num_pictures: test prompts a task to show, the first ones.

    Raises:
        ReportError: something is missing, with its path.
    """
    try:
        config = read_run_config(run / "config.json")
    except ConfigError as error:
        raise ReportError(f"{run} is no run folder: {error}") from error
    rows = read_metrics(run)
    rounds = int(rows[-1]["round"])
    seconds = max(seconds, sum(value for _, value in points(rows, "seconds")))
    try:
        teachers = config["train"]["teachers"]
        names = [teacher["name"] for teacher in teachers]
        tasks = [_collect_task(teacher, names, rows, evaluations, num_pictures) for teacher in teachers]
        facts = [*_run_facts(config, tasks, rounds, seconds), *machine_facts()]
    except KeyError as error:
        raise ReportError(f"{run / 'config.json'} or an evaluation lacks {error}") from error
    return Report(title, tasks, rounds, seconds, facts)


def _collect_task(
    teacher: Mapping[str, Any],
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    evaluations: Path,
    num_pictures: int,
) -> Task:
    name, reward = teacher["name"], next(iter(teacher["proxy_reward"]), "")
    models = [BASE, *map(teacher_folder, names), STUDENT]
    scores = {model: _score(evaluations / model / name, reward) for model in models}
    shown = (BASE, teacher_folder(name), STUDENT)
    return Task(
        name,
        reward,
        scores,
        monitored=points(rows, f"monitor/{name}/{reward}"),
        evaluated=points(rows, f"eval/{name}/{reward}"),
        loss=points(rows, f"loss/{name}"),
        pictures=_pictures({model: evaluations / model / name for model in shown}, reward, num_pictures),
    )


def _score(folder: Path, reward: str) -> Summary:
    try:
        averages = read_averages(folder / AVERAGES)
    except EvaluationError as error:
        raise ReportError(f"an evaluation is missing: {error}") from error
    if reward not in averages:
        raise ReportError(f"{folder} was not scored with '{reward}'; it has {', '.join(averages) or 'no score'}")
    return averages[reward]


def _pictures(folders: Mapping[str, Path], reward: str, count: int) -> list[Picture]:
    records = {model: {r.sample_id: r for r in read_records(folder / RESULTS)} for model, folder in folders.items()}
    common = sorted(set.intersection(*(set(by_id) for by_id in records.values())))
    pictures = []
    for sample_id in common[:count]:
        files = {model: folder / "images" / f"{sample_id:05d}.jpg" for model, folder in folders.items()}
        if all(file.is_file() for file in files.values()):
            scores = {model: by_id[sample_id].scores[reward] for model, by_id in records.items()}
            pictures.append(Picture(records[STUDENT][sample_id].prompt, files, scores))
    return pictures


def _run_facts(config: Mapping[str, Any], tasks: Sequence[Task], rounds: int, seconds: float) -> list[tuple[str, str]]:
    sample, train = config["sample"], config["train"]
    student = sample["guidance_scale"] if train["cfg"] else 1.0
    teachers = [
        f"{teacher['name']} (guidance {teacher.get('guidance_scale', sample['teacher_guidance_scale']):g})"
        for teacher in train["teachers"]
    ]
    return [
        ("Base model", config["pretrained"]["model"]),
        ("Student", f"LoRA of rank {train['lora_rank']}, guidance {student:g}"),
        ("Teachers", ", ".join(teachers)),
        ("Distillation", f"{rounds} rounds in {duration(seconds)}, learning rate {train['learning_rate']:g}"),
        ("Sampling", f"{sample['num_steps']} steps in training, {sample['eval_num_steps']} in evaluation"),
        ("Test prompts", ", ".join(f"{task.scores[STUDENT].count} {task.name}" for task in tasks)),
    ]


def machine_facts() -> list[tuple[str, str]]:
    """What this process runs on: processor, system, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = [f"{name} {metadata.version(name)}" for name in PACKAGES if _installed(name)]
    return [
        ("Machine", f"{os.cpu_count()} CPU cores, {model}, {platform.system()}"),
        ("Versions", ", ".join([f"Python {platform.python_version()}", *versions])),
    ]


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
