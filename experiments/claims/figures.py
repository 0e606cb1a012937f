"""The plots of the claims report: runs in, figures out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.claims.curves import Point, Result, Runs, curve_from_base, monitored
from experiments.claims.experiments import TASKS
from tools.report.plots import BASE, SERIES

Abscissa = Callable[[Result, Point], float]


@dataclass(frozen=True)
class Line:
    """One method in a figure."""

    experiment: str
    color: str
    style: str = "-"


METHODS = (
    Line("opd", SERIES[0]),
    Line("multitask_nft", SERIES[1]),
    Line("multitask_guard", SERIES[2]),
    Line("cascade_nft", SERIES[3]),
)
NOISE = (Line("opd_noise00", SERIES[0]), Line("opd_noise03", SERIES[2]), Line("opd_noise07", SERIES[1]))
ESTIMATORS = (
    Line("opd_noise03", SERIES[2]),
    Line("ppo_noise03", SERIES[2], "--"),
    Line("opd_noise07", SERIES[1]),
    Line("ppo_noise07", SERIES[1], "--"),
)
AXES: Mapping[str, Abscissa] = {
    "rounds": lambda _, point: point.round,
    "thousand evaluations": lambda _, point: point.evaluations / 1000,
    "thousand evaluations, teachers' included": lambda run, p: (run.teacher_evaluations + p.evaluations) / 1000,
}


def figures(runs: Runs) -> dict[str, Figure]:
    """File name -> figure, of those for which there is any curve."""
    rounds = {"rounds": AXES["rounds"]}
    drawn = {
        "methods.png": _students(runs, METHODS, AXES),
        "noise.png": _students(runs, NOISE, rounds),
        "estimators.png": _students(runs, ESTIMATORS, rounds),
        "teachers.png": _teachers(runs),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _students(runs: Runs, lines: Sequence[Line], abscissas: Mapping[str, Abscissa]) -> Figure | None:
    """A row an abscissa, a column a task; below and above, the finished teachers' and the base's level.

    Everything on the monitored test prompts.
    """
    if not any(_has_curve(runs, line.experiment) for line in lines):
        return None
    figure, grid = _panels(len(abscissas))
    for row, (xlabel, abscissa) in zip(grid, abscissas.items(), strict=True):
        for axes, task in zip(row, TASKS, strict=True):
            axes.set_xlabel(xlabel)
            for line in lines:
                _draw(axes, runs, line, task, abscissa)
            _level(axes, runs, f"teacher_{task}", task, "teacher of the task", SERIES[5], "--")
            _level(axes, runs, "base", task, "base", BASE, ":")
    _legend(figure, grid)
    return figure


def _teachers(runs: Runs) -> Figure | None:
    lines = [(Line(f"teacher_{t}", SERIES[0]), Line(f"guard_{t}", SERIES[2])) for t in TASKS]
    if not any(_has_curve(runs, line.experiment) for pair in lines for line in pair):
        return None
    figure, grid = _panels(1)
    for axes, task, (nft, guard) in zip(grid[0], TASKS, lines, strict=True):
        axes.set_xlabel("rounds")
        _draw(axes, runs, nft, task, AXES["rounds"], "DiffusionNFT")
        _draw(axes, runs, guard, task, AXES["rounds"], "GRPO-Guard")
        _level(axes, runs, f"shipped_{task}", task, "shipped teacher", SERIES[5], "--")
        _level(axes, runs, "base", task, "base", BASE, ":")
    _legend(figure, grid)
    return figure


def _panels(rows: int) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(11, 0.7 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, len(TASKS), squeeze=False).tolist()
    for i, row in enumerate(grid):
        for axes, task in zip(row, TASKS, strict=True):
            axes.set_title(task if i == 0 else "", fontsize=11)
            axes.grid(True, color="#e5e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
        row[0].set_ylabel("score")
    return figure, grid


def _has_curve(runs: Runs, experiment: str) -> bool:
    return any(result.curve for result in runs.get(experiment, {}).values())


def _draw(axes: Axes, runs: Runs, line: Line, task: str, abscissa: Abscissa, label: str = "") -> None:
    """The seeds' mean at the rounds that all of them have (dots), in a band from the lowest to the highest."""
    results = [result for result in runs.get(line.experiment, {}).values() if result.curve]
    if not results:
        return
    curves = [{point.round: point for point in _whole_curve(runs, result)} for result in results]
    rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
    x = [fmean(abscissa(result, c[n]) for result, c in zip(results, curves, strict=True)) for n in rounds]
    scores = [[curve[n].scores[task] for curve in curves] for n in rounds]
    label = f"{label or results[0].label} ({len(results)} seed{'s' if len(results) > 1 else ''})"
    means = [fmean(s) for s in scores]
    axes.plot(x, means, line.style, color=line.color, linewidth=1.8, marker="o", markersize=3, label=label)
    axes.fill_between(x, [min(s) for s in scores], [max(s) for s in scores], color=line.color, alpha=0.15, linewidth=0)


def _whole_curve(runs: Runs, result: Result) -> Sequence[Point]:
    """From the base's scores on, where the base was evaluated."""
    base = next(iter(runs.get("base", {}).values()), None)
    return result.curve if base is None else curve_from_base(result, runs["base"].get(result.seed, base))


def _level(axes: Axes, runs: Runs, experiment: str, task: str, label: str, color: str, style: str) -> None:
    results = runs.get(experiment, {}).values()
    if results:
        mean = fmean(monitored(result, task) for result in results)
        axes.axhline(mean, color=color, linestyle=style, linewidth=1.2, label=label)


def _legend(figure: Figure, grid: Sequence[Sequence[Axes]]) -> None:
    """One for all panels, each label once."""
    handles = {}
    for axes in (axes for row in grid for axes in row):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
