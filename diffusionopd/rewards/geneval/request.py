"""What a prompt asks for: the metadata of GenEval's prompt files, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusionopd.rewards.base import RewardError
from diffusionopd.rewards.geneval.classes import CLASSES, COLOURS, POSITIONS, TAGS


@dataclass(frozen=True)
class Clause:
    """`count` objects of a class; if stated, of one colour, or standing in a relation to the objects of another clause.

    `position` is (relation, index of that other clause in `include`).
    """

    class_name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Request:
    """A prompt's clauses: all of `include` must hold, and none of `exclude`."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def parse_request(prompt: str, metadata: Mapping[str, Any]) -> Request:
    """Metadata such as `{"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [...]}`.

    Raises:
        RewardError: what is missing or not GenEval's, with the prompt.
    """
    try:
        tag = _one_of("tag", metadata.get("tag"), TAGS)
        include = _clauses("include", metadata.get("include"))
        if not include:
            raise ValueError("'include' is missing or empty")
        return Request(tag, include, _clauses("exclude", metadata.get("exclude", ())))
    except ValueError as error:
        raise RewardError(
            f"reward 'geneval' cannot judge the prompt {prompt!r}: {error}. It needs metadata as in GenEval's "
            'test_metadata.jsonl: {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": ...}'
        ) from error


def _clauses(name: str, given: Any) -> tuple[Clause, ...]:
    entries = [] if given is None else given
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ValueError(f"'{name}' is {given!r}, no list of clauses")
    return tuple(_clause(f"{name}[{i}]", entry, i) for i, entry in enumerate(entries))


def _clause(name: str, entry: Any, index: int) -> Clause:
    if not isinstance(entry, Mapping):
        raise ValueError(f"'{name}' is {entry!r}, no clause")
    count = entry.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"'{name}.count' is {count!r}, no whole number of at least 1")
    colour = entry.get("color")
    return Clause(
        class_name=_one_of(f"{name}.class", entry.get("class"), CLASSES),
        count=count,
        colour=None if colour is None else _one_of(f"{name}.color", colour, COLOURS),
        position=_position(f"{name}.position", entry.get("position"), index),
    )


def _position(name: str, given: Any, index: int) -> tuple[str, int] | None:
    """A relation to an earlier clause: later ones are not judged yet."""
    if given is None:
        return None
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise ValueError(f"'{name}' is {given!r}, no pair of a relation and the index of a clause")
    relation, target = given
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < index:
        raise ValueError(f"'{name}' points to clause {target!r}, which is none before clause {index}")
    return _one_of(name, relation, POSITIONS), target


def _one_of(name: str, given: Any, known: Sequence[str]) -> str:
    if not isinstance(given, str) or given not in known:
        shown = ", ".join(known) if len(known) <= 10 else f"one of GenEval's {len(known)} classes"
        raise ValueError(f"'{name}' is {given!r}, not {shown}")
    return given
