"""GenEval as a reward: colours by a tiny CLIP, the scores of a batch, and the whole way on tiny random models."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionopd.rewards import NOT_APPLICABLE, RewardError, UnfitPromptError, check_prompts
from diffusionopd.rewards.clip import load_clip
from diffusionopd.rewards.geneval.classes import COLOURS, TAGS
from diffusionopd.rewards.geneval.rules import Detection
from diffusionopd.rewards.geneval.scorer import ColourClassifier, GenEval, crop
from tests.geneval_tiny import see_small, tiny_model
from tests.helpers_rewards import save_clip

HEIGHT, WIDTH = 40, 56


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def clip(folder):
    return load_clip(folder, folder, "cpu", "float32")


@pytest.fixture
def detector_folder(tmp_path, monkeypatch):
    """A detector of random weights that sees images at 96 pixels."""
    see_small(monkeypatch)
    tiny_model().save_pretrained(tmp_path / "detector")
    return f"transformers:{tmp_path / 'detector'}"


def picture(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def detection(left: int, top: int, right: int, bottom: int, score: float = 0.95) -> Detection:
    """A disc in its box."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    across, down = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
    return Detection((left, top, right, bottom), score, across**2 + down**2 <= 1)


def official_crop(pixels: np.ndarray, item: Detection) -> Image.Image:
    """GenEval's own way, with Pillow."""
    image = Image.fromarray(pixels)
    blank = Image.new("RGB", image.size, color="#999")
    pasted = Image.composite(image, blank, Image.fromarray((item.mask * 255).astype(np.uint8)))
    return pasted.crop(tuple(int(edge) for edge in item.box))


def test_crops_are_geneval_s():
    item = detection(3, 5, 40, 33)
    ours, wanted = crop(picture(0), item), official_crop(picture(0), item)
    assert ours.shape == (28, 37, 3)
    np.testing.assert_array_equal(ours, np.asarray(wanted))
    assert ours[0, 0].tolist() == [153, 153, 153]


def test_the_colour_is_the_best_of_ten_by_the_mean_of_three_sentences(clip):
    items = [detection(0, 0, 30, 20), detection(20, 4, 56, 40), detection(2, 2, 12, 38)]
    scores = []
    for item in items:
        image = clip.image_embeddings([np.asarray(official_crop(picture(1), item))])[0]
        row = []
        for colour in COLOURS:
            sentences = [f"a photo of a {colour} dog", f"a photo of a {colour}-colored dog"]
            sentences.append(f"a photo of a {colour} object")
            mean = sum(clip.text_embeddings([sentence])[0] for sentence in sentences) / 3
            row.append((image @ mean / mean.norm()).item())
        scores.append(row)
    classifier = ColourClassifier(clip)
    weights = classifier.class_weights("dog")
    assert weights.shape == (10, 24) and torch.allclose(weights.norm(dim=-1), torch.ones(10))
    got = classifier(picture(1), "dog", items)
    assert got == [COLOURS[int(np.argmax(row))] for row in scores]
    assert classifier.class_weights("dog") is weights and not torch.equal(classifier.class_weights("cat"), weights)


class HandMade:
    """A detector that finds what it is told, and notes how many images it was given at once."""

    def __init__(self, images: list[dict[str, list[Detection]]]):
        self.images, self.batches = list(images), []

    def __call__(self, pixels):
        self.batches.append(len(pixels))
        return [self.images.pop(0) for _ in pixels]


def line(tag: str, *include: dict, **more) -> dict:
    return {"tag": tag, "include": list(include), **more}


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
BATCH = [
    (line("single_object", DOG), {"dog": [detection(0, 0, 20, 20)]}),
    (line("single_object", DOG), {"dog": [detection(0, 0, 20, 20, 0.2)]}),
    (line("two_object", DOG, CAT), {"dog": [detection(0, 0, 20, 20)], "cat": [detection(5, 5, 9, 9)] * 2}),
    (line("position", DOG, CAT | {"position": ["right of", 0]}),
     {"dog": [detection(0, 0, 20, 20)], "cat": [detection(36, 0, 56, 20)]}),
    (line("counting", DOG | {"count": 2}, exclude=[DOG | {"count": 3}]),
     {"dog": [detection(0, 0, 20, 20, score) for score in (0.95, 0.5)]}),
]  # fmt: skip


