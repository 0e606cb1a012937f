"""PickScore, CLIPScore and the aesthetic predictor against their official recipes, on a tiny CLIP of random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from diffusionopd.rewards import RewardError, build_scorer
from diffusionopd.tiny.models import clip_tokenizer
from tests.helpers_rewards import MEAN, SIDE, STD, WIDTH, assert_every_form_scores_the_same, save_clip

PROMPTS = ["a photo of a red circle left of a blue square", "a sign", "a photo of two green triangles"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A CLIP folder in the hub's format."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Images wider than high, so that resizing and cropping both matter."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 80, 3), dtype=np.uint8)
    # Shrunk to the model's side, 3 columns more than a multiple of 4 are cut off: the case in which half pixels matter.
    width = 3 * SIDE + 3 * 3
    return [Image.fromarray(array).resize((width, 3 * SIDE), Image.Resampling.BILINEAR) for array in pixels]


def official_pixels(images: list[Image.Image]) -> torch.Tensor:
    """OpenAI's transform written out: shorter side by bicubic, centre crop (half a pixel to the even side, as
    torchvision does), to tensor, normalise."""
    batch = []
    for image in images:
        scale = SIDE / min(image.size)
        resized = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (round((edge - SIDE) / 2) for edge in resized.size)
        array = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float64) / 255
        batch.append(torch.from_numpy((array - MEAN) / STD).permute(2, 0, 1).float())
    return torch.stack(batch)


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


def test_every_form_of_an_image_scores_the_same(folder, images):
    assert_every_form_scores_the_same(
        build_scorer("clipscore", options={"model": folder}), "clipscore", images, PROMPTS
    )


def test_images_of_one_batch_may_differ_in_size(folder, images):
    scorer = build_scorer("clipscore", options={"model": folder})
    mixed = [images[0], images[1].crop((0, 0, 40, 60))]
    alone = [
        scorer.score([image], [prompt], [{}])["clipscore"][0] for image, prompt in zip(mixed, PROMPTS[:2], strict=True)
    ]
    np.testing.assert_allclose(scorer.score(mixed, PROMPTS[:2], [{}] * 2)["clipscore"], alone, atol=1e-6)


def test_long_prompts_are_cut_to_the_context(folder, images):
    score = build_scorer("clipscore", options={"model": folder}).score(images[:1], ["a red circle " * 40], [{}])
    assert np.isfinite(score["clipscore"]).all()


def official_head() -> torch.nn.Sequential:
    """The predictor as its repository builds it."""
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    return torch.nn.Sequential(
        linear(WIDTH, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1),
        linear(64, 16), linear(16, 1),
    )  # fmt: skip


def test_aesthetic_is_the_official_head_on_the_unit_embedding(folder, images, tmp_path):
    torch.manual_seed(1)
    head, path = official_head().eval(), tmp_path / "head.pth"
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, path)
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).get_image_features(official_pixels(images)).pooler_output
        wanted = head(features / features.norm(dim=-1, keepdim=True)).squeeze(-1).numpy()
    scorer = build_scorer("aesthetic", options={"model": folder, "head": str(path)})
    np.testing.assert_allclose(scorer.score(images, PROMPTS, [{}] * 3)["aesthetic"], wanted, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic"])
def test_scores_on_a_gpu_are_those_on_a_cpu(name, folder, images, tmp_path):
    torch.manual_seed(1)
    torch.save({f"layers.{key}": value for key, value in official_head().state_dict().items()}, tmp_path / "head.pth")
    own = {"pickscore": {"processor": folder}, "aesthetic": {"head": str(tmp_path / "head.pth")}}.get(name, {})
    cpu, gpu = (
        build_scorer(name, device, {"model": folder, **own}).score(images, PROMPTS, [{}] * 3)[name]
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(gpu, cpu, rtol=1e-3)


def test_what_is_missing_is_named_with_the_command(folder, tmp_path):
    with pytest.raises(RewardError, match="hf download nobody/no-such-clip"):
        build_scorer("clipscore", options={"model": "nobody/no-such-clip"})
    with pytest.raises(RewardError, match="python -m tools.download rewards aesthetic"):
        build_scorer("aesthetic", options={"model": folder, "head": str(tmp_path / "none.pth")})
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, other)
    with pytest.raises(RewardError, match="is not the checkpoint of reward 'aesthetic'"):
        build_scorer("aesthetic", options={"model": folder, "head": str(other)})
    Path(other).write_bytes(b"not a checkpoint")
    with pytest.raises(RewardError, match="is not the checkpoint of reward 'aesthetic'"):
        build_scorer("aesthetic", options={"model": folder, "head": str(other)})
    with pytest.raises(RewardError, match="no dtype"):
        build_scorer("clipscore", options={"model": folder, "dtype": "int8"})
