"""Captions of the three tiny tasks, and which of them are held out.

compose  coloured shapes, metadata in GenEval's own JSON form (arXiv 2310.11513)
ocr      a sign with a three-digit number
scene    a landscape described by four attributes

Held out are *combinations* (of digits, of two objects, of attributes), never a digit at a position or a relation: the
training captions hold each part of each test caption.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

TASKS = ("compose", "ocr", "scene")
SPLITS = ("train", "test")
#: `prompt_fn` of each task: how its prompt files are read.
PROMPT_FN = {"compose": "geneval", "ocr": "general_ocr", "scene": "general_ocr"}
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
    return _compose("single_object", f"a {_words(thing)}", [_include(thing)])


def pair(first: Thing, second: Thing) -> Caption:
    """Two objects in any arrangement."""
    return _compose("two_object", f"a {_words(first)} and a {_words(second)}", [_include(first), _include(second)])


def counting(thing: Thing, count: int) -> Caption:
    """Exactly `count` equal objects: one more is excluded, as GenEval does it."""
    exclude = [_include(thing, count=count + 1)]
    return _compose("counting", f"{COUNTS[count]} {_words(thing)}s", [_include(thing, count=count)], exclude=exclude)


def position(subject: Thing, relation: str, reference: Thing) -> Caption:
    """GenEval lists the reference first; the subject carries `position: [relation, index of the reference]`."""
    include = [_include(reference), _include(subject, position=[relation, 0])]
    return _compose("position", f"a {_words(subject)} {relation} a {_words(reference)}", include)


def sign(number: str) -> Caption:
    """A sign with a number, quoted, so that the OCR reward finds it."""
    return Caption(f'a sign that says "{number}"', {"text": number})


def scene(height: str, side: str, hills: str, extra: str) -> Caption:
    """A landscape with four attributes."""
    text = f"a landscape with a {height} {side} sun {hills} hills and a {extra}"
    return Caption(text, {"height": height, "side": side, "hills": hills, "extra": extra})


def _words(thing: Thing) -> str:
    return " ".join(thing)


def _include(thing: Thing, **more: Any) -> dict[str, Any]:
    return {"class": thing[1], "count": 1, "color": thing[0]} | more


def _compose(tag: str, what: str, include: list[dict], **more: list[dict]) -> Caption:
    text = f"a photo of {what}"
    return Caption(text, {"tag": tag, "include": include, **more, "prompt": text})


# ------------------------------------------------------------------------------------------------- all captions, split


@cache
def groups(task: str, split: str) -> dict[str, tuple[Caption, ...]]:
    """Every distinct caption of `task` in `split` ("train" or "test") in a fixed order: by tag, or all under the task.

    A fifth is held out. A pair of objects is held out in both orders, for `and` and for every relation.
    """
    rng = random.Random(HELD_OUT_SEED + TASKS.index(task))

    def part(every: Iterable[Any]) -> list:
        items = list(every)
        held = set(rng.sample(range(len(items)), max(1, round(_HELD_OUT_FRACTION * len(items)))))
        return [item for i, item in enumerate(items) if (i in held) == (split == "test")]

    if task == "ocr":
        return {task: tuple(sign("".join(digits)) for digits in part(itertools.product(DIGITS, repeat=3)))}
    if task == "scene":
        return {task: tuple(scene(*a) for a in part(itertools.product(SUN_HEIGHTS, SUN_SIDES, HILLS, EXTRAS)))}
    things: list[Thing] = list(itertools.product(COLORS, SHAPES))
    pairs = part((a, b) for a, b in itertools.combinations(things, 2) if a[0] != b[0])
    ordered = [both for a, b in pairs for both in ((a, b), (b, a))]
    counted = part(itertools.product(things, COUNTS))
    return {
        "single_object": tuple(single(thing) for thing in part(things)),
        "two_object": tuple(pair(a, b) for a, b in ordered),
        "counting": tuple(counting(thing, count) for thing, count in counted),
        "position": tuple(position(a, relation, b) for a, b in ordered for relation in RELATIONS),
    }


def captions(task: str, split: str) -> tuple[Caption, ...]:
    """Every distinct caption, whatever its tag."""
    return tuple(caption for group in groups(task, split).values() for caption in group)


def draw(task: str, rng: random.Random, split: str = "train") -> Caption:
    """One caption; compose first draws its tag by `TAG_WEIGHTS`."""
    tag = rng.choices(list(TAG_WEIGHTS), list(TAG_WEIGHTS.values()))[0] if task == "compose" else task
    return rng.choice(groups(task, split)[tag])


def file_captions(task: str, split: str) -> list[Caption]:
    """The lines of the prompt file of `task`, shuffled; captions are repeated as evenly as their number allows.

    compose has lines of each tag in fixed proportions, whatever the number of distinct captions. The test file has 384
    lines of held-out captions only: 200 distinct numbers, 14 scenes, and for compose 2 single objects, 22 pairs,
    7 counts and 88 positions.
    """
    rng, lines = random.Random(f"{HELD_OUT_SEED} {task} {split}"), []
    for tag, group in groups(task, split).items():
        count = COMPOSE_LINES[split].get(tag, TEST_LINES if split == "test" else len(group))
        times, rest = divmod(count, len(group))
        lines += [*group * times, *rng.sample(group, rest)]
    rng.shuffle(lines)
    return lines


def prompt_files() -> dict[str, str]:
    """Path below the dataset folder -> content, in the two forms that runs read."""
    files = {}
    for task, split in itertools.product(TASKS, SPLITS):
        lines = file_captions(task, split)
        if PROMPT_FN[task] == "geneval":
            files[f"{task}/{split}_metadata.jsonl"] = "".join(json.dumps(line.metadata) + "\n" for line in lines)
        else:
            files[f"{task}/{split}.txt"] = "".join(line.text + "\n" for line in lines)
    return files


# --------------------------------------------------------------------------------------------------------- label noise


@cache
def _known(task: str) -> dict[str, Caption]:
    return {caption.text: caption for caption in captions(task, "train")}


def corrupt(task: str, caption: Caption, rng: random.Random) -> Caption:
    """A training caption that differs from `caption` in one or two details: the label noise of the base model."""
    change = {"compose": _corrupt_compose, "ocr": _corrupt_ocr}[task]
    for _ in range(200):
        text = change(caption.metadata, rng).text
        if text != caption.text and text in _known(task):
            return _known(task)[text]
    return caption


def _corrupt_compose(metadata: dict[str, Any], rng: random.Random) -> Caption:
    things = [(i["color"], i["class"]) for i in metadata["include"]]
    changed, i = list(things), rng.randrange(len(things))
    color, shape = things[i]
    changed[i] = (rng.choice(COLORS), shape) if rng.random() < 0.5 else (color, rng.choice(SHAPES))
    if metadata["tag"] == "single_object":
        return single(changed[0])
    if metadata["tag"] == "two_object":
        return pair(*changed)
    if metadata["tag"] == "counting":
        if rng.random() < 0.4:
            return counting(changed[0], metadata["include"][0]["count"])
        return counting(things[0], rng.choice(list(COUNTS)))
    if rng.random() < 0.3:
        return position(things[1], rng.choice(RELATIONS), things[0])
    return position(changed[1], metadata["include"][1]["position"][0], changed[0])


def _corrupt_ocr(metadata: dict[str, Any], rng: random.Random) -> Caption:
    digits = list(metadata["text"])
    for i in rng.sample(range(3), rng.choice([1, 2])):
        digits[i] = rng.choice(DIGITS)
    return sign("".join(digits))
