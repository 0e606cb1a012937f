"""The worlds of the experiments: tasks, and prompts for training, validation and test that share none.

All are on the embedded tiny model. A task is a part of its grammar under one of its rewards.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from diffusionopd.files import write_atomically
from diffusionopd.tiny.grammar import PROMPT_FN, Caption, groups

SPLITS = ("train", "validation", "test")
SHARES = {"validation": 0.14, "test": 0.42}
"""Of the different prompts; the rest is for training. What the base was never trained on is all for test."""
LINES = {"validation": 60, "test": 420}
"""At least so many images of a task: prompts of which there are fewer are drawn several times."""
_SEED = 53


@dataclass(frozen=True)
class WorldTask:
    """Captions of one task of the grammar, perhaps a part of them, and what they are rewarded for."""

    name: str
    grammar: str
    reward: str
    part: Callable[[Caption], bool] = lambda caption: True
    shipped: str = ""
    """The teacher for it that is shipped, trained with supervision."""

    @property
    def prompt_fn(self) -> str:
        """How its files are read."""
        return PROMPT_FN[self.grammar]

    def captions(self, split: str) -> list[Caption]:
        """Its different captions."""
        return [caption for caption in split_captions(self.grammar)[split] if self.part(caption)]

    def lines(self, split: str) -> list[Caption]:
        """The lines of its prompt file, those of a caption one after another."""
        different = self.captions(split)
        return [caption for caption in different for _ in range(-(-LINES.get(split, 1) // len(different)))]


@cache
def split_captions(grammar: str) -> dict[str, tuple[Caption, ...]]:
    """Every caption in one split: two objects in all their orders and relations in the same one."""
    rng = random.Random(f"{_SEED} {grammar}")
    unseen, seen = ({_combination(c) for part in groups(grammar, s).values() for c in part} for s in ("test", "train"))
    found: dict[str, tuple[Caption, ...]] = {}
    everything = [c for s in ("train", "test") for part in groups(grammar, s).values() for c in part]
    kinds = sorted({key[0] for key in unseen | seen})
    places: dict[tuple, str] = {}
    for kind in kinds:  # each tag is shared by itself, so that small ones are in every split
        own = {key for key in unseen | seen if key[0] == kind}
        free = sorted(own - unseen)
        rng.shuffle(free)
        test = max(0, round(SHARES["test"] * len(own)) - len(own & unseen))
        validation = max(1, round(SHARES["validation"] * len(own)))
        names = ["test"] * test + ["validation"] * validation
        places |= dict.fromkeys(own & unseen, "test")
        places |= dict(zip(free, names + ["train"] * (len(free) - len(names)), strict=True))
    for split in SPLITS:
        captions = [caption for caption in everything if places[_combination(caption)] == split]
        rng.shuffle(captions)
        found[split] = tuple(captions)
    return found


def _combination(caption: Caption) -> tuple:
    """What a split may not tear apart: the objects, whatever their order and relation, or the caption."""
    include = caption.metadata.get("include")
    if not include:
        return "", caption.text
    things = sorted(f"{thing['color']} {thing['class']} {thing['count']}" for thing in include)
    return len(things) if len(things) > 1 else caption.metadata["tag"] == "counting", *things


@dataclass(frozen=True)
class World:
    """A few tasks that one model is to learn."""

    name: str
    title: str
    tasks: Sequence[WorldTask]
    rate: float = 1e-3
    """The learning rate of the method in arms that are not about rates: where all were tried, validation's choice."""

    @property
    def names(self) -> list[str]:
        """Of its tasks."""
        return [task.name for task in self.tasks]

    def folder(self, task: WorldTask, split: str) -> str:
        """The data set of a split, from the project's root. Runs find the validation prompts where they look for test
        prompts."""
        kind = "test" if split == "test" else "train"
        return f"logs/claims/prompts/{self.name}/{task.name}/{kind}"

    def write_prompts(self, root: Path) -> None:
        """Write the prompt files that are not there as they should be."""
        for task in self.tasks:
            for split in SPLITS:
                geneval, name = task.prompt_fn == "geneval", "train" if split == "train" else "test"
                lines = [json.dumps(c.metadata) if geneval else c.text for c in task.lines(split)]
                file = root / self.folder(task, split) / f"{name}{'_metadata.jsonl' if geneval else '.txt'}"
                content = "".join(f"{line}\n" for line in lines)
                if not file.is_file() or file.read_text(encoding="utf-8") != content:
                    write_atomically(file, content)

    def clusters(self, task: str) -> list[int]:
        """The cluster of each different test prompt of a task: what a split may not tear apart."""
        captions = next(each for each in self.tasks if each.name == task).captions("test")
        numbers: dict[tuple, int] = {}
        return [numbers.setdefault(_combination(caption), len(numbers)) for caption in captions]

    def digest(self) -> str:
        """Of its prompts, rewards and order."""
        text = [[t.name, t.reward, *(c.text for split in SPLITS for c in t.lines(split))] for t in self.tasks]
        return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:12]

    def counts(self) -> dict[str, dict[str, int]]:
        """Task -> split -> different prompts."""
        return {task.name: {split: len(task.captions(split)) for split in SPLITS} for task in self.tasks}


