"""The interface to base models: everything above sees latents, noise levels, velocities.

A model family is a file beside this one with a subclass of :class:`Backbone`, named in
:data:`diffusionopd.models.loading.FAMILIES`. Nothing outside that file knows the family.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffusionopd.distributed import world_size
from diffusionopd.models.conditions import NEGATIVE, Conditions, Row
from diffusionopd.models.fused import fuse_norms
from diffusionopd.models.latents import linear_mu
from diffusionopd.models.lora_names import RowSplit, Shapes
from diffusionopd.models.schedules import FAMILY, LINSPACE, flow_levels
from diffusionopd.models.sharding import Sharding
from diffusionopd.rows import put, take
from diffusionopd.stages import stage

Configs = Mapping[str, Mapping[str, Any]]
"""Configurations by part: ``index``, ``transformer``, ``vae``, ``scheduler``, and where known the text encoders'."""
CLASSIFIER_FREE, EMBEDDED, NO_GUIDANCE = "classifier-free", "embedded", "none"
"""How a model is guided: by a second branch for the negative prompt, by an input of its own, or (distilled) not."""


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

    The transformer's weights are held in ``dtype``, as loaded, and it computes in it; LoRA weights are float32 and take
    part as copies in that dtype. Velocities come back in float32. The VAE decodes in float32.
    """

    # --- what a family says ------------------------------------------------------------------------------------------

    MODELS: ClassVar[Mapping[str, tuple[str, ...]]]
    """``transformer`` and ``vae`` -> the classes of diffusers that may be loaded as each."""
    TEXT: ClassVar[Mapping[str, tuple[str, ...]]]
    """Text encoders, and tokenizers or processors, of the pipeline -> the classes of transformers that may be loaded as
    each."""
    READERS: ClassVar[Mapping[str, Any]] = {}
    """Of :attr:`TEXT`, classes that take the place of those that the folder names: a processor of images and texts
    needs torchvision, its tokenizer does not."""
    IN_CHECKPOINT: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]] = {}
    """Text encoders that diffusers takes from a single file -> what their tensors' names begin with there, and the
    tensors that it makes itself."""
    LORA_TARGETS: ClassVar[tuple[str, ...]]
    """The modules that a student adapts unless the configuration names others."""
    DEFAULTS: ClassVar[Defaults]
    BLOCKS: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """The transformer's lists of blocks, which are compiled and sharded one by one."""
    WIDTH: ClassVar[str] = "joint_attention_dim"
    """The transformer's option that says how wide ``tokens`` are."""
    NEGATIVE_PROMPT: ClassVar[str] = ""
    GUIDANCE_ARGUMENT: ClassVar[str] = "guidance_scale"
    """What the stock pipeline calls guidance."""
    TOKENS_AROUND: ClassVar[int] = 0
    """See :meth:`tokens_around`."""
    FIXED_LENGTH: ClassVar[bool] = True
    """Whether every prompt's conditions have one shape, so that batches of a size do."""
    LONGEST_PROMPT: ClassVar[int | None] = None
    """Tokens that its stock pipeline takes at most; None for any number."""
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
    both to see the same latents and text embeddings; times are the same for all."""

    @classmethod
    def unsupported(cls, configs: Configs) -> str:
        """Why a variant of the family cannot be used, empty if it can."""
        return ""

    @classmethod
    def defaults_of(cls, configs: Configs) -> Defaults:
        """:attr:`DEFAULTS`, or those of a variant such as a distilled one."""
        return cls.DEFAULTS

    @classmethod
    def guidance_of(cls, configs: Configs) -> str:
        """One of :data:`CLASSIFIER_FREE`, :data:`EMBEDDED`, :data:`NO_GUIDANCE`."""
        return CLASSIFIER_FREE

    @classmethod
    def nfe_of(cls, guidance: float, configs: Configs) -> int:
        """NFE of one velocity at ``guidance``: 2 where it needs a second branch, for the negative prompt."""
        return 2 if cls.guidance_of(configs) == CLASSIFIER_FREE and guidance > 1.0 else 1

    @classmethod
    def pipeline_guidance(cls, guidance: float) -> dict[str, Any]:
        """What its stock pipeline is called with for our ``guidance``."""
        negative = {"negative_prompt": cls.NEGATIVE_PROMPT} if cls.NEGATIVE_PROMPT and guidance > 1 else {}
        return {cls.GUIDANCE_ARGUMENT: guidance, **negative}

    @classmethod
    @abstractmethod
    def shape_of(cls, resolution: int, configs: Configs) -> tuple[int, ...]:
        """``(C, h, w)`` of the latents of a square image of ``resolution`` pixels. ValueError when it does not fit."""

    @classmethod
    def row_shapes(cls, max_sequence_length: int, configs: Configs) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's conditions at their longest; ``configs`` has those of the text encoders too."""
        return {"tokens": (max_sequence_length, configs["transformer"][cls.WIDTH])}

    def sigmas(self, num_steps: int, resolution: int, schedule: str = FAMILY) -> Tensor:
        """``num_steps + 1`` noise levels, decreasing to 0, float64 on the CPU: the pipeline's own, or "linspace" with
        its shift. By default both are evenly spread before a shift by the number of tokens, of four positions each."""
        _, h, w = self.latent_shape(resolution)
        return flow_levels(self.scheduler, num_steps, linear_mu(self.scheduler.config, h * w // 4), LINSPACE)

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

    def _decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of latents, by default scaled and shifted as the VAE says."""
        config = self.vae.config
        scaled = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return self.vae.decode(scaled, return_dict=False)[0]

    @classmethod
    def texts(cls, prompts: list[str]) -> list[str]:
        """Prompts with the text of the negative prompt among them."""
        return [cls.NEGATIVE_PROMPT if prompt == NEGATIVE else prompt for prompt in prompts]

    @classmethod
    @abstractmethod
    def encode(cls, pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> list[Row]:
        """One row per prompt by the pipeline's own encoders, in order; ``NEGATIVE`` may be among the prompts."""

    @classmethod
    def tokens_around(cls, pipeline: Any, row: Row) -> int:
        """Of ``max_sequence_length``, what the family's own text around the prompt of a row takes: it is cut so much
        earlier."""
        return cls.TOKENS_AROUND

    @classmethod
    def inert_of(cls, transformer: nn.Module) -> set[str]:
        """Modules without influence on the output, whose LoRA stays zero however long it is trained."""
        return set()

    @classmethod
    def mixing_in(cls, transformer: nn.Module) -> set[str]:
        """Modules whose layers are not given samples along the first dimension: with a LoRA in one of them samples
        cannot have a LoRA each."""
        return set()

    @classmethod
    def lora_layers(cls, shapes: Shapes) -> Mapping[str, RowSplit]:
        """Layers as LoRA files of other tools name them, dots as underscores -> what they are among the modules."""
        return {}

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
        self.nfe = 0
        """NFE so far, counted in single samples."""
        self.sharding = sharding  # if any, all processes must make the same number of forwards
        self._engine: object = None
        self._decoding = Lock()  # whoever has it uses the VAE

    def in_step(self, batch_size: int) -> int:
        """How many samples processes that share a sharded transformer may give it at a time, so that whoever has fewer
        makes as many forwards."""
        return batch_size if self.PADDABLE or self.sharding is None else 1

    def nfe_at(self, guidance: float) -> int:
        """NFE of one velocity at ``guidance``: 1 or 2."""
        return self.nfe_of(guidance, self.configs)

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
        guided = [row for row, scale in enumerate(scales) if self.nfe_at(scale) > 1]
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
        self.nfe += len(x)
        prepare = prepare or (lambda samples: None)
        x, conditions = x.to(self.dtype), conditions.to(dtype=self.dtype)
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
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]``, float32 in [0, 1], of latents, on the VAE's device.

        One at a time, of small ones up to eight that have no more pixels than one of 512x512: eight of 1024x1024 would
        need 26 GB of activations, which training does not have beside it.
        """
        latents = latents.to(self.vae_device).float()
        at_once = 64 * math.prod(self.latent_shape(64)[1:]) // math.prod(latents.shape[2:])
        with stage("VAE decode"):
            images = [self._decode_alone(part) for part in latents.split(max(1, min(8, at_once)))]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def _decode_alone(self, latents: Tensor) -> Tensor:
        """A VAE may keep what it has seen of an image on itself (Qwen's does), and a thread decodes beside training."""
        with self._decoding:
            return self._decode(latents)

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
        made.negative, made._decoding = self.negative, self._decoding
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
