"""The interface to base models, and loading them: everything above sees latents, noise levels, velocities.

A model family is a file beside this one with a subclass of :class:`Backbone`, named in :data:`FAMILIES`. Nothing
outside that file knows the family.
"""

from __future__ import annotations

import hashlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from diffusionopd.config_schema import is_device
from diffusionopd.distributed import world_size
from diffusionopd.models.conditions import Conditions, Row, TextEncoder, split_reference
from diffusionopd.models.fused import fuse_norms
from diffusionopd.models.lora_names import RowSplit, Shapes
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
    text_digest,
    weight_problems,
)
from diffusionopd.models.schedules import FAMILY, flow_levels
from diffusionopd.models.sharding import Sharding
from diffusionopd.models.token_limits import MeasuringEncoder, quiet_pipeline
from diffusionopd.rows import put, take
from diffusionopd.stages import stage

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


CLASSIFIER_FREE, EMBEDDED, NO_GUIDANCE = "classifier-free", "embedded", "none"
"""How a model is guided: by a second branch for the negative prompt, by an input of its own, or (distilled) not."""


class BackboneError(ValueError):
    """Raised for a base model that cannot be loaded, and for a device that is not there.

    ``problems`` lists what is wrong with a base model, each with its remedy.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems) or (message,)
        super().__init__(message)


@dataclass(frozen=True)
class Defaults:
    """A family's values for keys that the configuration leaves to the model."""

    num_steps: int
    guidance_scale: float
    max_sequence_length: int
    mixed_precision: str
    resolution: int = 1024


