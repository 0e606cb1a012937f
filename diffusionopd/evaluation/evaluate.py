"""Generate, score, write: the same images whatever the batch size and the number of processes.

The image of a sample depends on (seed, prompt index, image number) and on nothing else that the runner chooses.
Letters: B images, H and W pixels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from diffusionopd.data.prompts import Prompt
from diffusionopd.data.unfit import met_at
from diffusionopd.distributed import LONGEST_TIMEOUT, barrier, gather_over_processes
from diffusionopd.evaluation.results import AVERAGES, Record, ResultFolder, Summary, read_averages, summarise
from diffusionopd.locks import Lock
from diffusionopd.rewards import Combined, RewardError, RewardUnavailableError, Scorer, score_all, to_uint8

Generate = Callable[[Sequence[str], Sequence[tuple[int, int]]], Tensor]
"""Makes the images `[B, 3, H, W]` in [0, 1] of B prompts and their (prompt index, image number): `ImageGenerator`."""

Batches = Iterator[tuple[list[Record], np.ndarray]]
"""The records of a batch and its images, uint8 `[B, H, W, 3]`."""


def score_samples(
    generate: Generate,
    prompts: Sequence[Prompt],
    scorers: Mapping[str, Scorer],
    sample_ids: Sequence[int],
    batch_size: int,
    images_per_prompt: int = 1,
    progress: str = "",
) -> Batches:
    """Generate and score samples batch by batch.

    Args:
        sample_ids: prompt index times `images_per_prompt`, plus the image's number.
        progress: title of a progress bar; none without.

    Raises:
        RewardError: a scorer's output is malformed, or an image is not finite.
    """
    with tqdm(total=len(sample_ids), desc=progress, unit="image", disable=not progress) as bar:
        for start in range(0, len(sample_ids), batch_size):
            ids = sample_ids[start : start + batch_size]
            samples = [divmod(sample_id, images_per_prompt) for sample_id in ids]
            batch = [prompts[index] for index, _ in samples]
            texts = [prompt.text for prompt in batch]
            images = _pixels(generate([prompt.key for prompt in batch], samples), batch)
            try:
                scores = score_all(scorers, images, texts, [prompt.metadata for prompt in batch])
            except RewardUnavailableError:
                raise
            except RewardError as error:
                raise RewardError(f"{error}. It was scoring {met_at(error, batch)}") from error
            records = []
            for i, prompt in enumerate(batch):
                row = {name: float(values[i]) for name, values in scores.items()}
                records.append(Record(ids[i], prompt.text, prompt.metadata, row))
            yield records, images
            bar.update(len(ids))


def _pixels(images: Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
    """The images of these prompts as `to_uint8` makes them; `RewardError` that names those that are not finite."""
    try:
        return to_uint8(images)
    except ValueError as error:
        lost = [prompt for prompt, image in zip(prompts, images, strict=True) if not image.isfinite().all()]
        if not lost:
            raise
        remedy = "Choose mixed_precision bf16 or no, or check the model's weights and LoRA"
        raise RewardError(f"{error}: that of {met_at(error, lost)}. {remedy}") from error


def evaluate(
    generate: Generate,
    prompts: Sequence[Prompt],
    scorers: Mapping[str, Scorer],
    folder: Path,
    *,
    batch_size: int,
    save_images: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    images_per_prompt: int = 1,
    settings: Mapping[str, Any] | None = None,
    lock: Lock | None = None,
    rank: int = 0,
    world: int = 1,
    in_step: bool = False,
) -> dict[str, Summary]:
    """Score the images of all prompts and write the files of `diffusionopd.evaluation.results`.

    Args:
        folder: where the files go. What was scored there before is refused, unless `resume` goes on with the same
            evaluation or `overwrite` replaces it, the same or another.
        settings: JSON values that the images depend on, kept beside the results and compared.
        lock: of the folder, looked at before anything is written.
        rank, world: this process's share is every `world`-th sample left to do.
        in_step: whether all processes must make the same number of batches, as with a sharded base.

    Returns:
        mean, standard error and count of each score, on every process.

    Raises:
        EvaluationError: what is in the folder cannot be resumed or replaced.
        HeldError: the folder was taken by another process.
        RewardError: a scorer's output is malformed, or an image is not finite.
    """
    files = ResultFolder(Path(folder), rank, world, lock)
    samples = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    if rank == 0:
        described = {**(settings or {}), "rewards": sorted(scorers), "images_per_prompt": images_per_prompt}
        files.open(described, samples, resume=resume, need_images=save_images, overwrite=overwrite)
    barrier("the end of a data set", LONGEST_TIMEOUT)
    done = files.done()
    left = [sample_id for sample_id in range(len(samples)) if sample_id not in done]
    own = left[rank::world]
    progress = f"evaluating {files.folder.name}" if rank == 0 and own else ""
    batches = score_samples(generate, prompts, scorers, own, batch_size, images_per_prompt, progress)
    if in_step:
        batches = islice(_then_idle(batches, generate, prompts), _most_batches(len(left), world, batch_size))
    for records, images in batches:
        if save_images:
            for record, pixels in zip(records, images, strict=True):
                files.save_image(record.sample_id, pixels)
        files.append(replace(record, reference=samples[record.sample_id].image) for record in records)
    barrier("the end of a data set", LONGEST_TIMEOUT)
    if rank == 0:
        files.close(_combined(scorers))
    barrier("the end of a data set", LONGEST_TIMEOUT)
    return read_averages(files.folder / AVERAGES)


def evaluate_task(
    generate: Generate,
    prompts: Sequence[Prompt],
    scorers: Mapping[str, Scorer],
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    in_step: bool = False,
    parts: Mapping[str, range] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The mean of each score over the prompts, one image each, without files: for evaluation during training.

    Args:
        rank, world, in_step: as for `evaluate`.
        parts: by name, places of prompts whose means are returned too, as `<name>/<score>`.
        stopped: asked before each batch, equally often on every process, where it must have the same answer.

    Returns:
        the means on every process, or None when it was `stopped` before its end.

    Raises:
        RewardError: a scorer failed or an image is not finite on some process, raised on every one, with its rank.
    """
    batches = score_samples(generate, prompts, scorers, range(rank, len(prompts), world), batch_size)
    if in_step:
        batches = _then_idle(batches, generate, prompts)
    records: list[Record] = []
    failures: list[str] = []
    for _ in range(_most_batches(len(prompts), world, batch_size)):
        if stopped():
            return None
        try:
            records += next(batches, ([], None))[0]  # the last process may have one batch less
        except RewardError as error:  # the batches end with it
            failures = [f"rank {rank}: {error}"]
    if failures := gather_over_processes(failures):
        raise RewardError("; ".join(failures))
    records, means = gather_over_processes(records), dict[str, float]()
    named = {f"{name}/": places for name, places in (parts or {}).items()}
    for part, places in {"": range(len(prompts)), **named}.items():
        summaries = summarise([record for record in records if record.sample_id in places], _combined(scorers))
        means |= {f"{part}{name}": summary.mean for name, summary in summaries.items()}
    return means


def _most_batches(samples: int, world: int, batch_size: int) -> int:
    """How many batches the first process has of samples dealt out in turn; the last may have one less."""
    return math.ceil(math.ceil(samples / world) / batch_size)


def _then_idle(batches: Batches, generate: Generate, prompts: Sequence[Prompt]) -> Batches:
    """The batches, and when they end, also by an error, images without end that are thrown away."""

    def idle() -> Batches:
        while True:
            generate([prompts[0].key], [(0, 0)])
            yield [], np.zeros((0, 1, 1, 3), np.uint8)

    return chain(batches, idle())


def _combined(scorers: Mapping[str, Scorer]) -> Combined:
    """The figures of a whole test set that the scorers define beside the scores of single images."""
    return {name: parts for scorer in scorers.values() for name, parts in getattr(scorer, "combined", {}).items()}
