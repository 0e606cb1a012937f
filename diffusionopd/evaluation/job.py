"""Models on test sets: what `scripts/evaluate.py` runs. Backbone, scorers and text are loaded once for all models."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from diffusionopd.distributed import together
from diffusionopd.evaluation.evaluate import evaluate
from diffusionopd.evaluation.results import EvaluationError, ResultFolder, Summary
from diffusionopd.evaluation.sampling import ImageGenerator
from diffusionopd.evaluation.testsets import Benchmark
from diffusionopd.files import ensure_writable
from diffusionopd.locks import Lock, hold, refuse_if_held
from diffusionopd.models import loading as models
from diffusionopd.models.backbone import Backbone
from diffusionopd.models.conditions import NEGATIVE
from diffusionopd.models.loading import ModelInfo
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import AdapterError, LoraWeights
from diffusionopd.models.lora_fit import find_all
from diffusionopd.models.merging import EXACT, merge
from diffusionopd.models.policies import Home, Policies
from diffusionopd.models.sharding import requested_sharding
from diffusionopd.models.teacher_models import HostWeights, TeacherModel
from diffusionopd.models.text_cache import TextCache, filled
from diffusionopd.rewards import RUNTIME_OPTIONS, Scorer, build_scorers, digests

_OUTPUT_FOLDER = "Choose another with --output_dir, or free space."


@dataclass(frozen=True)
class Merge:
    """LoRAs to be merged into one without training: ``scale`` times their :func:`merge` by ``method``, nothing cut."""

    method: str
    loras: Sequence[LoraWeights]
    scale: float = 1.0


@dataclass(frozen=True)
class Model:
    """One model: the base with a LoRA, or bare without; a guidance of its own goes before that of the benchmarks.

    ``own``: a transformer of other weights, in the place of the base's. ``merge``: in the place of a LoRA.
    """

    name: str
    lora: LoraWeights | None = None
    guidance_scale: float | None = None
    own: TeacherModel | None = None
    only_on: str | None = None  # the one benchmark that it is evaluated on; None: all
    merge: Merge | None = None

    @property
    def source(self) -> str:
        """Where its transformer is; "" for the base's."""
        return self.own.model if self.own else ""

    def guidance_on(self, benchmark: Benchmark) -> float:
        """Classifier-free guidance of its images."""
        return benchmark.guidance_scale if self.guidance_scale is None else self.guidance_scale


