"""Training prompts for text rendering: a scene, a thing in it that carries writing, and the words, in double quotes.

Each kind of writing (shop names, notices, prices, ...) has things that carry it and a pattern for the words, so that
the words suit the thing. Their combinations are a numbered space, from which prompts are drawn without replacement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from diffusionopd.prompts import ocr_words as words
from tools.prompts.mixture import allocate, digits, drawn, shuffled

SENTENCES = (
    '{style} of {thing} {place}, with the words "{text}" in {lettering}',
    '{style} of {thing} that reads "{text}" in {lettering}, {place}',
    '{style} showing {thing} {place}. The text on it says "{text}" in {lettering}',
    'the words "{text}" in {lettering} on {thing} {place}, {style}',
    '{thing} {place} with "{text}" written on it in {lettering}, {style}',
    '{thing} {place} displays "{text}" in {lettering}, {style}',
    '{style} of {thing} with the inscription "{text}" in {lettering}, {place}',
    'seen {place}: {thing} with "{text}" in {lettering}, {style}',
)
"""All have the words in double quotes, once, and no other quotation marks: what a scorer looks for."""


@dataclass(frozen=True)
class Writing:
    """A kind of writing: the `things` that carry it and, in `pattern`, the words that `parts` fill in order."""

    things: tuple[str, ...]
    pattern: str
    parts: tuple[tuple[str, ...], ...]

    @property
    def lists(self) -> tuple[tuple[str, ...], ...]:
        """What is chosen for a prompt, one of each list."""
        return (SENTENCES, words.STYLES, words.PLACES, words.LETTERING, self.things, *self.parts)

    @property
    def size(self) -> int:
        """How many prompts there are."""
        return math.prod(map(len, self.lists))

    def prompt(self, number: int) -> str:
        """The n-th prompt (0 to size - 1)."""
        chosen = digits(number, [len(options) for options in self.lists])
        sentence, style, place, lettering, thing, *parts = (
            options[i] for options, i in zip(self.lists, chosen, strict=True)
        )
        text = self.pattern.format(*parts)
        filled = sentence.format(style=style, thing=thing, place=place, lettering=lettering, text=text)
        return filled[0].upper() + filled[1:]


KINDS: dict[str, Writing] = {
    "shop": Writing(words.SHOP_SIGNS, "{} {} {}", (words.ADJECTIVES, words.NOUNS, words.SHOPS)),
    "notice": Writing(words.NOTICE_BOARDS, "{} {}", (words.ORDERS, words.SUBJECTS)),
    "hours": Writing(words.DOORS, "Open {} to {}", (words.MORNINGS, words.EVENINGS)),
    "price": Writing(words.PRICE_TAGS, "{} ${}.{}", (words.GOODS, words.DOLLARS, words.CENTS)),
    "address": Writing(words.STREET_SIGNS, "{} {} {}", (words.HOUSE_NUMBERS, words.NAMES, words.STREETS)),
    "title": Writing(words.COVERS, "The {} {}", (words.ADJECTIVES, words.NOUNS)),
    "long_title": Writing(words.COVERS, "The {} of the {} {}", (words.TOPICS, words.ADJECTIVES, words.NOUNS)),
    "slogan": Writing(words.BANNERS, "{} Your {}", (words.VERBS, words.OWNED)),
    "event": Writing(words.POSTERS, "{} {} {}", (words.EVENTS, words.MONTHS, words.DAYS)),
    "code": Writing(words.PLATES, "{} {}", (words.LETTERS, words.NUMBERS)),
    "direction": Writing(words.ROAD_SIGNS, "{} {} {}", (words.NAMES, words.DISTANCES, words.UNITS)),
    "greeting": Writing(words.CARDS, "{} {}", (words.GREETINGS, words.NAMES)),
    "word": Writing(words.CLOTHES, "{}", (words.SINGLE_WORDS,)),
}
"""The kinds, in equal shares."""


def essence(prompt: str) -> str:
    """The words in double quotes, without spaces, in lower case; a prompt without any stands for itself."""
    parts = prompt.split('"')
    return "".join(parts[1].split()).lower() if len(parts) > 2 else prompt


def generate(count: int, seed: int, exclude: Iterable[str] = ()) -> list[str]:
    """`count` different prompts, shuffled, in equal shares of the kinds as far as their combinations go.

    Args:
        exclude: prompts whose words must not be asked for.

    Raises:
        PromptError: `count` is not positive, or more than there are without those excluded.
    """
    taken = {essence(prompt) for prompt in exclude}

    def accepted(prompt: str) -> bool:
        return essence(prompt) not in taken

    # No kind needs more than `count`, so drawing no more leaves the maximum exact where it matters.
    prompts = {
        name: drawn(kind.size, kind.prompt, accepted, count, f"ocr {seed} {name}") for name, kind in KINDS.items()
    }
    counts = allocate(count, dict.fromkeys(KINDS, 1.0), {name: len(prompts[name]) for name in KINDS})
    return shuffled((prompt for name in KINDS for prompt in prompts[name][: counts[name]]), f"ocr {seed}")
