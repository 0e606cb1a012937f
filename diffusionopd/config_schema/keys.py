"""Configuration keys, each declared once, beside the code that reads it.

    @dataclass(frozen=True)
    class NftSettings:
        nft_beta: float = key("train.nft_beta", 1.0, "(0, inf)")
        'How far the two implicit policies are from the old one.'

A group of keys is a dataclass, and the text under a field says what the key does; ``read(NftSettings, values)`` makes
one from a flat configuration. The check before weights load, the command line, ``docs/configuration.md`` and the resume
rules follow from the declarations.
"""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from ml_collections import ConfigDict

from diffusionopd.config_schema.problems import Problems, nearest
from diffusionopd.files import located, user_path

T = TypeVar("T")
SECTIONS = ("pretrained", "sample", "train")
_JSON = "numbers, strings, True, False, None, and lists and dicts of them"

# What a resumed run does about a changed value.
REFUSE = "refused"  # it would be another experiment
FREE = "free"
ROUND = "as a round"  # free as long as a round of all processes stays the same
TEACHERS = "refused with teachers"
REWARDS = "refused when trained on"

# What a path is for; each is a function that says where it leads.
READ: Callable[[str], str] = located
WRITE: Callable[[str], str] = user_path


@dataclass(frozen=True)
class Key:
    """The declaration of one key. Its type is that of its default; a string may be None."""

    name: str  # as on the command line, such as "train.learning_rate"
    default: Any
    interval: str = ""  # of a number, such as "[0, 1)"
    choices: Collection[Any] = ()
    form: tuple[str, Callable[[Any], bool]] | None = None  # (what it must be, whether a value is)
    resume: str = REFUSE
    used: bool = True  # False: accepted because existing files set it
    optional: bool = False  # None is a value of its own
    from_model: str = ""  # None stands for the base model's own: this field of its family's defaults
    path: Callable[[str], str] | None = None  # READ or WRITE, of a path or a list of them
    group: type | None = None

    def problem(self, value: Any) -> tuple[str, str] | None:
        """What is wrong with ``value`` and the remedy; None if nothing is."""
        if value is None and (self.optional or self.from_model):
            return None
        expected, fits = _type_of(self.default)
        wrong = ""
        if not fits(value) and not self.optional:
            wrong = f"{expected}."
        elif self.choices and value not in self.choices:
            choices = ", ".join(map(repr, self.choices))
            wrong = f"one of {choices}.{nearest(str(value), map(str, self.choices))}"
        elif self.form and not self.form[1](value):
            wrong = f"{self.form[0]}."
        elif self.interval and not _inside(value, self.interval):
            wrong = f"{expected} in {self.interval}."
        elif self.path and value:
            try:
                self.placed(value)
            except ValueError as error:
                return f"is {value!r}", f"{error}."
        else:
            for place, what in unwritable(value, self.name):
                return f"has {what} at {place}", f"It is saved as JSON: give {_JSON}."
        return (f"is {value!r}", f"It must be {wrong}") if wrong else None

    def placed(self, value: Any) -> Any:
        """A path, or each of a list, as it leads from here; anything else as it is. Raises ValueError."""
        if isinstance(value, list | tuple):
            return [self.placed(each) for each in value]
        return self.path(value) if self.path and isinstance(value, str) else value


def key(name: str, default: Any, interval: str = "", **options: Any) -> Any:
    """A dataclass field that declares a :class:`Key`; ``options`` are its other fields."""
    declared = Key(name, default, interval, **options)
    return field(default_factory=lambda: copy.deepcopy(default), metadata={"key": declared})


def keys_of(group: type) -> dict[str, Key]:
    """Field name -> key, of a group and what it derives from."""
    return {f.name: replace(f.metadata["key"], group=group) for f in fields(group) if "key" in f.metadata}


def read(group: type[T], values: Mapping[str, Any]) -> T:
    """The settings of a group, from a flat configuration that was checked; lists become tuples."""
    found = {name: values[declared.name] for name, declared in keys_of(group).items()}
    return group(**{name: tuple(v) if isinstance(v, list) else v for name, v in found.items()})


