"""Loading base models: what their small files say before any weights load, then transformer, VAE and text encoders."""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from diffusionopd.config_schema import is_device
from diffusionopd.models.backbone import NO_GUIDANCE, Backbone, Configs, Defaults
from diffusionopd.models.conditions import Row, TextEncoder, split_reference
from diffusionopd.models.pipeline_files import (
    CONFIGS,
    Part,
    check_loaded,
    default_config,
    fetch_weights,
    find_checkpoint,
    find_folder,
    from_checkpoint,
    hub_remedy,
    is_checkpoint,
    part_digest,
    rows_digest,
    weight_problems,
)
from diffusionopd.models.schedules import flow_levels
from diffusionopd.models.sharding import Sharding
from diffusionopd.models.token_limits import MeasuringEncoder, quiet_pipeline

FAMILIES = {
    "StableDiffusion3Pipeline": "diffusionopd.models.sd3:StableDiffusion3",
    "FluxPipeline": "diffusionopd.models.flux1:Flux1",
    "Flux2Pipeline": "diffusionopd.models.flux2:Flux2",
    "Flux2KleinPipeline": "diffusionopd.models.flux2:Flux2",
    "QwenImagePipeline": "diffusionopd.models.qwen_image:QwenImage",
    "QwenImageEditPlusPipeline": "diffusionopd.models.qwen_image_edit:QwenImageEdit",
    "QwenImage21Pipeline": "diffusionopd.models.qwen_image21:QwenImage21",
    "ZImagePipeline": "diffusionopd.models.z_image:ZImage",
    "SanaPipeline": "diffusionopd.models.sana:Sana",
}
"""``_class_name`` of a folder's model_index.json -> the family's class, imported when a model needs it."""
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""``mixed_precision`` -> the type in which the frozen transformer is held."""
_HERE = "The folder must be a complete diffusers pipeline folder; download or build it again."


class BackboneError(ValueError):
    """Raised for a base model that cannot be loaded, and for a device that is not there.

    ``problems`` lists what is wrong with a base model, each with its remedy.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems) or (message,)
        super().__init__(message)


@dataclass(frozen=True)
class ModelInfo:
    """What the small files of a base model say, before any weights load.

    ``configs``: model_index.json as ``index``, and those of the ``transformer``, the ``vae``, the ``scheduler`` and the
    text encoders.
    """

    model: str
    family: type[Backbone]
    configs: Configs
    root: Path | None = field(default=None, kw_only=True)  # the folder of its configurations

    def nfe_at(self, guidance: float) -> int:
        """NFE of one velocity at ``guidance``: 1 or 2."""
        return self.family.nfe_of(guidance, self.configs)

    @property
    def defaults(self) -> Defaults:
        """For keys that a configuration leaves to the model."""
        return self.family.defaults_of(self.configs)

    @property
    def guidance(self) -> str:
        """:meth:`Backbone.guidance_of` this model."""
        return self.family.guidance_of(self.configs)

    def length_problem(self, tokens: int) -> str:
        """Why its prompts cannot have so many tokens; empty if they can."""
        most = self.family.LONGEST_PROMPT
        return f"the pipeline of {self.model} takes at most {most} tokens" if most and tokens > most else ""

    def guidance_problem(self, guidance: float) -> str:
        """Why it cannot be asked at ``guidance``; empty if it can."""
        if self.guidance == NO_GUIDANCE and guidance != 1.0:
            return f"{self.model} is distilled and takes no guidance"
        return ""

    def empty_transformer(self) -> nn.Module:
        """The transformer without weights, on the meta device. Raises BackboneError."""
        with loading(self.model), torch.device("meta"):
            return part_class(self.configs["index"], "transformer").from_config(self.configs["transformer"])


def family_of(transformer: nn.Module) -> type[Backbone] | None:
    """The family that a transformer belongs to, by its class."""
    families = map(pkgutil.resolve_name, FAMILIES.values())
    return next((family for family in families if type(transformer).__name__ in family.MODELS["transformer"]), None)


