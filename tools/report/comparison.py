"""Models against scores: the paper's columns and others, averages, and what makes rows unequal."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diffusionopd.evaluation.results import Summary
from tools.report import benchmarks, published
from tools.report.evaluated import SCALES, Evaluation, Model

NUMBER = "number of prompts"
# What the images or the scores depend on. Models are what is compared, and guidance belongs to a model.
COMPARED_SETTINGS = (
    "num_inference_steps", "resolution", "seed", "max_sequence_length", "dtype", "images_per_prompt", "reward_options",
    "reward_files",
)  # fmt: skip


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

    @property
    def scale(self) -> float:
        """What files are multiplied with to be shown."""
        return 100.0 if benchmarks.is_percent(self.score) else SCALES.get(self.score, 1.0)

    def of(self, model: Model) -> Summary | None:
        """The model's value in the unit shown; None if it has none."""
        found = model.score(self.score, self.data_set)
        if found is None or (model.source and not self.paper):
            return None
        return Summary(self.scale * found.mean, self.scale * found.standard_error, found.count, found.prompts)

    def text(self, model: Model) -> str:
        """The model's value for people: a published one with the digits of its source."""
        summary = self.of(model)
        if summary and model.source:
            return published.ROWS[model.name][list(published.COLUMNS).index(self.title)]
        return f"{summary.mean:.{self.digits}f}" if summary else "–"


@dataclass(frozen=True)
class Averages:
    """Of each row: the mean of the min-max normalised scores that it has among `columns` (None without any), and their
    number."""

    title: str
    columns: Sequence[Column]
    values: Sequence[float | None]
    counts: Sequence[int]

    @property
    def complete(self) -> list[bool]:
        """Which rows have all the columns: only such averages can be compared."""
        return [count == len(self.columns) for count in self.counts]

    @property
    def best(self) -> list[bool]:
        """Which rows have the highest of at least two complete averages."""
        return highest([v if full else None for v, full in zip(self.values, self.complete, strict=True)])


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


def highest(values: Sequence[float | None]) -> list[bool]:
    """Which values are the highest of at least two."""
    there = [value for value in values if value is not None]
    return [len(there) > 1 and value == max(there) for value in values]


def compare(models: Iterable[Model]) -> Comparison:
    """The comparison of models, measured ones and published ones."""
    models = list(models)
    columns = list(find_columns(models))
    candidates = [column for column in columns if column.paper] or [column for column in columns if not column.detail]
    averages = list(_averages(models, candidates))
    notes = list(_notes(models, columns, candidates, averages))
    return Comparison(models, columns, averages, unequal_settings(models), notes)


def find_columns(models: Sequence[Model]) -> Iterator[Column]:
    """The paper's columns that there is something for, then other scores, then details."""
    measured = [model for model in models if not model.source] or models
    everywhere, taken = [name for model in models for name in model.evaluations], set()
    for title, (scores, data_sets, digits) in published.COLUMNS.items():
        # All rows show one score of one data set: the one that most of the measured models have.
        places = [(score, data_set) for data_set in (*data_sets, *everywhere) for score in scores]
        place = max(places, key=lambda place: sum(model.score(*place) is not None for model in measured))
        if any(model.score(*place) for model in models):
            taken.add(place)
            yield Column(title, *place, digits, paper=True)
    others = {}
    for data_set, evaluation in (pair for model in measured for pair in model.evaluations.items()):
        for score in evaluation.scores:
            if (score, data_set) not in taken:
                title, digits = benchmarks.title_of(score, data_set)
                detail = _is_detail(score, evaluation)
                others[score, data_set] = Column(title, score, data_set, digits, detail=detail)
    yield from sorted(others.values(), key=lambda column: column.detail)


def _is_detail(score: str, evaluation: Evaluation) -> bool:
    """Not one of the rewards that were asked for, or one that has a column of the paper already."""
    asked = evaluation.settings.get("rewards", evaluation.scores)
    return score not in asked or any(score in scores for scores, _, _ in published.COLUMNS.values())


