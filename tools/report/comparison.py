"""The paper's table of several models: its columns and averages, what may not be compared; as a page, text and CSV."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from diffusionopd.evaluation.results import Summary
from diffusionopd.rewards import NOT_APPLICABLE
from tools.report import published
from tools.report.evaluations import Evaluation, Model, unequal_settings
from tools.report.pages import aligned, image_of, render_page

BEST = "*"


class Measure(NamedTuple):
    """A column of the paper: the first of `scores` on the first of `data_sets` that models were evaluated with."""

    title: str
    scores: tuple[str, ...]
    data_sets: tuple[str, ...]
    digits: int


QUALITY = ("drawbench", "pickscore")

MEASURES = (
    Measure("GenEval", ("geneval_overall", "geneval"), ("geneval",), 3),
    Measure("OCR", ("ocr",), ("ocr",), 3),
    Measure("PickScore", ("pickscore",), QUALITY, 2),
    Measure("ClipScore", ("clipscore",), QUALITY, 3),
    Measure("HPSv2.1", ("hpsv2",), QUALITY, 3),
    Measure("Aesthetic", ("aesthetic",), QUALITY, 2),
    Measure("ImageReward", ("imagereward",), QUALITY, 2),
    Measure("UnifiedReward", ("unifiedreward",), QUALITY, 2),
)
"""The paper's columns in its order, `geneval_overall` being GenEval's official figure."""

SCALES = {"unifiedreward": 5.0}
"""Files hold UnifiedReward's rating of 1 to 5 divided by 5; the paper prints the rating."""


@dataclass(frozen=True)
class Column:
    """One score on one data set, for all rows.

    Attributes:
        detail: a part of another score, or a score of the paper on another data set than its column's.
    """

    title: str
    score: str
    data_set: str
    digits: int = 3
    paper: bool = False
    detail: bool = False

    def of(self, model: Model) -> Summary | None:
        """The model's value in the unit shown; None if it has none."""
        if model.source and not self.paper:
            return None
        evaluation = model.evaluations.get(self.data_set)
        summary = evaluation.scores.get(self.score) if evaluation else None
        scale = SCALES.get(self.score, 1.0)
        return summary and Summary(scale * summary.mean, scale * summary.standard_error, summary.count)

    def text(self, model: Model) -> str:
        """The model's value for people: a published one with the digits of its source."""
        summary = self.of(model)
        if summary is None:
            return "–"
        if model.source:
            return published.ROWS[model.name][published.COLUMNS.index(self.title)]
        return f"{summary.mean:.{self.digits}f}"


def find_columns(models: Sequence[Model]) -> Iterator[Column]:
    """The paper's columns that there is something for, then other scores, then details."""
    measured = [model for model in models if not model.source] or models
    taken = set()
    for measure in MEASURES:
        # All rows show one score of one data set: the one that most of the measured models have.
        places = [(score, data_set) for data_set in _data_sets(measure, models) for score in measure.scores]
        score, data_set = max(places, key=lambda place: sum(_has(model, *place) for model in measured))
        if any(_has(model, score, data_set) for model in models):
            taken.add((score, data_set))
            yield Column(measure.title, score, data_set, measure.digits, paper=True)
    others = {
        (score, data_set): Column(score, score, data_set, detail=_is_detail(score, evaluation))
        for model in measured
        for data_set, evaluation in model.evaluations.items()
        for score in evaluation.scores
        if (score, data_set) not in taken
    }
    yield from sorted(others.values(), key=lambda column: column.detail)


def _data_sets(measure: Measure, models: Sequence[Model]) -> list[str]:
    """Where a column may come from: the paper's data sets first."""
    return list(dict.fromkeys([*measure.data_sets, *(name for model in models for name in model.evaluations)]))


def _has(model: Model, score: str, data_set: str) -> bool:
    return data_set in model.evaluations and score in model.evaluations[data_set].scores


