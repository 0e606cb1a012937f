"""The plots of the claims report: runs in, figures out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.claims.curves import Point, Result, Runs, curve_from_base, monitored
from experiments.claims.experiments import TASKS

# Okabe and Ito's colours, which stay apart for colour-blind eyes.
BASE = "#6b7280"
BLUE, RED, GREEN, PURPLE, BLACK = "#0b62a8", "#c2410c", "#00795c", "#a2528f", "#2b2b2b"
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
            if "teacher_" in lines:
                _level(axes, runs, f"shipped_{task}", task, "shipped teacher", BLACK, "--")
            else:
                _level(axes, runs, f"teacher_{task}", task, "teacher of the task", BLACK, "--")
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


def _draw(axes: Axes, runs: Runs, name: str, color: str, task: str, abscissa: Abscissa, label: str) -> None:
    """The seeds' mean at the rounds that all of them have (dots), in a band from the lowest to the highest."""
    results = [result for result in runs.get(name, {}).values() if result.curve]
    if not results:
        return
    curves = [{point.round: point for point in _from_base(runs, result)} for result in results]
    rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
    x = [fmean(abscissa(result, c[n]) for result, c in zip(results, curves, strict=True)) for n in rounds]
    scores = [[curve[n].scores[task] for curve in curves] for n in rounds]
    label = f"{label or results[0].label} ({len(results)} seed{'s' if len(results) > 1 else ''})"
    means = [fmean(s) for s in scores]
    style = "--" if name.startswith("ppo") else "-"
    axes.plot(x, means, style, color=color, linewidth=1.8, marker="o", markersize=3, label=label)
    axes.fill_between(x, [min(s) for s in scores], [max(s) for s in scores], color=color, alpha=0.15, linewidth=0)


def _from_base(runs: Runs, result: Result) -> Sequence[Point]:
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
