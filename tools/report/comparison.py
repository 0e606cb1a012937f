"""The paper's table of several models: read from evaluations, with averages and warnings; as a page, text and CSV."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusionopd.config_schema import is_number
from diffusionopd.evaluation.results import AVERAGES, RESULTS, SETTINGS, Record, Summary, read_averages, read_records
from diffusionopd.files import path_flag
from diffusionopd.rewards import NOT_APPLICABLE
from tools.report import published
from tools.report.pages import aligned, image_of, render_page

EVALUATION = "evaluation"  # where a run folder keeps its evaluations
BEST = "*"
NUMBER = "number of prompts"
# What the images or the scores depend on. Models are what is compared, and guidance belongs to a model.
COMPARED_SETTINGS = (
    "num_inference_steps", "resolution", "seed", "max_sequence_length", "dtype", "images_per_prompt", "reward_options",
)  # fmt: skip


class ComparisonError(ValueError):
    """Raised for models that cannot be compared."""


# ---- Models and their evaluations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """One model on one data set.

    Attributes:
        scores: data-set-level figures by score.
        settings: what the images depend on; empty where it was not recorded, as by the upstream release.
        records: samples in order; empty where only the averages are there.
        folder: where the images are, if anywhere.
    """

    scores: Mapping[str, Summary]
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Record] = ()
    folder: Path | None = None

    @property
    def prompts(self) -> list[str]:
        """Its prompts in order, each once."""
        return [record.prompt for record in self.first_images().values()]

    def first_images(self) -> dict[int, Record]:
        """The first image of each prompt, by the prompt's index."""
        count = self.settings.get("images_per_prompt", 1)
        return {r.sample_id // count: r for r in self.records if r.sample_id % count == 0}

    def image(self, record: Record) -> Path | None:
        """The file of a sample's image, if it was saved."""
        file = self.folder / "images" / f"{record.sample_id:05d}.jpg" if self.folder else None
        return file if file and file.is_file() else None


@dataclass(frozen=True)
class Model:
    """A row of the comparison: evaluations by data set. `source` is empty for what was measured here."""

    name: str
    evaluations: Mapping[str, Evaluation]
    source: str = ""


def read_models(runs: Sequence[str]) -> list[Model]:
    """The models of command-line arguments `[NAME=]PATH`, in their order.

    A PATH is the folder of one evaluation, a folder with one such folder per data set, or a run folder with either in
    its `evaluation/`. An evaluation that stands alone belongs to the data set that its settings name, else to one with
    its folder's name.

    Raises:
        ComparisonError: nothing there, two models of one name, a file that cannot be read.
        EvaluationError: malformed averages or records.
    """
    models: dict[str, Model] = {}
    for run in runs:
        name, equals, path = run.partition("=")
        if not equals or Path(run).exists():
            folder = Path(run).resolve()
            name, path = folder.parent.name if folder.name == EVALUATION else folder.name, run
        if name in models:
            raise ComparisonError(f"two models are called '{name}'; tell them apart as NAME={path}")
        models[name] = Model(name, dict(_evaluations(path_flag(path))))
    return list(models.values())


def _evaluations(path: Path) -> Iterator[tuple[str, Evaluation]]:
    """The evaluations at a path by data set."""
    for root in (path, path / EVALUATION):
        if (root / AVERAGES).is_file():
            evaluation = read_evaluation(root)
            yield str(evaluation.settings.get("dataset", root.resolve().name)), evaluation
            return
        if several := sorted(file.parent for file in root.glob(f"*/{AVERAGES}")):
            yield from ((folder.name, read_evaluation(folder)) for folder in several)
            return
    if any(path.glob(f"**/{SETTINGS}")):
        raise ComparisonError(f"the evaluation in {path} is not finished: repeat its command with --resume")
    raise ComparisonError(
        f"no evaluation in {path}: expected {AVERAGES} there, in its folders or in its {EVALUATION}/; "
        "scripts/evaluate.py writes it"
    )


def read_evaluation(folder: Path) -> Evaluation:
    """The files of one evaluation. Raises `ComparisonError` or `EvaluationError` if one is malformed."""
    scores, file = read_averages(folder / AVERAGES), folder / SETTINGS
    for name, summary in scores.items():
        if not (is_number(summary.mean) and is_number(summary.standard_error)):
            raise ComparisonError(f"{folder / AVERAGES}: '{name}' is {summary.mean} ± {summary.standard_error}")
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ComparisonError(f"{file} cannot be read as settings: {error}") from error
    return Evaluation(scores, settings, read_records(folder / RESULTS), folder)


def published_models() -> list[Model]:
    """The rows of the paper, in the units of the files."""
    models = []
    for name, values in published.ROWS.items():
        scores: dict[str, dict[str, Summary]] = {}
        for (names, data_sets, _), value in zip(published.COLUMNS.values(), values, strict=True):
            for name_of_score in names:
                summary = Summary(float(value) / SCALES.get(name_of_score, 1.0), 0.0, 0)
                scores.setdefault(data_sets[0], {})[name_of_score] = summary
        evaluations = {data_set: Evaluation(found, published.SETTINGS) for data_set, found in scores.items()}
        models.append(Model(name, evaluations, published.SOURCE))
    return models


def unequal_settings(models: Sequence[Model]) -> list[str]:
    """What evaluations of one data set differ in, beside the model and its guidance: a sentence for each setting."""
    differing: dict[
        tuple[str, str], list[str]
    ] = {}  # (setting, its values with the models that have them) -> data sets
    for data_set in dict.fromkeys(name for model in models for name in model.evaluations):
        rows = {"published rows" if m.source else m.name: m.evaluations.get(data_set) for m in models}
        evaluated = {name: evaluation for name, evaluation in rows.items() if evaluation}
        prompts = {name: each.prompts for name, each in evaluated.items() if each.records}
        for key in (NUMBER, *COMPARED_SETTINGS):
            who: dict[str, list[str]] = {}
            for name, each in evaluated.items():
                known = {NUMBER: len(prompts[name]), **each.settings} if name in prompts else each.settings
                if key in known:
                    who.setdefault(str(known[key]), []).append(name)
            if len(who) > 1:
                text = ", ".join(f"{value} ({', '.join(names)})" for value, names in who.items())
                differing.setdefault((key, text), []).append(data_set)
        if any(a != b for each in prompts.values() for a, b in zip(each, next(iter(prompts.values())), strict=False)):
            differing.setdefault(("prompts", "not the same"), []).append(data_set)
    return [f"{key} on {', '.join(data_sets)}: {text}" for (key, text), data_sets in differing.items()]


# ---- Columns ---------------------------------------------------------------------------------------------------------


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
        if (model.source and not self.paper) or not _has(model, self.score, self.data_set):
            return None
        summary, scale = model.evaluations[self.data_set].scores[self.score], SCALES.get(self.score, 1.0)
        return Summary(scale * summary.mean, scale * summary.standard_error, summary.count)

    def text(self, model: Model) -> str:
        """The model's value for people: a published one with the digits of its source."""
        summary = self.of(model)
        if summary and model.source:
            return published.ROWS[model.name][list(published.COLUMNS).index(self.title)]
        return f"{summary.mean:.{self.digits}f}" if summary else "–"


def find_columns(models: Sequence[Model]) -> Iterator[Column]:
    """The paper's columns that there is something for, then other scores, then details."""
    measured = [model for model in models if not model.source] or models
    everywhere, taken = [name for model in models for name in model.evaluations], set()
    for title, (scores, data_sets, digits) in published.COLUMNS.items():
        # All rows show one score of one data set: the one that most of the measured models have.
        places = [(score, data_set) for data_set in (*data_sets, *everywhere) for score in scores]
        score, data_set = max(places, key=lambda place: sum(_has(model, *place) for model in measured))
        if any(_has(model, score, data_set) for model in models):
            taken.add((score, data_set))
            yield Column(title, score, data_set, digits, paper=True)
    others = {
        (score, data_set): Column(score, score, data_set, detail=_is_detail(score, evaluation))
        for model in measured
        for data_set, evaluation in model.evaluations.items()
        for score in evaluation.scores
        if (score, data_set) not in taken
    }
    yield from sorted(others.values(), key=lambda column: column.detail)


def _has(model: Model, score: str, data_set: str) -> bool:
    return data_set in model.evaluations and score in model.evaluations[data_set].scores


def _is_detail(score: str, evaluation: Evaluation) -> bool:
    """Not one of the rewards that were asked for, or one that has a column of the paper already."""
    asked = evaluation.settings.get("rewards", evaluation.scores)
    return score not in asked or any(score in scores for scores, _, _ in published.COLUMNS.values())


# ---- The comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Averages:
    """Of each row: the mean of the min-max normalised scores that it has among `columns` (None without any), and their
    number."""

    title: str
    columns: Sequence[Column]
    values: Sequence[float | None]
    counts: Sequence[int]

    def is_complete(self, row: int) -> bool:
        """Whether the row has all the columns: only such averages can be compared."""
        return self.counts[row] == len(self.columns)

    def is_best(self, row: int) -> bool:
        """Whether the row has the highest of at least two complete averages."""
        complete = [value for i, value in enumerate(self.values) if value is not None and self.is_complete(i)]
        return self.is_complete(row) and len(complete) > 1 and self.values[row] == max(complete)


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


def compare(models: Sequence[Model]) -> Comparison:
    """The comparison of models, measured ones and published ones."""
    columns = list(find_columns(models))
    candidates = [column for column in columns if column.paper] or [column for column in columns if not column.detail]
    averages = list(_averages(models, candidates))
    return Comparison(
        models, columns, averages, unequal_settings(models), list(_notes(models, columns, candidates, averages))
    )


def _averages(models: Sequence[Model], columns: Sequence[Column]) -> Iterator[Averages]:
    """Over the columns in which two rows differ, and over those that every row has if rows differ in that."""
    means = [[summary.mean if (summary := c.of(model)) else np.nan for c in columns] for model in models]
    normalised = min_max(np.array(means, dtype=np.float64).reshape(len(models), len(columns)))
    present = ~np.isnan(normalised)
    usable, common = present.any(axis=0), present.all(axis=0)
    for title, chosen in (("Average", usable), ("Common", common & (common != usable).any())):
        if chosen.any():
            kept = [column for column, is_kept in zip(columns, chosen, strict=True) if is_kept]
            rows = [row[~np.isnan(row)] for row in normalised[:, chosen]]
            values = [float(row.mean()) if row.size else None for row in rows]
            yield Averages(title, kept, values, [row.size for row in rows])


def min_max(values: np.ndarray) -> np.ndarray:
    """Each column mapped linearly to [0, 1] over its rows.

    Args:
        values: float64 `[rows, columns]`, NaN where there is none.

    Returns:
        the same shape; NaN where there is no value, and in columns whose values are all the same.
    """
    low, high = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)
    return (values - low) / np.where(high > low, high - low, np.nan)