@dataclass(frozen=True)
class Job:
    """Models on benchmarks: everything `run` needs, already checked.

    `dtype` None is what the base's family is published in on a GPU (float16 for SD3), and float32 on a CPU. `output`
    gets the files of a single model on a single benchmark; several models get a folder each in it, and in that several
    benchmarks.
    """

    base: str
    models: Sequence[Model]
    benchmarks: Sequence[Benchmark]
    output: Path
    revision: str | None = None
    variant: str | None = None
    config: str | None = None  # of a single file
    resolution: int = 512
    seed: int = 42
    batch_size: int = 16
    images_per_prompt: int = 1
    max_sequence_length: int = 128
    dtype: torch.dtype | None = None
    save_images: bool = False
    resume: bool = False
    overwrite: bool = False
    cache_dir: str = ".cache/text"
    text_encoder_device: str = ""  # empty: the process's own, as for vae_device
    vae_device: str = ""
    reward_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `EvaluationError` for values that no image can be made with."""
        steps = [benchmark.num_steps for benchmark in self.benchmarks]
        scales = [model.guidance_on(benchmark) for model, benchmark in self.evaluations]
        unusable = {
            "batch_size must be at least 1": self.batch_size < 1,
            "images_per_prompt must be at least 1": self.images_per_prompt < 1,
            "max_sequence_length must be at least 1": self.max_sequence_length < 1,
            "num_steps must be at least 1": min(steps, default=1) < 1,
            "guidance_scale must be at least 0": not all(0 <= scale < math.inf for scale in scales),
            "resolution must be at least 16": self.resolution < 16,
            "seed must be at least 0 and below 2**63": not 0 <= self.seed < 2**63,
            "at least one dataset is needed, each once": not _each_once(self.benchmarks),
            "at least one model is needed, each once": not _each_once(self.models),
        }
        if problems := [problem for problem, found in unusable.items() if found]:
            raise EvaluationError("; ".join(problems))

    @property
    def source(self) -> dict[str, Any]:
        """Where the base model is, as arguments of what reads it."""
        return {"model": self.base, "revision": self.revision, "variant": self.variant, "config": self.config}

    @cached_property
    def base_hash(self) -> str:
        """Of the base's weights."""
        return models.weights_key(**self.source)

    @property
    def evaluations(self) -> list[tuple[Model, Benchmark]]:
        """What is evaluated on what, in order."""
        pairs = product(self.models, self.benchmarks)
        return [(model, benchmark) for model, benchmark in pairs if model.only_on in (None, benchmark.name)]

    def check_fits(self, base: ModelInfo) -> None:
        """Raise EvaluationError for what the base, or a model's own transformer, cannot draw."""
        if problem := base.length_problem(self.max_sequence_length):
            what = f"max_sequence_length is {self.max_sequence_length}, but {problem}"
            raise EvaluationError(f"{what}: set --max_sequence_length")
        for model, benchmark in self.evaluations:
            info, scale = model.own or base, model.guidance_on(benchmark)
            if problem := info.guidance_problem(scale):
                raise EvaluationError(f"guidance_scale is {scale:g}, but {problem}: set --guidance_scale 1.0")
            try:
                info.family.shape_of(self.resolution, info.configs)
            except ValueError as error:
                raise EvaluationError(f"{error}: set --resolution") from error
        pictured = [b.name for b in self.benchmarks if any(prompt.reference for prompt in b.prompts)]
        if pictured and not base.family.READS_IMAGES:
            what = f"{', '.join(pictured)} has prompts with a reference_image"
            raise EvaluationError(f"{what}, which {self.base} does not read: evaluate an editing model")

    def folder(self, model: Model, benchmark: Benchmark) -> Path:
        """Where the files of a model on a benchmark go."""
        parts = [item.name for item, of in ((model, self.models), (benchmark, self.benchmarks)) if len(of) > 1]
        return self.output.joinpath(*parts)


def _each_once(items: Sequence[Model | Benchmark]) -> bool:
    return 0 < len(items) == len({item.name for item in items})


def run(job: Job, state: PartialState) -> dict[str, dict[str, dict[str, Summary]]]:
    """Evaluate every model on every benchmark of the job; the scores by model and benchmark, on every process.

    The folders are looked at and taken first; then scorers are built, so that a missing package or checkpoint is found
    before the base loads.

    Raises:
        EngineError, RewardError, BackboneError, AdapterError, TextCacheError, EvaluationError, HeldError, FolderError:
            as the parts do.
    """
    dtype = _look_together(job, state)
    folders = [job.folder(model, benchmark) for model, benchmark in job.evaluations]
    with hold(folders, "output folder", _OUTPUT_FOLDER) as locks:
        return _run(job, state, dtype, iter(locks))


def check(job: Job, state: PartialState) -> list[str]:
    """What `run` finds out before the base loads, writing nothing: a line for each evaluation. Raises as it does."""
    _look_together(job, state)
    _find_loras(job)
    _build_scorers(job, state)
    return [
        f"{model.name} on {benchmark.name}: {len(benchmark.prompts) * job.images_per_prompt} images, "
        f"{benchmark.num_steps} steps, guidance {model.guidance_on(benchmark):g}; {', '.join(benchmark.rewards)}"
        for model, benchmark in job.evaluations
    ]


