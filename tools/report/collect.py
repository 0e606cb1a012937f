"""The report of a distillation: read from a run folder and evaluations; as a page, as numbers, as a text table."""

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from diffusionopd.config_schema import ConfigError, is_number, read_json_config
from diffusionopd.evaluation.results import AVERAGES, RESULTS, EvaluationError, Summary, read_averages, read_records
from diffusionopd.evaluation.testsets import first
from tools.report import plots
from tools.report.pages import aligned, data_uri, image_of, render_page
from tools.report.plots import Points

PACKAGES = ("diffusionopd", "torch", "diffusers", "transformers", "peft", "accelerate")
IMAGES = 6  # test prompts of each task that are shown, the first ones
BASE, STUDENT, MERGE = "base", "student", "merge-"


@dataclass(frozen=True)
class Image:
    """One test prompt as base, teacher, merges and student drew it: files by model, with that image's score."""

    caption: str
    files: Mapping[str, Path]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Task:
    """One task: the score it is judged by, its values by model, and what was seen of it during training."""

    name: str
    reward: str
    scores: Mapping[str, Summary]
    monitored: Points = ()
    evaluated: Points = ()
    loss: Points = ()
    images: Sequence[Image] = ()

    @property
    def teacher(self) -> str:
        """The model that teaches this task: its evaluations' folder."""
        return f"teacher-{self.name}"

    @property
    def gap_closed(self) -> float | None:
        """(student - base) / (teacher - base); None where base and teacher score the same."""
        base, teacher, student = (self.scores[model].mean for model in (BASE, self.teacher, STUDENT))
        return (student - base) / (teacher - base) if teacher != base else None


@dataclass(frozen=True)
class Report:
    """Everything on the page; `facts` are (name, value) pairs about the run and the machine."""

    title: str
    tasks: Sequence[Task]
    rounds: int
    seconds: float
    facts: Sequence[tuple[str, str]] = ()

    @property
    def models(self) -> list[str]:
        """Base, teachers, merges, student."""
        found = dict.fromkeys(model for task in self.tasks for model in task.scores)
        return sorted(found, key=lambda model: (model == STUDENT, model.startswith(MERGE)))


class ReportError(ValueError):
    """Raised for a report that cannot be made; names what is missing."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rounds of a run's `metrics.jsonl` in order, each once (a resumed run may repeat some; the last counts).

    Round 0, where there is one, is the evaluation of the start.

    Raises:
        ReportError: there is no such file, or not one complete round in it.
    """
    path, rounds = run / "metrics.jsonl", {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):  # a line cut short by a kill
            row = json.loads(line)
            rounds[row["round"]] = row
    if not any(rounds):
        raise ReportError(f"{path} holds no finished round: has the run been trained?")
    return [rounds[number] for number in sorted(rounds)]


