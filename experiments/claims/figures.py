"""The plots of the claims report: runs in, figures out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims.curves import Point, Result, Runs, curve_from_base, monitored
from experiments.claims.experiments import TASKS
from tools.report.plots import BASE, SERIES, style

BLUE, RED, GREEN, PURPLE, _, BLACK = SERIES
METHODS = {"opd": BLUE, "multitask_nft": RED, "multitask_guard": GREEN, "cascade_nft": PURPLE}
NOISE = {"opd_noise00": BLUE, "opd_noise03": GREEN, "opd_noise07": RED}
ESTIMATORS = {"opd_noise03": GREEN, "ppo_noise03": GREEN, "opd_noise07": RED, "ppo_noise07": RED}

Abscissa = Callable[[Result, Point], float]
AXES: Mapping[str, Abscissa] = {
    "rounds": lambda _, point: point.round,
    "thousand evaluations": lambda _, point: point.evaluations / 1000,
    "thousand evaluations, teachers' included": lambda run, p: (run.teacher_evaluations + p.evaluations) / 1000,
}


def figures(runs: Runs) -> dict[str, Figure]:
    """File name -> figure, of those for which there is any curve."""
    rounds = {"rounds": AXES["rounds"]}
    drawn = {
        "methods.png": _figure(runs, METHODS, AXES),
        "noise.png": _figure(runs, NOISE, rounds),
        "estimators.png": _figure(runs, ESTIMATORS, rounds),
        "teachers.png": _figure(runs, {"teacher_": BLUE, "guard_": GREEN}, rounds),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _figure(runs: Runs, lines: Mapping[str, str], abscissas: Mapping[str, Abscissa]) -> Figure | None:
    """A row per abscissa, a column per task; above and below, levels of finished models, on the monitored prompts.

    ``lines`` are colours by experiment; one whose name ends in ``_`` is that of each task.
    """
    panels = {t: {name + t if name.endswith("_") else name: color for name, color in lines.items()} for t in TASKS}
    if not any(run.curve for names in panels.values() for name in names for run in runs.get(name, {}).values()):
        return None
    figure, grid = _panels(len(abscissas))
    for row, (xlabel, abscissa) in zip(grid, abscissas.items(), strict=True):
        for axes, (task, names) in zip(row, panels.items(), strict=True):
            axes.set_xlabel(xlabel)
            for name, color in names.items():
                label = {f"teacher_{task}": "DiffusionNFT", f"guard_{task}": "GRPO-Guard"}.get(name, "")
                _draw(axes, runs, name, color, task, abscissa, label)
            kind, named = ("shipped", "shipped teacher") if "teacher_" in lines else ("teacher", "teacher of the task")
            _level(axes, runs, f"{kind}_{task}", task, named, BLACK, "--")
            _level(axes, runs, "base", task, "base", BASE, ":")
    handles: dict[str, Any] = {}  # each label once
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _panels(rows: int) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(11, 0.7 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, len(TASKS), squeeze=False).tolist()
    for i, row in enumerate(grid):
        for axes, task in zip(row, TASKS, strict=True):
            axes.set_title(task if i == 0 else "", fontsize=11)
            style(axes, nbins=6, steps=[1, 2, 5, 10])
        row[0].set_ylabel("score")
    return figure, grid


def _draw(axes: Axes, runs: Runs, name: str, color: str, task: str, abscissa: Abscissa, label: str) -> None:
    """The seeds' mean at the rounds that all of them have (dots), in a band from the lowest to the highest."""
    results = [result for result in runs.get(name, {}).values() if result.curve]
    if not results:
        return
    bases = runs.get("base", {})
    curves = [curve_from_base(r, bases.get(r.seed, next(iter(bases.values())))) if bases else r.curve for r in results]
    at = [{point.round: point for point in curve} for curve in curves]
    rounds = sorted(set.intersection(*map(set, at)))
    x = [fmean(abscissa(result, points[n]) for result, points in zip(results, at, strict=True)) for n in rounds]
    scores = [[points[n].scores[task] for points in at] for n in rounds]
    label = f"{label or results[0].label} ({len(results)} seed{'s' if len(results) > 1 else ''})"
    style = "--" if name.startswith("ppo") else "-"
    axes.plot(x, [*map(fmean, scores)], style, color=color, linewidth=1.8, marker="o", markersize=3, label=label)
    axes.fill_between(x, [*map(min, scores)], [*map(max, scores)], color=color, alpha=0.15, linewidth=0)


def _level(axes: Axes, runs: Runs, experiment: str, task: str, label: str, color: str, style: str) -> None:
    results = runs.get(experiment, {}).values()
    if results:
        mean = fmean(monitored(result, task) for result in results)
        axes.axhline(mean, color=color, linestyle=style, linewidth=1.2, label=label)