def _tagged(*tags: str) -> Callable[[Caption], bool]:
    return lambda caption: caption.metadata["tag"] in tags


def _sun(height: str) -> Callable[[Caption], bool]:
    return lambda caption: caption.metadata["height"] == height


def _crossed(odd: bool) -> Callable[[Caption], bool]:
    """Half of the landscapes, told by no single word."""
    return lambda caption: (
        ((caption.metadata["height"] == "high") ^ (caption.metadata["extra"] in ("tree", "house"))) == odd
    )


_COMPOSE = WorldTask("compose", "compose", "tiny_compose", shipped="compose")
_OCR = WorldTask("ocr", "ocr", "tiny_ocr", shipped="ocr")
_PLACE = WorldTask("place", "compose", "tiny_compose", _tagged("two_object", "position"))
_REPAINT = WorldTask("repaint", "compose", "tiny_scene", _tagged("single_object", "counting"))
_VIVID = WorldTask("vivid", "scene", "tiny_scene", _sun("high"))
_DULL = WorldTask("dull", "scene", "tiny_dull", _sun("low"))

TINY = World(
    "tiny",
    "the tiny world as it is shipped",
    [_COMPOSE, _OCR, WorldTask("scene", "scene", "tiny_scene", shipped="scene")],
    rate=4e-3,
)
CANDIDATES = [
    World("opposed", "landscapes by day are to be vivid, those with a low sun dull", [_COMPOSE, _OCR, _VIVID, _DULL]),
    World("repainted", "photos of one kind of object are to be vivid, backgrounds too", [_PLACE, _OCR, _REPAINT]),
    World(
        "crossed",
        "landscapes are to be vivid or dull by two words together",
        [
            _COMPOSE,
            WorldTask("vivid", "scene", "tiny_scene", _crossed(True)),
            WorldTask("dull", "scene", "tiny_dull", _crossed(False)),
        ],
        rate=8e-3,
    ),
    World("crowded", "the tasks of the first two", [_PLACE, _REPAINT, _OCR, _VIVID, _DULL]),
    World(
        "shared",
        "the same captions are to be right and vivid",
        [_COMPOSE, WorldTask("recolour", "compose", "tiny_scene")],
    ),
]
"""Worlds in which tasks may fight; the screen (`run.py screen`) chooses by teachers and multi-task RL alone."""
FIGHTING: Sequence[str] = ("crossed",)
"""The one that was chosen, on validation prompts, before the first distillation in it: multi-task NFT at the teachers'
cost and at its best rate is .59 (vivid) and .37 (dull) below their teachers, mean of three seeds; the sum of the
teachers at its best scale .46 and .46. Of the others, "repainted" was begun with one seed and put aside when "crossed"
had shown itself; "opposed", "crowded" and "shared" were not run."""
WORLDS = {world.name: world for world in [TINY, *CANDIDATES]}