@dataclass(frozen=True)
class _Found:
    """A base model on this machine: its parts with weights, its scheduler."""

    info: ModelInfo
    source: str  # the folder or hub id of its configurations
    root: Path  # the folder that they are in
    checkpoint: Path | None
    parts: Mapping[str, Part]
    scheduler: Any


def part_class(index: Mapping[str, Any], part: str) -> Any:
    """The class of a transformer, VAE or scheduler: one of diffusers itself, other libraries may stand for code."""
    library, name = (index.get(part) or (None, ""))[:2]
    found = getattr(diffusers, str(name), None) if library == "diffusers" else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin | diffusers.SchedulerMixin)):
        raise ValueError(f"its model_index.json asks for {library}.{name} as {part}")
    return found


def refusal(model: str, problems: Sequence[str], what: str = "the base model") -> BackboneError:
    """The error for a model, ``what`` it is, with its problems."""
    found = problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
    return BackboneError(f"{what} {model!r} cannot be loaded: {found}", problems)


@contextmanager
def loading(model: str, source: str | None = None, what: str = "the base model", here: str = _HERE) -> Iterator[None]:
    """Turn what the libraries raise inside, on files of ``source`` (None: ``model``), into :func:`refusal` with the
    remedy, which is ``here`` for a place on this machine."""
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:  # whatever the libraries raise for a folder of something else, or damaged files
        remedy = here if Path(source or model).exists() else hub_remedy()
        raise refusal(model, [f"{str(error).rstrip('.')}. {remedy}".rstrip()], what) from error


def is_here(model: str, revision: str | None = None, config: str | None = None) -> bool:
    """Whether the configurations of a base model are on this machine, so that it can be read without a download."""
    with loading(model):
        checkpoint = find_checkpoint(model, revision, download=False) if is_checkpoint(model) else None
        if is_checkpoint(model) and checkpoint is None:
            return False
        source = config if checkpoint else model
        root = find_folder(source, None if checkpoint else revision) if source else Path()
        return root is not None and (not source or (root / "model_index.json").is_file())


def read_model(
    model: str,
    revision: str | None = None,
    *,
    variant: str | None = None,
    config: str | None = None,
    download: bool = True,
) -> ModelInfo:
    """The family and configurations of a base model: a diffusers folder, a hub id, or a single .safetensors file.

    The weights that are here are checked by their headers. Without ``download`` the base must be here
    (:func:`is_here`).

    Args:
        variant: of the weight files, such as ``"fp16"``.
        config: folder or hub id of the pipeline that a single file is made for; None: diffusers infers a hub id.

    Raises:
        BackboneError: naming all that is wrong, each with its remedy.
    """
    return _find(model, revision, variant, config, "configs" if download else "").info


