"""The columns of a comparison: the paper's scores, each of one data set for all rows, then whatever else was scored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from diffusionopd.evaluation.results import Summary
from tools.report import published
from tools.report.comparison_data import Evaluation, Model


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