class Schema:
    """The keys of several groups, by name. A key that several groups share is declared in one they derive from."""

    def __init__(self, *groups: type) -> None:
        self.keys: dict[str, Key] = {}
        for group in groups:
            for declared in keys_of(group).values():
                self.keys.setdefault(declared.name, declared)

    def defaults(self) -> dict[str, Any]:
        """A fresh copy of the defaults, flat."""
        return {name: copy.deepcopy(declared.default) for name, declared in self.keys.items()}

    def config(self) -> ConfigDict:
        """A fresh copy of the defaults, as configuration files start from them."""
        config = ConfigDict({section: {} for section in SECTIONS}, type_safe=False)
        for name, value in self.defaults().items():
            section, _, leaf = name.rpartition(".")
            (config[section] if section else config)[leaf] = value
        return config

    def left_to_model(self, values: Mapping[str, Any]) -> dict[str, str]:
        """The keys of a flat configuration that are None for the base model's own value -> the field that has it."""
        keys = self.keys.values()
        return {key.name: key.from_model for key in keys if key.from_model and values.get(key.name, "") is None}

    def check(self, values: Mapping[str, Any], used: Callable[[str], bool], problems: Problems) -> None:
        """Names, types, ranges and choices; values of keys that are not ``used`` are not looked at."""
        for name in sorted(values.keys() - self.keys.keys()):
            remedy = nearest(name, self.keys).strip() or "docs/configuration.md has all."
            problems.add(name, "is not a configuration key", remedy)
        for name in sorted(self.keys.keys() - values.keys()):
            problems.add(name, "is missing", "Start from the defaults in config/base.py.")
        for name, declared in self.keys.items():
            if name in values and used(name) and (problem := declared.problem(values[name])):
                problems.add(name, *problem)


def placed(values: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """``values`` with the paths among them as they lead from here; what `Key.problem` refuses is left as it is."""
    result = dict(values)
    for name, declared in keys.items():
        if declared.path and name in values:
            with suppress(ValueError):
                result[name] = declared.placed(values[name])
    return result


def unwritable(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Places in a value, itself at ``place``, of what JSON does not hold as it is, and what is there."""
    if isinstance(value, Mapping):
        yield from ((place, f"the name {name!r}") for name in value if not isinstance(name, str))
        for name, inner in value.items():
            yield from unwritable(inner, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from unwritable(inner, f"{place}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield place, repr(value)
    elif value is not None and not isinstance(value, str | int | float):
        yield place, f"a {type(value).__name__}"


def to_plain(value: Any) -> Any:
    """``value`` with every ConfigDict in it, also inside lists, turned into a dict."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {name: to_plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_plain(inner) for inner in value)
    return value


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Keys as on the command line: ``{"seed": .., "sample.num_steps": .., ..}``; lists and inner dicts stay values."""
    flat: dict[str, Any] = {}
    for name, value in to_plain(config).items():
        if name in SECTIONS and isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[name] = value
    return flat


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold; not NaN, not infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_device(value: str | None) -> bool:
    """Whether it can name a device: empty, cpu, cuda or cuda:<n>."""
    return re.fullmatch(r"(cpu|cuda(:\d+)?)?", value or "") is not None


def comparable(value: Any) -> Any:
    """``value`` as it comes back from JSON, with a word for what cannot; None is unset."""
    text = json.dumps(value, default=lambda other: f"a {type(other).__name__}", skipkeys=True)
    return "" if value is None else json.loads(text)


def unset(value: str | None) -> bool:
    """Whether a string key has no value: None, blank, or the word that command lines write for None."""
    return value is None or not value.strip() or value.strip().lower() == "none"


def _type_of(default: Any) -> tuple[str, Callable[[Any], bool]]:
    """What values of a key are called, and which they are, by its default."""
    if isinstance(default, bool):
        return "True or False", lambda value: isinstance(value, bool)
    if isinstance(default, int):
        return "an integer", lambda value: type(value) is int and abs(value) < 2**63
    if isinstance(default, float):
        return "a finite number", is_number
    if isinstance(default, dict):
        return "a dict", lambda value: isinstance(value, dict)
    if isinstance(default, list | tuple):
        return "a list", lambda value: isinstance(value, list | tuple)
    return "a string or None", lambda value: value is None or isinstance(value, str)


def _inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval.startswith("[") else value > low
    return above and (value <= high if interval.endswith("]") else value < high)
