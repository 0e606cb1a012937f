"""The reading reward: its formula, what prompts ask for, and the real engine on rendered text."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from diffusionopd.rewards import RewardError, build_scorer
from diffusionopd.rewards.ocr import normalised, ocr_reward, wanted_text

pytest.importorskip("rapidocr")


def rendered(text: str) -> Image.Image:
    image = Image.new("RGB", (384, 128), "white")
    ImageDraw.Draw(image).text((24, 36), text, fill="black", font=ImageFont.load_default(44))
    return image


@pytest.mark.parametrize(
    ("read", "wanted", "reward"),
    [
        ("hello", "hello", 1.0),
        ("sayhelloagain", "hello", 1.0),
        ("hallo", "hello", 0.8),
        ("hell", "hello", 0.8),
        ("", "hello", 0.0),
        ("somethingverylong", "hello", 0.0),
    ],
)
def test_reward_is_one_minus_the_clipped_edit_distance(read, wanted, reward):
    assert ocr_reward(read, wanted) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ('a shop called "Open Late"', "openlate"),
        ("a shop called “Open Late”", "openlate"),
        ("a shop called 'Open Late', at night", "openlate"),
        ("the baker's shop called ‘Joe’s Bread’", "joe’sbread"),
        ("the baker's sign 'NO 7'", "no7"),
        ('first "A1" then "B2"', "a1"),
        ("don't mind: \"it's fine\"", "it'sfine"),
    ],
)
def test_the_quoted_text_is_wanted(prompt, wanted):
    assert wanted_text(prompt) == wanted


@pytest.mark.parametrize(("prompt", "problem"), [("a red sign", "no text in quotes"), ('a sign ""', "empty"),
                                                ('a sign "  "', "empty"), ("the baker's sign", "no text")])  # fmt: skip
def test_a_prompt_that_wants_no_text_is_named(prompt, problem):
    with pytest.raises(RewardError, match=problem) as error:
        wanted_text(prompt)
    assert prompt in str(error.value)


def test_spaces_and_case_do_not_count():
    assert normalised(" Step\tGoal\n42 ") == "stepgoal42"


def test_the_engine_reads_rendered_text():
    scorer = build_scorer("ocr")
    images = [rendered("HELLO 2024"), rendered("HELLO 2034"), rendered("")]
    scores = scorer.score(images, ['a sign "Hello 2024"'] * 3, [{}] * 3)["ocr"]
    np.testing.assert_allclose(scores, [1.0, 8 / 9, 0.0])
