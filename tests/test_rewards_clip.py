"""PickScore, CLIPScore and the aesthetic predictor against their official recipes, on a tiny CLIP of random weights."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from diffusionopd.rewards import RewardError, build_scorer
from diffusionopd.tiny.models import clip_tokenizer
from tests.helpers_rewards import (
    SIDE,
    WIDTH,
    assert_every_form_scores_the_same,
    cropped_pixels,
    incomplete,
    save_clip,
    smooth_images,
)

PROMPTS = ["a photo of a red circle left of a blue square", "a sign", "a photo of two green triangles"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A CLIP folder in the hub's format."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Of which 3 columns are cut off, at the model's side: the case in which half pixels matter."""
    return smooth_images(3 * SIDE + 9, 3 * SIDE)


def official_pixels(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([cropped_pixels(image).float() for image in images])


def official_logits(folder: str, images: list[Image.Image]) -> np.ndarray:
    """Diagonal of `logits_per_image`, one image and prompt at a time."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), clip_tokenizer("<|endoftext|>")
    logits = []
    for pixels, prompt in zip(official_pixels(images), PROMPTS, strict=True):
        with torch.no_grad():
            tokens = tokenizer([prompt], return_tensors="pt")
            logits.append(model(pixel_values=pixels[None], **tokens).logits_per_image.item())
    return np.array(logits)


def test_pickscore_and_clipscore_are_the_official_logits(folder, images):
    wanted = official_logits(folder, images)
    assert np.ptp(wanted) > 0.05  # the images are told apart
    pick = build_scorer("pickscore", options={"model": folder, "processor": folder})
    clip = build_scorer("clipscore", options={"model": folder})
    np.testing.assert_allclose(pick.score(images, PROMPTS, [{}] * 3)["pickscore"], wanted, atol=1e-4)
    np.testing.assert_allclose(clip.score(images, PROMPTS, [{}] * 3)["clipscore"], wanted / 100, atol=1e-6)


def test_neither_the_form_nor_the_batch_of_images_matters_and_long_prompts_are_cut(folder, images):
    scorer = build_scorer("clipscore", options={"model": folder})
    assert_every_form_scores_the_same(scorer, "clipscore", images, PROMPTS)
    mixed = [images[0], images[1].crop((0, 0, 40, 60))]
    alone = [
        scorer.score([image], [prompt], [{}])["clipscore"][0] for image, prompt in zip(mixed, PROMPTS, strict=False)
    ]
    np.testing.assert_allclose(scorer.score(mixed, PROMPTS[:2], [{}] * 2)["clipscore"], alone, atol=1e-6)
    assert np.isfinite(scorer.score(images[:1], ["a red circle " * 40], [{}])["clipscore"]).all()


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> tuple[torch.nn.Sequential, str]:
    """The aesthetic predictor as its repository builds it, and its file."""
    torch.manual_seed(1)
    linear, dropout, path = torch.nn.Linear, torch.nn.Dropout, tmp_path_factory.mktemp("head") / "head.pth"
    head = torch.nn.Sequential(
        linear(WIDTH, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1),
        linear(64, 16), linear(16, 1),
    ).eval()  # fmt: skip
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, path)
    return head, str(path)


def test_aesthetic_is_the_official_head_on_the_unit_embedding(folder, images, head):
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).get_image_features(official_pixels(images)).pooler_output
        wanted = head[0](features / features.norm(dim=-1, keepdim=True)).squeeze(-1).numpy()
    scorer = build_scorer("aesthetic", options={"model": folder, "head": head[1]})
    np.testing.assert_allclose(scorer.score(images, PROMPTS, [{}] * 3)["aesthetic"], wanted, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic"])
def test_scores_on_a_gpu_are_those_on_a_cpu(name, folder, images, head):
    own = {"pickscore": {"processor": folder}, "aesthetic": {"head": head[1]}}.get(name, {})
    cpu, gpu = (
        build_scorer(name, device, {"model": folder, **own}).score(images, PROMPTS, [{}] * 3)[name]
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(gpu, cpu, rtol=1e-3)


def test_what_is_missing_or_another_is_named_with_the_command(folder, tmp_path, monkeypatch):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_bytes(b"not a checkpoint")
    for name, options, fact in (
        ("clipscore", {"model": "nobody/no-such-clip"}, "hf download nobody/no-such-clip"),
        ("clipscore", {"dtype": "int8"}, "dtype='int8'"),
        ("clipscore", {"model": incomplete(folder, tmp_path / "clip")}, "clip' .*weight"),
        ("aesthetic", {"head": str(tmp_path / "none.pth")}, "python -m tools.download rewards aesthetic"),
        ("aesthetic", {"head": str(tmp_path / "other.pth")}, "is not the checkpoint of reward 'aesthetic'"),
        ("aesthetic", {"head": str(tmp_path / "text.pth")}, "is not the checkpoint of reward 'aesthetic'"),
    ):
        with pytest.raises(RewardError, match=fact):
            build_scorer(name, options={"model": folder} | options)
    for error in (PermissionError(13, "denied"), MemoryError()):  # of the machine, not of the file
        monkeypatch.setattr("torch.load", Mock(side_effect=error))
        with pytest.raises(RewardError, match="other.pth") as caught:
            build_scorer("aesthetic", options={"model": folder, "head": str(tmp_path / "other.pth")})
        assert type(error).__name__ in str(caught.value) and "tools.download" not in str(caught.value)