def _find(model: str, revision: str | None, variant: str | None, config: str | None, fetch: str) -> _Found:
    """A base model, with everything checked that can be before weights load.

    ``fetch``: what may be downloaded: nothing (""), "configs", also the weights of the family's "models", or "all".
    """
    checkpoint, source = None, model
    if is_checkpoint(model):
        with loading(model):
            checkpoint = find_checkpoint(model, revision, download=bool(fetch))
            assert checkpoint is not None
            source = config or default_config(checkpoint)
    elif config:
        raise refusal(model, ["pretrained.config is for a single .safetensors file, which this is not. Leave it out"])
    with loading(model, source):
        inferred = checkpoint is not None and not config
        root = find_folder(source, None if checkpoint else revision, CONFIGS if fetch and not inferred else None)
        if root is None:
            what = f"diffusers takes it for one of {source}, whose configurations are not here"
            remedy = "Set pretrained.config to the pipeline (folder or hub id) that it is made for"
            raise refusal(model, [f"{what}. {remedy}"])
        index = diffusers.DiffusionPipeline.load_config(root)
        name = index.get("_class_name")
        if name not in FAMILIES:
            raise ValueError(f"its model_index.json names {name}, which is none of {', '.join(FAMILIES)}")
        family, local = pkgutil.resolve_name(FAMILIES[name]), Path(source).is_dir()
        unusable = _index_problems(index, family, root, complete=local or bool(fetch))
        parts = _parts(index, family, root, {*unusable, *_absent_encoders(index, family)})
        if checkpoint is not None:
            for name, part in parts.items():
                try:
                    parts[name] = from_checkpoint(part, checkpoint, *family.IN_CHECKPOINT.get(name, ("", ())))
                except ValueError as error:
                    unusable[name] = str(error)
        parts = {name: part for name, part in parts.items() if name not in unusable}
        scheduler: Any
        scheduler, problems = _scheduler(index, root) if "scheduler" not in unusable else (None, [])
        problems += unusable.values()
        needed = [part for name, part in parts.items() if fetch == "all" or fetch == "models" and name in family.MODELS]
        listing = () if local else fetch_weights(source, root, needed, variant)
        problems += weight_problems(parts.values() if local else needed, variant, listing)
        if not local:  # of what lies in the cache already
            problems += weight_problems([part for part in parts.values() if part not in needed], variant, None)
        if problems:
            raise refusal(model, problems)
        configs = {"index": index, "scheduler": scheduler.config, **{n: part.config() for n, part in parts.items()}}
        info = ModelInfo(model, family, configs, root=root)
        if problem := family.unsupported(info.configs):
            raise ValueError(problem)
    return _Found(info, source, root, checkpoint, parts, scheduler)


def _scheduler(index: Mapping[str, Any], root: Path) -> tuple[Any, list[str]]:
    """The pipeline's scheduler, and what is wrong with its noise levels."""
    try:
        scheduler = part_class(index, "scheduler").from_pretrained(root, subfolder="scheduler")
        flow_levels(scheduler, 4, 1.0 if scheduler.config.get("use_dynamic_shifting") else None)
    except Exception as error:  # whatever a scheduler raises for options that do not go together
        return None, [str(error)]
    return scheduler, []


def _index_problems(index: Mapping[str, Any], family: type[Backbone], root: Path, complete: bool) -> dict[str, str]:
    """What is wrong with the parts that an index names, by part: classes that do not belong there, which may stand for
    code, and folders that did not come along."""
    problems, the_index = {}, "its model_index.json"
    for name in (*family.MODELS, "scheduler"):
        try:
            kind = part_class(index, name).__name__
            if kind not in family.MODELS.get(name, (kind,)):
                problems[name] = f"its {name} is {kind}; {family.__name__} takes {' or '.join(family.MODELS[name])}"
        except ValueError as error:
            problems[name] = str(error)
    for name in dict.fromkeys([*family.TEXT, *(n for n in index if n.startswith(("text_encoder", "tokenizer")))]):
        library, kind = (index.get(name) or (None, None))[:2]
        if not library and not kind:
            if name in family.TEXT and name not in family.MAY_LACK:
                problems[name] = f"{the_index} has no {name}"
        elif library != "transformers" or kind not in family.TEXT.get(name, ()):
            problems[name] = f"{the_index} asks for {library}.{kind} as {name}"
    for name in (*family.MODELS, "scheduler", *family.TEXT) if complete else ():
        if name not in problems and any(index.get(name) or ()) and not (root / name).is_dir():
            without = f", or set {' and '.join(family.MAY_LACK)} to [null, null] there to go without"
            remedy = f"Download it{without if name in family.MAY_LACK else ''}"
            problems[name] = f"{the_index} lists {name}, but {root / name} is not there. {remedy}"
    return problems