@pytest.fixture
def scorer(folder, detector_folder):
    with pytest.warns(UserWarning, match="not comparable"):
        return GenEval(detector=detector_folder, clip=folder, batch_size=2)


def test_scores_of_a_batch(scorer):
    scorer.detect = HandMade([objects for _, objects in BATCH])
    images = torch.zeros(len(BATCH), 3, HEIGHT, WIDTH)
    scores = scorer.score(images, ["p"] * len(BATCH), [metadata for metadata, _ in BATCH])
    no = NOT_APPLICABLE
    assert scorer.detect.batches == [2, 2, 1]
    assert scores["geneval"].tolist() == [1, 0, 0.5, 1, 0.5]
    assert scores["accuracy"].tolist() == [1, 0, 1, 1, 0]
    assert scores["strict_accuracy"].tolist() == [1, 0, 0, 1, 0]
    assert scores["single_object_accuracy"].tolist() == [1, 0, no, no, no]
    assert scores["two_object_accuracy"].tolist() == [no, no, 1, no, no]
    assert scores["two_object_strict_accuracy"].tolist() == [no, no, 0, no, no]
    assert scores["position_strict_accuracy"].tolist() == [no, no, no, 1, no]
    assert scores["colors_accuracy"].tolist() == [no] * 5
    assert all(values.dtype == np.float64 and values.shape == (5,) for values in scores.values())


def test_colours_are_those_of_the_picture_itself(scorer):
    pixels = np.zeros((2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[1] = 255
    asked = [DOG | {"color": "black"}, DOG | {"color": "white"}]
    scorer.colours = lambda image, name, items: ["white" if image.mean() > 127 else "black"] * len(items)
    for order, wanted in (([0, 1], [1, 1]), ([1, 0], [0, 0]), ([0, 0], [1, 0])):
        scorer.detect = HandMade([{"dog": [detection(4, 4, 40, 36)]}] * 2)
        scores = scorer.score(pixels[order], ["p"] * 2, [line("colors", clause) for clause in asked])
        assert scores["colors_accuracy"].tolist() == wanted


def test_the_overall_score_is_made_of_the_six_tags(scorer):
    assert GenEval.combined == {"geneval_overall": tuple(f"{tag}_accuracy" for tag in TAGS)}
    scores = scorer.score([], [], [])  # no images are no mistake
    assert scores.keys() >= set(GenEval.combined["geneval_overall"]) and len(scores) == 15
    assert all(values.shape == (0,) and values.dtype == np.float64 for values in scores.values())


def test_from_pixels_to_scores(scorer):
    """The objects that the detector finds make their own prompt right, and another one wrong."""
    pixels = np.stack([picture(5), picture(6)])
    found = scorer.detect(pixels)
    metadata, absent = [], {"class": "zebra", "count": 1}
    for objects in found:
        assert objects and "zebra" not in objects
        name = max(objects, key=lambda name: max(item.score for item in objects[name]))
        metadata.append(line("single_object", {"class": name, "count": min(len(objects[name]), 16)}))
    scores = scorer.score(pixels, ["p", "p"], metadata)
    assert scores["strict_accuracy"].tolist() == [1, 1] and scores["geneval"].tolist() == [1, 1]
    wrong = scorer.score(pixels, ["p", "p"], [line("single_object", absent)] * 2)
    assert wrong["accuracy"].tolist() == [0, 0]


def test_mistakes_are_named(scorer, folder, tmp_path):
    prompts, metadata = ["a photo of a dog", "a sign"], [BATCH[0][0], {}]
    with pytest.raises(UnfitPromptError, match="'a sign'"):
        scorer.score(np.stack([picture(0)] * 2), prompts, metadata)
    assert list(check_prompts(["geneval"], prompts, metadata)) == [1]
    with pytest.raises(RewardError, match="tools.download rewards geneval"):
        GenEval(clip=folder, checkpoint=str(tmp_path / "none.pth"))
