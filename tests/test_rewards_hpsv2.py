"""HPSv2 against open_clip's forward pass and HPSv2's preprocessing written out, on a tiny checkpoint of its format."""

import html
import re
import sys
from functools import partial
from types import SimpleNamespace

import ftfy
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional as F
from transformers import CLIPModel

from diffusionopd.rewards import RewardError, hpsv2
from diffusionopd.rewards.hpsv2 import Hpsv2, load_hps_clip, to_transformers

from .helpers_rewards import (
    CONTEXT,
    HEADS,
    LAYERS,
    MEAN,
    OPEN_CLIP,
    PATCH,
    SIDE,
    STD,
    VOCABULARY,
    assert_official_scores,
    assert_one_score_a_pair,
    assert_other_files_are_refused,
    assert_same_on_a_gpu,
    attend,
    layer_norm,
    linear,
    open_clip_state,
    save_byte_tokenizer,
    smooth_images,
)

PUBLISHED = hpsv2.CONFIG
PROMPTS = [
    "a red circle",
    # Escaped twice (ftfy leaves entities alone beside a "<"), a broken character, white space, capitals.
    "  <Two> &amp;amp; three\n\tcafÃ© SIGNS, don't!  ",
    "an image with more words than the context of this model has room for " * 3,
]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return open_clip_state()


@pytest.fixture(scope="module")
def scorer(tmp_path_factory, state):
    """`scorer(...)`: of the checkpoint as published."""
    path = tmp_path_factory.mktemp("hpsv2")
    torch.save({"epoch": 1, "name": "tiny", "state_dict": state}, path / "hps.pt")
    files = {"checkpoint": str(path / "hps.pt"), "tokenizer": save_byte_tokenizer(path / "tokenizer")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hpsv2, "CONFIG", OPEN_CLIP)
        yield lambda **options: Hpsv2(**files | options)
    load_hps_clip.cache_clear()


# ---- the official steps ----------------------------------------------------------------------------------------------


def cubic_weights(length: int, size: int) -> torch.Tensor:
    """`[size, length]`: bicubic resampling with antialiasing, kernel a = -0.5 widened by the scale, as PIL's."""
    scale = length / size
    stretch = max(scale, 1.0)
    weights = torch.zeros(size, length, dtype=torch.float64)
    for row in range(size):
        for column in range(length):
            x = abs((column + 0.5 - (row + 0.5) * scale) / stretch)
            if x < 1:
                weights[row, column] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                weights[row, column] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return weights / weights.sum(dim=1, keepdim=True)


