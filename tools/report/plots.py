"""Curves as SVG text: numbers in, images out."""

import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, MaxNLocator

Points = Sequence[tuple[float, float]]
"""(x, y) pairs in order of x."""

# Okabe and Ito's colours, which stay apart for colour-blind eyes.
BASE, TEACHER, STUDENT = "#6b7280", "#c2410c", "#0b62a8"
SERIES = ("#0b62a8", "#c2410c", "#00795c", "#a2528f", "#8a6d00", "#2b2b2b")
SIZE = (5.4, 3.3)  # inches


def running_mean(points: Points, window: int = 5) -> list[tuple[float, float]]:
    """Each y replaced by the mean of the points around it, fewer at the ends; same x.

    The window is a quarter of the points at most: over a short run a longer one would be flat. None of fewer than 8.
    """
    half = min(window, len(points) // 4) // 2
    near = [[y for _, y in points[max(0, i - half) : i + half + 1]] for i in range(len(points))]
    return [(x, fmean(ys)) for (x, _), ys in zip(points, near, strict=True)] if half else []


def score_curve(
    monitored: Points, evaluated: Points, base: float, teacher: float, final: tuple[float, float, float]
) -> str:
    """A task's score over rounds as SVG, between the levels of base and teacher.

    Args:
        monitored: (round, score) of the student's own training images: dots, and their running mean.
        evaluated: (round, score) on test prompts during training: diamonds.
        base, teacher: levels, drawn as labelled horizontal lines.
        final: (round, score, standard error) of the finished student on test prompts.
    """
    figure, axes = _figure("round", "score")
    for name, level, color, style in (("teacher", teacher, TEACHER, "--"), ("base", base, BASE, ":")):
        axes.axhline(level, color=color, linestyle=style, linewidth=1.8, label=f"{name} {level:.2f}")
    if monitored:
        axes.plot(*_columns(monitored), "o", color=STUDENT, alpha=0.3, markersize=4, label="training images")
    if smooth := running_mean(monitored):
        axes.plot(*_columns(smooth), "-", color=STUDENT, linewidth=2, label="running mean")
    if evaluated:
        axes.plot(*_columns(evaluated), "D", color=STUDENT, markersize=5, label="test prompts")
    x, y, error = final
    axes.errorbar([x], [y], yerr=[error], fmt="*", color=STUDENT, markersize=13, capsize=3, label="final, test")
    _legend(axes)
    return _svg(figure)


def loss_curves(losses: Mapping[str, Points]) -> str:
    """Every task's distillation loss over rounds as SVG, on a logarithmic axis."""
    figure, axes = _figure("round", "loss")
    for i, (task, points) in enumerate(losses.items()):
        positive = [(x, y) for x, y in points if y > 0]
        color, smooth = SERIES[i % len(SERIES)], running_mean(positive, 9)
        axes.plot(*_columns(positive), color=color, alpha=0.25, linewidth=1)
        axes.plot(*_columns(smooth or positive), color=color, linewidth=2, label=task)
        if positive:
            axes.set_yscale("log")
    _legend(axes)
    return _svg(figure)


def shares(values: Mapping[str, float], xlabel: str) -> str:
    """Parts of a whole as horizontal bars, the first on top, as SVG; each has its share of the sum beside it."""
    figure, axes = _figure(xlabel, "")
    total = sum(values.values()) or 1.0
    bars = axes.barh(list(values), list(values.values()), color=STUDENT)
    axes.bar_label(bars, [f"{value / total:.1%}" for value in values.values()], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(AutoLocator())
    return _svg(figure)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    style(axes)
    return figure, axes


def style(axes: Axes, **ticks: Any) -> None:
    """A light grid, two spines, whole numbers below; ``ticks`` are options of MaxNLocator."""
    axes.grid(True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, **ticks))


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _svg(figure: Figure) -> str:
    """The figure as SVG, the same bytes for the same numbers."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "diffusionopd"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return buffer.getvalue()
