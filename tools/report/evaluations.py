"""What is compared: models with their evaluations, read from the folders that `scripts/evaluate.py` writes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusionopd.evaluation.results import AVERAGES, RESULTS, SETTINGS, Record, Summary, read_averages, read_records

EVALUATION = "evaluation"  # where a run folder keeps its evaluations


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
    def images_per_prompt(self) -> int:
        """Images per prompt, 1 where the settings do not say."""
        return int(self.settings.get("images_per_prompt", 1))

    @property
    def prompts(self) -> list[str]:
        """Its prompts in order, each once."""
        return [record.prompt for record in self.first_images().values()]

    def first_images(self) -> dict[int, Record]:
        """The first image of each prompt, by the prompt's index."""
        count = self.images_per_prompt
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
    its `evaluation/`. An evaluation that stands alone belongs to the data set that its settings name, else to that of
    other models with the same prompts, else to one with its folder's name.

    Raises:
        ComparisonError: nothing there, two models of one name, a file that cannot be read.
        EvaluationError: malformed averages or records.
    """
    found = {}
    for run in runs:
        name, path = _split(run)
        if name in found:
            raise ComparisonError(f"two models are called '{name}'; tell them apart as NAME={path}")
        found[name] = {folder: (given, read_evaluation(folder)) for folder, given in find_evaluations(path).items()}
    prompts = {
        given: evaluation.prompts for model in found.values() for given, evaluation in model.values() if given
    }  # of the data sets that have a name
    models = []
    for name, evaluations in found.items():
        by_data_set = {}
        for folder, (given, evaluation) in evaluations.items():
            data_set = given or _data_set(folder, evaluation, prompts)
            prompts.setdefault(data_set, evaluation.prompts)
            by_data_set[data_set] = evaluation
        models.append(Model(name, by_data_set))
    return models


def _split(run: str) -> tuple[str, Path]:
    """Name and path of an argument; the name defaults to the folder's, or its run's."""
    name, equals, path = run.partition("=")
    if equals and name and not Path(run).exists():
        return name, Path(path)
    folder = Path(run).resolve()
    return folder.parent.name if folder.name == EVALUATION else folder.name, Path(run)


def find_evaluations(path: Path) -> dict[Path, str]:
    """The evaluations at a path: folder -> its data set, empty for one that stands alone.

    Raises:
        ComparisonError: there is none.
    """
    for root in (path, path / EVALUATION):
        if (root / AVERAGES).is_file():
            return {root: ""}
        folders = sorted(root.iterdir()) if root.is_dir() else []
        several = {folder: folder.name for folder in folders if (folder / AVERAGES).is_file()}
        if several:
            return several
    if not path.is_dir():
        raise ComparisonError(f"there is no folder {path}")
    if any((folder / SETTINGS).is_file() for folder in (path, *path.iterdir())):
        raise ComparisonError(f"the evaluation in {path} is not finished: repeat its command with --resume")
    raise ComparisonError(
        f"no evaluation in {path}: expected {AVERAGES} there, in its folders or in its {EVALUATION}/; "
        "scripts/evaluate.py writes it"
    )


def read_evaluation(folder: Path) -> Evaluation:
    """The files of one evaluation. Raises `ComparisonError` or `EvaluationError` if one is malformed."""
    scores = read_averages(folder / AVERAGES)
    for name, summary in scores.items():
        if not (math.isfinite(summary.mean) and math.isfinite(summary.standard_error)):
            raise ComparisonError(f"{folder / AVERAGES}: '{name}' is {summary.mean} ± {summary.standard_error}")
    return Evaluation(scores, _read_settings(folder / SETTINGS), read_records(folder / RESULTS), folder)


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
        count, rewards = settings.get("images_per_prompt", 1), settings.get("rewards", [])
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"images_per_prompt is {count!r}")
        if not isinstance(rewards, list) or not all(isinstance(name, str) for name in rewards):
            raise ValueError(f"rewards is {rewards!r}")
        return settings
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ComparisonError(f"{path} cannot be read as settings: {error}") from error


def _data_set(folder: Path, evaluation: Evaluation, known: Mapping[str, Sequence[str]]) -> str:
    """The data set of an evaluation that stands alone."""
    if "dataset" in evaluation.settings:
        return str(evaluation.settings["dataset"])
    own = folder.resolve().name
    alike = [name for name, prompts in known.items() if same_prompts(evaluation.prompts, prompts)]
    return own if own in alike or not alike else alike[0]


def same_prompts(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether one list of prompts is the beginning of the other, and neither is empty."""
    shorter = min(len(a), len(b))
    return shorter > 0 and list(a[:shorter]) == list(b[:shorter])


# What else the images or the scores depend on. Models are what is compared, and guidance belongs to a model.
COMPARED_SETTINGS = (
    "num_inference_steps", "resolution", "seed", "max_sequence_length", "dtype", "images_per_prompt", "reward_options",
)  # fmt: skip


def unequal_settings(models: Sequence[Model]) -> list[str]:
    """What evaluations of one data set differ in, beside the model and its guidance: a sentence for each setting."""
    differing: dict[str, list[tuple[str, str, str]]] = {}  # setting -> (data set, value, model) of all that have it
    other_prompts = []
    for data_set in dict.fromkeys(name for model in models for name in model.evaluations):
        evaluations = {
            "published rows" if model.source else model.name: model.evaluations[data_set]
            for model in models
            if data_set in model.evaluations
        }
        settings = {name: _compared(evaluation) for name, evaluation in evaluations.items()}
        for key in dict.fromkeys(key for each in settings.values() for key in each):
            values = [(data_set, str(each[key]), name) for name, each in settings.items() if key in each]
            if len({value for _, value, _ in values}) > 1:
                differing.setdefault(key, []).extend(values)
        prompts = [evaluation.prompts for evaluation in evaluations.values() if evaluation.records]
        if not all(same_prompts(each, prompts[0]) for each in prompts):
            other_prompts.append(data_set)
    sentences = [_sentence(key, values) for key, values in differing.items()]
    return sentences + ([f"prompts on {', '.join(other_prompts)}: not the same"] if other_prompts else [])


def _compared(evaluation: Evaluation) -> dict[str, Any]:
    known = {key: evaluation.settings[key] for key in COMPARED_SETTINGS if key in evaluation.settings}
    return known | ({"number of prompts": len(evaluation.prompts)} if evaluation.records else {})


def _sentence(key: str, values: Sequence[tuple[str, str, str]]) -> str:
    """`key on <data sets>: <value> (<models>), ...`, each once, in order."""
    data_sets = dict.fromkeys(data_set for data_set, _, _ in values)
    who: dict[str, dict[str, None]] = {}
    for _, value, name in values:
        who.setdefault(value, {})[name] = None
    groups = ", ".join(f"{value} ({', '.join(names)})" for value, names in who.items())
    return f"{key} on {', '.join(data_sets)}: {groups}"
