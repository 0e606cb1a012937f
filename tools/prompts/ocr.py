"""Training prompts for text rendering: a scene, a thing in it that carries writing, and the words, in double quotes.

Each kind of writing (shop names, notices, prices, ...) has things that carry it and a pattern for the words, so that
the words suit the thing. Their combinations are a numbered space, from which prompts are drawn without replacement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from diffusionopd.rewards import UnfitPromptError
from diffusionopd.rewards.quotes import wanted_text
from tools.prompts.mixture import allocate, drawn, shuffled

_DATA = json.loads(Path(__file__).with_name("ocr.json").read_text(encoding="utf-8"))

SENTENCES: list[str] = _DATA["sentences"]
"""All have the words in double quotes, once, and no other quotation marks: what a scorer looks for."""

WORDS: dict[str, list[str]] = _DATA["words"] | {
    "dollars": [str(number) for number in range(1, 30)],
    "house_numbers": [str(number) for number in (*range(1, 100, 3), *range(101, 1000, 37))],
    "days": [str(number) for number in range(1, 29)],
    "letters": [first + second for first in "ABCDEFHKLMNPRSTX" for second in "ACEHKMNRTX"],
    "numbers": [str(number) for number in range(101, 1000, 7)],
    "distances": [str(number) for number in (*range(2, 30), *range(35, 400, 15))],
}
"""Lists of words; no entry comes twice in its list or has quotation marks."""

KINDS: dict[str, list[str]] = _DATA["kinds"]
"""The kinds, in equal shares: the things that carry them, the pattern of the words, and the lists that fill it."""


def lists_of(kind: str) -> list[Sequence[str]]:
    """What is chosen for a prompt of a kind, one of each list."""
    things, _, parts = KINDS[kind]
    return [SENTENCES, *(WORDS[name] for name in ("styles", "places", "lettering", things, *parts.split()))]


def size(kind: str) -> int:
    """How many prompts of a kind there are."""
    return math.prod(map(len, lists_of(kind)))


def make(kind: str, number: int) -> str:
    """The n-th prompt of a kind (0 to its size - 1)."""
    lists = lists_of(kind)
    chosen: list[str] = []
    for options in reversed(lists):  # a mixed radix: the last list changes fastest
        number, index = divmod(number, len(options))
        chosen.insert(0, options[index])
    sentence, style, place, lettering, thing, *parts = chosen
    text = KINDS[kind][1].format(*parts)
    filled = sentence.format(style=style, thing=thing, place=place, lettering=lettering, text=text)
    return filled[0].upper() + filled[1:]


def essence(prompt: str) -> str:
    """The text that the reward looks for; a prompt without any stands for itself."""
    try:
        return wanted_text(prompt)
    except UnfitPromptError:
        return prompt


def generate(count: int, seed: int, exclude: Iterable[str] = ()) -> list[str]:
    """`count` different prompts, shuffled, in equal shares of the kinds as far as their combinations go.

    Args:
        exclude: prompts whose words must not be asked for.

    Raises:
        PromptError: `count` is not positive, or more than there are without those excluded.
    """
    taken = {essence(prompt) for prompt in exclude}
    # No kind needs more than `count`, so drawing no more leaves the maximum exact where it matters.
    prompts = {
        kind: drawn(size(kind), partial(make, kind), lambda p: essence(p) not in taken, count, f"ocr {seed} {kind}")
        for kind in KINDS
    }
    counts = allocate(count, dict.fromkeys(KINDS, 1.0), {kind: len(found) for kind, found in prompts.items()})
    return shuffled((prompt for kind in KINDS for prompt in prompts[kind][: counts[kind]]), f"ocr {seed}")