def official_pixels(image: Image.Image) -> torch.Tensor:
    """To tensor, longest side to SIDE, zeros around, then mean and deviation."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    height, width = pixels.shape[1:]
    scale = SIDE / max(height, width)
    high, wide = round(height * scale), round(width * scale)
    resized = cubic_weights(height, high) @ pixels @ cubic_weights(width, wide).T
    padded = torch.zeros(3, SIDE, SIDE, dtype=torch.float64)
    top, left = (SIDE - high) // 2, (SIDE - wide) // 2
    padded[:, top : top + high, left : left + wide] = resized
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (MEAN, STD))
    return (padded - mean) / std


def official_tokens(prompt: str) -> torch.Tensor:
    """open_clip's `tokenize`, for a vocabulary without merges: `[CONTEXT]`, zeros after EOT."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    text = re.sub(r"\s+", " ", text).strip().lower()
    words = re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+", text)
    ids = [VOCABULARY.index("<|startoftext|>")]
    for word in words:
        ((characters, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)
        ids += [VOCABULARY.index(character) for character in characters[:-1]]
        ids.append(VOCABULARY.index(characters[-1] + "</w>"))
    ids = [*ids, VOCABULARY.index("<|endoftext|>")]
    if len(ids) > CONTEXT:
        ids = [*ids[: CONTEXT - 1], VOCABULARY.index("<|endoftext|>")]
    return torch.tensor(ids + [0] * (CONTEXT - len(ids)))


def transformer(w: dict, prefix: str, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Pre-norm residual blocks on `[tokens, width]`, with exact GELU."""
    for layer in range(LAYERS):
        p = f"{prefix}{layer}."
        qkv = F.linear(layer_norm(w, p + "ln_1", x, 1e-5), w[p + "attn.in_proj_weight"], w[p + "attn.in_proj_bias"])
        x = x + linear(w, p + "attn.out_proj", attend(*qkv.chunk(3, dim=-1), HEADS, mask))
        x = x + linear(w, p + "mlp.c_proj", F.gelu(linear(w, p + "mlp.c_fc", layer_norm(w, p + "ln_2", x, 1e-5))))
    return x


def official_picture(w: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """`encode_image` of open_clip's CLIP for one image."""
    patches = F.conv2d(pixels[None], w["visual.conv1.weight"], stride=PATCH)[0].flatten(1).T
    x = torch.cat([w["visual.class_embedding"][None], patches]) + w["visual.positional_embedding"]
    x = transformer(w, "visual.transformer.resblocks.", layer_norm(w, "visual.ln_pre", x, 1e-5))
    return layer_norm(w, "visual.ln_post", x[0], 1e-5) @ w["visual.proj"]


def official_text(w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """`encode_text` of open_clip's CLIP for one prompt."""
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    x = transformer(w, "transformer.resblocks.", x, torch.ones(CONTEXT, CONTEXT).tril())
    return layer_norm(w, "ln_final", x, 1e-5)[tokens.argmax()] @ w["text_projection"]


def official_score(w: dict[str, torch.Tensor], image: Image.Image, prompt: str) -> float:
    """One image and one prompt; `w` is in float64."""
    picture, text = official_picture(w, official_pixels(image)), official_text(w, official_tokens(prompt))
    return float(picture @ text / (picture.norm() * text.norm()))


# ---- the scorer ------------------------------------------------------------------------------------------------------


def test_score_is_the_official_cosine(scorer, state):
    sizes = [(64, 64), (75, 48), (41, 64), (20, 11), (SIDE, SIDE), (SIDE, 19)]
    official = partial(official_score, {name: value.double() for name, value in state.items()})
    assert_official_scores(scorer, "hpsv2", official, sizes, PROMPTS, told_apart=0.01)


class OpenClipModel(torch.nn.Module):
    """Stands in for the model that open_clip makes."""

    def load_state_dict(self, state):
        assert state.keys() == open_clip_state().keys()
        self.w, self.visual = state, SimpleNamespace(conv1=SimpleNamespace(weight=state["visual.conv1.weight"]))

    def encode_image(self, pixels):
        return torch.stack([official_picture(self.w, each) for each in pixels])

    def encode_text(self, tokens):
        return torch.stack([official_text(self.w, each) for each in tokens])


def test_open_clip_is_given_what_it_takes_and_says_what_the_default_says(scorer, monkeypatch):
    with pytest.raises(RewardError, match=r"open_clip.*environment\.sh make open_clip"):
        monkeypatch.setitem(sys.modules, "open_clip", None)
        scorer(engine="open_clip")
    made = []
    fake = SimpleNamespace(
        create_model=lambda name, pretrained: made.append((name, pretrained)) or OpenClipModel(),
        get_tokenizer=lambda name: lambda prompts: torch.stack([official_tokens(prompt) for prompt in prompts]),
    )
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    images = smooth_images(75, 48)
    theirs, ours = (scorer(engine=engine).score(images, PROMPTS, [{}] * 3) for engine in ("open_clip", "transformers"))
    np.testing.assert_allclose(theirs["hpsv2"], ours["hpsv2"], atol=1e-5)
    assert made == [("ViT-H-14", None)] and theirs["hpsv2"].dtype == np.float64


def test_one_score_a_pair_whatever_batch_form_and_precision(scorer):
    assert_one_score_a_pair(scorer, "hpsv2", PROMPTS, half_within=0.02)
    assert (first := scorer().clip) is scorer().clip, "weights are loaded once, and frozen"
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_a_cpu(scorer):
    assert_same_on_a_gpu(scorer, "hpsv2", PROMPTS, atol=1e-4)


def test_the_configuration_has_the_published_sizes():
    """ViT-H-14 of open_clip's `model_configs`, whose heads are 80 and 64 wide."""
    sizes = {
        "visual.conv1.weight": (1280, 3, 14, 14),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.transformer.resblocks.31.mlp.c_fc.bias": (5120,),
        "token_embedding.weight": (49408, 1024),
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "transformer.resblocks.23.mlp.c_fc.bias": (4096,),
    }
    config = PUBLISHED
    with torch.device("meta"):
        model = CLIPModel(config).state_dict()
        official = to_transformers({name: torch.empty(shape) for name, shape in sizes.items()})
    assert {name: model[name].shape for name in official} == {name: value.shape for name, value in official.items()}
    assert len([name for name in model if name.endswith("layer_norm1.bias")]) == 32 + 24
    vision, text = config.vision_config, config.text_config
    assert (vision.num_attention_heads, text.num_attention_heads, text.eos_token_id) == (1280 // 80, 1024 // 64, 49407)


# ---- what is wrong with the files ------------------------------------------------------------------------------------


def test_other_files_are_refused(scorer, state, tmp_path):
    assert_other_files_are_refused(
        scorer, "hpsv2", tmp_path, lambda state: {"state_dict": state}, state,
        removed={
            "visual.transformer.resblocks.1.attn.in_proj_bias": r"layers\.1\.self_attn\.q_proj\.bias",
            "visual.proj": r"visual_projection|'visual\.proj'",
        },
        added={
            "ln_final.bias": "size mismatch",
            "score_predictor.weight": r"Unexpected.*score_predictor\.weight",
            "transformer.resblocks.0.ln_3.bias": r"Unexpected.*layers\.0\.ln_3\.bias",
        },
    )  # fmt: skip
    torch.save(state, tmp_path / "bare.pt")
    with pytest.raises(RewardError, match="state_dict"):
        scorer(checkpoint=str(tmp_path / "bare.pt"))


def test_a_tokenizer_of_another_vocabulary_and_a_missing_package_are_refused(scorer, tmp_path, monkeypatch):
    with pytest.raises(RewardError, match="ends a text with token 0"):
        scorer(tokenizer=save_byte_tokenizer(tmp_path, VOCABULARY[::-1]))
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match="ftfy"):
        scorer()
