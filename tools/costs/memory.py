"""What one GPU holds in a run: computed bytes, whole copies or shares of them."""

from __future__ import annotations

from dataclasses import dataclass

from tools.costs.architecture import Pipeline
from tools.costs.encoders import clip_parameters, decoder_workspace, t5_parameters, vae_parameters
from tools.costs.evaluation import Cost

DECODED_AT_ONCE = 8
"""Pictures at most; ``backbone.Backbone.decode`` cuts larger batches."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by what they are, and the peak of a training step: their sum."""

    rows: tuple[tuple[str, int], ...]
    decoding: int  # on top while pictures are decoded: beside the training in a distillation, else before it
    encoding: int  # while prompts are encoded, before anything else is loaded; 0 once all are cached

    @property
    def peak(self) -> int:
        """Of a training step."""
        return sum(size for _, size in self.rows)


@dataclass(frozen=True)
class Held:
    """What a run holds beside the base: counts and choices of its configuration."""

    rows: int  # evaluations in one backward pass: pictures, twice that under guidance
    text_prompts: int  # whose embeddings a process holds in a round
    text_tokens: int
    teacher_bytes: int  # of teachers' adapters or merged matrices, or of nft's old policy
    ema: bool
    optimizer_bytes: int = 8  # a trained value: AdamW's two moments; 2 with 8-bit state
    checkpointing: bool = False
    item: int = 2
    vae: bool = True  # on this GPU
    decoded: int = 1  # pictures at once
    kept_latents: int = 0  # states and velocities held until the round is trained
    shards: int = 1  # processes over which the base is spread; adapters and the optimizer's state are not


def memory(cost: Cost, pipeline: Pipeline, held: Held, resolution: int) -> Memory:
    """The bytes of one GPU. CUDA's context, kernels' workspaces and the allocator's losses come on top."""
    shards = held.shards
    base = cost.parameters * held.item // shards + cost.buffers * held.item
    # Gathered: the block that computes and the one that is fetched for it to go on.
    gathered = 2 * cost.largest_block * held.item if shards > 1 else 0
    student = cost.lora_parameters * (4 + 4 + held.optimizer_bytes + (4 if held.ema else 0))
    width, pooled = pipeline.transformer.text_width, pipeline.transformer.pooled_width
    texts = held.text_prompts * (held.text_tokens * width + pooled) * held.item
    side = pipeline.latent_side(resolution)
    latents = held.kept_latents * pipeline.transformer.in_channels * side**2 * 4
    rows = {
        "base transformer": base,
        "blocks gathered from other GPUs": gathered,
        "VAE, float32": 4 * vae_parameters(pipeline.vae) if held.vae else 0,
        "student: LoRA, gradient, optimizer, EMA": student,
        "teachers, or nft's old policy": held.teacher_bytes,
        "prompt embeddings": texts,
        "latents kept for training": latents,
        "activations of a step": cost.activations(held.rows, held.checkpointing),
    }
    encoders = sum(clip_parameters(clip) for clip in pipeline.clips)
    encoders += t5_parameters(pipeline.t5) if pipeline.t5 else 0
    pictures = min(held.decoded, DECODED_AT_ONCE) if held.vae else 0
    decoding = decoder_workspace(pipeline.vae, resolution, pictures)
    return Memory(tuple((name, size) for name, size in rows.items() if size), decoding, encoders * held.item)