def _notes(
    models: Sequence[Model], columns: Sequence[Column], candidates: Sequence[Column], averages: Sequence[Averages]
) -> Iterator[str]:
    if averages:
        yield (
            "Average: mean of the scores min-max normalised over the rows shown (0 the lowest, 1 the highest of a "
            "column); it changes with the rows."
        )
        average = averages[0]
        for i, model in enumerate(models):
            if not average.is_complete(i):
                of = f"{average.counts[i]} of {len(average.columns)} columns"
                yield f"{model.name}: average over {of} ({_titles(c for c in average.columns if c.of(model))})."
        if not all(map(average.is_complete, range(len(models)))):
            yield "Averages over different columns cannot be compared with each other."
        for common in averages[1:]:
            yield f"Common: the average over the columns that every row has ({_titles(common.columns)})."
    else:
        yield "No average: it takes a score that differs between two rows."
    for column in candidates:
        if not averages or column not in averages[0].columns:
            yield f"{column.title} is in no average: it takes two rows that differ."
    if any(column.score == "unifiedreward" for column in columns):
        yield "UnifiedReward is shown as its rating of 1 to 5; the files hold a fifth of it."
    if any(model.source for model in models):
        yield (
            f"Published rows are those of {published.SOURCE}, to its digits. In brackets: the paper's own average, "
            "which is not what this mean gives for its rows (alone they come to 0.984 for DiffusionOPD, not to 0.929)."
        )


