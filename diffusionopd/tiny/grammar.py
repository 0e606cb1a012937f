"""Captions of the three tiny tasks, and which of them are held out.

compose  coloured shapes, metadata in GenEval's own JSON form (arXiv 2310.11513)
ocr      a sign with a three-digit number
scene    a landscape described by four attributes

Held out are *combinations* (of digits, of two objects, of attributes), never a digit at a position or a relation: the
training captions hold each part of each test caption.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

TASKS = ("compose", "ocr", "scene")
COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
DIGITS = "0123456789"
SUN_HEIGHTS = ("high", "low")
SUN_SIDES = ("left", "middle", "right")
HILLS = ("green", "brown", "snowy")
EXTRAS = ("tree", "house", "cloud", "pond")

#: Every word of the grammar; the tokenizers are built from it.
WORDS = (
    *"a photo of and sign that says landscape with sun hills".split(),
    *"left right above below".split(),
    *COLORS,
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
    *COUNTS.values(),
    *SUN_HEIGHTS,
    "middle",
    *HILLS[1:],
    *EXTRAS,
)

#: How often a caption of each compose tag is drawn. Two objects are what is hard to learn.
TAG_WEIGHTS = {"single_object": 0.1, "two_object": 0.25, "counting": 0.2, "position": 0.45}
#: Lines of each tag in the prompt files, in about these proportions; single objects are few, as few are held out.
COMPOSE_LINES = {
    "train": {"single_object": 96, "two_object": 240, "counting": 192, "position": 432},
    "test": {"single_object": 36, "two_object": 88, "counting": 84, "position": 176},
}
TEST_LINES = 384
HELD_OUT_SEED = 20260
_HELD_OUT_FRACTION = 0.2

Thing = tuple[str, str]  # (colour, shape)


@dataclass(frozen=True)
class Caption:
    """A prompt and what it asks for; for compose, `metadata` is a line of GenEval's metadata file."""

    text: str
    metadata: dict[str, Any] = field(hash=False)


def single(thing: Thing) -> Caption:
    """One object."""
    text = f"a photo of a {thing[0]} {thing[1]}"
    return _compose("single_object", [_include(thing)], text)


def pair(first: Thing, second: Thing) -> Caption:
    """Two objects in any arrangement."""
    text = f"a photo of a {first[0]} {first[1]} and a {second[0]} {second[1]}"
    return _compose("two_object", [_include(first), _include(second)], text)


def counting(thing: Thing, count: int) -> Caption:
    """Exactly `count` equal objects: one more is excluded, as GenEval does it."""
    text = f"a photo of {COUNTS[count]} {thing[0]} {thing[1]}s"
    more = dict(_include(thing), count=count + 1)
    return _compose("counting", [dict(_include(thing), count=count)], text, exclude=[more])


def position(subject: Thing, relation: str, reference: Thing) -> Caption:
    """GenEval lists the reference first; the subject carries `position: [relation, index of the reference]`."""
    text = f"a photo of a {subject[0]} {subject[1]} {relation} a {reference[0]} {reference[1]}"
    return _compose("position", [_include(reference), dict(_include(subject), position=[relation, 0])], text)


def sign(number: str) -> Caption:
    """A sign with a number, quoted, so that the OCR reward finds it."""
    return Caption(f'a sign that says "{number}"', {"text": number})


def scene(height: str, side: str, hills: str, extra: str) -> Caption:
    """A landscape with four attributes."""
    text = f"a landscape with a {height} {side} sun {hills} hills and a {extra}"
    return Caption(text, {"height": height, "side": side, "hills": hills, "extra": extra})


def _include(thing: Thing) -> dict[str, Any]:
    return {"class": thing[1], "count": 1, "color": thing[0]}


def _compose(tag: str, include: list[dict], text: str, exclude: list[dict] | None = None) -> Caption:
    metadata: dict[str, Any] = {"tag": tag, "include": include}
    if exclude:
        metadata["exclude"] = exclude
    return Caption(text, metadata | {"prompt": text})


# ------------------------------------------------------------------------------------------------- all captions, split


def _split(items: list, rng: random.Random, at_least: int = 1) -> tuple[list, list]:
    """(kept, held out), each in the order of `items`."""
    held = set(rng.sample(range(len(items)), max(at_least, round(_HELD_OUT_FRACTION * len(items)))))
    return [x for i, x in enumerate(items) if i not in held], [x for i, x in enumerate(items) if i in held]