def _is_detail(score: str, evaluation: Evaluation) -> bool:
    """Not one of the rewards that were asked for, or one that has a column of the paper already."""
    asked = evaluation.settings.get("rewards", evaluation.scores)
    return score not in asked or any(score in measure.scores for measure in MEASURES)


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


# ---- Tables ----------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A value as text, and what stands below it."""

    text: str
    below: str
    best: bool
    average: bool


class Row(NamedTuple):
    """A model's line."""

    name: str
    published: bool
    cells: list[Cell]


class Table(NamedTuple):
    """Columns' titles with what stands below them, and lines."""

    heads: list[tuple[str, str]]
    rows: list[Row]


def table_of(comparison: Comparison, columns: Sequence[Column]) -> Table:
    """Some columns as shown, averages after the columns that they are made of; published rows that have any of them."""
    averaged = [column for averages in comparison.averages[:1] for column in averages.columns]
    before = [column for column in columns if column.paper or column in averaged]
    averages = comparison.averages if before else []
    after = [column for column in columns if column not in before]
    rows = []
    for i, model in enumerate(comparison.models):
        if model.source and not any(column.of(model) for column in columns):
            continue
        cells = [_cell(comparison, column, model) for column in before]
        cells += [_average_cell(each, i, model) for each in averages]
        rows.append(Row(model.name, bool(model.source), cells + [_cell(comparison, each, model) for each in after]))
    heads = [(column.title, column.data_set) for column in before]
    heads += [(each.title, f"{len(each.columns)} columns") for each in averages]
    return Table(heads + [(column.title, column.data_set) for column in after], rows)


def _cell(comparison: Comparison, column: Column, model: Model) -> Cell:
    """A value and its standard error."""
    summary = column.of(model)
    error = f"± {summary.standard_error:.{column.digits}f}" if summary and summary.count else ""
    return Cell(column.text(model), error, comparison.is_best(column, model), False)


def _average_cell(averages: Averages, row: int, model: Model) -> Cell:
    """An average, with the number of its columns if these are not all; what a published row's source gives for it."""
    average, remark = averages.rows[row], ""
    count = "" if averages.is_complete(row) else f" ({average.count}/{len(averages.columns)})"
    if model.source and averages.title == "Average":
        remark = f"[{published.AVERAGES[model.name]}]"
    text = "–" if average.value is None else f"{average.value:.3f}{count}"
    return Cell(text, remark, averages.is_best(row), True)


def text_comparison(comparison: Comparison) -> str:
    """The table, under each value its standard error, then further scores, warnings and notes."""
    parts = [_text(table_of(comparison, comparison.main))]
    if comparison.details:
        parts.append("Further scores\n" + _text(table_of(comparison, comparison.details)))
    warnings = [f"warning: {warning}" for warning in comparison.warnings]
    return "\n\n".join([*parts, "\n".join([*warnings, *comparison.notes, f"{BEST} best of a column."])])


def _text(table: Table) -> str:
    rows = [["model", *(title for title, _ in table.heads)], ["", *(below for _, below in table.heads)]]
    for row in table.rows:
        rows.append([row.name, *(cell.text + BEST * cell.best for cell in row.cells)])
        rows.append(["  published" if row.published else "", *(cell.below for cell in row.cells)])
    return aligned([row for row in rows if any(row)])