def _look_together(job: Job, state: PartialState) -> torch.dtype:
    """Look at the devices and, on one process for all, the output folders; returns the dtype of the images' model."""
    dtype = job.dtype or torch.float32
    models.find_device(job.vae_device, state.device, "vae_device")
    models.find_device(job.text_encoder_device, state.device, "text_encoder_device")
    requested_sharding()
    if job.dtype is None and state.device.type == "cuda":
        dtype = models.DTYPES[models.read_model(**job.source).defaults.mixed_precision]
    together(partial(_look, job, dtype) if state.is_main_process else lambda: None, "looking at the output folders")
    return dtype


def _build_scorers(job: Job, state: PartialState) -> dict[str, Scorer]:
    names = dict.fromkeys(name for benchmark in job.benchmarks for name in benchmark.rewards)
    return build_scorers(names, str(state.device), job.reward_options)


def _look(job: Job, dtype: torch.dtype) -> None:
    """HeldError, or EvaluationError for what must stay, in any of the folders; changes nothing."""
    for model, benchmark in job.evaluations:
        samples = [prompt for prompt in benchmark.prompts for _ in range(job.images_per_prompt)]
        files = ResultFolder(job.folder(model, benchmark))
        refuse_if_held(files.folder)
        files.look(settings_of(job, model, benchmark, dtype), samples, job.resume, job.save_images, job.overwrite)


def _run(
    job: Job, state: PartialState, dtype: torch.dtype, locks: Iterator[Lock]
) -> dict[str, dict[str, dict[str, Summary]]]:
    device, rank, world = state.device, state.process_index, state.num_processes
    if rank == 0:
        ensure_writable(job.output, "output folder", _OUTPUT_FOLDER)
    ensure_writable(job.cache_dir, "text cache", "Choose another with --cache_dir, or free space.")
    scorers = _build_scorers(job, state)
    cache, policies = load_policies(job, dtype, device, rank, world)
    results: dict[str, dict[str, dict[str, Summary]]] = {}
    for model, benchmark in job.evaluations:
        home = policies.use(model.name)
        generate = ImageGenerator(
            home.backbone, cache, benchmark.num_steps, model.guidance_on(benchmark), job.resolution, job.seed
        )
        results.setdefault(model.name, {})[benchmark.name] = evaluate(
            generate,
            benchmark.prompts,
            {name: scorers[name] for name in benchmark.rewards},
            job.folder(model, benchmark),
            batch_size=home.backbone.in_step(job.batch_size),
            save_images=job.save_images,
            resume=job.resume,
            overwrite=job.overwrite,
            images_per_prompt=job.images_per_prompt,
            settings=settings_of(job, model, benchmark, dtype),
            lock=next(locks),
            rank=rank,
            world=world,
            in_step=home.backbone.sharding is not None,
        )
    return results


def load_policies(
    job: Job, dtype: torch.dtype, device: torch.device, rank: int = 0, world: int = 1
) -> tuple[TextCache, Policies]:
    """The embeddings of a job's prompts, and its models as policies by name. Errors as of `run`."""
    loras = _find_loras(job)
    decode_on = models.find_device(job.vae_device, device, "vae_device")
    texts = [NEGATIVE, *(prompt.key for benchmark in job.benchmarks for prompt in benchmark.prompts)]
    where, length, encode_on = job.cache_dir, job.max_sequence_length, job.text_encoder_device
    # Before the transformer comes: the encoders are gone by then.
    cache = filled(
        job.source, texts, where, length, encode_on=encode_on, device=device, dtype=dtype, rank=rank, world=world
    )
    sharding = requested_sharding() if world > 1 else None
    backbone = models.load_backbone(**job.source, dtype=dtype, device=device, vae_device=decode_on, sharding=sharding)
    backbone.negative = cache.get([NEGATIVE], device)
    policies = _place_models(job, backbone, loras)
    policies.shard()
    return cache, policies