def _titles(columns: Iterator[Column] | Sequence[Column]) -> str:
    return ", ".join(column.title for column in columns) or "none"


# ---- Tables ----------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A value as text, and what stands below it."""

    text: str
    below: str
    best: bool
    average: bool = False


class Table(NamedTuple):
    """Titles of the columns with what stands below them; of each line the name, whether it is published, the cells."""

    heads: list[tuple[str, str]]
    rows: list[tuple[str, bool, list[Cell]]]


def table_of(comparison: Comparison, columns: Sequence[Column]) -> Table:
    """Some columns as shown, averages after the columns that they are made of; published rows that have any of them."""
    averaged = [column for averages in comparison.averages[:1] for column in averages.columns]
    before = [column for column in columns if column.paper or column in averaged]
    after = [column for column in columns if column not in before]
    averages = comparison.averages if before else []
    heads = [
        *((column.title, column.data_set) for column in before),
        *((each.title, f"{len(each.columns)} columns") for each in averages),
        *((column.title, column.data_set) for column in after),
    ]
    rows = []
    for i, model in enumerate(comparison.models):
        cells = [
            *(_cell(comparison, column, model) for column in before),
            *(_average_cell(each, i, model) for each in averages),
            *(_cell(comparison, column, model) for column in after),
        ]
        if not model.source or any(column.of(model) for column in columns):
            rows.append((model.name, bool(model.source), cells))
    return Table(heads, rows)


