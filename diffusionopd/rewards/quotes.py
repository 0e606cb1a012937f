"""Which text a prompt asks an image to show: what it has in quotes; and when two texts are the same.

Upstream takes what stands between the first two straight double quotes; here these are one kind of many.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from diffusionopd.rewards.base import UnfitPromptError

Mark = re.Match[str]
"""A quotation mark in a prompt."""

_DOUBLE: Mapping[str, str] = {
    **{'"': '"', "＂": "＂", "“": "”“", "„": "“”", "‟": "”", "〝": "〞〟", "”": "”", "``": "''", "''": "''"},
    **{"«": "»", "»": "«»", "‹": "›", "›": "‹›", "「": "」", "『": "』", "〞": "", "〟": "", "」": "", "』": ""},
}
_SINGLE: Mapping[str, str] = {"'": "'’", "‘": "’", "‚": "‘’", "‛": "’", "＇": "＇", "’": ""}
"""Opening quote -> those that close it, none for a quote that only closes."""

_AT_WORDS = frozenset(("”", "»", "›", "''", *_SINGLE))
"""Quotes that open only at the beginning of a word: they also close, or are apostrophes."""
_NEVER_BEHIND_DIGITS = frozenset(('"', "＂", "“", "”", "''", "'", "‘", "‛", "＇"))
"""Quotes that stand for inches and feet."""
_STRAY = "\"”''"
"""What closes a quote of another kind where nothing else does, if it comes next."""

_ELIDED = re.compile(r"['‘’](?:n['’]|(?:n|em|til|tis|twas|\d\ds)(?!['’\w]))", re.IGNORECASE)
"""Words with an apostrophe in front: rock 'n' roll, the '90s."""

_INVISIBLE = frozenset(("Cf", "Cc"))  # Unicode's categories of zero-width and control characters
_STRAIGHT = str.maketrans(dict.fromkeys("‘’‚‛′`´ʼ‹›", "'") | dict.fromkeys("“”„‟″«»〝〞〟", '"') | {"⁄": "/"})


class Quoted(NamedTuple):
    """The wanted text as it stands in the prompt, and what is unclear about it, if anything."""

    text: str
    unclear: str = ""


def wanted_text(prompt: str) -> str:
    """The text that an image of the prompt should show, `normalised`. Raises as `quoted`."""
    return normalised(quoted(prompt).text)


def normalised(text: str) -> str:
    """One form of equal texts: NFKC, straight quotes, lower case, without what is blank or invisible."""
    text = unicodedata.normalize("NFKC", text.translate(_STRAIGHT)).translate(_STRAIGHT).lower()
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) not in _INVISIBLE)


def quoted(prompt: str) -> Quoted:
    """The first text in double quotes of any kind; in single ones where there are none.

    A quote directly behind a digit (inches) and an apostrophe open nothing; quotes inside quotes belong to the text. A
    double quote that nothing closes holds the rest of the prompt, as upstream reads it, unless there is another text.

    Raises:
        UnfitPromptError: nothing in quotes that could be shown.
    """
    if '\\"' in prompt and not re.search(r'(?<!\\)"', prompt):
        prompt = prompt.replace('\\"', '"')
    spans = list(_spans(prompt, _DOUBLE))
    rest = list(prompt)
    for opening, closing in spans:
        rest[opening.start() : closing.end()] = " " * (closing.end() - opening.start())
    # A word's own apostrophe is taken for a quote only where there is no other.
    spans += list(_spans("".join(rest), _SINGLE, _ELIDED)) or list(_spans("".join(rest), _SINGLE))
    texts = [re.sub(r"\\([\"'])", r"\1", prompt[first.end() : last.start()]) for first, last in spans]
    if found := [text for text in texts if normalised(text)]:
        several = len({normalised(text) for text in found}) > 1
        return Quoted(found[0], "has several texts in quotes" if several else "")
    unclosed = None if spans else re.search(r'(?<![^\s(])["“„«](?=\S)(.+)', prompt, re.DOTALL)
    if unclosed and normalised(unclosed[1]):
        return Quoted(unclosed[1], "has a quote that nothing closes")
    raise UnfitPromptError("has nothing to show in its quotes" if spans else "has no text in quotes", prompt)


def _spans(prompt: str, pairs: Mapping[str, str], words: re.Pattern[str] | None = None) -> Iterator[tuple[Mark, Mark]]:
    """The quotes around each text that is not inside another; those of `words` belong to the words."""
    belong = {i for word in words.finditer(prompt) for i in range(*word.span())} if words else set()
    pattern = re.compile("|".join(sorted(map(re.escape, pairs), key=len, reverse=True)))
    marks = [mark for mark in pattern.finditer(prompt) if mark.start() not in belong and not _is_apostrophe(mark)]
    unescaped = [mark for mark in marks if _beside(mark)[0] != "\\"]
    marks = unescaped if len(unescaped) > 1 else marks  # a text may end with a backslash
    at = 0
    while at < len(marks):
        end = _end(marks[at:], pairs)
        if end:
            yield marks[at], marks[at + end]
        at += end + 1


def _end(marks: Sequence[Mark], pairs: Mapping[str, str]) -> int:
    """The number of the mark that closes the first one; 0 where that opens nothing, or nothing closes it."""
    own = marks[0].group()
    if not pairs[own] or not _may_open(marks[0]):
        return 0
    depth, nearest = 1, 0
    for number, mark in enumerate(marks[1:], 1):
        closes = mark.group() in pairs[own] and _may_close(mark, own)
        if mark.group() == own and (not closes or _begins_word(mark)):
            depth += 1
        elif closes:
            depth -= 1
            nearest = nearest or number
        if depth == 0:
            return number
    return nearest or int(len(marks) > 1 and marks[1].group() in _STRAY and _may_close(marks[1], own))


def _beside(mark: Mark) -> tuple[str, str]:
    """The characters before and behind; a space at either end of the prompt."""
    start, end = mark.span()
    return mark.string[start - 1 : start] or " ", mark.string[end : end + 1] or " "


def _may_open(mark: Mark) -> bool:
    before, behind = _beside(mark)
    if mark.group() in _NEVER_BEHIND_DIGITS and unicodedata.category(before) in ("Nd", "No"):
        return False
    return mark.group() not in _AT_WORDS or not (_is_letter(before) or behind.isspace())


def _may_close(mark: Mark, opening: str) -> bool:
    before, behind = _beside(mark)
    if mark.group() in _SINGLE:
        return not (before.isspace() or _is_letter(behind))
    return mark.group() != opening or opening != "“" or not behind.isalnum()


def _begins_word(mark: Mark) -> bool:
    before, behind = _beside(mark)
    return (before.isspace() or before in "([{") and not behind.isspace()


def _is_apostrophe(mark: Mark) -> bool:
    """Inside a word, or alone."""
    before, behind = _beside(mark)
    return mark.group() in _SINGLE and (_is_letter(before) and _is_letter(behind) or (before + behind).isspace())


def _is_letter(character: str) -> bool:
    """Of a word that spaces part from others; Chinese and Japanese have none."""
    return character.isalnum() and character < "\u2e80"
