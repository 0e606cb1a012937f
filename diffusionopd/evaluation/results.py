"""The files of an evaluation: one line a sample as it is scored, then the averages.

    <folder>/evaluation_results.jsonl    {"sample_id", "prompt", "metadata", "scores"}, one object a line; with an
                                         image beside the prompt its SHA-256, "reference"
    <folder>/average_scores.json         mean of each score; "counts", "prompts" and "standard_errors" beside them
    <folder>/evaluation_settings.json    what the images depend on, so that two evaluations are not mixed; beside it
                                         "images_saved": of samples below this number the evaluation may write images
    <folder>/images/%05d.jpg             by sample_id, when images are saved

Several processes write a part file each; process 0 merges them. File and key names are those of the upstream release.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffusionopd.data.prompts import REFERENCE, Prompt
from diffusionopd.files import write_atomically, writing
from diffusionopd.rewards import NOT_APPLICABLE, Combined, Weighted

if TYPE_CHECKING:
    from diffusionopd.locks import Lock

RESULTS = "evaluation_results.jsonl"
AVERAGES = "average_scores.json"
SETTINGS = "evaluation_settings.json"
PART = "evaluation_results.part{rank}.jsonl"
_KEPT = "What has been scored is kept: free some space, and go on with --resume."
_SAVED = "images_saved"
_FOREIGN = ("config.json", "metrics.jsonl", AVERAGES, RESULTS, PART.format(rank="*"), "images")
_REMEDY = "use another output folder, or --overwrite to replace that evaluation"


class EvaluationError(ValueError):
    """An evaluation that cannot be run or resumed as asked."""


@dataclass(frozen=True)
class Record:
    """One scored sample: `sample_id` is prompt index times images per prompt, plus the image's number.

    `reference`: SHA-256 of the image beside the prompt; "" where there is none.
    """

    sample_id: int
    prompt: str
    metadata: dict[str, Any]
    scores: dict[str, float]
    reference: str = ""

    @property
    def subject(self) -> tuple[str, Any]:
        """What tells its prompt from others: the text, and the image beside it by its content or else its name."""
        return self.prompt, self.reference or self.metadata.get(REFERENCE)


@dataclass(frozen=True)
class Summary:
    """A score over the `count` samples of an evaluation to which it applies, of so many different `prompts`."""

    mean: float
    standard_error: float
    count: int
    prompts: int = 0  # where it is not known


def read_records(path: Path) -> list[Record]:
    """The records of a results file, in file order; `[]` if there is none.

    A last line cut short by a kill is left out.

    Raises:
        EvaluationError: any other line that is no record.
    """
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # a complete line ends in a line feed, so the last piece is empty
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(Record(**json.loads(line)))
            if not isinstance(records[-1].sample_id, int):
                raise TypeError(f"sample_id is {records[-1].sample_id!r}")
        except (ValueError, TypeError, RecursionError) as error:
            raise EvaluationError(f"{path}, line {number}: not a result ({error}); remove the line to go on") from error
    return records


def summarise(records: Sequence[Record], combined: Combined | None = None) -> dict[str, Summary]:
    """Mean, standard error and count of every score, over the samples to which it applies.

    The standard error is over prompts: the images of one text (and one reference image) are one cluster, because they
    are not independent draws, whether they come from several images a prompt or from a prompt that is in the test set
    several times (GenEval's has each of its 553 four times). It is 0 for a single prompt.

    Args:
        combined: name -> scores whose means are averaged without weights (`Scorer`s say which); left out unless each of
            them applies to some sample. They are scores of different samples, so that their errors are independent.
            Or `Weighted`, which may have the name of the score that it averages.
    """
    by_score: dict[str, list[_Term]] = {}
    for record in records:
        for name, value in record.scores.items():
            if value != NOT_APPLICABLE:
                by_score.setdefault(name, []).append((record.subject, value, 1.0))
    summaries = {name: _summary(terms) for name, terms in by_score.items()}
    for name, parts in (combined or {}).items():
        if isinstance(parts, Weighted):
            if parts.of in summaries and parts.by in summaries:
                weighed = [(r.subject, r.scores[parts.of], r.scores[parts.by]) for r in records]
                summaries[name] = _summary([term for term in weighed if NOT_APPLICABLE not in term[1:]])
        elif all(part in summaries for part in parts):
            found = [summaries[part] for part in parts]
            mean = math.fsum(part.mean for part in found) / len(found)
            error = math.sqrt(math.fsum(part.standard_error**2 for part in found)) / len(found)
            summaries[name] = Summary(mean, error, sum(part.count for part in found), sum(p.prompts for p in found))
    return summaries


_Term = tuple[tuple[str, Any], float, float]  # prompt, value, weight


def _summary(terms: Sequence[_Term]) -> Summary:
    """The weighted mean, with the error of the linearised ratio of two sums over prompts."""
    total = math.fsum(weight for *_, weight in terms)
    mean = math.fsum(value * weight for _, value, weight in terms) / total if total else 0.0
    residuals: dict[tuple[str, Any], float] = {}
    for prompt, value, weight in terms:
        residuals[prompt] = residuals.get(prompt, 0.0) + weight * (value - mean)
    n = len(residuals)
    spread = math.sqrt(n / (n - 1) * math.fsum(each**2 for each in residuals.values())) if n > 1 else 0.0
    return Summary(mean, spread / total if total else 0.0, len(terms), n)


def averages_json(summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """Upstream's flat `{score: mean}`, with counts, prompts and standard errors under keys of their own."""
    means: dict[str, Any] = {name: summary.mean for name, summary in summaries.items()}
    means["counts"] = {name: summary.count for name, summary in summaries.items()}
    means["prompts"] = {name: summary.prompts for name, summary in summaries.items()}
    means["standard_errors"] = {name: summary.standard_error for name, summary in summaries.items()}
    return means


def read_averages(path: Path) -> dict[str, Summary]:
    """The summaries of an `average_scores.json`, ours or upstream's (whose errors and counts are then 0).

    Raises:
        EvaluationError: the file is missing or is no such file.
    """
    try:
        means = json.loads(path.read_text(encoding="utf-8"))
        counts, prompts, errors = (means.pop(key, {}) for key in ("counts", "prompts", "standard_errors"))
        return {
            name: Summary(float(mean), errors.get(name, 0.0), counts.get(name, 0), prompts.get(name, 0))
            for name, mean in means.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(f"{path} cannot be read as average scores: {error}") from error


def format_table(summaries: Mapping[str, Mapping[str, Summary]]) -> str:
    """Text table of every dataset's scores: mean, standard error, number of samples and of different prompts."""
    rows = [f"{'dataset':16} {'score':32} {'mean':>10} {'s.e.':>10} {'n':>8} {'prompts':>8}"]
    for dataset, scores in summaries.items():
        for name, summary in scores.items():
            numbers = f"{summary.mean:10.4f} {summary.standard_error:10.4f} {summary.count:8} {summary.prompts:8}"
            rows.append(f"{dataset:16} {name:32} {numbers}")
    return "\n".join(rows)


@dataclass(frozen=True)
class Start:
    """What an evaluation begins with in a folder."""

    records: list[Record]
    """Of samples that need no work."""
    images_saved: int
    """Samples below this number may have an image of this evaluation's."""
    stale_images: list[Path]
    """Of an earlier evaluation that is started over."""


@dataclass
class ResultFolder:
    """An evaluation's folder, as one of `world` processes sees it.

    Order of calls: `open` on process 0, wait, `done` and then `append` on all, wait, `close` on process 0. All that is
    ever removed or replaced is what an evaluation has written. With a `lock`, HeldError instead of writing when that is
    lost.
    """

    folder: Path
    rank: int = 0
    world: int = 1
    lock: Lock | None = None

    def look(
        self,
        settings: Mapping[str, Any],
        prompts: Sequence[Prompt],
        resume: bool = False,
        need_images: bool = False,
        overwrite: bool = False,
    ) -> Start:
        """What this evaluation begins with; changes nothing.

        Args:
            settings: JSON values that images and scores depend on.
            prompts: the prompt of each sample id.
            resume: go on from the scored samples of an evaluation that is the same.
            need_images: a sample whose image is not there counts as not done.
            overwrite: start over what is in the folder; with `resume`, what is not the same.

        Raises:
            EvaluationError: files that no evaluation wrote; without `overwrite` also results of other settings or
                prompts (text, metadata, reference image), or of more samples, and without both any results.
        """
        before = self._settings()
        try:
            records = self._merge() if before is not None else []
        except EvaluationError:
            if not overwrite:
                raise
            records, resume = [], False
        saved, wanted = (before or {}).pop(_SAVED, 0), len(prompts) if need_images else 0
        if not isinstance(saved, int):
            raise EvaluationError(f"{self.folder / SETTINGS} has {_SAVED} {saved!r}; use another output folder")
        if taken := [path for path in map(self.image_path, range(saved, wanted)) if path.exists()]:
            raise EvaluationError(f"{taken[0]} is not of the evaluation in this folder; use another output folder")
        differences = _differences(before or {}, settings, prompts, records)
        if records and differences and not overwrite:
            what = "; ".join(differences)
            raise EvaluationError(f"{self.folder} holds results of another evaluation: {what}; {_REMEDY}")
        if records and not (resume or overwrite):
            what = f"{self.folder} holds this evaluation, with {len(records)} of {len(prompts)} samples scored"
            raise EvaluationError(f"{what}: go on with --resume, start over with --overwrite, or use another folder")
        if differences or not resume:
            return Start([], wanted, [self.image_path(sample_id) for sample_id in range(saved)])
        kept = [record for record in records if not need_images or self.image_path(record.sample_id).is_file()]
        return Start(kept, max(saved, wanted), [])

    def open(self, settings: Mapping[str, Any], prompts: Sequence[Prompt], **how: bool) -> None:
        """Make the folder ready for appending: what an evaluation left there is kept or removed.

        The order is such that a kill at any moment leaves results beside the settings that they were made with.
        Arguments and errors as of `look`.
        """
        start = self.look(settings, prompts, **how)
        self._check_lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / AVERAGES).unlink(missing_ok=True)
        if start.records:
            self._write_records(start.records)
        for path in [*([] if start.records else [self.folder / RESULTS]), *self._parts(), *start.stale_images]:
            path.unlink(missing_ok=True)
        described = {**settings, _SAVED: start.images_saved}
        self._write(self.folder / SETTINGS, json.dumps(described, indent=2) + "\n")

    def done(self) -> set[int]:
        """Ids of the samples that need no work; to be called after `open`."""
        return {record.sample_id for record in read_records(self.folder / RESULTS)}

    def append(self, records: Iterable[Record]) -> None:
        """Add records to this process's file at once, so that a kill loses at most the batch in work."""
        self._check_lock()
        path = self.folder / (RESULTS if self.world == 1 else PART.format(rank=self.rank))
        with writing(path, "file", _KEPT), path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, records)))

    def save_image(self, sample_id: int, pixels: np.ndarray) -> None:
        """Write an image, uint8 `[H, W, 3]`, atomically."""
        # Encoded in memory: given a file, Pillow does not notice when a full disk takes a part only.
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, format="JPEG", quality=95, subsampling=0)
        self._write(self.image_path(sample_id), encoded.getvalue())

    def image_path(self, sample_id: int) -> Path:
        """Where the image of a sample is or will be."""
        return self.folder / "images" / f"{sample_id:05d}.jpg"

    def close(self, combined: Combined | None = None) -> None:
        """Merge the parts, sorted by sample, and write the averages; `combined` as for `summarise`."""
        records = self._merge()
        self._write_records(records)
        for part in self._parts():
            part.unlink()
        self._write(self.folder / AVERAGES, json.dumps(averages_json(summarise(records, combined)), indent=4) + "\n")

    def _check_lock(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(PART.format(rank="*")))

    def _merge(self) -> list[Record]:
        """Every record of the folder once, sorted by sample."""
        found = {r.sample_id: r for path in [self.folder / RESULTS, *self._parts()] for r in read_records(path)}
        return [found[sample_id] for sample_id in sorted(found)]

    def _write(self, path: Path, content: bytes | str) -> None:
        """Write a file of the folder atomically; FolderError when the disk is full or it cannot be written."""
        self._check_lock()
        with writing(path, "file", _KEPT):
            write_atomically(path, content)

    def _write_records(self, records: Iterable[Record]) -> None:
        self._write(self.folder / RESULTS, "".join(map(_line, records)))

    def _settings(self) -> dict[str, Any] | None:
        """Those of the evaluation that wrote here; None if there was none.

        Raises:
            EvaluationError: they cannot be read, or there are none beside files that an evaluation would replace.
        """
        path = self.folder / SETTINGS
        if path.exists():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError, RecursionError) as error:
                raise EvaluationError(f"{path} cannot be read ({error}); use another output folder") from error
        if foreign := [path.name for name in _FOREIGN for path in self.folder.glob(name)]:
            raise EvaluationError(
                f"{self.folder} has {', '.join(foreign)}, and no {SETTINGS}: it is not an evaluation's folder; use "
                "another one"
            )
        return None


def _differences(
    before: Mapping[str, Any], settings: Mapping[str, Any], prompts: Sequence[Prompt], records: Sequence[Record]
) -> list[str]:
    """What an evaluation with these settings and prompts, and the one that made the records, do not share."""
    now = json.loads(json.dumps(settings))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    differences = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys]
    others = ((record.sample_id, _other(record, prompts)) for record in records)
    return differences + [f"sample {sample_id} {what}" for sample_id, what in others if what][:1]


def _other(record: Record, prompts: Sequence[Prompt]) -> str:
    """What tells a record from the prompt of its sample; nothing for the same."""
    if not 0 <= record.sample_id < len(prompts):
        return f"is not among the {len(prompts)} wanted now"
    prompt = prompts[record.sample_id]
    if record.prompt != prompt.text:
        return "has another prompt"
    if record.metadata != prompt.metadata:
        return "has other metadata"
    return "has another reference image" if record.reference != prompt.image else ""


def _line(record: Record) -> str:
    values = asdict(record)
    if not record.reference:
        del values["reference"]
    return json.dumps(values, ensure_ascii=False) + "\n"