def _cell(comparison: Comparison, column: Column, model: Model) -> Cell:
    """A value and its standard error."""
    summary = column.of(model)
    error = f"± {summary.standard_error:.{column.digits}f}" if summary and summary.count else ""
    return Cell(column.text(model), error, comparison.is_best(column, model))


def _average_cell(averages: Averages, row: int, model: Model) -> Cell:
    """An average, with the number of its columns if these are not all; what a published row's source gives for it."""
    value = averages.values[row]
    count = "" if averages.is_complete(row) else f" ({averages.counts[row]}/{len(averages.columns)})"
    remark = f"[{published.AVERAGES[model.name]}]" if model.source and averages.title == "Average" else ""
    return Cell("–" if value is None else f"{value:.3f}{count}", remark, averages.is_best(row), average=True)


def text_comparison(comparison: Comparison) -> str:
    """The table, under each value its standard error, then further scores, warnings and notes."""
    parts = [_text(table_of(comparison, comparison.main))]
    if comparison.details:
        parts.append("Further scores\n" + _text(table_of(comparison, comparison.details)))
    warnings = [f"warning: {warning}" for warning in comparison.warnings]
    return "\n\n".join([*parts, "\n".join([*warnings, *comparison.notes, f"{BEST} best of a column."])])


def _text(table: Table) -> str:
    rows = [["model", *(title for title, _ in table.heads)], ["", *(below for _, below in table.heads)]]
    for name, is_published, cells in table.rows:
        rows.append([name, *(cell.text + BEST * cell.best for cell in cells)])
        rows.append(["  published" if is_published else "", *(cell.below for cell in cells)])
    return aligned([row for row in rows if any(row)])