def csv_table(comparison: Comparison) -> str:
    """One line per model with all digits: of every column the value, its standard error and the number of samples."""
    head = ["model", "source"]
    for column in comparison.columns:
        name = f"{column.title} ({column.data_set})"
        head += [name, f"{name} standard error", f"{name} count"]
    head += [name for each in comparison.averages for name in (each.title, f"{each.title} number of columns")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for i, model in enumerate(comparison.models):
        line: list[object] = [model.name, model.source or "measured"]
        for column in comparison.columns:
            summary = column.of(model)
            line += ["" if summary is None else summary.mean]
            # A count of 0 is "not known": published rows, and files of the upstream release.
            line += [summary.standard_error, summary.count] if summary and summary.count else ["", ""]
        for averages in comparison.averages:
            average = averages.rows[i]
            line += ["" if average.value is None else average.value, average.count]
        writer.writerow(line)
    return buffer.getvalue()


# ---- The page --------------------------------------------------------------------------------------------------------


def render_comparison(comparison: Comparison, title: str, num_images: int = 12) -> str:
    """The page as one HTML document that refers to nothing outside itself.

    Args:
        num_images: prompts to show of each data set, the first ones that all its models have.
    """
    data_sets = dict.fromkeys(name for model in comparison.models for name in model.evaluations)
    galleries = [_gallery(comparison, name, num_images) for name in data_sets]
    return render_page(
        "comparison.html.j2",
        title=title,
        main=table_of(comparison, comparison.main),
        details=table_of(comparison, comparison.details),
        warnings=comparison.warnings,
        notes=comparison.notes,
        galleries=[gallery for gallery in galleries if gallery["prompts"]],
        facts=list(_facts(comparison.models)),
        image=image_of,
    )


def _gallery(comparison: Comparison, data_set: str, count: int) -> dict[str, Any]:
    """The first prompts of a data set, as drawn by all models that have images of it."""
    evaluated = {
        m.name: m.evaluations[data_set] for m in comparison.models if data_set in m.evaluations and not m.source
    }
    drawn = {name: each for name, each in evaluated.items() if any(map(each.image, each.records))}
    columns = {column.score: column for column in comparison.main if column.data_set == data_set}
    for evaluation in drawn.values():  # also what a figure of the whole data set is made of
        for score in evaluation.settings.get("rewards", ()):
            columns.setdefault(score, Column(score, score, data_set))
    return {
        "data_set": data_set,
        "models": len(drawn),
        "undrawn": [name for name in evaluated if name not in drawn],
        "prompts": list(_common_images(drawn, list(columns.values())))[:count],
    }


def _common_images(drawn: Mapping[str, Evaluation], columns: Sequence[Column]) -> Iterator[tuple[str, list[Any]]]:
    """Prompts with an image of every model: the prompt, and each model's name, file and scores."""
    by_model = {name: evaluation.first_images() for name, evaluation in drawn.items()}
    for index in sorted(set.intersection(*(set(records) for records in by_model.values())) if by_model else ()):
        records = {name: of_model[index] for name, of_model in by_model.items()}
        files = {name: drawn[name].image(record) for name, record in records.items()}
        prompts = {record.prompt for record in records.values()}
        if len(prompts) == 1 and all(files.values()):
            yield prompts.pop(), [(name, files[name], _scores(records[name].scores, columns)) for name in drawn]


def _scores(scores: Mapping[str, float], columns: Sequence[Column]) -> list[tuple[str, str]]:
    """An image's own scores; not those that do not apply."""
    found = [(column, scores.get(column.score, NOT_APPLICABLE)) for column in columns]
    return [
        (column.title, f"{SCALES.get(column.score, 1.0) * value:.{column.digits}f}")
        for column, value in found
        if value != NOT_APPLICABLE
    ]


def _facts(models: Sequence[Model]) -> Iterator[tuple[str, str]]:
    """What is known of each measured model's evaluations; data sets evaluated alike share a line."""
    for model in models:
        if model.source:
            continue
        lines: dict[str, list[str]] = {}
        for data_set, evaluation in model.evaluations.items():
            count = f"{data_set} ({len(evaluation.prompts)} prompts)" if evaluation.records else data_set
            lines.setdefault(_described(evaluation), []).append(count)
        yield model.name, "; ".join(f"{', '.join(data_sets)}: {text}" for text, data_sets in lines.items())


def _described(evaluation: Evaluation) -> str:
    s = evaluation.settings
    if not s:
        return "settings not recorded"
    names = {"guidance_scale": "guidance", "num_inference_steps": "steps", "resolution": "pixels", "seed": "seed"}
    known = [f"{name} {s[key]}" for key, name in names.items() if key in s]
    return ", ".join([f"{s.get('model', 'model not recorded')}", f"LoRA {s.get('lora') or 'none'}", *known])
