"""GenEval's judgement on detections made by hand: every tag, the geometry, the choice of objects, the metadata."""

import json
import re

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
EXCLUDING = SINGLE | {"exclude": [{"class": "cup", "count": 1}, {"class": "dog", "count": 2}]}
MASK = np.ones((1, 1), dtype=bool)


class Painted(Detection):
    """A detection that knows its colour."""

    def __init__(self, colour: str = "green", x: float = 0, y: float = 0, size: float = 10, score: float = 0.95):
        super().__init__((x, y, x + size, y + size), score, MASK)
        object.__setattr__(self, "colour", colour)


def verdict(metadata: dict, **objects: list[Painted]) -> Verdict:
    return judge(objects, parse_request("p", metadata), lambda name, found: [item.colour for item in found])


WRONG = (False, False)


@pytest.mark.parametrize(
    ("metadata", "objects", "expected"),
    [
        (SINGLE, {"bowl": 1}, (True, True, 1.0)),
        (SINGLE, {"bowl": 2}, (True, False, 0.0)),
        (SINGLE, {"bowl": 4}, (True, False, 0.0)),  # soft is never below 0
        (SINGLE, {"cup": 1}, (*WRONG, 0.0)),
        (TWO, {"bench": 1, "dog": 1}, (True, True, 1.0)),
        (TWO, {"bench": 1}, (*WRONG, 0.5)),
        (TWO, {"bench": 1, "dog": 2}, (True, False, 0.5)),
        *((COUNTING, {"cup": n}, (n == 2, n == 2, s)) for n, s in enumerate((0.0, 0.5, 1.0, 0.5, 0.0, 0.0, 0.0))),
        (EXCLUDING, {"bowl": 1, "dog": 1}, (True, True, 1.0)),  # strict honours excludes of another class
        (EXCLUDING, {"bowl": 1, "cup": 1}, (*WRONG, 1.0)),
        (EXCLUDING, {"bowl": 1, "dog": 2}, (*WRONG, 1.0)),
    ],
)
def test_numbers_of_objects(metadata, objects, expected):
    assert verdict(metadata, **{name: [Painted()] * count for name, count in objects.items()}) == Verdict(*expected)


def test_colours():
    pink, red, blue = Painted("pink"), Painted("red"), Painted("blue")
    three = {"tag": "colors", "include": [{"class": "car", "count": 3, "color": "pink"}]}
    for metadata, objects, expected in (
        (COLORS, {"car": [pink]}, (True, True, 1.0)),
        (COLORS, {"car": [red]}, (*WRONG, 0.5)),
        (COLORS, {"car": [pink, red]}, (True, False, 0.0)),  # the best one counts
        (COLORS, {"car": [red, pink]}, (*WRONG, 0.0)),
        (three, {"car": [pink, pink, red]}, (*WRONG, pytest.approx((1 + 2 / 3) / 2))),
        (COLOR_ATTR, {"cow": [red], "tv": [blue]}, (True, True, 1.0)),
        (COLOR_ATTR, {"cow": [blue], "tv": [red]}, (*WRONG, 0.5)),
        (COLOR_ATTR, {"cow": [red], "tv": [red]}, (*WRONG, 0.75)),
        (COLOR_ATTR, {"cow": [red]}, (*WRONG, 0.5)),
    ):
        assert verdict(metadata, **objects) == Verdict(*expected)


def test_position():
    """The target must have matched, and every object be in its place."""
    dog, left, right, third = Painted(x=100), Painted(x=0), Painted(x=200), pytest.approx(1 / 3)
    red_dog = {"class": "dog", "count": 1, "color": "red"}
    ties = {"class": "tie", "count": 2, "position": ["left of", 0]}
    two, pair = {"tag": "position", "include": [red_dog, ties]}, [Painted(x=0), Painted(x=40)]
    for metadata, objects, expected in (
        (POSITION, {"dog": [dog], "tie": [left]}, (True, True, 1.0)),
        (POSITION, {"dog": [dog], "tie": [right]}, (*WRONG, pytest.approx(2 / 3))),
        (POSITION, {"tie": [left]}, (*WRONG, third)),  # nothing to be left of
        (POSITION, {"dog": [dog, right], "tie": [left]}, (True, False, third)),
        (POSITION, {"dog": [dog], "tie": [left, right]}, (True, False, third)),
        (two, {"dog": [Painted("red", x=100)], "tie": pair}, (True, True, 1.0)),
        (two, {"dog": [Painted("red", x=50)], "tie": [Painted(x=0), Painted(x=90)]}, (*WRONG, 0.75)),
        (two, {"dog": [Painted("blue", x=100)], "tie": pair}, (*WRONG, 0.5)),
    ):
        assert verdict(metadata, **objects) == Verdict(*expected)


def test_relations():
    """2 = 0.1 (10 + 10) is just as far apart as does not count; one half of the distance itself is not enough."""
    small, large = Painted(x=95, y=95, size=10), Painted(size=100)
    cases = {
        (-50, 0): "left of", (50, 0): "right of", (0, -50): "above", (0, 50): "below", (-50, -50): "left of above",
        (50, 40): "right of below", (50, 10): "right of", (0, 0): "", (2, -2): "", (3, 0): "", (4, 0): "",
        (-4, 0): "", (0, 4): "", (0, -4): "", (5, 0): "right of",
    }  # fmt: skip
    for (x, y), words in cases.items():
        assert relative_position(Painted(x=x, y=y), Painted()) == set(
            re.findall("(?:left|right) of|above|below", words)
        )
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


def clause(**changes) -> dict:
    return {"tag": "colors", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1} | changes]}


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
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