def _parts(index: Mapping[str, Any], family: type[Backbone], root: Path, without: Collection[str]) -> dict[str, Part]:
    """Transformer, VAE and text encoders in the folders of a pipeline."""
    kinds = {name: part_class(index, name) for name in family.MODELS if name not in without}
    encoders = [name for name in family.TEXT if name.startswith("text_encoder") and name not in without]
    kinds |= {name: getattr(transformers, index[name][1]) for name in encoders}
    return {name: Part(name, kind, root / name) for name, kind in kinds.items()}


def _absent_encoders(index: Mapping[str, Any], family: type[Backbone]) -> tuple[str, ...]:
    """The family's ``MAY_LACK`` if the index is without one of them."""
    return family.MAY_LACK if any(not any(index.get(name) or ()) for name in family.MAY_LACK) else ()


def load_backbone(
    model: str,
    revision: str | None = None,
    *,
    variant: str | None = None,
    config: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    vae_device: torch.device | str | None = None,
    sharding: Sharding | None = None,
) -> Backbone:
    """Load transformer, VAE and scheduler of a base model; arguments and error as of :func:`read_model`.

    ``vae_device`` None is ``device``. With ``sharding`` the transformer stays on the CPU until :meth:`Backbone.shard`.
    """
    found = _find(model, revision, variant, config, "models")
    with loading(model):
        transformer, vae = (
            found.parts[name].load(variant, kept) for name, kept in (("transformer", dtype), ("vae", torch.float32))
        )
    placed: dict[str, Any] = {"dtype": dtype, "device": device, "vae_device": vae_device, "sharding": sharding}
    return found.info.family(transformer, vae, found.scheduler, index=found.info.configs["index"], **placed)


def load_text_encoder(
    model: str,
    revision: str | None = None,
    *,
    variant: str | None = None,
    config: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_sequence_length: int | None = None,
) -> TextEncoder:
    """Load the text encoders and tokenizers of a base model alone; rows are on the CPU.

    ``max_sequence_length`` None is the family's. Arguments and error as of :func:`read_model`.
    """
    # All weights are fetched: what is wrong with the transformer is said before prompts are encoded.
    found = _find(model, revision, variant, config, "all")
    device, info, index, root = torch.device(device), found.info, found.info.configs["index"], found.root
    encoders = {name: part for name, part in found.parts.items() if name in info.family.TEXT}
    with loading(model):
        transformer = info.empty_transformer()  # some pipelines read its configuration
        loaded = {name: part.load(variant, dtype) for name, part in encoders.items() if part.checkpoint is None}
        if info.family.READS_IMAGES:
            loaded["vae"] = found.parts["vae"].load(variant, torch.float32)
        # What is absent must be passed as None.
        absent = dict.fromkeys(["vae", *info.family.OPTIONAL, *_absent_encoders(index, info.family)])
        parts = {
            name: reader.from_pretrained(root / name, trust_remote_code=False)
            for name, reader in info.family.READERS.items()
        }
        # Diffusers refuses another class than the index names: such a part comes afterwards.
        known = {n: part if isinstance(part, getattr(transformers, index[n][1])) else None for n, part in parts.items()}
        given = {"transformer": transformer, **absent, **loaded, **known}
        kind = getattr(diffusers, index["_class_name"])
        if len(loaded) < len(encoders):
            pipeline = kind.from_single_file(str(found.checkpoint), config=str(root), dtype=dtype, **given)
        else:
            pipeline = kind.from_pretrained(root, use_safetensors=True, trust_remote_code=False, **given)
        for name, reader in parts.items():
            setattr(pipeline, name, reader)
        for name, part in encoders.items():
            if part.checkpoint is not None:
                getattr(pipeline, name).tie_weights()  # diffusers fills one name of those that share a tensor
                check_loaded(name, getattr(pipeline, name))
    for name in {**encoders, **loaded}:
        getattr(pipeline, name).to(device).requires_grad_(False).eval()
    length = max_sequence_length or info.family.DEFAULTS.max_sequence_length
    readers = {name: getattr(pipeline, name) for name in info.family.TEXT if name not in encoders}
    tokenizers = {n: getattr(reader, "tokenizer", reader) for n, reader in readers.items() if reader is not None}

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> list[Row]:
        if not info.family.READS_IMAGES and any(split_reference(prompt)[1] for prompt in prompts):
            raise refusal(model, ["there are prompts with a reference_image, and it draws from text alone"])
        with quiet_pipeline(pipeline):
            rows = info.family.encode(pipeline, list(prompts), device, length)
        return [{name: part.cpu() for name, part in row.items()} for row in rows]

    return MeasuringEncoder(encode, tokenizers, lambda row: length - info.family.tokens_around(pipeline, row))


