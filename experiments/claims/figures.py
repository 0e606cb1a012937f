"""The plots of the report: runs in, figures out. Scores on validation prompts along training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims.arms import HALF
from experiments.claims.results import Result, Runs
from experiments.claims.worlds import World
from tools.report.plots import BASE, SERIES, style

BLUE, RED, GREEN, PURPLE, ORANGE, BLACK = SERIES
METHODS = {
    "opd": ("DiffusionOPD, our loss", BLUE, "-"),
    "paper": ("DiffusionOPD, the paper's loss", BLUE, "--"),
    "multitask_nft": ("multi-task NFT", RED, "-"),
    "multitask_guard": ("multi-task GRPO-Guard", GREEN, "-"),
    "cascade_nft": ("cascade NFT", PURPLE, "-"),
}
NOISE = {
    "closed_0": ("ODE", BLUE, "-"),
    "closed_0.3": ("noise 0.3", GREEN, "-"),
    "closed_0.7": ("noise 0.7", RED, "-"),
}
ESTIMATORS = {
    f"{kind}_{noise}{stage}": (f"{label}, noise {noise}", color, line)
    for kind, stage, label, line in (  # over as many rounds
        ("closed", f".{HALF}", "closed form", "-"),
        ("plain", "", "plain", ":"),
        ("centred", "", "centred", "--"),
    )
    for noise, color in (("0.3", GREEN), ("0.7", RED))
}
DRAWN = {
    "target": ("target itself", BLACK),
    "opd": ("our loss", BLUE),
    "paper": ("the paper's loss", RED),
}
FIGURES = {
    "score": "score",
    "spread": "distance of two images of a prompt",
    "from_base": "distance to the base's image",
}
Lines = Mapping[str, tuple[str, str, str]]
Abscissa = Callable[[Result, int], float]
AXES: Mapping[str, Abscissa] = {
    "rounds": lambda _, number: float(number),
    "thousand forwards + 2 x backwards": lambda run, number: number / run.rounds * run.cost / 1000,
    "the same, teachers' included": lambda run, number: (
        (number / run.rounds * run.cost + run.cost_with_teachers - run.cost) / 1000
    ),
}


def figures(runs: Runs, world: World) -> dict[str, Figure]:
    """File name -> figure, of those for which there is any curve."""
    rounds = {"rounds": AXES["rounds"]}
    drawn = {
        "methods.png": _figure(runs, world, METHODS, AXES),
        "noise.png": _figure(runs, world, NOISE, rounds),
        "estimators.png": _figure(runs, world, ESTIMATORS, rounds),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def means(measured: Sequence[Mapping[str, Any]]) -> dict[tuple[int, float, str], dict[str, dict[str, float]]]:
    """Rounds of the teachers, strength, what drew -> task -> figure of ``beyond.py`` -> mean over the seeds."""
    by: dict[tuple[int, float, str], dict[str, list[Mapping[str, Any]]]] = {}
    for row in (row for one in measured for row in one["figures"]):
        by.setdefault((row["rounds"], row["strength"], row["kind"]), {}).setdefault(row["task"], []).append(row)
    return {
        key: {task: {name: fmean(row[name] for row in rows) for name in FIGURES} for task, rows in tasks.items()}
        for key, tasks in by.items()
    }


def drawing(measured: Sequence[Mapping[str, Any]], world: World) -> Figure:
    """Over the strength, a row per figure of ``beyond.py``, a column per task; a style per age of the teachers."""
    found = means(measured)
    ages = sorted({rounds for rounds, _, kind in found if kind == "teacher"})
    figure = Figure(figsize=(3.7 * len(world.names), 0.7 + 2.5 * len(FIGURES)), layout="constrained")
    grid = figure.subplots(len(FIGURES), len(world.names), squeeze=False).tolist()
    for row, (name, title) in zip(grid, FIGURES.items(), strict=True):
        row[0].set_ylabel(title, fontsize=9)
        for axes, task in zip(row, world.names, strict=True):
            axes.set_title(task if row is grid[0] else "", fontsize=11)
            axes.set_xlabel("strength" if row is grid[-1] else "")
            style(axes, nbins=6, steps=[1, 2, 5, 10])
            for age, line in zip(ages, (":", "-"), strict=False):
                for kind, (label, color) in DRAWN.items():
                    kinds = (kind, "teacher") if kind == "target" else (kind,)  # which is its target at strength 1
                    points = sorted(
                        (strength, tasks[task][name])
                        for (rounds, strength, drew), tasks in found.items()
                        if rounds == age and drew in kinds and task in tasks
                    )
                    text = f"{label}, teachers of {age} rounds"
                    axes.plot(*zip(*points, strict=True), line, color=color, marker=".", label=text)
            axes.set_xticks(sorted({strength for _, strength, _ in found}))
    _legend(figure, 3)
    return figure


def _figure(runs: Runs, world: World, lines: Lines, abscissas: Mapping[str, Abscissa]) -> Figure | None:
    """A row per abscissa, a column per task; levels of base and teacher."""
    if not any(name in runs for name in lines):
        return None
    figure = Figure(figsize=(3.7 * len(world.names), 0.7 + 2.7 * len(abscissas)), layout="constrained")
    grid = figure.subplots(len(abscissas), len(world.names), squeeze=False).tolist()
    for row, (xlabel, abscissa) in zip(grid, abscissas.items(), strict=True):
        for axes, task in zip(row, world.names, strict=True):
            axes.set_xlabel(xlabel)
            axes.set_title(task if row is grid[0] else "", fontsize=11)
            style(axes, nbins=6, steps=[1, 2, 5, 10])
            for name, (label, color, line) in lines.items():
                _draw(axes, list(runs.get(name, {}).values()), task, abscissa, label=label, color=color, linestyle=line)
            for name, label, color in ((f"teacher_{task}", "teacher of the task", BLACK), ("base", "base", BASE)):
                levels = [result.validation[task] for result in runs.get(name, {}).values()]
                if levels:
                    axes.axhline(fmean(levels), color=color, linestyle=":", linewidth=1.2, label=label)
        row[0].set_ylabel("score")
    _legend(figure, 4)
    return figure


def _legend(figure: Figure, columns: int) -> None:
    handles: dict[str, Any] = {}  # each label once
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _draw(axes: Axes, results: list[Result], task: str, abscissa: Abscissa, **look: Any) -> None:
    """The seeds' mean at the rounds that all of them have, in a band from the lowest to the highest; points alone where
    it was scored at start and end only."""
    if not results:
        return
    curves = [{number: scores[task] for number, scores in result.curve} for result in results]
    rounds = sorted(set.intersection(*map(set, curves)))
    x = [fmean(abscissa(result, number) for result in results) for number in rounds]
    scores = [[curve[number] for curve in curves] for number in rounds]
    look["label"] += f" ({len(results)} seed{'s' if len(results) > 1 else ''})"
    means, lows, highs = ([*map(of, scores)] for of in (fmean, min, max))
    if len(rounds) < 3:
        errors = [[means[-1] - lows[-1]], [highs[-1] - means[-1]]]
        axes.errorbar(x[-1:], means[-1:], errors, fmt=".", color=look["color"], label=look["label"])
        return
    axes.plot(x, means, linewidth=1.8, marker=".", markersize=5, **look)  # where it was scored
    axes.fill_between(x, lows, highs, color=look["color"], alpha=0.15, linewidth=0)
