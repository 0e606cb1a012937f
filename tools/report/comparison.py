"""The paper's table of several models: its averages, and what may not be compared. Data in, data out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diffusionopd.evaluation.results import Summary
from tools.report import published
from tools.report.comparison_columns import MEASURES, SCALES, Column, find_columns
from tools.report.comparison_data import Evaluation, Model, unequal_settings


@dataclass(frozen=True)
class Average:
    """Mean of the min-max normalised scores that a row has: `value` None without any, `count` is their number."""

    value: float | None
    count: int


@dataclass(frozen=True)
class Averages:
    """A column of averages: of each row, over those of `columns` that it has."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Average]

    def is_complete(self, row: int) -> bool:
        """Whether the row has all the columns: only such averages can be compared."""
        return self.rows[row].count == len(self.columns)

    def is_best(self, row: int) -> bool:
        """Whether the row has the highest of at least two complete averages."""
        complete = [a.value for i, a in enumerate(self.rows) if a.value is not None and self.is_complete(i)]
        return self.is_complete(row) and len(complete) > 1 and self.rows[row].value == max(complete)


@dataclass(frozen=True)
class Comparison:
    """Models against scores.

    Attributes:
        columns: all of them; those of the paper first, details last.
        averages: over the paper's columns, or, without any, over all that are no details; where rows lack different
            columns, also over those that every row has.
        warnings: what makes rows unequal that the reader cannot see from the table.
        notes: how the table is made.
    """

    models: Sequence[Model]
    columns: Sequence[Column]
    averages: Sequence[Averages]
    warnings: Sequence[str]
    notes: Sequence[str]

    @property
    def main(self) -> list[Column]:
        """The columns that are no details."""
        return [column for column in self.columns if not column.detail]

    @property
    def details(self) -> list[Column]:
        """Columns that break another one down."""
        return [column for column in self.columns if column.detail]

    def is_best(self, column: Column, model: Model) -> bool:
        """Whether the model has the highest of at least two values of the column."""
        own, values = column.of(model), [summary.mean for each in self.models if (summary := column.of(each))]
        return own is not None and len(values) > 1 and own.mean == max(values)


def published_models() -> list[Model]:
    """The rows of the paper, in the units of the files."""
    return [Model(name, _published_evaluations(values), published.SOURCE) for name, values in published.ROWS.items()]


def _published_evaluations(values: Sequence[str]) -> dict[str, Evaluation]:
    scores: dict[str, dict[str, Summary]] = {}
    for measure, value in zip(MEASURES, values, strict=True):
        of_data_set = scores.setdefault(measure.data_sets[0], {})
        for score in measure.scores:
            of_data_set[score] = Summary(float(value) / SCALES.get(score, 1.0), 0.0, 0)
    return {data_set: Evaluation(found, published.SETTINGS) for data_set, found in scores.items()}


def compare(models: Sequence[Model]) -> Comparison:
    """The comparison of models, measured ones and published ones."""
    columns = list(find_columns(models))
    candidates = [column for column in columns if column.paper] or [column for column in columns if not column.detail]
    averages, without_spread = make_averages(models, candidates)
    notes = [
        *_average_notes(models, averages),
        *(f"{column.title} is in no average: it takes two rows that differ." for column in without_spread),
        *_unit_notes(columns, models),
    ]
    return Comparison(models, columns, averages, unequal_settings(models), notes)


def make_averages(models: Sequence[Model], columns: Sequence[Column]) -> tuple[list[Averages], list[Column]]:
    """Averages over the columns, and over those that every row has if rows differ in that.

    Returns:
        the averages, and the columns that are in none because no two rows differ in them.
    """
    means = [[_mean(column, model) for column in columns] for model in models]
    normalised = min_max(np.array(means, dtype=np.float64).reshape(len(models), len(columns)))
    usable, common = ~np.isnan(normalised).all(axis=0), ~np.isnan(normalised).any(axis=0)
    kinds = {"Average": usable, "Common": common if (common != usable).any() else np.zeros_like(common)}
    averages = [
        Averages(title, [c for c, kept in zip(columns, chosen, strict=True) if kept], _row_means(normalised[:, chosen]))
        for title, chosen in kinds.items()
        if chosen.any()
    ]
    return averages, [column for column, kept in zip(columns, usable, strict=True) if not kept]


def _mean(column: Column, model: Model) -> float:
    summary = column.of(model)
    return summary.mean if summary else float("nan")


def min_max(values: np.ndarray) -> np.ndarray:
    """Each column mapped linearly to [0, 1] over its rows.

    Args:
        values: float64 `[rows, columns]`, NaN where there is none.

    Returns:
        the same shape; NaN where there is no value, and in columns whose values are all the same.
    """
    low, high = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)
    return (values - low) / np.where(high > low, high - low, np.nan)


def _row_means(normalised: np.ndarray) -> list[Average]:
    rows = [row[~np.isnan(row)] for row in normalised]
    return [Average(float(row.mean()) if row.size else None, row.size) for row in rows]


def _average_notes(models: Sequence[Model], averages: Sequence[Averages]) -> list[str]:
    if not averages:
        return ["No average: it takes a score that differs between two rows."]
    notes = [
        "Average: mean of the scores min-max normalised over the rows shown (0 the lowest, 1 the highest of a column); "
        "it changes with the rows."
    ]
    average, *common = averages
    for i, model in enumerate(models):
        if not average.is_complete(i):
            names = ", ".join(column.title for column in average.columns if column.of(model)) or "none"
            notes.append(
                f"{model.name}: average over {average.rows[i].count} of {len(average.columns)} columns ({names})."
            )
    if len(notes) > 1:
        notes.append("Averages over different columns cannot be compared with each other.")
    for each in common:
        names = ", ".join(column.title for column in each.columns)
        notes.append(f"Common: the average over the columns that every row has ({names}).")
    return notes


def _unit_notes(columns: Sequence[Column], models: Sequence[Model]) -> Iterator[str]:
    if any(column.score == "unifiedreward" for column in columns):
        yield "UnifiedReward is shown as its rating of 1 to 5; the files hold a fifth of it."
    if any(model.source for model in models):
        yield (
            f"Published rows are those of {published.SOURCE}, to its digits. In brackets: the paper's own average, "
            "which is not what this mean gives for its rows (alone they come to 0.984 for DiffusionOPD, not to 0.929)."
        )
