"""What tests of several scorers share: a tiny CLIP, images, and their forms."""

import itertools
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffusionopd.rewards import RewardError
from diffusionopd.tiny.models import clip_tokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's constants
SIDE, PATCH, WIDTH = 32, 8, 24  # of the tiny CLIP: pixels, and channels of the common space

# Of the tiny CLIP in open_clip's names; heads are 80 and 64 wide, as in ViT-H-14.
CONTEXT, VISION, TEXT, COMMON, LAYERS, HEADS = 24, 160, 128, 48, 2, 2
BYTES = sorted(ByteLevel.alphabet())
VOCABULARY = [*BYTES, *(character + "</w>" for character in BYTES), "<|startoftext|>", "<|endoftext|>"]
_SHAPE = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_act": "gelu"}
OPEN_CLIP = CLIPConfig(
    text_config=_SHAPE | {
        "hidden_size": TEXT, "intermediate_size": 2 * TEXT, "max_position_embeddings": CONTEXT,
        "vocab_size": len(VOCABULARY), "eos_token_id": len(VOCABULARY) - 1,
    },
    vision_config=_SHAPE | {
        "hidden_size": VISION, "intermediate_size": 2 * VISION, "image_size": SIDE, "patch_size": PATCH,
    },
    projection_dim=COMMON,
)  # fmt: skip


def save_clip(path) -> str:
    """Write a CLIP folder of random weights in the hub's format."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer("<|endoftext|>")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextConfig(
        **shape, vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(**shape, image_size=SIDE, patch_size=PATCH)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # far from the near-zero initial values
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(path)
    return str(path)


def incomplete(folder: str, path) -> str:
    """A copy of a model's folder, at `path`, whose file lacks a tensor."""
    shutil.copytree(folder, path)
    state = load_file(path / "model.safetensors")
    state.pop(next(name for name, value in state.items() if value.ndim == 2))
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
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


def open_clip_state() -> dict[str, torch.Tensor]:
    """Random weights under the names of open_clip's CLIP."""
    layers: dict[str, tuple[int, ...]] = {"visual.ln_pre": (VISION,), "visual.ln_post": (VISION,), "ln_final": (TEXT,)}
    found: dict[str, tuple[int, ...]] = {
        "positional_embedding": (CONTEXT, TEXT), "text_projection": (TEXT, COMMON), "logit_scale": (),
        "visual.class_embedding": (VISION,), "visual.positional_embedding": ((SIDE // PATCH) ** 2 + 1, VISION),
        "visual.proj": (VISION, COMMON), "visual.conv1.weight": (VISION, 3, PATCH, PATCH),
        "token_embedding.weight": (len(VOCABULARY), TEXT),
    }  # fmt: skip
    for layer, (tower, width) in itertools.product(range(LAYERS), (("visual.", VISION), ("", TEXT))):
        p = f"{tower}transformer.resblocks.{layer}."
        found |= {f"{p}attn.in_proj_weight": (3 * width, width), f"{p}attn.in_proj_bias": (3 * width,)}
        layers |= {f"{p}ln_1": (width,), f"{p}ln_2": (width,), f"{p}attn.out_proj": (width, width)}
        layers |= {f"{p}mlp.c_fc": (2 * width, width), f"{p}mlp.c_proj": (width, 2 * width)}
    return random_state(found | with_biases(layers))


def save_byte_tokenizer(path, vocabulary=VOCABULARY) -> str:
    """CLIP's tokenizer over bytes without merges."""
    tokens = {token: i for i, token in enumerate(vocabulary)}
    CLIPTokenizer(vocab=tokens, merges=[], model_max_length=CONTEXT).save_pretrained(path)
    return str(path)


def cropped_pixels(image: Image.Image) -> torch.Tensor:
    """`[3, SIDE, SIDE]` float64, by OpenAI's transform written out: shorter side by bicubic, centre crop (half a pixel
    to the even side, as torchvision does), to tensor, normalise."""
    width, height = image.size
    size = (SIDE, int(SIDE * height / width)) if width <= height else (int(SIDE * width / height), SIDE)
    left, top = (round((edge - SIDE) / 2) for edge in size)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    array = np.asarray(resized, dtype=np.float64)[top : top + SIDE, left : left + SIDE] / 255
    return torch.from_numpy((array - MEAN) / STD).permute(2, 0, 1)


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


def assert_other_files_are_refused(build, name: str, folder, whole, state: dict, removed: dict, added: dict) -> None:
    """`build(checkpoint=..., tokenizer=...)` of files that are not there, or hold too little or too much.

    `whole(state)` is a file's content; `removed` and `added` (as three zeros) are tensors -> a fact of the message.
    """
    changed = [({key: value for key, value in state.items() if key != one}, fact) for one, fact in removed.items()]
    changed += [(state | {one: torch.zeros(3)}, fact) for one, fact in added.items()]
    other = folder / "other.pt"
    for tensors, fact in changed:
        torch.save(whole(tensors), other)
        with pytest.raises(
            RewardError, match=rf"(?s)is not the checkpoint of reward '{name}'.*{fact}.*tools\.download"
        ):
            build(checkpoint=str(other))
    other.write_bytes(b"<html>not found</html>")
    with pytest.raises(RewardError, match="is not the checkpoint"):
        build(checkpoint=str(other))
    with pytest.raises(RewardError, match=rf"none\.pt.*python -m tools\.download rewards {name}"):
        build(checkpoint=str(folder / "none.pt"))
    with pytest.raises(RewardError, match="hf download nobody/no-such-tokenizer"):
        build(tokenizer="nobody/no-such-tokenizer")
