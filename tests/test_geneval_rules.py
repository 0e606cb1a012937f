"""GenEval's judgement on detections made by hand: every tag, the geometry, the choice of objects, the metadata."""

import json

import numpy as np
import pytest

from diffusionopd.rewards import RewardError
from diffusionopd.rewards.geneval.rules import (
    Detection,
    Verdict,
    judge,
    parse_request,
    relative_position,
    select_objects,
)

# A line of each kind from GenEval's test_metadata.jsonl.
SINGLE, TWO, COUNTING, COLORS, POSITION, COLOR_ATTR = (
    json.loads(line)
    for line in """
    {"tag": "single_object", "include": [{"class": "bowl", "count": 1}], "prompt": "a photo of a bowl"}
    {"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "dog", "count": 1}], "prompt": "p"}
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}]}
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "pink"}], "prompt": "a photo of a pink car"}
    {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "tie", "count": 1, "position": ["left of", 0]}]}
    {"tag": "color_attr", "include": [{"class": "cow", "count": 1, "color": "red"}, {"class": "tv", "count": 1, "color": "blue"}]}
    """.strip().splitlines()  # noqa: E501
)
MASK = np.ones((1, 1), dtype=bool)


class Painted(Detection):
    """A detection that knows its colour."""

    def __init__(self, colour: str = "green", x: float = 0, y: float = 0, size: float = 10, score: float = 0.95):
        super().__init__((x, y, x + size, y + size), score, MASK)
        object.__setattr__(self, "colour", colour)


def verdict(metadata: dict, **objects: list[Painted]) -> Verdict:
    return judge(objects, parse_request("p", metadata), lambda name, found: [item.colour for item in found])


def test_single_object():
    assert verdict(SINGLE, bowl=[Painted()]) == Verdict(True, True, 1.0)
    assert verdict(SINGLE, bowl=[Painted(), Painted()]) == Verdict(True, False, 0.0)
    assert verdict(SINGLE, bowl=[Painted()] * 4) == Verdict(True, False, 0.0)  # soft is never below 0
    assert verdict(SINGLE, cup=[Painted()]) == Verdict(False, False, 0.0)
    assert verdict(SINGLE) == Verdict(False, False, 0.0)


def test_two_objects():
    assert verdict(TWO, bench=[Painted()], dog=[Painted()]) == Verdict(True, True, 1.0)
    assert verdict(TWO, bench=[Painted()]) == Verdict(False, False, 0.5)
    assert verdict(TWO, bench=[Painted()], dog=[Painted()] * 2) == Verdict(True, False, 0.5)


def test_counting_is_right_for_the_very_number():
    for count, soft in ((0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5), (4, 0.0), (6, 0.0)):
        assert verdict(COUNTING, cup=[Painted()] * count) == Verdict(count == 2, count == 2, soft)


def test_strict_honours_excludes_of_another_class():
    metadata = SINGLE | {"exclude": [{"class": "cup", "count": 1}, {"class": "dog", "count": 2}]}
    assert verdict(metadata, bowl=[Painted()], dog=[Painted()]) == Verdict(True, True, 1.0)
    assert verdict(metadata, bowl=[Painted()], cup=[Painted()]) == Verdict(False, False, 1.0)
    assert verdict(metadata, bowl=[Painted()], dog=[Painted()] * 2) == Verdict(False, False, 1.0)


def test_colours():
    pink, red = Painted("pink"), Painted("red")
    assert verdict(COLORS, car=[pink]) == Verdict(True, True, 1.0)
    assert verdict(COLORS, car=[red]) == Verdict(False, False, 0.5)
    assert verdict(COLORS, car=[pink, red]) == Verdict(True, False, 0.0)  # the best one counts
    assert verdict(COLORS, car=[red, pink]) == Verdict(False, False, 0.0)
    three = {"tag": "colors", "include": [{"class": "car", "count": 3, "color": "pink"}]}
    assert verdict(three, car=[pink, pink, red]) == Verdict(False, False, pytest.approx((1 + 2 / 3) / 2))


def test_two_colours():
    red, blue = Painted("red"), Painted("blue")
    assert verdict(COLOR_ATTR, cow=[red], tv=[blue]) == Verdict(True, True, 1.0)
    assert verdict(COLOR_ATTR, cow=[blue], tv=[red]) == Verdict(False, False, 0.5)
    assert verdict(COLOR_ATTR, cow=[red], tv=[red]) == Verdict(False, False, 0.75)
    assert verdict(COLOR_ATTR, cow=[red]) == Verdict(False, False, 0.5)


