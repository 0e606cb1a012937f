"""ImageReward against BLIP's forward pass and the official preprocessing written out, on a tiny official checkpoint."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig

from diffusionopd.rewards import RewardError, imagereward
from diffusionopd.rewards.imagereward import ImageReward, load_imagereward
from tests.helpers_rewards import MEAN, STD, assert_one_score_a_pair, smooth_images

SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072  # constants of the official class
PUBLISHED = imagereward.VISION, imagereward.TEXT
SIDE, PATCH, VISION, TEXT, LAYERS, HEADS = 32, 8, 128, 128, 2, 2  # heads of 64, as in the official model
MAX_TOKENS = 35
WORDS = ["a", "red", "circle", "left", "of", "blue", "square", "painting", "the", "ocean", ",", "birds"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
PROMPTS = ["a red circle left of a Blue square", "birds", "the ocean, " * 30]
WIDTHS = (TEXT, 1024, 128, 64, 16, 1)


def vision_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, VISION),
        "pos_embed": (1, (SIDE // PATCH) ** 2 + 1, VISION),
        "patch_embed.proj.weight": (VISION, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (VISION,),
        "norm.weight": (VISION,),
        "norm.bias": (VISION,),
    }
    for layer in range(LAYERS):
        linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (outputs, inputs) in linears.items():
            shapes[f"blocks.{layer}.{name}.weight"] = (outputs * VISION, inputs * VISION)
            shapes[f"blocks.{layer}.{name}.bias"] = (outputs * VISION,)
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{layer}.{name}.weight": (VISION,), f"blocks.{layer}.{name}.bias": (VISION,)}
    return shapes


def text_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY) + 2, TEXT),  # BLIP adds two tokens
        "embeddings.position_embeddings.weight": (64, TEXT),
        "embeddings.LayerNorm.weight": (TEXT,),
        "embeddings.LayerNorm.bias": (TEXT,),
    }
    for layer in range(LAYERS):
        p = f"encoder.layer.{layer}."
        linears = {"intermediate.dense": (4 * TEXT, TEXT), "output.dense": (TEXT, 4 * TEXT)}
        for kind, width in (("attention", TEXT), ("crossattention", VISION)):
            linears |= {f"{kind}.self.query": (TEXT, TEXT), f"{kind}.output.dense": (TEXT, TEXT)}
            linears |= {f"{kind}.self.key": (TEXT, width), f"{kind}.self.value": (TEXT, width)}
        for name, shape in linears.items():
            shapes |= {f"{p}{name}.weight": shape, f"{p}{name}.bias": shape[:1]}
        for name in ("attention.output", "crossattention.output", "output"):
            shapes |= {f"{p}{name}.LayerNorm.weight": (TEXT,), f"{p}{name}.LayerNorm.bias": (TEXT,)}
    return shapes


def random_state() -> dict[str, torch.Tensor]:
    """A state dict with the official names, those that the score does not read included."""
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in vision_shapes().items()}
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in text_shapes().items()}
    for i, number in enumerate((0, 2, 4, 6, 7)):
        shapes |= {f"mlp.layers.{number}.weight": (WIDTHS[i + 1], WIDTHS[i])}
        shapes |= {f"mlp.layers.{number}.bias": (WIDTHS[i + 1],)}
    for name, width in (("vision", VISION), ("text", TEXT)):
        shapes |= {f"blip.{name}_proj.weight": (32, width), f"blip.{name}_proj.bias": (32,)}
    generator = torch.Generator().manual_seed(0)
    state = {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(shape[-1]) if len(shape) == 2 and "embeddings" not in name else 0.3
        one = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        state[name] = one + scale * torch.randn(shape, generator=generator)
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    """The checkpoint as published, and a BERT tokenizer."""
    path = tmp_path_factory.mktemp("imagereward")
    torch.save(state, path / "ImageReward.pt")
    BertTokenizer(vocab={token: i for i, token in enumerate(VOCABULARY)}).save_pretrained(path / "tokenizer")
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    vision = BlipVisionConfig(
        hidden_size=VISION, intermediate_size=4 * VISION, image_size=SIDE, patch_size=PATCH,
        layer_norm_eps=PUBLISHED[0].layer_norm_eps, **shape,
    )  # fmt: skip
    text = BlipTextConfig(
        hidden_size=TEXT, intermediate_size=4 * TEXT, encoder_hidden_size=VISION, vocab_size=len(VOCABULARY) + 2,
        max_position_embeddings=64, **shape,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagereward, "VISION", vision)
        patch.setattr(imagereward, "TEXT", text)
        yield path
    load_imagereward.cache_clear()


def scorer(folder: Path, **options) -> ImageReward:
    return ImageReward(checkpoint=str(folder / "ImageReward.pt"), tokenizer=str(folder / "tokenizer"), **options)


# ---- the official steps ----------------------------------------------------------------------------------------------


def official_pixels(image: Image.Image) -> torch.Tensor:
    """torchvision's Resize and CenterCrop on a PIL picture, to tensor, normalise."""
    width, height = image.size
    size = (SIDE, int(SIDE * height / width)) if width <= height else (int(SIDE * width / height), SIDE)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = int(round((size[0] - SIDE) / 2.0)), int(round((size[1] - SIDE) / 2.0))
    array = np.asarray(resized, dtype=np.float64)[top : top + SIDE, left : left + SIDE] / 255
    return torch.from_numpy((array - MEAN) / STD).permute(2, 0, 1)


