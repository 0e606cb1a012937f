"""HPSv3 against transformers' Qwen2-VL and image processor, put together as the official code does, on tiny weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from diffusionopd.rewards import RewardError, check_prompts, hpsv3
from diffusionopd.rewards.hpsv3 import Hpsv3, load_hpsv3

from .helpers_rewards import assert_every_form_scores_the_same, assert_same_on_a_gpu, smooth_images

PIXELS = 4 * 28 * 28  # of the tiny model: four blocks of patches
PUBLISHED = hpsv3.VISION, hpsv3.TEXT
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
PROMPTS = ["a red fox", "two cats {on} a mat, 1999", "an ocean " * 9]
INSTRUCTION = "\nRate it.\nTextual prompt - {text_prompt}\n\n\n\nThe rating: <|Reward|>\n\nEND\n"
DEPTH, WIDTH, HEADS = 2, 64, 4


def tiny_config(tokens: int, image_token: int) -> Qwen2VLConfig:
    text = {
        "vocab_size": tokens, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": DEPTH, "embed_dim": 32, "num_heads": 2, "hidden_size": WIDTH}
    return Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=image_token)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Model, head and tokenizer as the official code has them, of random weights."""
    torch.manual_seed(0)
    letters = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]
    tokenizer = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    path = tmp_path_factory.mktemp("hpsv3")
    tokenizer.save_pretrained(path / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS, "<|Reward|>"]})
    config = tiny_config(len(tokenizer), tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    model = Qwen2VLForConditionalGeneration(config).eval()
    parts = [nn.Linear(WIDTH, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)]
    head = nn.Sequential(*parts).eval()
    with torch.no_grad():
        for parameter in [*model.parameters(), *head.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = model.state_dict() | {f"rm_head.{name}": value for name, value in head.state_dict().items()}
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path / "new.safetensors")
    old = {name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
           for name, value in state.items()}  # fmt: skip
    save_file({name: value.contiguous().clone() for name, value in old.items()}, path / "old.safetensors")
    (path / "instruction.txt").write_text(INSTRUCTION)
    return model, head, tokenizer, path


@pytest.fixture(scope="module")
def scorer(official):
    """`scorer(...)`: of the checkpoint as published, in float32."""
    *_, path = official
    config = official[0].config
    files = {"checkpoint": str(path / "new.safetensors"), "tokenizer": str(path / "tokenizer")}
    files |= {"instruction": str(path / "instruction.txt"), "dtype": "float32"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hpsv3, "VISION", config.vision_config)
        patch.setattr(hpsv3, "TEXT", config.text_config)
        patch.setattr(hpsv3.fitting_size, "__defaults__", (PIXELS,))
        yield lambda **options: Hpsv3(**files | options)
    load_hpsv3.cache_clear()


@torch.no_grad()
def official_outputs(official, image: Image.Image, prompt: str) -> torch.Tensor:
    """The official `reward` for one image: mean, and logarithm of the deviation."""
    model, head, tokenizer, _ = official
    processor = Qwen2VLImageProcessorPil(min_pixels=PIXELS, max_pixels=PIXELS)
    image = processor(images=[image], return_tensors="pt")
    blocks = int(image["image_grid_thw"].prod()) // 4
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * blocks
        + "<|vision_end|>"
        + INSTRUCTION.replace("{text_prompt}", prompt)
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    embedded = model.get_input_embeddings()(ids)
    seen = model.model.visual(image["pixel_values"], grid_thw=image["image_grid_thw"]).pooler_output
    embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None].expand_as(embedded), seen)
    states = model.model.language_model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).last_hidden_state
    return head(states)[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")][0]


@pytest.mark.parametrize("size", [(56, 56), (64, 64), (57, 40), (512, 512), (30, 90)])
def test_score_is_the_official_one(scorer, official, size):
    """Mean and deviation, of images of any size side by side, in both layouts of the checkpoint."""
    images = smooth_images(*size)
    wanted = torch.stack([official_outputs(official, *pair) for pair in zip(images, PROMPTS, strict=True)]).double()
    assert np.ptp(wanted[:, 0].numpy()) > 0.01
    for checkpoint in ("new", "old"):
        path = str(official[3] / f"{checkpoint}.safetensors")
        scores = scorer(checkpoint=path, batch_size=2).score(images, PROMPTS, [{}] * 3)
        np.testing.assert_allclose(scores["hpsv3"], wanted[:, 0], atol=1e-4)
        np.testing.assert_allclose(scores["hpsv3_sigma"], wanted[:, 1].exp(), rtol=1e-4)
        assert list(scores) == ["hpsv3", "hpsv3_sigma"] and scores["hpsv3"].dtype == np.float64


def test_every_form_of_images_scores_the_same_and_half_precision_nearly(scorer):
    images = smooth_images(75, 48)
    assert_every_form_scores_the_same(scorer(), "hpsv3", images, PROMPTS)
    full, half = (scorer(dtype=dtype).score(images, PROMPTS, [{}] * 3)["hpsv3"] for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(full - half).max() < 0.3
    assert scorer().score([], [], [])["hpsv3"].shape == (0,)
    model = scorer(dtype="bfloat16").model
    assert model.head[0].weight.dtype == torch.float32 and model.language.rotary_emb.inv_freq.dtype == torch.bfloat16


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_a_cpu(scorer):
    assert_same_on_a_gpu(scorer, "hpsv3", PROMPTS, atol=1e-3)


def test_images_become_as_many_patches_as_officially():
    sizes = {(512, 512): (448, 448), (1024, 1024): (448, 448), (448, 448): (448, 448), (300, 200): (560, 392)}
    assert {size: hpsv3.fitting_size(*size, 28, 256 * 784) for size in sizes} == sizes


def test_the_configuration_has_the_published_sizes():
    vision, text = PUBLISHED
    assert (vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size) == (32, 1280, 16, 3584)
    assert (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, vision.mlp_ratio) == (14, 2, 2, 4)
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (3584, 18944, 28)
    assert (text.num_attention_heads, text.num_key_value_heads, text.rms_norm_eps) == (28, 4, 1e-6)
    assert text.rope_parameters["rope_theta"] == 1e6 and text.rope_parameters["mrope_section"] == [16, 24, 24]


def test_other_files_are_refused(scorer, official, tmp_path):
    state = load_file(official[3] / "new.safetensors")
    others = [({k: v for k, v in state.items() if k != "rm_head.3.bias"}, r"head\.3\.bias")]
    others += [(state | {"rm_head.6.weight": torch.zeros(2)}, r"head\.6\.weight")]
    for content, fact in others:
        save_file(content, tmp_path / "other.safetensors")
        with pytest.raises(RewardError, match=rf"(?s)not the checkpoint of reward 'hpsv3'.*{fact}"):
            scorer(checkpoint=str(tmp_path / "other.safetensors"))
    small = {name: value[:-1] if "embed_tokens" in name else value for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in small.items()}, tmp_path / "small.safetensors")
    with pytest.raises(RewardError, match=r"tokens with <\|Reward\|>"):
        scorer(checkpoint=str(tmp_path / "small.safetensors"))
    with pytest.raises(RewardError, match=r"none\.safetensors.*tools\.download rewards hpsv3"):
        scorer(checkpoint=str(tmp_path / "none.safetensors"))
    for content in (None, b"Rate {text_prompt}", b"caf\xe9 {text_prompt} <|Reward|>"):
        if content:
            (tmp_path / "other.txt").write_bytes(content)
        with pytest.raises(RewardError, match=r"other\.txt.*tools\.download rewards hpsv3"):
            scorer(instruction=str(tmp_path / "other.txt"))


def test_a_prompt_with_a_token_of_the_model_is_named():
    assert list(check_prompts(["hpsv3"], ["a <|Reward|>", "a < | b", "<|image_pad|>"], [{}] * 3)) == [0, 2]