def test_position():
    dog, left, right = Painted(x=100), Painted(x=0), Painted(x=200)
    assert verdict(POSITION, dog=[dog], tie=[left]) == Verdict(True, True, 1.0)
    assert verdict(POSITION, dog=[dog], tie=[right]) == Verdict(False, False, pytest.approx(2 / 3))
    assert verdict(POSITION, tie=[left]) == Verdict(False, False, pytest.approx(1 / 3))  # nothing to be left of
    assert verdict(POSITION, dog=[dog, right], tie=[left]) == Verdict(True, False, pytest.approx(1 / 3))
    assert verdict(POSITION, dog=[dog], tie=[left, right]) == Verdict(True, False, pytest.approx(1 / 3))


def test_a_position_needs_a_target_that_matched_and_every_object_in_place():
    red_dog = {"class": "dog", "count": 1, "color": "red"}
    ties = {"class": "tie", "count": 2, "position": ["left of", 0]}
    metadata = {"tag": "position", "include": [red_dog, ties]}
    near, far = Painted("red", x=100), Painted("red", x=50)
    assert verdict(metadata, dog=[near], tie=[Painted(x=0), Painted(x=40)]) == Verdict(True, True, 1.0)
    assert verdict(metadata, dog=[far], tie=[Painted(x=0), Painted(x=90)]) == Verdict(False, False, 0.75)
    assert verdict(metadata, dog=[Painted("blue", x=100)], tie=[Painted(x=0), Painted(x=40)]) == Verdict(
        False, False, 0.5
    )


@pytest.mark.parametrize(
    ("x", "y", "relations"),
    [
        (-50, 0, {"left of"}),
        (50, 0, {"right of"}),
        (0, -50, {"above"}),
        (0, 50, {"below"}),
        (-50, -50, {"left of", "above"}),
        (50, 40, {"right of", "below"}),
        (50, 10, {"right of"}),  # the small offset vanishes in the sizes
        (0, 0, set()),
        (2, -2, set()),  # 2 = 0.1 (10 + 10): just as far apart as does not count
        (3, 0, set()),  # (3 - 2) / 3 is below one half
        (4, 0, set()),  # one half itself is not enough
        (-4, 0, set()),
        (0, 4, set()),
        (0, -4, set()),
        (5, 0, {"right of"}),
    ],
)
def test_relations(x, y, relations):
    assert relative_position(Painted(x=x, y=y), Painted()) == relations


def test_relations_depend_on_both_sizes():
    small, large = Painted(x=95, y=95, size=10), Painted(size=100)
    assert relative_position(small, large) == {"right of", "below"}
    assert relative_position(Painted(x=60, y=45, size=10), large) == set()  # (15 - 11) / 15 on one axis
    assert relative_position(large, small) == {"left of", "above"}


def test_objects_are_selected_by_score():
    scores = [0.3, 0.31, 0.95, 0.9, 0.5]
    found = {"dog": [Painted(score=score) for score in scores], "cup": [Painted(score=0.2)]}
    assert [item.score for item in select_objects(found, "position")["dog"]] == [0.95, 0.9, 0.5, 0.31]
    assert [item.score for item in select_objects(found, "counting")["dog"]] == [0.95]
    assert select_objects(found, "position")["cup"] == []
    crowd = {"dog": [Painted(score=0.4 + i / 100) for i in range(30)]}
    chosen = [item.score for item in select_objects(crowd, "colors")["dog"]]
    assert len(chosen) == 16 and chosen == sorted(chosen, reverse=True) and chosen[0] == pytest.approx(0.69)


def test_every_kind_of_line_is_read():
    position = parse_request("p", POSITION)
    assert position.include[1].position == ("left of", 0) and position.exclude == ()
    assert parse_request("p", COLOR_ATTR).include[1].colour == "blue"
    counting = parse_request("p", COUNTING)
    assert (counting.tag, counting.include[0].count, counting.exclude[0].count) == ("counting", 2, 3)


def clause(**changes) -> dict:
    return {"tag": "colors", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1} | changes]}


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        ({}, "'include' is missing or empty"),
        (clause() | {"tag": "counts"}, "'counts' is none of single_object"),
        ({"tag": "colors"}, "'include' is missing or empty"),
        (clause() | {"include": ["dog"]}, "TypeError"),
        (clause() | {"exclude": [{"class": "dog"}]}, "KeyError.*'count'"),
        (clause(count=0), "count 0 is no"),
        (clause(**{"class": "mouse"}), "'mouse' is none of person"),
        (clause(color="grey"), "'grey' is none of red"),
        (clause(position="left of"), "unpack"),
        (clause(position=["near", 0]), "'near' is none of left of"),
        (clause(position=["above", 1]), "1 is none of 0"),
        (clause(position=["above", -1]), "-1 is none of 0"),
    ],
)
def test_metadata_that_cannot_be_judged_is_an_error_with_the_prompt(metadata, what):
    with pytest.raises(RewardError, match=f"the prompt 'a photo of a cat' .*{what}"):
        parse_request("a photo of a cat", metadata)