@cache
def compose_captions(split: str) -> dict[str, tuple[Caption, ...]]:
    """Tag -> captions. A pair of objects is held out in both orders, for `and` and for every relation."""
    rng = random.Random(HELD_OUT_SEED)
    things: list[Thing] = list(itertools.product(COLORS, SHAPES))
    which = 0 if split == "train" else 1
    pairs = [p for p in itertools.combinations(things, 2) if p[0][0] != p[1][0]]
    ordered = [q for p in _split(pairs, rng)[which] for q in (p, p[::-1])]
    counted = _split(list(itertools.product(things, COUNTS)), rng)[which]
    alone = _split(things, rng)[which]
    return {
        "single_object": tuple(single(t) for t in alone),
        "two_object": tuple(pair(a, b) for a, b in ordered),
        "counting": tuple(counting(t, n) for t, n in counted),
        "position": tuple(position(a, r, b) for a, b in ordered for r in RELATIONS),
    }


@cache
def ocr_captions(split: str) -> tuple[Caption, ...]:
    """All three-digit numbers, a fifth of them held out."""
    rng = random.Random(HELD_OUT_SEED + 1)
    numbers = ["".join(d) for d in itertools.product(DIGITS, repeat=3)]
    return tuple(sign(n) for n in _split(numbers, rng)[0 if split == "train" else 1])


@cache
def scene_captions(split: str) -> tuple[Caption, ...]:
    """All combinations of attributes, a fifth of them held out."""
    rng = random.Random(HELD_OUT_SEED + 2)
    attributes = list(itertools.product(SUN_HEIGHTS, SUN_SIDES, HILLS, EXTRAS))
    return tuple(scene(*a) for a in _split(attributes, rng)[0 if split == "train" else 1])


def captions(task: str, split: str) -> tuple[Caption, ...]:
    """Every distinct caption of `task` in `split` ("train" or "test"), in a fixed order."""
    if task == "compose":
        return tuple(c for group in compose_captions(split).values() for c in group)
    return {"ocr": ocr_captions, "scene": scene_captions}[task](split)


def draw(task: str, rng: random.Random, split: str = "train") -> Caption:
    """One caption; compose first draws its tag by `TAG_WEIGHTS`."""
    if task == "compose":
        tag = rng.choices(list(TAG_WEIGHTS), list(TAG_WEIGHTS.values()))[0]
        return rng.choice(compose_captions(split)[tag])
    return rng.choice(captions(task, split))


def file_captions(task: str, split: str) -> list[Caption]:
    """The lines of the prompt file of `task`, shuffled; captions are repeated as evenly as their number allows.

    compose has lines of each tag in fixed proportions, whatever the number of distinct captions. The test file has 384
    lines of held-out captions only: 200 distinct numbers, 14 scenes, and for compose 2 single objects, 22 pairs,
    7 counts and 88 positions.
    """
    rng = random.Random(f"{HELD_OUT_SEED} {task} {split}")
    if task == "compose":
        groups = compose_captions(split)
        lines = [c for tag, n in COMPOSE_LINES[split].items() for c in _repeat(groups[tag], n, rng)]
    else:
        distinct = captions(task, split)
        lines = _repeat(distinct, TEST_LINES if split == "test" else len(distinct), rng)
    rng.shuffle(lines)
    return lines


def _repeat(items: tuple[Caption, ...], n: int, rng: random.Random) -> list[Caption]:
    whole, rest = divmod(n, len(items))
    return list(items) * whole + rng.sample(items, rest)


# --------------------------------------------------------------------------------------------------------- label noise


@cache
def _known(task: str) -> dict[str, Caption]:
    return {c.text: c for c in captions(task, "train")}


def corrupt(task: str, caption: Caption, rng: random.Random) -> Caption:
    """A training caption that differs from `caption` in one or two details: the label noise of the base model."""
    change = {"compose": _corrupt_compose, "ocr": _corrupt_ocr}[task]
    for _ in range(200):
        text = change(caption, rng)
        if text != caption.text and text in _known(task):
            return _known(task)[text]
    return caption


def _corrupt_compose(caption: Caption, rng: random.Random) -> str:
    metadata = caption.metadata
    things = [(i["color"], i["class"]) for i in metadata["include"]]
    i = rng.randrange(len(things))
    changed = list(things)
    changed[i] = (rng.choice(COLORS), changed[i][1]) if rng.random() < 0.5 else (changed[i][0], rng.choice(SHAPES))
    tag = metadata["tag"]
    if tag == "single_object":
        return single(changed[0]).text
    if tag == "two_object":
        return pair(*changed).text
    if tag == "counting":
        count = metadata["include"][0]["count"]
        return (
            counting(changed[0], count).text if rng.random() < 0.4 else counting(things[0], rng.choice([2, 3, 4])).text
        )
    relation = metadata["include"][1]["position"][0]
    if rng.random() < 0.3:
        return position(things[1], rng.choice(RELATIONS), things[0]).text
    return position(changed[1], relation, changed[0]).text


def _corrupt_ocr(caption: Caption, rng: random.Random) -> str:
    digits = list(caption.metadata["text"])
    for i in rng.sample(range(3), rng.choice([1, 2])):
        digits[i] = rng.choice(DIGITS)
    return sign("".join(digits)).text