def _find_loras(job: Job) -> dict[str, LoraWeights]:
    """The LoRAs by model, fitted to what each is on. AdapterError that names each that cannot be used."""
    found: dict[str, LoraWeights] = {}
    problems: list[str] = []
    base = models.read_model(**job.source)
    for source in dict.fromkeys(model.source for model in job.models):
        on = [model for model in job.models if model.source == source]
        given = {model.name: model.lora for model in on if model.lora is not None}
        merges = {model.name: model.merge for model in on if model.merge is not None}
        parts = {f"{name}/{i}": lora for name, what in merges.items() for i, lora in enumerate(what.loras)}
        fitted, wrong, _ = find_all(given | parts, source or base.model, on[0].own or base)
        problems += wrong.values()
        if not wrong:
            found |= {name: fitted[name] for name in given}
            for name, what in merges.items():
                own = [fitted[f"{name}/{i}"] for i in range(len(what.loras))]
                found[name] = merge(own, EXACT, what.method).weights.scaled(what.scale)
    if problems:
        raise AdapterError("\n".join(dict.fromkeys(problems)))
    return found


def _place_models(job: Job, backbone: Backbone, loras: Mapping[str, LoraWeights]) -> Policies:
    """Every model as a policy; transformers of other weights than the base's wait on the host until they are asked."""
    base, homes, waits = Adapters(backbone.transformer), dict[str, Home](), backbone.sharding is None
    for source in dict.fromkeys(model.source for model in job.models):
        on = [model for model in job.models if model.source == source]
        own = on[0].own
        home = own.load(backbone, waits=waits) if own else backbone
        adapters = Adapters(home.transformer) if own else base
        names = {model.name: f"model_{number}" for number, model in enumerate(on) if model.name in loras}
        for name, adapter in names.items():
            adapters.add_teacher(adapter, loras[name])
        host = HostWeights(home.transformer, home.device) if own and waits else None
        homes |= {model.name: Home(home, adapters, names.get(model.name), host) for model in on}
    return Policies(backbone, base, homes)


def settings_of(job: Job, model: Model, benchmark: Benchmark, dtype: torch.dtype) -> dict[str, Any]:
    """What images and scores depend on, as JSON values: neither the batch size nor the number of processes."""
    options = {
        name: {key: value for key, value in job.reward_options.get(name, {}).items() if key not in RUNTIME_OPTIONS}
        for name in benchmark.rewards
    }
    files = {name: digests(name, job.reward_options.get(name, {})) for name in benchmark.rewards}
    return {
        "dataset": benchmark.name,
        "model": job.base,
        "revision": job.revision,
        "model_hash": job.base_hash,
        **{name: value for name, value in job.source.items() if name in ("variant", "config") and value},
        "lora": model.lora.source if model.lora else None,
        "lora_hash": lora_hash(model.lora) if model.lora else None,
        **(_merge_settings(model.merge) if model.merge else {}),
        **({"own_model": model.own.model, "own_model_hash": model.own.digest()} if model.own else {}),
        "num_inference_steps": benchmark.num_steps,
        "guidance_scale": model.guidance_on(benchmark),
        "resolution": job.resolution,
        "seed": job.seed,
        "max_sequence_length": job.max_sequence_length,
        "dtype": str(dtype).removeprefix("torch."),
        "reward_options": {name: given for name, given in options.items() if given},
        **({"reward_files": given} if (given := {name: found for name, found in files.items() if found}) else {}),
        "rewards": sorted(benchmark.rewards),
        "images_per_prompt": job.images_per_prompt,
    }


def _merge_settings(what: Merge) -> dict[str, Any]:
    sources, hashes = [lora.source for lora in what.loras], [lora_hash(lora) for lora in what.loras]
    return {"lora": f"{what.scale:g} times the {what.method} of {', '.join(sources)}", "lora_hash": hashes}


def lora_hash(lora: LoraWeights) -> str:
    """A short hash of a LoRA's tensors and scales: training again under the same name must not look the same."""
    digest = hashlib.sha256(b"rslora" if lora.rslora else b"")
    for name in sorted(lora.a):
        digest.update(f"{name} {lora.alpha[name]}".encode())
        for tensor in (lora.a[name], lora.b[name]):
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