def csv_table(comparison: Comparison) -> str:
    """One line per model with all digits: of every column the value, its standard error and the number of samples."""
    lines = []
    for i, model in enumerate(comparison.models):
        line: dict[str, object] = {"model": model.name, "source": model.source or "measured"}
        for column in comparison.columns:
            name, summary = f"{column.title} ({column.data_set})", column.of(model)
            counted = summary and summary.count  # 0 is "not known": published rows, files of the upstream release
            line[name] = summary and summary.mean
            line[f"{name} standard error"] = summary.standard_error if summary and counted else None
            line[f"{name} count"] = counted or None
        for each in comparison.averages:
            line |= {each.title: each.values[i], f"{each.title} number of columns": each.counts[i]}
        lines.append(line)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


# ---- The page --------------------------------------------------------------------------------------------------------


def render_comparison(comparison: Comparison, title: str, num_images: int = 12) -> str:
    """The page as one HTML document that refers to nothing outside itself.

    Args:
        num_images: prompts to show of each data set, the first ones that all its models have.
    """
    measured = [model for model in comparison.models if not model.source]
    data_sets = dict.fromkeys(name for model in measured for name in model.evaluations)
    galleries = [_gallery(comparison, measured, name, num_images) for name in data_sets]
    return render_page(
        "comparison.html.j2",
        title=title,
        main=table_of(comparison, comparison.main),
        details=table_of(comparison, comparison.details),
        warnings=comparison.warnings,
        notes=comparison.notes,
        galleries=[gallery for gallery in galleries if gallery["prompts"]],
        facts=[(model.name, "; ".join(_described(model))) for model in measured],
        image=image_of,
    )


def _gallery(comparison: Comparison, models: Sequence[Model], data_set: str, count: int) -> dict[str, Any]:
    """The first prompts of a data set, as drawn by all models that have images of it, with each image's scores."""
    evaluated = {model.name: model.evaluations[data_set] for model in models if data_set in model.evaluations}
    drawn = {name: each for name, each in evaluated.items() if any(map(each.image, each.records))}
    columns = {column.score: column for column in comparison.main if column.data_set == data_set}
    for evaluation in drawn.values():  # also what a figure of the whole data set is made of
        for score in evaluation.settings.get("rewards", ()):
            columns.setdefault(score, Column(score, score, data_set))
    first = [evaluation.first_images() for evaluation in drawn.values()]
    prompts = []
    for index in sorted(set.intersection(*map(set, first))) if first else ():
        records = {name: images[index] for name, images in zip(drawn, first, strict=True)}
        files = {name: drawn[name].image(record) for name, record in records.items()}
        if len({record.prompt for record in records.values()}) == 1 and all(files.values()):
            shown = [(name, files[name], _scores(record, columns.values())) for name, record in records.items()]
            prompts.append((next(iter(records.values())).prompt, shown))
    undrawn = [name for name in evaluated if name not in drawn]
    return {"data_set": data_set, "models": len(drawn), "undrawn": undrawn, "prompts": prompts[:count]}


def _scores(record: Record, columns: Any) -> list[tuple[str, str]]:
    """An image's own scores; not those that do not apply."""
    found = [(column, record.scores.get(column.score, NOT_APPLICABLE)) for column in columns]
    return [
        (column.title, f"{SCALES.get(column.score, 1.0) * value:.{column.digits}f}")
        for column, value in found
        if value != NOT_APPLICABLE
    ]


def _described(model: Model) -> Iterator[str]:
    """What is known of a model's evaluations; data sets evaluated alike share a part."""
    parts: dict[str, list[str]] = {}
    names = {"guidance_scale": "guidance", "num_inference_steps": "steps", "resolution": "pixels", "seed": "seed"}
    for data_set, evaluation in model.evaluations.items():
        s = evaluation.settings
        what = [f"{s.get('model', 'model not recorded')}", f"LoRA {s.get('lora') or 'none'}"]
        what += [f"{name} {s[key]}" for key, name in names.items() if key in s]
        count = f" ({len(evaluation.prompts)} prompts)" if evaluation.records else ""
        parts.setdefault(", ".join(what) if s else "settings not recorded", []).append(data_set + count)
    return (f"{', '.join(data_sets)}: {text}" for text, data_sets in parts.items())
