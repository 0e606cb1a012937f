"""The tiny scorers on images whose content is known."""

import random

import numpy as np
import pytest
import torch

from diffusionopd.rewards import UnfitPromptError, build_scorer
from diffusionopd.tiny.grammar import TASKS, captions, counting, draw, pair, position, sign, single
from diffusionopd.tiny.render import render
from diffusionopd.tiny.scorers import TinyCompose, TinyScene

RED_CIRCLE, BLUE_SQUARE, GREEN_TRIANGLE = ("red", "circle"), ("blue", "square"), ("green", "triangle")


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr")
    return build_scorer("tiny_ocr")


def compose_score(shown, asked, change=lambda image: None):
    image = render("compose", shown, random.Random(0)).copy()
    change(image)
    return TinyCompose().score(image[None], [asked.text], [asked.metadata])


def test_clean_images_score_one_on_every_held_out_compose_prompt():
    rng = random.Random(1)
    prompts = captions("compose", "test")
    images = np.stack([render("compose", caption, rng) for caption in prompts])
    scores = TinyCompose().score(images, [c.text for c in prompts], [c.metadata for c in prompts])
    assert scores["tiny_compose"].min() == scores["tiny_compose_soft"].min() == 1


WRONG = {
    "wrong colour": (single(("blue", "circle")), single(RED_CIRCLE)),
    "wrong shape": (single(("red", "square")), single(RED_CIRCLE)),
    "one too many": (counting(RED_CIRCLE, 3), counting(RED_CIRCLE, 2)),
    "one too few": (counting(RED_CIRCLE, 3), counting(RED_CIRCLE, 4)),
    "extra object": (pair(RED_CIRCLE, BLUE_SQUARE), single(RED_CIRCLE)),
    "missing object": (single(RED_CIRCLE), pair(RED_CIRCLE, BLUE_SQUARE)),
    "swapped colours": (pair(("blue", "circle"), ("red", "square")), pair(RED_CIRCLE, BLUE_SQUARE)),
    **{
        name: (position(RED_CIRCLE, shown, BLUE_SQUARE), position(RED_CIRCLE, asked, BLUE_SQUARE))
        for name, shown, asked in (
            ("wrong side", "left of", "right of"),
            ("wrong axis", "above", "left of"),
            ("upside down", "above", "below"),
        )
    },
}


def test_a_wrong_image_scores_zero_and_less_than_one_softly():
    for name, (shown, asked) in WRONG.items():
        found = compose_score(shown, asked)
        assert found["tiny_compose"] == 0 and 0 <= found["tiny_compose_soft"] < 1, name

    def with_violet(image):
        image[2:14, 2:14] = (200, 60, 220)

    found = compose_score(single(RED_CIRCLE), single(RED_CIRCLE), with_violet)
    assert found["tiny_compose"] == 0, "an object of no known colour is one too many"


def test_relations_that_say_the_same_are_both_right():
    shown = position(RED_CIRCLE, "left of", GREEN_TRIANGLE)
    for asked in (position(GREEN_TRIANGLE, "right of", RED_CIRCLE), pair(GREEN_TRIANGLE, RED_CIRCLE)):
        assert compose_score(shown, asked)["tiny_compose"] == 1


def test_prompts_that_cannot_be_scored_are_named_beforehand_and_when_scored(ocr):
    good = pair(RED_CIRCLE, BLUE_SQUARE).metadata
    circle = good["include"][0]
    wrong = [
        {},
        {"include": []},
        {"include": None},
        {"include": "circle"},
        *({"include": [{**circle, **change}]} for change in (
            {"count": "1"}, {"count": 0}, {"color": "mauve"}, {"class": "dog"}, {"class": ["circle"]},
            {"position": "above"}, {"position": ["near", 0]}, {"position": ["above", 1]},
        )),
        {"include": [{"class": "circle"}]},
    ]  # fmt: skip
    metadata = [good, *wrong]
    found = TinyCompose.check([f"p{i}" for i in range(len(metadata))], metadata)
    assert list(found) == list(range(1, len(metadata)))
    image = np.zeros((1, 64, 64, 3), np.uint8)
    for one in wrong:
        with pytest.raises(UnfitPromptError, match="'p'.*geneval"):
            TinyCompose().score(image, ["p"], [one])
    signs = ['a sign "347"', "a sign that says 347", 'a sign "?!"']
    assert list(type(ocr).check(signs, [{}] * 3)) == [1, 2]
    for text in signs[1:]:
        with pytest.raises(UnfitPromptError) as error:
            ocr.score(image, [text], [{}])
        assert repr(text) in str(error.value)


def test_clean_signs_are_read_exactly_and_wrong_ones_are_not(ocr):
    rng = random.Random(2)
    signs = [draw("ocr", rng, "test") for _ in range(12)] + [sign("000"), sign("111")]
    images = np.stack([render("ocr", s, rng) for s in signs])
    texts, nothing = [s.text for s in signs], [{}] * len(signs)
    scores = ocr.score(images, texts, nothing)
    assert scores["tiny_ocr"].min() == scores["tiny_ocr_soft"].min() == 1
    one_digit_off = [sign(s.metadata["text"][:2] + str((int(s.metadata["text"][2]) + 1) % 10)).text for s in signs]
    scores = ocr.score(images, one_digit_off, nothing)
    assert scores["tiny_ocr"].max() == 0
    assert np.allclose(scores["tiny_ocr_soft"], 2 / 3)
    blank = np.full((1, 64, 64, 3), 245, np.uint8)
    assert ocr.score(blank, [sign("123").text], [{}]) == {"tiny_ocr": 0, "tiny_ocr_soft": 0}


def test_scene_score_grows_with_colour():
    rng, score = random.Random(3), lambda images: TinyScene().score(images, [""] * 4, [{}] * 4)["tiny_scene"].mean()
    caption = draw("scene", rng)
    levels = [np.stack([render("scene", caption, rng, vividness=v) for _ in range(4)]) for v in (0.0, 0.5, 1.0)]
    means = [score(images) for images in levels]
    assert means[0] < 0.3 < means[1] < 0.75 < means[2] <= 1
    assert score(np.full((4, 64, 64, 3), 128, np.uint8)) == 0


def test_tensors_arrays_and_floats_score_alike(ocr):
    rng = random.Random(4)
    for task in TASKS:
        scorer = ocr if task == "ocr" else build_scorer(f"tiny_{task}")
        caption = draw(task, rng)
        image = render(task, caption, rng)[None]
        tensor = torch.from_numpy(image.copy()).permute(0, 3, 1, 2)
        results = [scorer.score(x, [caption.text], [caption.metadata]) for x in (image, tensor, tensor / 255)]
        assert results[0] == results[1] == results[2] and f"tiny_{task}" in results[0]