def official_tokens(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of 35 tokens, for a vocabulary of whole words."""
    words = prompt.lower().replace(",", " , ").split()[: MAX_TOKENS - 2]
    ids = [VOCABULARY.index(token) for token in ["[CLS]", *words, "[SEP]"]]
    padding = [0] * (MAX_TOKENS - len(ids))
    return torch.tensor(ids + padding), torch.tensor([1] * len(ids) + padding)


def linear(w: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def layer_norm(w: dict, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`[tokens, width]` each; `mask` is 1 where a key may be attended to."""
    q, k, v = (part.reshape(len(part), HEADS, -1).transpose(0, 1) for part in (q, k, v))
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(mask == 0, -torch.inf)
    return (logits.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)


def official_patches(w: dict, pixels: torch.Tensor) -> torch.Tensor:
    """timm's vision transformer, epsilon 1e-6."""
    p = "blip.visual_encoder."
    x = F.conv2d(pixels[None], w[p + "patch_embed.proj.weight"], w[p + "patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([w[p + "cls_token"][0], x[0].flatten(1).T]) + w[p + "pos_embed"][0]
    for layer in range(LAYERS):
        b = f"{p}blocks.{layer}."
        q, k, v = linear(w, b + "attn.qkv", layer_norm(w, b + "norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + linear(w, b + "attn.proj", attend(q, k, v))
        x = x + linear(w, b + "mlp.fc2", F.gelu(linear(w, b + "mlp.fc1", layer_norm(w, b + "norm2", x, 1e-6))))
    return layer_norm(w, p + "norm", x, 1e-6)


def official_text(w: dict, ids: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """BERT (post-norm, epsilon 1e-12, no causal mask) with cross-attention to the patches in every layer."""
    p = "blip.text_encoder."
    x = w[p + "embeddings.word_embeddings.weight"][ids] + w[p + "embeddings.position_embeddings.weight"][: len(ids)]
    x = layer_norm(w, p + "embeddings.LayerNorm", x, 1e-12)
    for layer in range(LAYERS):
        b = f"{p}encoder.layer.{layer}."
        for kind, source, allowed in (("attention", None, mask), ("crossattention", patches, None)):
            keys = x if source is None else source
            q, k, v = (linear(w, f"{b}{kind}.self.{n}", y) for n, y in (("query", x), ("key", keys), ("value", keys)))
            attended = linear(w, f"{b}{kind}.output.dense", attend(q, k, v, allowed))
            x = layer_norm(w, f"{b}{kind}.output.LayerNorm", attended + x, 1e-12)
        hidden = F.gelu(linear(w, b + "intermediate.dense", x))
        x = layer_norm(w, b + "output.LayerNorm", linear(w, b + "output.dense", hidden) + x, 1e-12)
    return x


def official_score(state: dict[str, torch.Tensor], image: Image.Image, prompt: str) -> float:
    """The official `score`, in float64."""
    w = {name: value.double() for name, value in state.items()}
    x = official_text(w, *official_tokens(prompt), official_patches(w, official_pixels(image)))[0]
    for number in (0, 2, 4, 6, 7):
        x = linear(w, f"mlp.layers.{number}", x)
    return (x.item() - SCORE_MEAN) / SCORE_STD


# ---- the scorer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (70, 64), (64, 71), (96, 48), (19, 25), (SIDE, SIDE)])
def test_score_is_the_official_one(folder, state, size):
    images = smooth_images(*size)
    wanted = np.array([official_score(state, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)])
    assert np.ptp(wanted) > 0.05  # the pairs are told apart
    scores = scorer(folder).score(images, PROMPTS, [{}] * len(PROMPTS))
    assert list(scores) == ["imagereward"] and scores["imagereward"].dtype == np.float64
    np.testing.assert_allclose(scores["imagereward"], wanted, atol=1e-5)


def test_prompts_become_the_official_tokens(folder):
    tokenizer = scorer(folder).tokenizer
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=MAX_TOKENS)
    for ids, mask, prompt in zip(tokens["input_ids"], tokens["attention_mask"], PROMPTS, strict=True):
        assert [ids, mask] == [part.tolist() for part in official_tokens(prompt)]


def test_image_and_prompt_both_matter(folder):
    images, reward = smooth_images(64, 64), scorer(folder)
    same_prompt = reward.score(images, PROMPTS[:1] * 3, [{}] * 3)["imagereward"]
    same_image = reward.score(images[:1] * 3, PROMPTS, [{}] * 3)["imagereward"]
    assert np.ptp(same_prompt) > 1e-3 and np.ptp(same_image) > 1e-3


def test_one_score_a_pair_whatever_batch_form_and_precision(folder):
    assert_one_score_a_pair(lambda **options: scorer(folder, **options), "imagereward", PROMPTS, half_within=0.05)


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_a_cpu(folder):
    images = smooth_images(75, 48)
    cpu, gpu = (scorer(folder, device=d).score(images, PROMPTS, [{}] * 3)["imagereward"] for d in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu, cpu, atol=1e-3)


def test_weights_are_loaded_once_and_frozen(folder):
    first, second = scorer(folder), scorer(folder)
    assert first.model is second.model
    assert not first.model.training and not any(p.requires_grad for p in first.model.parameters())


def test_the_configuration_has_the_published_sizes():
    """BLIP with `vit="large"` at 224 pixels, and a BERT of base size with two tokens more."""
    vision, text = PUBLISHED
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (224, 16, 1024, 24)
    assert (vision.intermediate_size, vision.num_attention_heads, vision.hidden_act) == (4096, 1024 // 64, "gelu")
    assert (text.vocab_size, text.max_position_embeddings, text.hidden_size) == (30522 + 2, 512, 768)
    assert (text.num_hidden_layers, text.num_attention_heads, text.intermediate_size) == (12, 768 // 64, 3072)
    assert (text.encoder_hidden_size, text.is_decoder, text.hidden_act) == (1024, True, "gelu")
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)


# ---- what is wrong with the files ------------------------------------------------------------------------------------


def test_missing_files_are_named_with_the_command(folder, tmp_path):
    with pytest.raises(RewardError, match=r"none\.pt.*python -m tools\.download rewards imagereward"):
        ImageReward(checkpoint=str(tmp_path / "none.pt"), tokenizer=str(folder / "tokenizer"))
    with pytest.raises(RewardError, match="hf download nobody/no-such-tokenizer"):
        ImageReward(checkpoint=str(folder / "ImageReward.pt"), tokenizer="nobody/no-such-tokenizer")


@pytest.mark.parametrize(
    ("removed", "added", "problem"),
    [
        ("blip.visual_encoder.blocks.1.attn.qkv.bias", {}, r"layers\.1\.self_attn\.qkv\.bias"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", {}, r"layer\.1\.crossattention"),
        ("blip.visual_encoder.patch_embed.proj.weight", {}, "embeddings.patch_embedding.weight"),
        ("mlp.layers.4.weight", {}, "layers.4.weight"),
        (None, {"blip.text_decoder.cls.bias": torch.zeros(1)}, "Unexpected.*blip.text_decoder.cls.bias"),
        (
            None,
            {"blip.visual_encoder.head.weight": torch.zeros(1)},
            "Unexpected.*head.weight",
        ),
        (None, {"blip.text_encoder.pooler.dense.bias": torch.zeros(1)}, "pooler.dense.bias"),
        (None, {"mlp.layers.0.bias": torch.zeros(3)}, "size mismatch"),
    ],
)
def test_another_file_is_refused(folder, state, tmp_path, removed, added, problem):
    path = tmp_path / "other.pt"
    torch.save({name: value for name, value in state.items() if name != removed} | added, path)
    with pytest.raises(
        RewardError, match=rf"(?s)is not the checkpoint of reward 'imagereward'.*{problem}.*tools\.download"
    ):
        ImageReward(checkpoint=str(path), tokenizer=str(folder / "tokenizer"))
