"""What T2I-CompBench asks about, out of a prompt: by spaCy's small English model, as officially."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusionopd.rewards.base import RewardError, UnfitPromptError

MODEL = "en_core_web_sm"
_WHEEL = f"https://github.com/explosion/spacy-models/releases/download/{MODEL}-3.8.0/{MODEL}-3.8.0-py3-none-any.whl"
_NO_PHRASES = ("top", "the side", "the left", "the right")
MOST_PHRASES = 8

RELATIONS = (
    "on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
    "on top of",
)  # fmt: skip
"""In the order in which they are looked for; of "on top of" the official rule knows no score but 0."""
_AROUND = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
_PEOPLE = ("girl", "boy", "man", "woman")

KINDS = {"spatial": ("attribute", "spatial"), "action": ("attribute", "action"),
         "both": ("attribute", "spatial", "action")}  # fmt: skip
"""Of a complex prompt, `kind` in its metadata -> the scores of which the mean is taken."""


@dataclass(frozen=True)
class Spatial:
    """Two objects and the relation of the first to the second; None for what the prompt does not have."""

    first: str | None
    second: str | None
    relation: str | None


@functools.cache
def load_parser() -> Callable[[str], Any]:
    """spaCy's small English model. Raises `RewardError` with what installs it."""
    try:
        import spacy

        return spacy.load(MODEL)
    except (ImportError, OSError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise RewardError(
            f"prompts are taken apart by spaCy and its model {MODEL}, which cannot be loaded ({first_line}): "
            f"pip install -e '.[compbench]' && pip install {_WHEEL}"
        ) from error


def noun_phrases(prompt: str) -> list[str]:
    """The first eight noun phrases, each one a question. `UnfitPromptError` if there is none, which would score 1."""
    found = [chunk.text for chunk in load_parser()(prompt).noun_chunks if chunk.text not in _NO_PHRASES]
    if not found:
        raise UnfitPromptError("has no noun phrase that could be asked about", prompt)
    return found[:MOST_PHRASES]


def without_adjectives(prompt: str) -> str:
    """The words of the prompt but its adjectives, one blank between any two."""
    return " ".join(token.text for token in load_parser()(prompt) if token.pos_ != "ADJ")


def relation_in(prompt: str) -> str | None:
    """The relation that a prompt names."""
    return next((relation for relation in RELATIONS if relation in prompt), None)


def spatial(prompt: str, is_complex: bool = False) -> Spatial:
    """The objects of a prompt and their relation.

    Args:
        is_complex: the nouns around a preposition, in place of the first and the last noun of the prompt.
    """
    tokens = load_parser()(prompt)
    nouns = [token.text for token in tokens if token.pos_ == "NOUN"]
    objects = _around_preposition(tokens) if is_complex else [*nouns[:1], *nouns[-1:]]
    first, second = ("person" if each in _PEOPLE else each for each in (objects if len(objects) == 2 else (None, None)))
    return Spatial(first, second, relation_in(prompt))


def _around_preposition(tokens: Any) -> list[str | None]:
    """The nouns before and after each preposition: the nearest before it, the first after it, else the first name."""
    found: list[str | None] = []
    for i in range(len(tokens)):
        length = next((n for n in (3, 2, 1) if tokens[i : i + n].text in _AROUND), 0)
        if not length:
            continue
        before = (token for token in reversed(list(tokens[:i])) if token.pos_ in ("NOUN", "PROPN"))
        found += [token.text for token in list(before)[:1]]
        after = list(tokens[i + length :])
        nouns = [token.text for token in after if token.pos_ == "NOUN"]
        # A name counts where another kind of word follows it, at which it is complete.
        names = [a.text for a, b in zip(after, after[1:], strict=False) if a.pos_ == "PROPN" and b.pos_ != "PROPN"]
        found += (nouns or names)[:1]
    return found
