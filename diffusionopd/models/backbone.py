"""Stable Diffusion 3 at the edge: the only file that knows it. Load, velocity, decode, text encoding.

Everything above sees latents ``x`` ``[B, C, h, w]``, a noise level ``sigma`` and a velocity, whatever the checkpoint:
SD3-medium, SD3.5-medium or -large and the embedded tiny world differ in their folder's own configuration alone.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import Tensor

from diffusionopd.distributed import world_size
from diffusionopd.models.conditions import TextEmbeddings
from diffusionopd.models.fused import fuse_norms
from diffusionopd.models.sharding import Sharding
from diffusionopd.stages import stage

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""``mixed_precision`` -> the type in which the frozen transformer is held."""
# What the libraries raise for a folder that holds something else, or damaged files.
_UNREADABLE = (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError)


class BackboneError(ValueError):
    """A base model that cannot be loaded; the message says what is wrong and the remedy."""


class Backbone:
    """A frozen SD3 transformer, VAE and scheduler, on one device unless the VAE is given its own.

    The transformer's weights are held in ``dtype``, as loaded; in half precision the transformer runs under
    autocast, so that float32 LoRA weights take part, and velocities come back in float32. The VAE decodes in
    float32: SD3's overflows in float16.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        vae_device: torch.device | str | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        """With ``sharding`` the transformer stays where it is until :meth:`shard`."""
        self.dtype = dtype
        self.device = torch.device(device)
        self.vae_device = self.device if vae_device is None else torch.device(vae_device)
        self.transformer = transformer.requires_grad_(False).eval()
        fuse_norms(self.transformer)
        if sharding is None:
            self.transformer.to(self.device)
        self.vae = vae.to(self.vae_device).requires_grad_(False).eval()
        self.scheduler = scheduler
        self.evaluations = 0  # of the transformer so far, counted in single pictures
        self.sharding = sharding  # if any, all processes must make the same number of forwards
        self._engine: object = None

    def shard(self) -> None:
        """Shard the transformer over the processes if it is to be; its adapters, those there now and later, stay whole.

        Its parameters can be read and written until then.
        """
        if self.sharding is not None:
            self._engine = self.sharding(self.transformer, self.device, world_size())

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """``(C, h, w)`` of the latents of a square image of ``resolution`` pixels. ValueError when it does not fit."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        unit = factor * self.transformer.config.patch_size
        largest = self.transformer.config.pos_embed_max_size * unit
        if resolution % unit or not 0 < resolution <= largest:
            raise ValueError(
                f"resolution must be a multiple of {unit} up to {largest} for this model, not {resolution}"
            )
        side = resolution // factor
        return self.transformer.config.in_channels, side, side

    def sigmas(self, num_steps: int, resolution: int) -> Tensor:
        """The scheduler's own ``num_steps + 1`` noise levels from 1 down to 0, float64 on the CPU."""
        options = {}
        if self.scheduler.config.use_dynamic_shifting:
            _, h, w = self.latent_shape(resolution)
            options["mu"] = self._dynamic_shift(h * w // self.transformer.config.patch_size**2)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_steps, **options)
        return scheduler.sigmas.double().cpu()

    def _dynamic_shift(self, sequence_length: int) -> float:
        """Resolution-dependent shift of the schedule, linear in the number of image tokens (as SD3's pipeline)."""
        c = self.scheduler.config
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        return c.base_shift + slope * (sequence_length - c.base_image_seq_len)

    def velocity(
        self,
        x: Tensor,
        sigma: float,
        text: TextEmbeddings,
        guidance_scale: float = 1.0,
        negative: TextEmbeddings | None = None,
    ) -> Tensor:
        """Velocity at ``x`` ``[B, C, h, w]`` and ``sigma`` in [0, 1], float32, ``[B, C, h, w]``.

        With ``guidance_scale > 1`` both halves of classifier-free guidance run in one batch and
        ``v = v_neg + guidance_scale (v_pos - v_neg)``; ``negative`` (batch 1 or B) is needed then. Gradients flow to
        the adapter in use when the caller has them enabled.
        """
        if guidance_scale <= 1.0:
            return self._forward(x, sigma, text)
        if negative is None:
            raise ValueError(f"guidance_scale {guidance_scale} needs the embeddings of the empty prompt")
        both = TextEmbeddings(*(torch.cat([n.expand_as(p), p]) for n, p in zip(negative, text, strict=True)))
        v_negative, v_positive = self._forward(torch.cat([x, x]), sigma, both).chunk(2)
        return v_negative + guidance_scale * (v_positive - v_negative)

    def _forward(self, x: Tensor, sigma: float, text: TextEmbeddings) -> Tensor:
        self.evaluations += len(x)
        # The transformer embeds time in units of the scheduler's training steps (1000), in float32.
        time = torch.full((len(x),), sigma * self.scheduler.config.num_train_timesteps, device=self.device)
        with self._autocast():
            (velocity,) = self.transformer(
                hidden_states=x.to(self.dtype),
                timestep=time,
                encoder_hidden_states=text.tokens.to(self.dtype),
                pooled_projections=text.pooled.to(self.dtype),
                return_dict=False,
            )
        return velocity.float()

    def _autocast(self) -> AbstractContextManager:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = 8) -> Tensor:
        """Images ``[B, 3, H, W]``, float32 in [0, 1], of latents ``[B, C, h, w]``, ``chunk`` at a time.

        The images are on the VAE's device.
        """
        config = self.vae.config
        scaled = latents.to(self.vae_device).float() / config.scaling_factor + (config.shift_factor or 0.0)
        with stage("VAE decode"):
            images = [self.vae.decode(part, return_dict=False)[0] for part in scaled.split(chunk)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


class SD3TextEncoder:
    """The pipeline's own text encoders: prompts to embeddings on the CPU. T5 may be absent, as in T5-less SD3."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, device: torch.device, max_sequence_length: int) -> None:
        self.pipeline = pipeline
        self.device = device
        self.max_sequence_length = max_sequence_length

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Embeddings of ``B`` prompts: ``tokens`` ``[B, L, D]`` (CLIP's tokens, then T5's), ``pooled`` ``[B, P]``."""
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return TextEmbeddings(tokens.cpu(), pooled.cpu())

    def close(self) -> None:
        """Drop the encoders and give their memory back."""
        self.pipeline = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_backbone(
    model: str,
    revision: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    vae_device: torch.device | str | None = None,
    sharding: Sharding | None = None,
) -> Backbone:
    """Load transformer, VAE and scheduler of a diffusers folder or hub id. Raises BackboneError naming the remedy.

    ``vae_device`` None is ``device``. With ``sharding`` the transformer stays on the CPU until :meth:`Backbone.shard`.
    """
    try:
        common = {"revision": revision, "use_safetensors": True}
        transformer = SD3Transformer2DModel.from_pretrained(model, subfolder="transformer", dtype=dtype, **common)
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae", dtype=torch.float32, **common)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler", revision=revision)
    except _UNREADABLE as error:
        raise BackboneError(f"the base model {model!r} cannot be loaded: {error}. {_remedy(model)}") from error
    return Backbone(transformer, vae, scheduler, dtype=dtype, device=device, vae_device=vae_device, sharding=sharding)


