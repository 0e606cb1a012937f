"""Finished runs as they stand in their files, and their scores along training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusionopd.evaluation.results import Summary
from experiments.claims.experiments import TASKS

REMEDY = "python experiments/claims/run.py"


class ClaimsError(ValueError):
    """Results that cannot be read or put side by side; the message says what, where and the remedy."""


@dataclass(frozen=True)
class Point:
    """Scores on the monitored test prompts after so many rounds and forward passes of single images."""

    round: int
    evaluations: float
    scores: Mapping[str, float]  # task -> score; a teacher's curve has its own task alone, the base's is one point


@dataclass(frozen=True)
class Result:
    """One experiment with one seed, as its file has it. Evaluations are forward passes of single images (NFE)."""

    experiment: str
    label: str
    seed: int
    form: str  # full or short
    rounds: int
    seconds: float  # of the training
    evaluations: float
    teacher_evaluations: float
    curve: Sequence[Point]
    final: Mapping[str, Summary]
    machine: str
    date: str
    backwards: float | None = None  # images whose forward was also backpropagated; None where it was not counted

    @property
    def with_teachers(self) -> float:
        """Evaluations of this training and of the teachers it used."""
        return self.evaluations + self.teacher_evaluations

    def means(self) -> dict[str, float]:
        """Task -> the finished model's score on all test prompts."""
        return {task: self.final[task].mean for task in TASKS}


Runs = Mapping[str, Mapping[int, Result]]
"""Experiment -> seed -> result."""


def read_results(folder: Path) -> dict[str, dict[int, Result]]:
    """Every ``<experiment>-seed<seed>.json`` of a folder.

    Raises:
        ClaimsError: no such file there, one that is no result, short runs among full ones.
    """
    runs: dict[str, dict[int, Result]] = {}
    for file in sorted(folder.glob("*-seed*.json")):
        result = read_result(file)
        runs.setdefault(result.experiment, {})[result.seed] = result
    forms = {result.form for by_seed in runs.values() for result in by_seed.values()}
    if not runs:
        raise ClaimsError(f"{folder} holds no results; make some with {REMEDY}")
    if len(forms) > 1:
        raise ClaimsError(f"{folder} mixes runs of the forms {', '.join(sorted(forms))}; move one of them elsewhere")
    return runs


def read_result(file: Path) -> Result:
    """The result in a file; ClaimsError if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        content["curve"] = [Point(**point) for point in content["curve"]]
        content["final"] = {task: Summary(**content["final"][task]) for task in TASKS}
        return Result(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ClaimsError(f"{file} is no result of a run ({error!r}); remove it and run {REMEDY} again") from error


def curve_from_base(result: Result, base: Result) -> list[Point]:
    """The run's curve with the base's scores before it: every training starts there."""
    if not result.curve:
        return []
    return [Point(0, 0.0, {task: monitored(base, task) for task in result.curve[0].scores}), *result.curve]


def monitored(result: Result, task: str) -> float:
    """The finished model's score on the prompts of the curves; on all test prompts where its curve has not the task.

    Curves are compared with such scores alone: what one gains from easy prompts the other gains too.
    """
    end = result.curve[-1].scores if result.curve else {}
    return end[task] if task in end else result.final[task].mean


def at_evaluations(curve: Sequence[Point], evaluations: float) -> dict[str, float]:
    """Scores interpolated linearly at so many evaluations; beyond the curve's ends, its ends."""
    x = [point.evaluations for point in curve]
    return {task: float(np.interp(evaluations, x, [p.scores[task] for p in curve])) for task in curve[0].scores}


def rounds_to(curve: Sequence[Point], task: str, level: float) -> float | None:
    """Rounds, with fraction, after which the linearly interpolated curve first has this score; None if it never has."""
    first = next((i for i, point in enumerate(curve) if point.scores[task] >= level), None)
    if not first:
        return None if first is None else float(curve[0].round)
    before, point = curve[first - 1], curve[first]
    low, high = before.scores[task], point.scores[task]
    return before.round + (level - low) / (high - low) * (point.round - before.round)


def area(points: Sequence[tuple[float, float]], end: float) -> float:
    """Area under a piecewise linear curve of (x, y) from its first x to ``end``, divided by that length."""
    x, y = np.array(points, dtype=np.float64).T
    inside = x < end
    x, y = np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))
