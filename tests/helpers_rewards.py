"""What tests of several scorers share: a tiny CLIP, images, and their forms."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffusionopd.rewards import RewardError
from diffusionopd.tiny.models import clip_tokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's constants
SIDE, WIDTH = 32, 24  # of the tiny CLIP: pixels, and channels of the common space


def save_clip(path) -> str:
    """Write a CLIP folder of random weights in the hub's format."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer("<|endoftext|>")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextConfig(
        **shape, vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(**shape, image_size=SIDE, patch_size=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # far from the near-zero initial values
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(path)
    return str(path)


def smooth_images(width: int, height: int, count: int = 3) -> list[Image.Image]:
    """Smooth noise, so that resizing matters but does not blur everything away."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    return [Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC) for array in noise]


def assert_every_form_scores_the_same(scorer, name: str, images: list[Image.Image], prompts: list[str]) -> None:
    """PIL images, a uint8 and a float tensor, and the array that is used inside give equal scores."""
    arrays = np.stack([np.array(image) for image in images])
    pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    wanted = scorer.score(images, prompts, [{}] * len(images))[name]
    for form in (arrays, pixels, pixels.float() / 255):
        np.testing.assert_array_equal(scorer.score(form, prompts, [{}] * len(images))[name], wanted)


def assert_one_score_a_pair(build, name: str, prompts: list[str], half_within: float) -> None:
    """Neither the form of the images nor the batch changes scores, and half precision does a little.

    `build(**options)` makes the scorer.
    """
    images, scorer = smooth_images(75, 48), build()
    assert_every_form_scores_the_same(scorer, name, images, prompts)
    together = scorer.score(images, prompts, [{}] * 3)[name]
    alone = [scorer.score([image], [prompt], [{}])[name][0] for image, prompt in zip(images, prompts, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    half = build(dtype="bfloat16").score(images, prompts, [{}] * 3)[name]
    assert 0 < np.abs(half - together).max() < half_within
    with pytest.raises(RewardError, match="int8"):
        build(dtype="int8")


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random weights of these shapes: matrices keep the size of what they multiply, norms are around one."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(shape[-1]) if len(shape) == 2 and "embedding" not in name else 0.3
        one = 1.0 if re.search(r"(ln_\w+|norm\d?|LayerNorm)\.weight", name) else 0.0
        state[name] = one + scale * torch.randn(shape, generator=generator)
    return state


def with_biases(weights: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of weights and biases of these layers."""
    parts = lambda name, shape: {f"{name}.weight": shape, f"{name}.bias": shape[:1]}  # noqa: E731
    return {key: s for name, shape in weights.items() for key, s in parts(name, shape).items()}


def linear(w: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def layer_norm(w: dict, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None):
    """`[tokens, width]` each; `mask` is 1 where a key may be attended to."""
    q, k, v = (part.reshape(len(part), heads, -1).transpose(0, 1) for part in (q, k, v))
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(mask == 0, -torch.inf)
    return (logits.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)


def assert_official_scores(build, name: str, official, sizes, prompts: list[str], told_apart: float) -> None:
    """`official(image, prompt)` is the score of the scorer that `build()` makes, at every size of the images."""
    scorer = build()
    for size in sizes:
        images = smooth_images(*size)
        wanted = np.array([official(image, prompt) for image, prompt in zip(images, prompts, strict=True)])
        assert np.ptp(wanted) > told_apart
        scores = scorer.score(images, prompts, [{}] * len(prompts))
        assert list(scores) == [name] and scores[name].dtype == np.float64
        np.testing.assert_allclose(scores[name], wanted, atol=1e-5, err_msg=str(size))


def assert_same_on_a_gpu(build, name: str, prompts: list[str], atol: float) -> None:
    images = smooth_images(75, 48)
    cpu, gpu = (build(device=device).score(images, prompts, [{}] * len(prompts))[name] for device in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu, cpu, atol=atol)


def assert_other_files_are_refused(build, name: str, folder, contents) -> None:
    """`build(checkpoint=..., tokenizer=...)`; contents of other files, each with a fact of the message."""
    for content, fact in contents:
        torch.save(content, folder / "other.pt")
        with pytest.raises(
            RewardError, match=rf"(?s)is not the checkpoint of reward '{name}'.*{fact}.*tools\.download"
        ):
            build(checkpoint=str(folder / "other.pt"))
    (folder / "other.pt").write_bytes(b"<html>not found</html>")
    with pytest.raises(RewardError, match="is not the checkpoint"):
        build(checkpoint=str(folder / "other.pt"))
    with pytest.raises(RewardError, match=rf"none\.pt.*python -m tools\.download rewards {name}"):
        build(checkpoint=str(folder / "none.pt"))
    with pytest.raises(RewardError, match="hf download nobody/no-such-tokenizer"):
        build(tokenizer="nobody/no-such-tokenizer")
