"""GenEval's prompt grammar: its six kinds of prompt with their metadata (Ghosh et al., arXiv 2310.11513).

The wording, the order of the clauses and the keys are those of the published files, quirks included ("a skis", "two
scissorses"): a prompt of the benchmark and the same prompt from here are the same line. Each kind is a numbered space,
so that prompts can be drawn without replacement.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from diffusionopd.data.prompts import PromptError
from diffusionopd.rewards.geneval.classes import CLASSES, COLOURS, POSITIONS
from tools.prompts.mixture import allocate, apportion, drawn, shuffled

SHARES = {"single_object": 0, "two_object": 1, "counting": 5, "colors": 1, "position": 7, "color_attr": 3}
"""Weight of each tag in Flow-GRPO's training set (arXiv 2505.05470, appendix): what the base model finds hard."""

NUMBERS = ("two", "three", "four")
COLOURABLE = tuple(name for name in CLASSES if name != "person")


def article(name: str) -> str:
    """The name behind "a" or "an", told by its first letter."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """The name with "s", or "es" after an s."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _two_of(number: int, names: Sequence[str]) -> tuple[str, str]:
    """Ordered pair of different names out of n; numbers 0 to n (n - 1) - 1."""
    first, second = divmod(number, len(names) - 1)
    return names[first], names[second + (second >= first)]


def _record(tag: str, include: list[dict[str, Any]], prompt: str, **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {prompt}"}


def _objects(names: Sequence[str], colours: Sequence[str] = ("", "")) -> tuple[list[dict[str, Any]], str]:
    """One of each object, with its colour if it has one: the clauses, and the wording."""
    pairs = list(zip(names, colours, strict=False))
    include = [{"class": name, "count": 1} | ({"color": colour} if colour else {}) for name, colour in pairs]
    return include, " and ".join(f"{article(colour)} {name}" if colour else article(name) for name, colour in pairs)


def _single_object(number: int) -> dict[str, Any]:
    return _record("single_object", *_objects((CLASSES[number],)))


def _two_object(number: int) -> dict[str, Any]:
    return _record("two_object", *_objects(_two_of(number, CLASSES)))


def _counting(number: int) -> dict[str, Any]:
    which, index = divmod(number, len(NUMBERS))
    name, count = CLASSES[which], index + 2
    include, exclude = [{"class": name, "count": count}], [{"class": name, "count": count + 1}]
    return _record("counting", include, f"{NUMBERS[index]} {plural(name)}", exclude=exclude)


def _colors(number: int) -> dict[str, Any]:
    which, index = divmod(number, len(COLOURS))
    return _record("colors", *_objects((COLOURABLE[which],), (COLOURS[index],)))


def _position(number: int) -> dict[str, Any]:
    pair, index = divmod(number, len(POSITIONS))
    (what, where), position = _two_of(pair, CLASSES), POSITIONS[index]
    # The clause that carries the position comes second and refers to clause 0.
    include = [{"class": where, "count": 1}, {"class": what, "count": 1, "position": [position, 0]}]
    return _record("position", include, f"{article(what)} {position} {article(where)}")


def _color_attr(number: int) -> dict[str, Any]:
    objects, colours = divmod(number, len(COLOURS) * (len(COLOURS) - 1))
    return _record("color_attr", *_objects(_two_of(objects, COLOURABLE), _two_of(colours, COLOURS)))


_PAIRS = math.perm(len(CLASSES), 2)
SPACES: dict[str, tuple[int, Callable[[int], dict[str, Any]]]] = {
    "single_object": (len(CLASSES), _single_object),
    "two_object": (_PAIRS, _two_object),
    "counting": (len(CLASSES) * len(NUMBERS), _counting),
    "colors": (len(COLOURABLE) * len(COLOURS), _colors),
    "position": (_PAIRS * len(POSITIONS), _position),
    "color_attr": (math.perm(len(COLOURABLE), 2) * math.perm(len(COLOURS), 2), _color_attr),
}
"""Tag -> how many prompts the grammar has, and the metadata of the n-th (0 to that number - 1)."""


def essence(prompt: str) -> frozenset[str]:
    """What two prompts share that differ only in the order of their objects: excluding one excludes the other."""
    return frozenset(prompt.removeprefix("a photo of ").split(" and "))


def generate(count: int, seed: int, exclude: Iterable[str] = (), repeat: bool = False) -> list[str]:
    """`count` JSON lines, shuffled, in Flow-GRPO's shares.

    The grammar has only 240 counting prompts. So either every prompt comes once and the tags with more prompts take
    what is missing, or, with `repeat`, the shares hold and prompts of small tags come again, evenly.

    Args:
        exclude: prompts that must not occur, in either order of their objects.

    Raises:
        PromptError: `count` is not positive; without `repeat`, fewer prompts are left (the message says how many).
    """
    taken = {essence(prompt) for prompt in exclude}

    shares = {tag: share for tag, share in SHARES.items() if share}
    # No tag needs more than `count`, so drawing no more leaves the maximum exact where it matters.
    records = {
        tag: drawn(*SPACES[tag], lambda record: essence(record["prompt"]) not in taken, count, f"geneval {seed} {tag}")
        for tag in shares
    }
    if repeat:
        if count < 1 or not all(records.values()):
            raise PromptError(f"--count {count} must be at least 1, and --exclude must leave prompts of every kind")
        counts = apportion(count, shares)
    else:
        counts = allocate(count, shares, {tag: len(records[tag]) for tag in shares})
    chosen = (record for tag in shares for record in itertools.islice(itertools.cycle(records[tag]), counts[tag]))
    return [json.dumps(record) for record in shuffled(chosen, f"geneval {seed}")]
