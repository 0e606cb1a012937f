"""Evaluated models: read from the folders of their evaluations, and the paper's rows."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusionopd.config_schema import is_number
from diffusionopd.evaluation.results import AVERAGES, RESULTS, SETTINGS, Record, Summary, read_averages, read_records
from diffusionopd.files import path_flag
from tools.report import published

EVALUATION = "evaluation"  # where a run folder keeps its evaluations
SCALES = {"unifiedreward": 5.0}
"""Files hold UnifiedReward's rating of 1 to 5 divided by 5; the paper prints the rating."""


class ComparisonError(ValueError):
    """Raised for models that cannot be compared."""


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

    def score(self, name: str, data_set: str) -> Summary | None:
        """A figure as the files have it; None if there is none."""
        evaluation = self.evaluations.get(data_set)
        return evaluation.scores.get(name) if evaluation else None


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
        models[name] = Model(name, _evaluations(path_flag(path)))
    return list(models.values())


def _evaluations(path: Path) -> dict[str, Evaluation]:
    """The evaluations at a path by data set."""
    for root in (path, path / EVALUATION):
        if (root / AVERAGES).is_file():
            evaluation = read_evaluation(root)
            return {str(evaluation.settings.get("dataset", root.resolve().name)): evaluation}
        if several := sorted(file.parent for file in root.glob(f"*/{AVERAGES}")):
            begun = {file.parent for file in root.glob(f"*/{SETTINGS}")}
            for folder in sorted(begun.difference(several)):
                warnings.warn(f"left out: the evaluation in {folder} is not finished", stacklevel=2)
            return {folder.name: read_evaluation(folder) for folder in several}
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


def published_models() -> Iterator[Model]:
    """The rows of the paper, in the units of the files."""
    for name, values in published.ROWS.items():
        scores: dict[str, dict[str, Summary]] = {}
        for (names, data_sets, _), value in zip(published.COLUMNS.values(), values, strict=True):
            for score in names:
                mean = float(value) / SCALES.get(score, 1.0)
                scores.setdefault(data_sets[0], {})[score] = Summary(mean, 0.0, 0)
        evaluations = {data_set: Evaluation(found, published.SETTINGS) for data_set, found in scores.items()}
        yield Model(name, evaluations, published.SOURCE)