def _averages(models: Sequence[Model], columns: Sequence[Column]) -> Iterator[Averages]:
    """Over the columns in which two rows differ, and over those that every row has if rows differ in that."""
    means = [[summary.mean if (summary := c.of(model)) else np.nan for c in columns] for model in models]
    normalised = min_max(np.array(means, dtype=np.float64).reshape(len(models), len(columns)))
    present = ~np.isnan(normalised)
    usable, common = present.any(axis=0), present.all(axis=0)
    for title, chosen in (("Average", usable), ("Common", common & (common != usable).any())):
        if chosen.any():
            rows = [row[~np.isnan(row)] for row in normalised[:, chosen]]
            values = [float(row.mean()) if row.size else None for row in rows]
            yield Averages(title, list(itertools.compress(columns, chosen)), values, [row.size for row in rows])


def min_max(values: np.ndarray) -> np.ndarray:
    """Each column of float64 `[rows, columns]` mapped linearly to [0, 1] over its rows.

    NaN is where there is no value, and in the result also a column whose values are all the same.
    """
    low, high = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)
    return (values - low) / np.where(high > low, high - low, np.nan)


def _notes(
    models: Sequence[Model], columns: Sequence[Column], candidates: Sequence[Column], averages: Sequence[Averages]
) -> Iterator[str]:
    def titles(some: Iterable[Column]) -> str:
        return ", ".join(column.title for column in some) or "none"

    averaged = averages[0].columns if averages else []
    if averages:
        yield (
            "Average: mean of the scores min-max normalised over the rows shown (0 the lowest, 1 the highest of a "
            "column); it changes with the rows."
        )
        for model, count, complete in zip(models, averages[0].counts, averages[0].complete, strict=True):
            if not complete:
                own = titles(column for column in averaged if column.of(model))
                yield f"{model.name}: average over {count} of {len(averaged)} columns ({own})."
        if not all(averages[0].complete):
            yield "Averages over different columns cannot be compared with each other."
        for common in averages[1:]:
            yield f"Common: the average over the columns that every row has ({titles(common.columns)})."
    else:
        yield "No average: it takes a score that differs between two rows."
    for column in candidates:
        if column not in averaged:
            yield f"{column.title} is in no average: it takes two rows that differ."
    if any(column.score == "unifiedreward" for column in columns):
        yield "UnifiedReward is shown as its rating of 1 to 5; the files hold a fifth of it."
    if any(benchmarks.is_percent(column.score) for column in columns):
        yield "GenEval 2 and DPG-Bench are shown times 100, as they are quoted; the files hold shares of 1."
    if any(model.source for model in models):
        yield (
            f"Published rows are those of {published.SOURCE}, to its digits. In brackets: the paper's own average, "
            "which is not what this mean gives for its rows (alone they come to 0.984 for DiffusionOPD, not to 0.929)."
        )


def unequal_settings(models: Iterable[Model]) -> list[str]:
    """What evaluations of one data set differ in, beside the model and its guidance: a sentence for each setting."""
    models, differing = list(models), dict[str, list[str]]()  # what differs and how -> data sets
    for data_set in dict.fromkeys(name for model in models for name in model.evaluations):
        rows = {"published rows" if m.source else m.name: m.evaluations.get(data_set) for m in models}
        settings = {name: dict(each.settings) for name, each in rows.items() if each}
        prompts = {name: each.prompts for name, each in rows.items() if each and each.records}
        for name, texts in prompts.items():
            settings[name].setdefault(NUMBER, len(texts))
        for key in (NUMBER, *COMPARED_SETTINGS):
            who: dict[str, list[str]] = {}
            for name in settings:
                if key in settings[name]:
                    who.setdefault(str(settings[name][key]), []).append(name)
            if len(who) > 1:
                text = ", ".join(f"{value} ({', '.join(names)})" for value, names in who.items())
                differing.setdefault(f"{key} on {{}}: {text}", []).append(data_set)
        if any(a != b for each in prompts.values() for a, b in zip(each, next(iter(prompts.values())), strict=False)):
            differing.setdefault("prompts on {}: not the same", []).append(data_set)
    return [text.replace("{}", ", ".join(data_sets), 1) for text, data_sets in differing.items()]