def points(rows: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(round, value) of a metric where it was measured."""
    return [(row["round"], row[key]) for row in rows if is_number(row.get(key))]


def collect(run: Path, evaluations: Path, title: str, seconds: float = 0.0) -> Report:
    """Read a run folder and `<evaluations>/{base,teacher-<task>,student}/<task>/`; `merge-*`, and teachers on other
    tasks, where they are there.

    Args:
        seconds: wall-clock time of the distillation, where known to be more than its rounds together.

    Raises:
        ReportError: something is missing, with its path.
    """
    try:
        config, rows = read_json_config(run / "config.json"), read_metrics(run)
        teachers = config["train"]["teachers"]
        merges = sorted(path.name for path in evaluations.glob(f"{MERGE}*"))
        models = [BASE, *(f"teacher-{teacher['name']}" for teacher in teachers), *merges, STUDENT]
        tasks = []
        for teacher in teachers:
            name, reward = teacher["name"], next(iter(teacher["proxy_reward"]), "")
            folders = {model: evaluations / model / name for model in models}
            shown = {model: folders[model] for model in (BASE, f"teacher-{name}", *merges, STUDENT)}
            there = [model for model in models if model in shown or folders[model].is_dir()]
            scores = {model: read_averages(folders[model] / AVERAGES)[reward] for model in there}
            keys = (f"monitor/{name}/{reward}", f"eval/{name}/{reward}", f"loss/{name}")
            monitored, evaluated, loss = (points(rows, key) for key in keys)
            images = _images(shown, reward)
            tasks.append(Task(name, reward, scores, monitored, evaluated, loss, images))
        rounds = int(rows[-1]["round"])
        seconds = max(seconds, sum(value for _, value in points(rows, "seconds")))
        facts = [*_run_facts(config, tasks, rounds, seconds), *machine_facts()]
    except (ConfigError, EvaluationError) as error:
        raise ReportError(f"the run or an evaluation cannot be read: {error}") from error
    except KeyError as error:
        raise ReportError(f"{run / 'config.json'} or an evaluation of {evaluations} lacks {error}") from error
    except (TypeError, AttributeError, StopIteration) as error:
        raise ReportError(f"{run / 'config.json'} is not what a run has written: {error!r}") from error
    return Report(title, tasks, rounds, seconds, facts)


def _images(folders: Mapping[str, Path], reward: str) -> list[Image]:
    records = {model: {r.sample_id: r for r in read_records(folder / RESULTS)} for model, folder in folders.items()}
    images = []
    for sample_id in sorted(set.intersection(*map(set, records.values())))[:IMAGES]:
        files = {model: folder / "images" / f"{sample_id:05d}.jpg" for model, folder in folders.items()}
        for file in files.values():
            if not file.is_file():
                raise ReportError(f"{file} is missing; evaluate again with --save_images --resume")
        scores = {model: by_id[sample_id].scores[reward] for model, by_id in records.items()}
        images.append(Image(records[STUDENT][sample_id].prompt, files, scores))
    return images


def _run_facts(config: Mapping[str, Any], tasks: Sequence[Task], rounds: int, seconds: float) -> list[tuple[str, str]]:
    sample, train = config["sample"], config["train"]
    student = sample["guidance_scale"] if train["cfg"] else 1.0
    teachers = [
        f"{teacher['name']} (guidance {first(teacher.get('guidance_scale'), sample['teacher_guidance_scale']):g})"
        for teacher in train["teachers"]
    ]
    return [
        ("Base model", config["pretrained"]["model"]),
        ("Student", f"LoRA of rank {train['lora_rank']}, guidance {student:g}"),
        ("Teachers", ", ".join(teachers)),
        ("Distillation", f"{rounds} rounds in {duration(seconds)}, learning rate {train['learning_rate']:g}"),
        ("Sampling", f"{sample['num_steps']} steps in training, {sample['eval_num_steps']} in evaluation"),
        ("Test images", ", ".join(f"{t.scores[STUDENT].count} {t.name}" for t in tasks)),
        ("Different test prompts", ", ".join(f"{t.scores[STUDENT].prompts or '?'} {t.name}" for t in tasks)),
    ]


def machine_facts() -> list[tuple[str, str]]:
    """What this process runs on: processor, system, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.is_file() else None
    model = found[1] if found else platform.machine()
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return [
        ("Machine", f"{os.cpu_count()} CPU cores, {model}, {platform.system()}"),
        ("Versions", ", ".join(versions)),
    ]


# ---- What is shown ---------------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The page as one HTML document that refers to nothing outside itself."""
    shares = [task.gap_closed for task in report.tasks if task.gap_closed is not None]
    mean_gap = percent(fmean(shares) if shares else None)
    shown = {"title": report.title, "facts": report.facts, "report": report, "mean_gap": mean_gap}
    helpers = {"percent": percent, "label": label, "duration": duration, "image": image_of}
    return render_page("report.html.j2", plots=_plots(report), **shown, **helpers)


def _plots(report: Report) -> list[dict[str, str]]:
    found = []
    for task in report.tasks:
        base, teacher, student = (task.scores[model] for model in (BASE, task.teacher, STUDENT))
        final = (report.rounds, student.mean, student.standard_error)
        svg = plots.score_curve(task.monitored, task.evaluated, base.mean, teacher.mean, final)
        text = (
            f"{task.reward} of the student over {report.rounds} rounds, ending at {student.mean:.3f}, "
            f"between the base model's {base.mean:.3f} and the teacher's {teacher.mean:.3f}"
        )
        found.append((svg, task.name, text))
    if losses := {task.name: task.loss for task in report.tasks if task.loss}:
        ends = ", ".join(f"{name} from {p[0][1]:.2g} to {p[-1][1]:.2g}" for name, p in losses.items())
        found.append((plots.loss_curves(losses), "distillation loss", f"Loss over rounds: {ends}"))
    return [
        {"src": data_uri("image/svg+xml", svg.encode()), "title": title, "text": text} for svg, title, text in found
    ]


def summary(report: Report) -> dict[str, Any]:
    """The scores as plain numbers: base, teachers by task, merges, student, each by reward; rounds and seconds."""

    def scores(model: str) -> dict[str, float]:
        return {task.reward: task.scores[model].mean for task in report.tasks if model in task.scores}

    return {
        "base": scores(BASE),
        "teachers": {task.name: scores(task.teacher) for task in report.tasks},
        "merges": {model: scores(model) for model in report.models if model.startswith(MERGE)},
        "student": scores(STUDENT),
        "rounds": report.rounds,
        "seconds": round(report.seconds, 1),
    }


def duration(seconds: float) -> str:
    """`45 s`, `9 min 12 s` or `3 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def text_table(report: Report) -> str:
    """Base, teachers and student against the tasks' scores, for the terminal."""
    return aligned(
        [
            ["", *(task.reward for task in report.tasks)],
            *([label(model), *(_mean(task, model) for task in report.tasks)] for model in report.models),
            ["gap closed", *(percent(task.gap_closed) for task in report.tasks)],
        ]
    )


def _mean(task: Task, model: str) -> str:
    return f"{task.scores[model].mean:.3f}" if model in task.scores else "–"


def label(model: str) -> str:
    """A model's name for people."""
    kind, _, name = model.partition("-")
    if model.startswith(MERGE):
        method, _, scale = name.partition("-")
        return f"merge by {method}" + (f" x {scale}" if scale else "")
    return f"{kind} {name}" if name else model


def percent(share: float | None) -> str:
    """A share of 0 to 1 in whole percent, a dash for None."""
    return "–" if share is None else f"{100 * share:.0f}%"