class Backbone(ABC):
    """A frozen transformer, VAE and scheduler of one family, on one device unless the VAE is given its own.

    Conventions, whatever the family's own: latents are ``[B, *latent_shape]``, not packed, standard normal at sigma 1;
    ``x = (1 - sigma) x_0 + sigma noise``; a velocity is ``noise - x_0``; guidance is ``g`` in ``v- + g (v+ - v-)``, of
    which 1 is none. A model that has guidance as an input is given ``g`` as such.

    The transformer's weights are held in ``dtype``, as loaded; in half precision it runs under autocast, so that
    float32 LoRA weights take part, and velocities come back in float32. The VAE decodes in float32.
    """

    # --- what a family says ------------------------------------------------------------------------------------------

    MODELS: ClassVar[Mapping[str, tuple[str, ...]]]
    """``transformer`` and ``vae`` -> the classes of diffusers that may be loaded as each."""
    TEXT: ClassVar[Mapping[str, tuple[str, ...]]]
    """Text encoders, and tokenizers or processors, of the pipeline -> the classes of transformers that may be loaded as
    each."""
    IN_CHECKPOINT: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]] = {}
    """Text encoders that diffusers takes from a single file -> what their tensors' names begin with there, and the
    tensors that it makes itself."""
    LORA_TARGETS: ClassVar[tuple[str, ...]]
    """The modules that a student adapts unless the configuration names others."""
    DEFAULTS: ClassVar[Defaults]
    BLOCKS: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """The transformer's lists of blocks, which are compiled and sharded one by one."""
    NEGATIVE_PROMPT: ClassVar[str] = ""
    TOKENS_AROUND: ClassVar[int] = 0
    """Of ``max_sequence_length``, what the family's own text around a prompt takes: it is cut so much earlier."""
    PADDABLE: ClassVar[bool] = True
    """Whether a sample's velocity stays the same beside longer ones; if not, each sample has a forward of its own."""
    READS_IMAGES: ClassVar[bool] = False
    """Whether a prompt may have a reference image. Its pipeline then encodes with the VAE, too."""
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    """Components of the pipeline that text encoding never needs."""
    MAY_LACK: ClassVar[tuple[str, ...]] = ()
    """Text encoders that a pipeline may come without, all of these together."""
    SHARED: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Part of the pipeline -> what its configuration must have in common with that of another model of the family, for
    both to see the same latents, times and text embeddings."""

    @classmethod
    def unsupported(cls, configs: Mapping[str, Mapping[str, Any]]) -> str:
        """Why a variant of the family cannot be used, empty if it can; ``configs`` as in :class:`ModelInfo`."""
        return ""

    @classmethod
    def defaults_of(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        """:attr:`DEFAULTS`, or those of a variant such as a distilled one."""
        return cls.DEFAULTS

    @classmethod
    def guidance_of(cls, configs: Mapping[str, Mapping[str, Any]]) -> str:
        """One of :data:`CLASSIFIER_FREE`, :data:`EMBEDDED`, :data:`NO_GUIDANCE`."""
        return CLASSIFIER_FREE

    @classmethod
    def evaluations_of(cls, guidance: float, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """NFE of one velocity at ``guidance``: 2 where it needs a second branch, for the negative prompt."""
        return 2 if cls.guidance_of(configs) == CLASSIFIER_FREE and guidance > 1.0 else 1

    @classmethod
    @abstractmethod
    def shape_of(cls, resolution: int, configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, ...]:
        """``(C, h, w)`` of the latents of a square image of ``resolution`` pixels. ValueError when it does not fit."""

    @classmethod
    @abstractmethod
    def row_shapes(
        cls, max_sequence_length: int, configs: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's conditions at their longest; ``configs`` has those of the text encoders too."""

    @abstractmethod
    def sigmas(self, num_steps: int, resolution: int, schedule: str = FAMILY) -> Tensor:
        """``num_steps + 1`` noise levels, decreasing to 0, float64 on the CPU: the pipeline's own, or "linspace" with
        its shift."""

    @property
    def multistep(self) -> bool:
        """Whether the pipeline samples by DPM-Solver++(2M), and evaluation with it; if not, by Euler steps."""
        return False

    @abstractmethod
    def _forward(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | Tensor) -> Tensor:
        """The velocity of one forward: signs, time and packing are settled here.

        ``x`` and ``conditions`` are in the transformer's dtype, ``sigma`` is float64 ``[B]``; ``guidance`` is for a
        transformer that has it as an input.
        """

    def _guide(self, conditional: Tensor, negative: Tensor, guidance: float | Tensor) -> Tensor:
        """Classifier-free guidance as the family's pipeline has it; ``guidance`` is a number or ``[B, 1, 1, 1]``."""
        return negative + guidance * (conditional - negative)

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of latents."""

    @classmethod
    def text_parts(cls, root: Path) -> dict[str, Any]:
        """Of :attr:`TEXT`, what is put into the pipeline in another form than diffusers loads from its folder: a
        processor of images and texts needs torchvision, its tokenizer does not."""
        return {}

    @classmethod
    @abstractmethod
    def encode(cls, pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> list[Row]:
        """One row per prompt by the pipeline's own encoders, in order; ``NEGATIVE`` may be among the prompts."""

    @classmethod
    def inert_of(cls, transformer: nn.Module) -> set[str]:
        """Modules without influence on the output, whose LoRA stays zero however long it is trained."""
        return set()

    @classmethod
    def lora_layers(cls, shapes: Shapes) -> Mapping[str, RowSplit]:
        """Layers as LoRA files of other tools name them, dots as underscores -> what they are among the modules."""
        return {}

    def inert_modules(self) -> set[str]:
        """:meth:`inert_of` the own transformer."""
        return self.inert_of(self.transformer)

    # --- what all have in common -------------------------------------------------------------------------------------

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        *,
        index: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        vae_device: torch.device | str | None = None,
        sharding: Sharding | None = None,
        waits: bool = False,
    ) -> None:
        """``index`` is the pipeline's model_index.json. With ``sharding`` the transformer stays where it is until
        :meth:`shard`; one that ``waits`` is moved by whoever asks for its velocities."""
        self.dtype = dtype
        self.device = torch.device(device)
        self.vae_device = self.device if vae_device is None else torch.device(vae_device)
        self.transformer = transformer.requires_grad_(False).eval()
        fuse_norms(self.transformer)
        if sharding is None and not waits:
            self.transformer.to(self.device)
        self.vae = vae.to(self.vae_device).requires_grad_(False).eval()
        self.scheduler = scheduler
        parts = {"transformer": self.transformer, "vae": self.vae, "scheduler": scheduler}
        self.configs = {"index": index or {}, **{name: part.config for name, part in parts.items()}}
        self.negative: Conditions | None = None
        """Of the negative prompt, one row; set by whoever fills the text cache."""
        self.evaluations = 0
        """NFE so far, counted in single samples."""
        self.sharding = sharding  # if any, all processes must make the same number of forwards
        self._engine: object = None

    def evaluations_at(self, guidance: float) -> int:
        """NFE of one velocity at ``guidance``: 1 or 2."""
        return self.evaluations_of(guidance, self.configs)

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """``(C, h, w)`` of the latents of a square image of ``resolution`` pixels. ValueError when it does not fit."""
        return self.shape_of(resolution, self.configs)

    def velocity(
        self,
        x: Tensor,
        sigma: float | Tensor,
        conditions: Conditions,
        guidance: float | Tensor = 1.0,
        prepare: Callable[[Sequence[int]], object] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The guided velocity at ``x`` and the conditional one, both float32 ``[B, C, h, w]``.

        Where guidance needs no second branch, both are one tensor. Otherwise both branches run in one batch, and
        :attr:`negative` must be set. Gradients flow to the adapter in use when the caller has them enabled.

        Args:
            x: latents ``[B, C, h, w]``.
            sigma: noise level in [0, 1], of all samples or ``[B]``.
            conditions: of B samples.
            guidance: scale, of all samples or ``[B]`` on the host; a sample at 1 has no second branch.
            prepare: is called before each forward with the numbers of the samples whose rows it has, in their order.
        """
        rows = len(x)
        if isinstance(sigma, Tensor):
            sigma = sigma.to(self.device, torch.float64, non_blocking=True).expand(rows)
        else:
            sigma = torch.full((rows,), sigma, dtype=torch.float64, device=self.device)
        scales = guidance.tolist() if isinstance(guidance, Tensor) else [guidance] * rows
        guided = [row for row, scale in enumerate(scales) if self.evaluations_at(scale) > 1]
        if not guided:
            v = self._evaluate(x, sigma, conditions, guidance, range(rows), prepare)
            return v, v
        own = conditions if len(guided) == rows else conditions.index(guided)
        v = self._evaluate(
            torch.cat([take(x, guided), x]),
            torch.cat([take(sigma, guided), sigma]),
            Conditions.cat([self._negatives(own), conditions]),
            torch.cat([take(guidance, guided), guidance]) if isinstance(guidance, Tensor) else guidance,
            [*guided, *range(rows)],
            prepare,
        )
        negative, conditional = v.split([len(guided), rows])
        if isinstance(guidance, Tensor):
            guidance = take(guidance, guided).to(v.device, v.dtype, non_blocking=True).view(-1, *[1] * (x.ndim - 1))
        v_guided = self._guide(take(conditional, guided), negative, guidance)
        others = sorted(set(range(rows)).difference(guided))
        if others:
            v_guided = put([(guided, v_guided), (others, take(conditional, others))])
        return v_guided, conditional

    def _negatives(self, conditions: Conditions) -> Conditions:
        """What the second branch of each sample sees under guidance."""
        if self.negative is None:
            raise ValueError("guidance needs the conditions of the negative prompt: set backbone.negative")
        return self.negative.expand(len(conditions))

    def _evaluate(
        self,
        x: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        guidance: float | Tensor,
        samples: Sequence[int],
        prepare: Callable[[Sequence[int]], object] | None,
    ) -> Tensor:
        self.evaluations += len(x)
        prepare = prepare or (lambda samples: None)
        x, conditions = x.to(self.dtype), conditions.to(dtype=self.dtype)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.PADDABLE:
                prepare(samples)
                return self._forward(x, sigma, conditions, guidance).float()
            scales = guidance.split(1) if isinstance(guidance, Tensor) else [guidance] * len(x)
            found = []
            for sample, *alone in zip(samples, x.split(1), sigma.split(1), conditions.each(), scales, strict=True):
                prepare([sample])
                found.append(self._forward(*alone))
            return torch.cat(found).float()

    def _each(self, x: Tensor, value: float | Tensor) -> Tensor:
        """``value`` for each sample of ``x``, float32 ``[B]`` on the device; a tensor of them may be on the host."""
        values = value if isinstance(value, Tensor) else torch.full((len(x),), value)
        return values.to(self.device, torch.float32, non_blocking=True)

    def _rounded_time(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Sigma as pipelines hand it to transformers that multiply it by 1000 in the dtype of ``x``.

        In bfloat16 both round: 1000 sigma to 8 bits first is off by up to 2 thousandths, sigma itself by 3.5.
        """
        steps = self.scheduler.config.num_train_timesteps
        return (sigma * steps).to(torch.float32).to(x.dtype) / steps

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = 8) -> Tensor:
        """Images ``[B, 3, H, W]``, float32 in [0, 1], of latents, ``chunk`` at a time, on the VAE's device."""
        latents = latents.to(self.vae_device).float()
        with stage("VAE decode"):
            images = [self._decode(part) for part in latents.split(chunk)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def beside(self, transformer: Any, *, index: Mapping[str, Any] | None = None, waits: bool = False) -> Backbone:
        """Another transformer of the family, with an index of its own or this one's, and with this one's VAE, times,
        device and negative prompt."""
        made = type(self)(
            transformer,
            self.vae,
            self.scheduler,
            index=index or self.configs["index"],
            dtype=self.dtype,
            device=self.device,
            vae_device=self.vae_device,
            sharding=self.sharding,
            waits=waits,
        )
        made.negative = self.negative
        return made

    def blocks(self) -> Iterator[nn.Module]:
        """The transformer's blocks, in order."""
        for name in self.BLOCKS:
            yield from getattr(self.transformer, name)

    def shard(self) -> None:
        """Shard the transformer over the processes if it is to be; its adapters, those there now and later, stay whole.

        Its parameters can be read and written until then.
        """
        if self.sharding is not None:
            self._engine = self.sharding(self.transformer, list(self.blocks()), self.device, world_size())


# --- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelInfo:
    """What the small files of a base model say, before any weights load.

    ``configs``: model_index.json as ``index``, and those of the ``transformer``, the ``vae``, the ``scheduler`` and the
    text encoders.
    """

    model: str
    revision: str | None
    family: type[Backbone]
    configs: Mapping[str, Mapping[str, Any]]
    root: Path | None = field(default=None, kw_only=True)  # the folder of its configurations

    def evaluations_at(self, guidance: float) -> int:
        """NFE of one velocity at ``guidance``: 1 or 2."""
        return self.family.evaluations_of(guidance, self.configs)

    @property
    def defaults(self) -> Defaults:
        """For keys that a configuration leaves to the model."""
        return self.family.defaults_of(self.configs)

    @property
    def guidance(self) -> str:
        """:meth:`Backbone.guidance_of` this model."""
        return self.family.guidance_of(self.configs)

    def guidance_problem(self, guidance: float) -> str:
        """Why it cannot be asked at ``guidance``; empty if it can."""
        if self.guidance == NO_GUIDANCE and guidance != 1.0:
            return "the base model is distilled and takes no guidance"
        return ""

    def empty_transformer(self) -> nn.Module:
        """The transformer without weights, on the meta device. Raises BackboneError."""
        with _loading(self.model), torch.device("meta"):
            return part_class(self.configs["index"], "transformer").from_config(self.configs["transformer"])


def family_of(transformer: nn.Module) -> type[Backbone] | None:
    """The family that a transformer belongs to, by its class."""
    families = map(pkgutil.resolve_name, FAMILIES.values())
    return next((family for family in families if type(transformer).__name__ in family.MODELS["transformer"]), None)


@dataclass(frozen=True)
class _Found:
    """A base model on this machine: the folder of its configurations, its parts with weights, its scheduler."""

    info: ModelInfo
    root: Path
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


def _refusal(model: str, problems: Sequence[str]) -> BackboneError:
    what = problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
    return BackboneError(f"the base model {model!r} cannot be loaded: {what}", problems)


@contextmanager
def _loading(model: str, source: str | None = None) -> Iterator[None]:
    """Turn what the libraries raise inside, on files of ``source`` (None: ``model``), into BackboneError with the
    remedy."""
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:  # whatever the libraries raise for a folder of something else, or damaged files
        here = "The folder must be a complete diffusers pipeline folder; download or build it again."
        remedy = here if Path(source or model).exists() else hub_remedy()
        raise _refusal(model, [f"{str(error).rstrip('.')}. {remedy}"]) from error


def is_here(model: str, revision: str | None = None, config: str | None = None) -> bool:
    """Whether the configurations of a base model are on this machine, so that it can be read without a download."""
    with _loading(model):
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
        with _loading(model):
            checkpoint = find_checkpoint(model, revision, download=bool(fetch))
            assert checkpoint is not None
            source = config or default_config(checkpoint)
    elif config:
        raise _refusal(model, ["pretrained.config is for a single .safetensors file, which this is not. Leave it out"])
    with _loading(model, source):
        inferred = checkpoint is not None and not config
        root = find_folder(source, None if checkpoint else revision, CONFIGS if fetch and not inferred else None)
        if root is None:
            what = f"diffusers takes it for one of {source}, whose configurations are not here"
            remedy = "Set pretrained.config to the pipeline (folder or hub id) that it is made for"
            raise _refusal(model, [f"{what}. {remedy}"])
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
            raise _refusal(model, problems)
        configs = {"index": index, "scheduler": scheduler.config, **{n: part.config() for n, part in parts.items()}}
        info = ModelInfo(model, revision, family, configs, root=root)
        if problem := family.unsupported(info.configs):
            raise ValueError(problem)
    return _Found(info, root, checkpoint, parts, scheduler)


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
    with _loading(model):
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
    device, info, index = torch.device(device), found.info, found.info.configs["index"]
    encoders = {name: part for name, part in found.parts.items() if name in info.family.TEXT}
    with _loading(model):
        transformer = info.empty_transformer()  # some pipelines read its configuration
        loaded = {name: part.load(variant, dtype) for name, part in encoders.items() if part.checkpoint is None}
        if info.family.READS_IMAGES:
            loaded["vae"] = found.parts["vae"].load(variant, torch.float32)
        # What is absent must be passed as None.
        absent = dict.fromkeys(["vae", *info.family.OPTIONAL, *_absent_encoders(index, info.family)])
        parts = info.family.text_parts(found.root)
        # Diffusers refuses another class than the index names: such a part comes afterwards.
        known = {n: part if isinstance(part, getattr(transformers, index[n][1])) else None for n, part in parts.items()}
        given = {"transformer": transformer, **absent, **loaded, **known}
        kind = getattr(diffusers, index["_class_name"])
        if len(loaded) < len(encoders):
            pipeline = kind.from_single_file(str(found.checkpoint), config=str(found.root), dtype=dtype, **given)
        else:
            pipeline = kind.from_pretrained(found.root, use_safetensors=True, trust_remote_code=False, **given)
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
            raise _refusal(model, ["there are prompts with a reference_image, and it draws from text alone"])
        with quiet_pipeline(pipeline):
            rows = info.family.encode(pipeline, list(prompts), device, length)
        return [{name: part.cpu() for name, part in row.items()} for row in rows]

    return MeasuringEncoder(encode, tokenizers, length - info.family.TOKENS_AROUND)


def text_key(model: str, revision: str | None = None, *, variant: str | None = None, config: str | None = None) -> str:
    """What the conditions of prompts depend on in a base model, as a short hash: the key of the disk cache.

    For a folder: names, sizes and the first and last MiB of every file of its text encoders, tokenizers and processor,
    and of the VAE if that encodes images. For a hub id: the repository and the commit that ``revision`` resolves to.
    For a single file: the beginning of every tensor of its text encoders, and what holds for its ``config``. For all,
    the variant and the major versions of the libraries that encode.
    """
    versions = [f"{library.__name__} {library.__version__.split('.')[0]}" for library in (transformers, diffusers)]
    digest = hashlib.sha256(" ".join([*versions, *filter(None, [variant])]).encode())
    source = model
    with _loading(model):
        if is_checkpoint(model):
            checkpoint = find_checkpoint(model, revision, download=True)
            assert checkpoint is not None
            source, revision = config or default_config(checkpoint), None
            family = read_model(model, revision, variant=variant, config=config).family
            text_digest(digest, checkpoint, [prefix for prefix, _ in family.IN_CHECKPOINT.values()])
        root = Path(source)
        if not root.is_dir():
            index = Path(hf_hub_download(source, "model_index.json", revision=revision))
            digest.update(f"{source}@{index.parent.name}".encode())
            return digest.hexdigest()[:16]
        name = diffusers.DiffusionPipeline.load_config(root).get("_class_name")
    images = name in FAMILIES and pkgutil.resolve_name(FAMILIES[name]).READS_IMAGES
    patterns = ("text_encoder*", "tokenizer*", "processor", *(["vae"] if images else []))
    for file in sorted(p for pattern in patterns for p in root.glob(f"{pattern}/*")):
        part_digest(digest, str(file.relative_to(root)), file)
    return digest.hexdigest()[:16]


# --- devices ---------------------------------------------------------------------------------------------------------


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
