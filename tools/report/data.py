"""What a report says, as plain data, and the numbers that follow from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusionopd.evaluation.results import Summary
from tools.report.plots import Points

BASE, STUDENT = "base", "student"


def teacher_folder(task: str) -> str:
    """Name of the evaluation folder of a task's teacher."""
    return f"teacher-{task}"


@dataclass(frozen=True)
class Picture:
    """One test prompt as base, teacher and student drew it: files by model, with that picture's score."""

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
    pictures: Sequence[Picture] = ()

    @property
    def teacher(self) -> str:
        """The model that teaches this task."""
        return teacher_folder(self.name)

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
        """Base, teachers, student."""
        return [BASE, *(task.teacher for task in self.tasks), STUDENT]


def summary(report: Report) -> dict[str, Any]:
    """The scores as plain numbers: base, teachers by task, student, each by reward; rounds and seconds."""

    def scores(model: str) -> dict[str, float]:
        return {task.reward: task.scores[model].mean for task in report.tasks}

    return {
        "base": scores(BASE),
        "teachers": {task.name: scores(task.teacher) for task in report.tasks},
        "student": scores(STUDENT),
        "rounds": report.rounds,
        "seconds": round(report.seconds, 1),
    }


def duration(seconds: float) -> str:
    """`45 s`, `9 min 12 s` or `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def text_table(report: Report) -> str:
    """Base, teachers and student against the tasks' scores, for the terminal."""
    rows = [["", *(task.reward for task in report.tasks)]]
    for model in report.models:
        rows.append([label(model), *(f"{task.scores[model].mean:.3f}" for task in report.tasks)])
    rows.append(["gap closed", *(percent(task.gap_closed) for task in report.tasks)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    return "\n".join("  ".join(row) for row in cells)


def label(model: str) -> str:
    """A model's name for people."""
    return f"teacher {model.removeprefix('teacher-')}" if model.startswith("teacher-") else model


def percent(share: float | None) -> str:
    """A share of 0 to 1 in whole percent, a dash for None."""
    return "–" if share is None else f"{100 * share:.0f}%"