def find_device(name: str | None, default: torch.device, key: str) -> torch.device:
    """The device that the setting ``key`` names; ``default`` for none. BackboneError for one that is not there."""
    if not name:
        return default
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackboneError(f"{key} is {name!r}, which is no device. Use cpu, cuda or cuda:<n>.") from error
    present = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= present:
        have = f"{present} GPU{'' if present == 1 else 's'}" if present else "no GPU"
        raise BackboneError(f"{key} is {name!r}, but this process sees {have}. Name another, cpu, or leave it empty.")
    return device


def encoder_place(name: str | None, default: torch.device, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the text encoders; float32 on a CPU beside a GPU, which is slow in half precision."""
    device = find_device(name, default, "text_encoder_device")
    return device, torch.float32 if device.type == "cpu" and default.type != "cpu" else dtype


def load_text_encoder(
    model: str,
    revision: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_sequence_length: int = 128,
) -> SD3TextEncoder:
    """Load the text encoders and tokenizers of a diffusers folder or hub id, and nothing else of it."""
    device = torch.device(device)
    try:
        config = SD3Transformer2DModel.load_config(model, subfolder="transformer", revision=revision)
        with torch.device("meta"):  # the pipeline reads the transformer's configuration when there is no T5
            transformer = SD3Transformer2DModel.from_config(config)
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            model,
            revision=revision,
            transformer=transformer,
            vae=None,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            image_encoder=None,
            feature_extractor=None,
            **_absent_t5(model, revision),
        )
    except _UNREADABLE as error:
        raise BackboneError(f"the text encoders of {model!r} cannot be loaded: {error}. {_remedy(model)}") from error
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        if encoder is not None:
            encoder.to(device).requires_grad_(False).eval()
    return SD3TextEncoder(pipeline, device, max_sequence_length)


def _absent_t5(model: str, revision: str | None) -> dict[str, None]:
    """``text_encoder_3=None, tokenizer_3=None`` for a pipeline that comes without T5: the loader wants to be told."""
    index = StableDiffusion3Pipeline.load_config(model, revision=revision)
    _check_index(index)
    names = ("text_encoder_3", "tokenizer_3")
    listed = all((index.get(name) or (None,))[0] for name in names)
    present = not Path(model).is_dir() or all((Path(model) / name).is_dir() for name in names)
    return {} if listed and present else dict.fromkeys(names)


def _check_index(index: Mapping[str, Any]) -> None:
    """ValueError unless the text encoders are transformers' own CLIP and T5: other classes may stand for code."""
    for name, entry in index.items():
        if name.startswith(("text_encoder", "tokenizer")) and isinstance(entry, list | tuple) and any(entry):
            library, kind = (str(part) for part in entry)
            if library != "transformers" or not kind.startswith(("CLIP", "T5")):
                raise ValueError(f"its model_index.json asks for {library}.{kind} as {name}, where CLIP or T5 belongs")


def text_key(model: str, revision: str | None = None) -> str:
    """What the text embeddings of ``model`` depend on, as a short hash: the key of the disk cache.

    For a folder: names, sizes and the first and last MiB of every text encoder and tokenizer file. For a hub id: the
    repository and the commit that ``revision`` resolves to.
    """
    digest = hashlib.sha256()
    root = Path(model)
    if not root.is_dir():
        try:
            index = Path(hf_hub_download(model, "model_index.json", revision=revision))
        except Exception as error:
            raise BackboneError(f"the base model {model!r} cannot be found: {error}. {_remedy(model)}") from error
        digest.update(f"{model}@{index.parent.name}".encode())
        return digest.hexdigest()[:16]
    for file in sorted(p for pattern in ("text_encoder*", "tokenizer*") for p in root.glob(f"{pattern}/*")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root)}:{size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(2**20))
            handle.seek(max(0, size - 2**20))
            digest.update(handle.read())
    return digest.hexdigest()[:16]


def _remedy(model: str) -> str:
    if Path(model).is_dir():
        return "The folder must be a complete diffusers pipeline folder; download or build it again."
    return "Check the name and the connection, accept the model's licence on the hub, and log in with `hf auth login`."
