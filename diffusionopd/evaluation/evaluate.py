"""Generate, score, write: the same pictures whatever the batch size and the number of processes.

The picture of a sample depends on (seed, prompt index, image number) and on nothing else that the runner chooses.
Letters: B pictures, C latent channels, h and w latent size, H and W pixels.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from diffusionopd.data.noise import Stream, noise
from diffusionopd.data.prompts import Prompt
from diffusionopd.distributed import barrier, by_rank, gather_over_processes, together
from diffusionopd.evaluation.results import (
    AVERAGES,
    EvaluationError,
    Record,
    ResultFolder,
    Summary,
    read_averages,
    summarise,
)
from diffusionopd.evaluation.testsets import Benchmark
from diffusionopd.files import ensure_writable
from diffusionopd.models.backbone import (
    Backbone,
    encoder_place,
    find_device,
    load_backbone,
    load_text_encoder,
    text_key,
)
from diffusionopd.models.conditions import NEGATIVE, Conditions
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import LoraWeights
from diffusionopd.models.sharding import requested_sharding
from diffusionopd.models.text_cache import TextCache
from diffusionopd.rewards import RewardError, Scorer, build_scorer, score_all, to_uint8
from diffusionopd.transitions import transition

PATIENCE = 12 * 3600.0
"""Seconds that a process may wait for the slowest: scoring is shared by samples, not by time."""


class Generate(Protocol):
    """Makes the pictures of samples."""

    def __call__(self, prompts: Sequence[str], samples: Sequence[tuple[int, int]]) -> Tensor:
        """Pictures `[B, 3, H, W]` in [0, 1] of B prompts; `samples` are their (prompt index, image number)."""
        ...


@torch.no_grad()
def sample_images(
    backbone: Backbone,
    text: Conditions,
    latents: Tensor,
    num_steps: int,
    guidance_scale: float,
    *,
    resolution: int,
) -> Tensor:
    """Pictures by the first-order ODE (paper eq. 12: x' = x + dt v), decoded.

    Args:
        text: conditions of B prompts; those of the negative prompt are the backbone's.
        latents: noise `[B, C, h, w]` float32 on the backbone's device.
        num_steps: steps of the schedule.
        resolution: pixels a side, which the schedule's shift may depend on.

    Returns:
        float32 `[B, 3, H, W]` in [0, 1], on the VAE's device.
    """
    sigmas = backbone.sigmas(num_steps, resolution).tolist()
    x = latents
    for sigma, sigma_next in pairwise(sigmas):
        velocity, _ = backbone.velocity(x, sigma, text, guidance_scale)
        x = transition("ode", sigma, sigma_next).mean(x, velocity)
    return backbone.decode(x)


@dataclass(frozen=True)
class ImageGenerator:
    """Pictures of samples from a backbone (with whatever adapter is in use) and cached prompt embeddings."""

    backbone: Backbone
    cache: TextCache
    num_steps: int
    guidance_scale: float
    resolution: int
    seed: int

    def __call__(self, prompts: Sequence[str], samples: Sequence[tuple[int, int]]) -> Tensor:
        """As `Generate`. Raises `TextCacheError` for a prompt that the cache has not been filled with."""
        device = self.backbone.device
        keys = [(Stream.EVALUATION, self.seed, *sample) for sample in samples]
        latents = noise(self.backbone.latent_shape(self.resolution), keys).to(device)
        text = self.cache.get(prompts, device)
        return sample_images(
            self.backbone, text, latents, self.num_steps, self.guidance_scale, resolution=self.resolution
        )


Batches = Iterator[tuple[list[Record], Tensor]]


def score_samples(
    generate: Generate,
    prompts: Sequence[Prompt],
    scorers: Mapping[str, Scorer],
    sample_ids: Sequence[int],
    batch_size: int,
    images_per_prompt: int = 1,
    progress: str = "",
) -> Batches:
    """Generate and score samples batch by batch: yields the batch's records and its pictures.

    Args:
        sample_ids: prompt index times `images_per_prompt`, plus the image's number.
        progress: title of a progress bar; none without.

    Raises:
        RewardError: a scorer's output is malformed.
    """
    with tqdm(total=len(sample_ids), desc=progress, unit="image", disable=not progress) as bar:
        for start in range(0, len(sample_ids), batch_size):
            ids = sample_ids[start : start + batch_size]
            samples = [divmod(sample_id, images_per_prompt) for sample_id in ids]
            batch = [prompts[index] for index, _ in samples]
            texts, metadata = [prompt.text for prompt in batch], [prompt.metadata for prompt in batch]
            images = generate(texts, samples)
            scores = score_all(scorers, images, texts, metadata)
            yield (
                [
                    Record(sample_id, prompt.text, prompt.metadata, {name: float(v[i]) for name, v in scores.items()})
                    for i, (sample_id, prompt) in enumerate(zip(ids, batch, strict=True))
                ],
                images,
            )
            bar.update(len(ids))


def evaluate(
    generate: Generate,
    prompts: Sequence[Prompt],
    scorers: Mapping[str, Scorer],
    folder: Path,
    *,
    batch_size: int,
    save_images: bool = False,
    resume: bool = False,
    images_per_prompt: int = 1,
    settings: Mapping[str, Any] | None = None,
    rank: int = 0,
    world: int = 1,
    in_step: bool = False,
    barrier: Callable[[], object] = lambda: None,
) -> dict[str, Summary]:
    """Score every prompt's pictures and write the files of `diffusionopd.evaluation.results`.

    Args:
        folder: where the files go. What is there is replaced, unless `resume`: then scored samples are not made again.
        settings: JSON values that the pictures depend on, kept beside the results and compared on resume.
        rank, world: this process's share is every `world`-th sample left to do.
        in_step: whether all processes must make the same number of batches, as with a sharded base.
        barrier: returns once all processes have called it.

    Returns:
        mean, standard error and count of each score, on every process.

    Raises:
        EvaluationError: what is in the folder cannot be resumed.
        RewardError: a scorer's output is malformed.
    """
    files = ResultFolder(Path(folder), rank, world)
    texts = [prompt.text for prompt in prompts for _ in range(images_per_prompt)]
    if rank == 0:
        described = {**(settings or {}), "rewards": sorted(scorers), "images_per_prompt": images_per_prompt}
        files.open(described, texts, resume, save_images)
    barrier()
    done = files.done()
    left = [sample_id for sample_id in range(len(texts)) if sample_id not in done]
    own = left[rank::world]
    progress = f"evaluating {files.folder.name}" if rank == 0 and own else ""
    batches = score_samples(generate, prompts, scorers, own, batch_size, images_per_prompt, progress)
    if in_step:
        batches = islice(_then_idle(batches, generate, prompts), _most_batches(len(left), world, batch_size))
    for records, images in batches:
        if save_images:
            for record, pixels in zip(records, to_uint8(images), strict=True):
                files.save_image(record.sample_id, pixels)
        files.append(records)
    barrier()
    if rank == 0:
        files.close(_combined(scorers))
    barrier()
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
    gather: Callable[[list[Record]], list[Record]] = gather_over_processes,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The mean of each score over the prompts, one picture each, without files: for evaluation during training.

    Args:
        rank, world, in_step: as for `evaluate`.
        gather: joins the lists of all processes.
        stopped: asked before each batch, equally often on every process, where it must have the same answer.

    Returns:
        the means on every process, or None when it was `stopped` before its end.

    Raises:
        RewardError: a scorer failed on some process, raised on every one, with its rank.
    """
    batches = score_samples(generate, prompts, scorers, range(rank, len(prompts), world), batch_size)
    if in_step:
        batches = _then_idle(batches, generate, prompts)
    records: list[Record] = []
    failure = ""
    for _ in range(_most_batches(len(prompts), world, batch_size)):
        if stopped():
            return None
        try:
            records += next(batches, ([], None))[0]  # the last process may have one batch less
        except RewardError as error:  # the batches end with it
            failure = str(error)
    if failures := by_rank(gather_over_processes([failure])):
        raise RewardError(failures)
    return {name: summary.mean for name, summary in summarise(gather(records), _combined(scorers)).items()}


def _most_batches(samples: int, world: int, batch_size: int) -> int:
    """How many batches the first process has of samples dealt out in turn; the last may have one less."""
    return math.ceil(math.ceil(samples / world) / batch_size)


def _then_idle(batches: Batches, generate: Generate, prompts: Sequence[Prompt]) -> Batches:
    """The batches, and when they end, also by an error, pictures without end that are thrown away."""

    def idle() -> Batches:
        while True:
            yield [], generate([prompts[0].text], [(0, 0)])[:0]

    return chain(batches, idle())


def _combined(scorers: Mapping[str, Scorer]) -> dict[str, Sequence[str]]:
    """The figures of a whole test set that the scorers define beside the scores of single pictures."""
    return {name: parts for scorer in scorers.values() for name, parts in getattr(scorer, "combined", {}).items()}


@dataclass(frozen=True)
class Job:
    """One model on several benchmarks: everything `run` needs, already checked.

    `lora` None is the bare base model. `dtype` None is float16 on a GPU and float32 on a CPU. `output` gets the files
    of a single benchmark; several get a folder each in it.
    """

    model: str
    revision: str | None
    lora: LoraWeights | None
    benchmarks: Sequence[Benchmark]
    output: Path
    num_steps: int = 40
    guidance_scale: float = 4.5
    resolution: int = 512
    seed: int = 42
    batch_size: int = 16
    images_per_prompt: int = 1
    max_sequence_length: int = 128
    dtype: torch.dtype | None = None
    save_images: bool = False
    resume: bool = False
    cache_dir: str = ".cache/text"
    text_encoder_device: str = ""  # empty: the process's own, as for vae_device
    vae_device: str = ""
    reward_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `EvaluationError` for values that no picture can be made with."""
        for name in ("num_steps", "resolution", "batch_size", "images_per_prompt", "max_sequence_length"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not math.isfinite(self.guidance_scale) or self.guidance_scale < 0:
            raise EvaluationError(f"guidance_scale must be a number of at least 0, not {self.guidance_scale}")
        if self.resolution % 16:
            raise EvaluationError(f"resolution must be a multiple of 16, not {self.resolution}")
        if not 0 <= self.seed < 2**63:
            raise EvaluationError(f"seed must be at least 0 and below 2**63, not {self.seed}")
        names = [benchmark.name for benchmark in self.benchmarks]
        if not names or len(set(names)) < len(names):
            raise EvaluationError(f"evaluate at least one dataset, each once; given: {', '.join(names) or 'none'}")

    def steps_on(self, benchmark: Benchmark) -> int:
        """Steps of the ODE: the benchmark's own, else the job's."""
        return self.num_steps if benchmark.num_steps is None else benchmark.num_steps

    def guidance_on(self, benchmark: Benchmark) -> float:
        """Classifier-free guidance: the benchmark's own, else the job's."""
        return self.guidance_scale if benchmark.guidance_scale is None else benchmark.guidance_scale

    def folder(self, benchmark: Benchmark) -> Path:
        """Where the files of a benchmark go."""
        return self.output if len(self.benchmarks) == 1 else self.output / benchmark.name


def run(job: Job, state: PartialState) -> dict[str, dict[str, Summary]]:
    """Evaluate one model on every benchmark of the job; the scores by benchmark, on every process.

    Scorers are built first, so that a missing package or checkpoint is found before the model loads; text encoders are
    loaded only for prompts that the cache has not seen, and leave memory before the transformer comes. With several
    processes the base is sharded if the launcher says so (`diffusionopd.models.sharding`).

    Raises:
        EngineError, RewardError, BackboneError, AdapterError, TextCacheError, EvaluationError: as the parts do.
    """
    device, rank, world = state.device, state.process_index, state.num_processes
    if rank == 0:
        ensure_writable(job.output, "output folder", "Choose another with --output_dir, or free space.")
    ensure_writable(job.cache_dir, "text cache", "Choose another with --cache_dir, or free space.")
    dtype = job.dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    place, precision = encoder_place(job.text_encoder_device, device, dtype)
    vae_device = find_device(job.vae_device, device, "vae_device")
    names = dict.fromkeys(name for benchmark in job.benchmarks for name in benchmark.rewards)
    scorers = {name: build_scorer(name, str(device), job.reward_options.get(name)) for name in names}
    length = job.max_sequence_length
    load = partial(
        load_text_encoder, job.model, job.revision, dtype=precision, device=place, max_sequence_length=length
    )
    cache = TextCache(job.cache_dir, text_key(job.model, job.revision), length, dtype)
    texts = [NEGATIVE, *(prompt.text for benchmark in job.benchmarks for prompt in benchmark.prompts)]
    together(lambda: cache.fill(texts, load, rank=rank, world=world), "encoding the prompts", PATIENCE)
    sharding = requested_sharding() if world > 1 else None
    backbone = load_backbone(
        job.model, job.revision, dtype=dtype, device=device, vae_device=vae_device, sharding=sharding
    )
    backbone.negative = cache.get([NEGATIVE], device)
    if job.lora is not None:
        adapters = Adapters(backbone.transformer, backbone.inert_modules())
        adapters.add_teacher("evaluated", job.lora)
        adapters.use("evaluated")
    backbone.shard()
    generate = ImageGenerator(backbone, cache, job.num_steps, job.guidance_scale, job.resolution, job.seed)
    return {
        benchmark.name: evaluate(
            replace(generate, num_steps=job.steps_on(benchmark), guidance_scale=job.guidance_on(benchmark)),
            benchmark.prompts,
            {name: scorers[name] for name in benchmark.rewards},
            job.folder(benchmark),
            batch_size=job.batch_size,
            save_images=job.save_images,
            resume=job.resume,
            images_per_prompt=job.images_per_prompt,
            settings=_settings(job, benchmark, dtype),
            rank=rank,
            world=world,
            in_step=sharding is not None,
            barrier=lambda: barrier("the end of a data set", PATIENCE),
        )
        for benchmark in job.benchmarks
    }


# Options that say where a scorer runs or how long to wait for it, not what it scores.
_PLACE_AND_PATIENCE = {"device", "base_url", "api_key_variable", "timeout", "connect_timeout", "retries", "backoff"}
_PLACE_AND_PATIENCE |= {"concurrency"}


def _settings(job: Job, benchmark: Benchmark, dtype: torch.dtype) -> dict[str, Any]:
    """What pictures and scores depend on, as JSON values: neither the batch size nor the number of processes."""
    options = {
        name: {key: value for key, value in job.reward_options.get(name, {}).items() if key not in _PLACE_AND_PATIENCE}
        for name in benchmark.rewards
    }
    return {
        "dataset": benchmark.name,
        "model": job.model,
        "revision": job.revision,
        "lora": job.lora.source if job.lora else None,
        "lora_hash": _hash(job.lora) if job.lora else None,
        "num_inference_steps": job.steps_on(benchmark),
        "guidance_scale": job.guidance_on(benchmark),
        "resolution": job.resolution,
        "seed": job.seed,
        "max_sequence_length": job.max_sequence_length,
        "dtype": str(dtype).removeprefix("torch."),
        "reward_options": {name: given for name, given in options.items() if given},
    }


def _hash(lora: LoraWeights) -> str:
    """A short hash of a LoRA's tensors and scales: training again under the same name must not look the same."""
    digest = hashlib.sha256()
    for name in sorted(lora.a):
        digest.update(f"{name} {lora.alpha[name]}".encode())
        for tensor in (lora.a[name], lora.b[name]):
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def find_checkpoint(path: str) -> Path:
    """The folder of a saved LoRA: a run folder, `<run>/checkpoints/latest` or `checkpoint-<n>`, or its `lora/`.

    Returns:
        `checkpoint-<n>`, or the folder of a LoRA that stands alone.

    Raises:
        EvaluationError: nothing of the kind is there.
    """
    given = Path(path)
    if given.name == "latest" and given.parent.is_dir():
        given = given.parent
    for pointer in (given / "checkpoints" / "latest", given / "latest"):
        if os.path.isfile(pointer):
            given = pointer.parent / Path(pointer.read_text(encoding="utf-8", errors="replace").strip()).name
            break
    if given.name == "lora" and os.path.isfile(given.parent / "config.json"):
        given = given.parent
    weights = ("lora/adapter_config.json", "adapter_config.json", "pytorch_lora_weights.safetensors")
    if not any(os.path.isfile(given / name) for name in weights):
        raise EvaluationError(
            f"no checkpoint at {path}: expected a run folder, <run>/checkpoints/checkpoint-<n>, its lora/ folder, "
            "or <run>/checkpoints/latest"
        )
    return given