def text_key(model: str, revision: str | None = None, *, variant: str | None = None, config: str | None = None) -> str:
    """What the conditions of prompts depend on in a base model, as a short hash: the key of the disk cache.

    For a folder: every file of its text encoders, tokenizers and processor, and of the VAE if that encodes images, as
    ``part_digest`` reads it; and which encoders its index is without. For a hub id: the repository and the
    commit that ``revision`` resolves to. For a single file: the beginning of every tensor of its text encoders, and
    what holds for its ``config``. For all, the variant and the versions (of two parts) of the libraries that encode.
    """
    versions = [f"{each.__name__} {'.'.join(each.__version__.split('.')[:2])}" for each in (transformers, diffusers)]
    digest = hashlib.sha256(" ".join([*versions, *filter(None, [variant])]).encode())
    found = _find(model, revision, variant, config, "configs")
    family = found.info.family
    if found.checkpoint is not None:
        rows_digest(digest, found.checkpoint, [prefix for prefix, _ in family.IN_CHECKPOINT.values()])
    if Path(found.source).is_dir():
        for name in _absent_encoders(found.info.configs["index"], family):  # their folders may still be there
            digest.update(f"no {name}".encode())
    return _files_key(digest, found, ["text_encoder*", "tokenizer*", "processor", *["vae"] * family.READS_IMAGES])


def weights_key(
    model: str, revision: str | None = None, *, variant: str | None = None, config: str | None = None
) -> str:
    """What images depend on in a base model beside its text, as a short hash, for evaluations that go on.

    For a hub id: the repository and the commit. For a folder or a single file: those of transformer, VAE and scheduler,
    as ``part_digest`` reads them.
    """
    found, digest = _find(model, revision, variant, config, "configs"), hashlib.sha256()
    if found.checkpoint is not None:
        part_digest(digest, found.checkpoint.name, found.checkpoint)
    return _files_key(digest, found, [*found.info.family.MODELS, "scheduler"])


def _files_key(digest: Any, found: _Found, folders: Sequence[str]) -> str:
    """The hash with the commit of a hub id, or with the files in ``folders`` (patterns) of a pipeline here."""
    if not Path(found.source).is_dir():
        digest.update(f"{found.source}@{found.root.name}".encode())
    else:
        for file in sorted(path for folder in folders for path in found.root.glob(f"{folder}/*")):
            part_digest(digest, str(file.relative_to(found.root)), file)
    return digest.hexdigest()[:16]


def find_device(name: str | None, default: torch.device, key: str) -> torch.device:
    """The device that the setting ``key`` names; ``default`` for none. BackboneError for one that is not there."""
    if not name:
        return default
    if not is_device(name):
        raise BackboneError(f"{key} is {name!r}, which is no device. Use cpu, cuda or cuda:<n>.")
    device = torch.device(name)
    present = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= present:
        raise BackboneError(f"{key} is {name!r}, but this process sees {present} GPUs: name another, or none.")
    return device


def encoder_place(name: str | None, default: torch.device, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the text encoders; float32 on a CPU beside a GPU, which is slow in half precision."""
    device = find_device(name, default, "text_encoder_device")
    return device, torch.float32 if device.type == "cpu" and default.type != "cpu" else dtype
