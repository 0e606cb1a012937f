"""Questions of one's own, from a YAML file: what is asked about each image and how answers become a score."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffusionopd.config_schema import is_number
from diffusionopd.files import located, looked_in
from diffusionopd.rewards.base import RewardError
from diffusionopd.rewards.judges.ask import yes_or_no
from diffusionopd.rewards.judges.server import Answer

_KEYS = {"name", "ask", "answer", "probability", "number", "range", "weight", "needs"}
_FILE_KEYS = {"questions", "system", "max_tokens", "average"}
AVERAGES = ("arithmetic", "geometric")


@dataclass(frozen=True)
class OwnQuestion:
    """One question. `answer` are the right words, or `number` finds a number of `range` in the answer."""

    name: str
    ask: str
    answer: tuple[str, ...] = ()
    probability: bool = False
    number: str = ""
    range: tuple[float, float] = (0.0, 1.0)
    weight: float = 1.0
    needs: tuple[str, ...] = ()

    def read(self, answer: Answer) -> float | None:
        """The score in [0, 1] of an answer; None if it cannot be read."""
        if self.number:
            found = re.search(self.number, answer.text)
            low, high = self.range
            try:
                value = float(found[1]) if found else low - 1
            except (ValueError, TypeError):  # the group holds no number, or took no part
                return None
            return (value - low) / (high - low) if low <= value <= high else None
        asks_yes_or_no = bool({"yes", "no"} & set(self.answer))
        if self.probability:
            listed = [(token.strip().lower(), p) for token, p in answer.first.items()]
            known = {*self.answer, *(("yes", "no") if asks_yes_or_no else ())}
            if not any(word in known for word, _ in listed):
                return None
            return min(1.0, sum(p for word, p in listed if word in self.answer))
        if answer.word() in self.answer:
            return 1.0
        wrong = yes_or_no(answer) is not None if asks_yes_or_no else answer.word()
        return 0.0 if wrong else None


@dataclass(frozen=True)
class Questionnaire:
    """The content of a file."""

    questions: tuple[OwnQuestion, ...]
    system: str = ""
    max_tokens: int = 1024
    average: str = "arithmetic"


def load_questions(path: str) -> Questionnaire:
    """The questions of a YAML file; docs/rewards.md has its form.

    Raises:
        RewardError: it is missing, no YAML, or of another form: everything that is wrong with it.
    """
    place = Path(located(path))
    try:
        content = yaml.safe_load(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RewardError(f"there are no questions in {path}: it does not exist{looked_in(path)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RewardError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(given := content.get("questions"), list) or not given:
        raise RewardError(f"{path} has no list 'questions'")
    found = [f"has the key {key!r}, not one of {', '.join(sorted(_FILE_KEYS))}" for key in content.keys() - _FILE_KEYS]
    if content.get("average", AVERAGES[0]) not in AVERAGES:
        found.append(f"average must be one of {', '.join(AVERAGES)}, not {content['average']!r}")
    if not isinstance(tokens := content.get("max_tokens", 1), int) or tokens < 1:
        found.append(f"max_tokens must be at least 1, not {tokens!r}")
    if not isinstance(content.get("system", ""), str):
        found.append("system must be text")
    before: set[str] = set()
    for number, each in enumerate(given, 1):
        own = each.get("name") if isinstance(each, dict) else None
        found += [f"question {number}{f' ({own})' if own else ''} {what}" for what in _problems(each, before)]
        before.add(str(own))
    if found:
        raise RewardError(f"{path}: " + "; ".join(found))
    rest = {key: value for key, value in content.items() if key != "questions"}
    return Questionnaire(tuple(_question(each) for each in given), **rest)


def _problems(given: Any, before: set[str]) -> list[str]:
    """What is wrong with a question; ``before``: the names of those before it."""
    if not isinstance(given, dict):
        return [f"must be {{key: value}}, not {given!r}"]
    found = [f"has the key {key!r}, not one of {', '.join(sorted(_KEYS))}" for key in given.keys() - _KEYS]
    name = given.get("name")
    if not isinstance(name, str) or not name.isidentifier():
        found.append(f"needs a name of letters, digits and _, not {name!r}")
    elif name in before or name == "unparsable":
        found.append("has a name that is taken")
    if not isinstance(given.get("ask"), str) or not given["ask"].strip():
        found.append("needs 'ask', the text of the question")
    if ("answer" in given) == ("number" in given):
        found.append("needs either 'answer', the right words, or 'number', a pattern that finds a number")
    words = given.get("answer", "yes")
    if lost := [word for word in (words if isinstance(words, list) else [words]) if not _is_word(word)]:
        found.append(
            f"has an answer that is not one word of letters and digits: {', '.join(map(repr, lost))} (YAML takes yes "
            "and no for true and false: quote them)"
        )
    if "number" in given:
        found += _number_problems(given)
    if not isinstance(given.get("probability", False), bool) or ("probability" in given and "number" in given):
        found.append("can have 'probability' true or false, beside 'answer' only")
    if not is_number(weight := given.get("weight", 1)) or weight <= 0:
        found.append(f"has a weight that is not above 0: {weight!r}")
    if not isinstance(needs := given.get("needs", []), list) or not all(isinstance(each, str) for each in needs):
        found.append(f"must have a list of names as 'needs', not {needs!r}")
    elif lost := [each for each in needs if each not in before]:
        found.append(f"needs {', '.join(lost)}, which no question before it is called")
    return found


def _is_word(value: Any) -> bool:
    """Whether it is what `Answer.word` may give."""
    return isinstance(value, str) and re.fullmatch(r"\w+", value.strip()) is not None


def _number_problems(given: Mapping[str, Any]) -> list[str]:
    found = []
    try:
        if re.compile(str(given["number"])).groups != 1:
            found.append("must have one group in the pattern of 'number'")
    except re.error as error:
        found.append(f"has a pattern in 'number' that is none: {error}")
    limits = given.get("range")
    if not (isinstance(limits, list) and len(limits) == 2 and all(map(is_number, limits)) and limits[0] < limits[1]):
        found.append(f"needs 'range', the worst and the best number: [1, 5], not {limits!r}")
    return found


def _question(given: Mapping[str, Any]) -> OwnQuestion:
    words = given.get("answer", [])
    right = tuple(word.strip().lower() for word in (words if isinstance(words, list) else [words]))
    low, high = given.get("range", (0.0, 1.0))
    values = {"answer": right, "range": (float(low), float(high)), "needs": tuple(given.get("needs", ()))}
    return OwnQuestion(**{**given, **values})
