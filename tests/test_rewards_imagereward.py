"""ImageReward against BLIP's forward pass and the official preprocessing written out, on a tiny official checkpoint."""

from functools import partial

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig

from diffusionopd.rewards import imagereward
from diffusionopd.rewards.imagereward import ImageReward, load_imagereward

from .helpers_rewards import (
    HEADS,
    LAYERS,
    PATCH,
    SIDE,
    assert_official_scores,
    assert_one_score_a_pair,
    assert_other_files_are_refused,
    assert_same_on_a_gpu,
    attend,
    cropped_pixels,
    layer_norm,
    linear,
    random_state,
    with_biases,
)

SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072  # constants of the official class
PUBLISHED = imagereward.VISION, imagereward.TEXT
VISION, TEXT = 128, 128  # two heads of 64, as in the official model
MAX_TOKENS = 35
WORDS = ["a", "red", "circle", "left", "of", "blue", "square", "painting", "the", "ocean", ",", "birds"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
PROMPTS = ["a red circle left of a Blue square", "birds", "the ocean, " * 30]
WIDTHS = (TEXT, 1024, 128, 64, 16, 1)


def vision_shapes() -> dict[str, tuple[int, ...]]:
    layers: dict[str, tuple[int, ...]] = {"patch_embed.proj": (VISION, 3, PATCH, PATCH), "norm": (VISION,)}
    for layer in range(LAYERS):
        linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        layers |= {f"blocks.{layer}.{name}": (n * VISION, m * VISION) for name, (n, m) in linears.items()}
        layers |= {f"blocks.{layer}.{name}": (VISION,) for name in ("norm1", "norm2")}
    return {"cls_token": (1, 1, VISION), "pos_embed": (1, (SIDE // PATCH) ** 2 + 1, VISION)} | with_biases(layers)


def text_shapes() -> dict[str, tuple[int, ...]]:
    words, layers = len(VOCABULARY) + 2, {"embeddings.LayerNorm": (TEXT,)}  # BLIP adds two tokens
    for layer in range(LAYERS):
        linears = {"intermediate.dense": (4 * TEXT, TEXT), "output.dense": (TEXT, 4 * TEXT)}
        for kind, width in (("attention", TEXT), ("crossattention", VISION)):
            linears |= {f"{kind}.self.query": (TEXT, TEXT), f"{kind}.output.dense": (TEXT, TEXT)}
            linears |= {f"{kind}.self.key": (TEXT, width), f"{kind}.self.value": (TEXT, width)}
        norms = {f"{name}.LayerNorm": (TEXT,) for name in ("attention.output", "crossattention.output", "output")}
        layers |= {f"encoder.layer.{layer}.{name}": shape for name, shape in (linears | norms).items()}
    sizes = {"word": words, "position": 64}
    return {f"embeddings.{name}_embeddings.weight": (n, TEXT) for name, n in sizes.items()} | with_biases(layers)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """With the official names, those that the score does not read included."""
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in vision_shapes().items()}
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in text_shapes().items()}
    heads = {f"mlp.layers.{n}": (WIDTHS[i + 1], WIDTHS[i]) for i, n in enumerate((0, 2, 4, 6, 7))}
    shapes |= with_biases(heads | {"blip.vision_proj": (32, VISION), "blip.text_proj": (32, TEXT)})
    return {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None], **random_state(shapes)}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory, state):
    """`scorer(...)`: of the checkpoint as published, and a BERT tokenizer."""
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
    files = {"checkpoint": str(path / "ImageReward.pt"), "tokenizer": str(path / "tokenizer")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagereward, "VISION", vision)
        patch.setattr(imagereward, "TEXT", text)
        yield lambda **options: ImageReward(**files | options)
    load_imagereward.cache_clear()


# ---- the official steps ----------------------------------------------------------------------------------------------


def official_tokens(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of 35 tokens, for a vocabulary of whole words."""
    words = prompt.lower().replace(",", " , ").split()[: MAX_TOKENS - 2]
    ids = [VOCABULARY.index(token) for token in ["[CLS]", *words, "[SEP]"]]
    padding = [0] * (MAX_TOKENS - len(ids))
    return torch.tensor(ids + padding), torch.tensor([1] * len(ids) + padding)


def official_patches(w: dict, pixels: torch.Tensor) -> torch.Tensor:
    """timm's vision transformer, epsilon 1e-6."""
    p = "blip.visual_encoder."
    x = F.conv2d(pixels[None], w[p + "patch_embed.proj.weight"], w[p + "patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([w[p + "cls_token"][0], x[0].flatten(1).T]) + w[p + "pos_embed"][0]
    for layer in range(LAYERS):
        b = f"{p}blocks.{layer}."
        q, k, v = linear(w, b + "attn.qkv", layer_norm(w, b + "norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + linear(w, b + "attn.proj", attend(q, k, v, HEADS))
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
            attended = linear(w, f"{b}{kind}.output.dense", attend(q, k, v, HEADS, allowed))
            x = layer_norm(w, f"{b}{kind}.output.LayerNorm", attended + x, 1e-12)
        hidden = F.gelu(linear(w, b + "intermediate.dense", x))
        x = layer_norm(w, b + "output.LayerNorm", linear(w, b + "output.dense", hidden) + x, 1e-12)
    return x


def official_score(w: dict[str, torch.Tensor], image: Image.Image, prompt: str) -> float:
    """The official `score`; `w` is in float64."""
    x = official_text(w, *official_tokens(prompt), official_patches(w, cropped_pixels(image)))[0]
    for number in (0, 2, 4, 6, 7):
        x = linear(w, f"mlp.layers.{number}", x)
    return (x.item() - SCORE_MEAN) / SCORE_STD


# ---- the scorer ------------------------------------------------------------------------------------------------------


def test_score_is_the_official_one(scorer, state):
    sizes = [(64, 64), (70, 64), (64, 71), (96, 48), (19, 25), (SIDE, SIDE)]
    official = partial(official_score, {name: value.double() for name, value in state.items()})
    assert_official_scores(scorer, "imagereward", official, sizes, PROMPTS, told_apart=0.05)


def test_one_score_a_pair_whatever_batch_form_and_precision(scorer):
    assert_one_score_a_pair(scorer, "imagereward", PROMPTS, half_within=0.05)
    assert (first := scorer().model) is scorer().model, "weights are loaded once, and frozen"
    assert not first.training and not any(p.requires_grad for p in first.parameters())


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_a_cpu(scorer):
    assert_same_on_a_gpu(scorer, "imagereward", PROMPTS, atol=1e-3)


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


def test_other_files_are_refused(scorer, state, tmp_path):
    removed = {
        "blip.visual_encoder.blocks.1.attn.qkv.bias": r"layers\.1\.self_attn\.qkv\.bias",
        "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias": r"layer\.1\.crossattention",
        "blip.visual_encoder.patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "mlp.layers.4.weight": "layers.4.weight",
    }
    added = {
        "blip.text_decoder.cls.bias": "Unexpected.*blip.text_decoder.cls.bias",
        "blip.visual_encoder.head.weight": "Unexpected.*head.weight",
        "blip.text_encoder.pooler.dense.bias": "pooler.dense.bias",
        "mlp.layers.0.bias": "size mismatch",
    }
    assert_other_files_are_refused(scorer, "imagereward", tmp_path, dict, state, removed, added)
