"""Settings of the base model, its precision and memory, and the student's LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusionopd.config_schema import FREE, READ, WRITE, is_device, key

FRESH, FROM_TEACHERS = "fresh", "teachers"
_DEVICE = ('"cpu", "cuda", "cuda:<n>" or empty (the training device)', is_device)


@dataclass(frozen=True)
class BaseSettings:
    """The base model."""

    model: str = key("pretrained.model", "", path=READ)
    """A diffusers pipeline: hub id ("organisation/name") or local folder with model_index.json; or a single file, local
    or on the hub ("organisation/name/file.safetensors"). docs/bases.md has what can be given."""
    revision: str = key("pretrained.revision", "")
    """Branch, tag or commit on the hub; empty is the default branch. Unused for a local folder."""
    variant: str = key("pretrained.variant", None)
    """Variant of the weight files, such as "fp16"; None is the plain ones."""
    config: str = key("pretrained.config", None, path=READ)
    """For a single file: folder or hub id of the pipeline that it is made for, which gives the configurations, the
    tokenizers, and the weights that the file does not hold. None: the hub id that diffusers infers from the file."""
    resolution: int = key("resolution", 768, "[16, inf)", from_model="resolution")
    """Height and width in pixels; a multiple of the model's unit."""
    max_sequence_length: int = key("max_sequence_length", 128, "[1, inf)", from_model="max_sequence_length")
    """Length in tokens to which prompts are cut, and padded where the family's are (T5's of SD3 and FLUX)."""

    @property
    def source(self) -> dict[str, Any]:
        """Where the base model is, as arguments of what reads it."""
        rest = {"revision": self.revision, "variant": self.variant, "config": self.config}
        return {"model": self.model} | {name: value or None for name, value in rest.items()}


@dataclass(frozen=True)
class MemorySettings:
    """Precision and memory."""

    mixed_precision: str = key(
        "mixed_precision",
        "fp16",
        choices=("no", "fp16", "bf16"),
        resume=FREE,
        from_model="mixed_precision",
    )
    """The type in which frozen weights are held and the transformer computes ("no": float32). LoRA weights, the
    optimizer and the loss are float32 in each case. On a CPU "no" is by far the fastest."""
    allow_tf32: bool = key("allow_tf32", True, resume=FREE)
    """Allow TF32 in float32 matrix products and convolutions on NVIDIA GPUs: faster, 10 bits of mantissa."""
    activation_checkpointing: bool = key("activation_checkpointing", False, resume=FREE)
    """Recompute activations in the backward pass: less memory, about a third more time for the student."""
    text_encoder_device: str = key("text_encoder_device", "", form=_DEVICE, resume=FREE)
    """Where text encoders work (they leave memory once every prompt is encoded): "cpu", "cuda:1"; empty is the training
    device. Every process loads its own."""
    vae_device: str = key("vae_device", "", form=_DEVICE, resume=FREE)
    """Where the VAE stays, as for `text_encoder_device`."""
    teacher_device: str = key("teacher_device", "", choices=("", "cpu"), resume=FREE)
    """Where the weights of teachers that have a `model` of their own stay: empty is the training device. "cpu": they
    wait in the host's memory, and one of them at a time is on the device, moved there when another is asked than was
    last (once per task and round; docs/scaling.md)."""
    attention_backend: str = key(
        "attention_backend", "", choices=("", "flash", "efficient", "cudnn", "math"), resume=FREE
    )
    """CUDA kernel of the attention layers: "flash", "efficient", "cudnn" or "math"; "" lets torch choose, which in half
    precision on a GPU is flash or cudnn already."""
    compile: bool | None = key(
        "compile", None, optional=True, form=("True, False or None", lambda value: isinstance(value, bool)), resume=FREE
    )
    """Compile the transformer's blocks (torch.compile): minutes at the start, faster rounds on a GPU; needs a compiler.
    None: where that is worth it: on a GPU, for 100 rounds or more, where all passes have the same sizes; `--dry_run`
    says whether, and why not."""
    cache_dir: str = key("cache_dir", ".cache/text", path=WRITE, resume=FREE)
    """Folder of the prompt embeddings, shared by runs (keyed by model, prompt and length)."""


def _named(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(n, str) and n for n in value)


_ONLY_LORA = (
    "True: the student is a LoRA, because teachers, references and the bare base share its frozen weights, which "
    "full fine-tuning would change. Weights fine-tuned in full can be a teacher (train.teachers[i].model)"
)


@dataclass(frozen=True)
class LoraSettings:
    """The student's adapter."""

    use_lora: bool = key("use_lora", True, form=(_ONLY_LORA, bool))
    """Must be True: the student is a LoRA on the frozen base, which its teachers (LoRAs on it), the references and the
    bare base share. One that is fine-tuned in full would change them all; full weights can be a teacher (`model`)."""
    lora_path: str = key("train.lora_path", None, path=READ)
    """LoRA to start the student from (forms as for teachers); None is a fresh one. It keeps its rank and effect."""
    student_init: str = key("train.student_init", FRESH, choices=(FRESH, FROM_TEACHERS))
    """Where a student without `train.lora_path` starts: "fresh", as the base, or at its "teachers": the sum of their
    LoRAs (task arithmetic), cut to its rank; what the cut loses is printed. It then adapts what they adapt, too, unless
    `train.lora_target_modules` says what."""
    student_init_scale: float = key("train.student_init_scale", 0.0, "[0, inf)")
    """What multiplies that sum; 0: the one of 0.2, 0.4, ..., 1, and 1/n for more than five teachers, with the
    smallest loss on a batch of each task."""
    lora_rank: int = key("train.lora_rank", 32, "[1, inf)")
    """Its rank, unless it comes from `train.lora_path`."""
    lora_alpha: float = key("train.lora_alpha", 64.0, "(0, inf)")
    """The student's output is scaled by `lora_alpha / lora_rank`, also when it starts from a LoRA of another scale."""
    lora_target_modules: tuple | None = key(
        "train.lora_target_modules", None, optional=True, form=("a list of at least one name, or None", _named)
    )
    """Linear layers that get one, by the ends of their names; None: the model family's own (docs/configuration.md has
    them), and those of teachers that it starts from."""
