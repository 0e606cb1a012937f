"""GenEval's judgement of an image: what its prompt asks for against what was detected (arXiv 2310.11513).

Constants and the official verdict are those of evaluation/evaluate_images.py in github.com/djghosh13/geneval; the
strict verdict and the partial credit follow the reward server of Flow-GRPO (github.com/yifan123/reward-server).
Coordinates are pixels, x to the right, y downwards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusionopd.rewards.base import UnfitPromptError
from diffusionopd.rewards.geneval.classes import CLASSES, COLOURS, POSITIONS, TAGS

THRESHOLD = 0.3
"""Score above which a detection is an object."""
COUNTING_THRESHOLD = 0.9
"""The same for prompts of the tag `counting`."""
MAX_OBJECTS = 16
"""Objects of one class that an image may have; the rest is ignored."""
POSITION_THRESHOLD = 0.1
"""Share of the two sizes by which centres must be apart before their offset counts."""


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


@dataclass(frozen=True, eq=False)
class Detection:
    """An object: its box (left, top, right, bottom), the detector's score in [0, 1], and its mask, bool `[H, W]`."""

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray


Objects = Mapping[str, Sequence[Detection]]
"""Class name -> its detections."""

ClassifyColours = Callable[[str, Sequence[Detection]], Sequence[str]]
"""(class name, detections) -> the colour of each."""


@dataclass(frozen=True)
class Verdict:
    """`correct`: GenEval's own. `strict`: with exactly `count` objects. `soft`: partial credit in [0, 1]."""

    correct: bool
    strict: bool
    soft: float


def select_objects(detections: Objects, tag: str) -> dict[str, list[Detection]]:
    """The detections that count as objects, best first, at most `MAX_OBJECTS` of a class."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects = {}
    for name, found in detections.items():
        sure = [detection for detection in found if detection.score > threshold]
        objects[name] = sorted(sure, key=lambda detection: detection.score, reverse=True)[:MAX_OBJECTS]
    return objects


def relative_position(a: Detection, b: Detection) -> set[str]:
    """Where A is relative to B: none, one or two of left of, right of, above, below.

    The offset of the centres is shortened on each axis by `POSITION_THRESHOLD (size_A + size_B)`, at most to zero, and
    divided by its unshortened length; an axis counts from one half, that is 30 degrees off the other axis.
    """
    corners_a, corners_b = (np.asarray(item.box, dtype=np.float64).reshape(2, 2) for item in (a, b))
    offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)
    sizes = np.abs(np.diff(corners_a, axis=0)[0]) + np.abs(np.diff(corners_b, axis=0)[0])
    clear = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if (np.abs(clear) < 1e-3).all():
        return set()
    dx, dy = clear / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, is_so in holds.items() if is_so}


@dataclass(frozen=True)
class _Outcome:
    """How one clause went. `chosen` are the objects that others are compared with."""

    chosen: Sequence[Detection]
    matched: bool
    strict: bool
    credits: tuple[float, ...]


def judge(objects: Objects, request: Request, classify_colours: ClassifyColours) -> Verdict:
    """Judge the selected objects of an image (`select_objects`) against what its prompt asks for.

    Official: each clause needs at least `count` objects of its class, and looks at the `count` best of them only. All
    of these must have the colour, and all must stand in the relation to all chosen objects of the other clause, which
    must have matched itself. A class with `count` objects or more fails an exclude clause.

    Strict: the same, with exactly `count` objects in every include clause.

    Soft: mean over the parts of the include clauses. A count n gives `max(0, 1 - |n - count| / count)`; a colour the
    share of objects that have it, a position 1 if it holds strictly, both 0 where the count is wrong. The reward server
    differs where it errs: its count credit may be negative, its failed position adds a 0 and a 1, and its strict
    verdict does not see exclude clauses.
    """
    outcomes: list[_Outcome] = []
    for clause in request.include:
        outcomes.append(_judge_clause(objects, clause, outcomes, classify_colours))
    allowed = all(len(objects.get(clause.class_name, ())) < clause.count for clause in request.exclude)
    return Verdict(
        correct=allowed and all(outcome.matched for outcome in outcomes),
        strict=allowed and all(outcome.strict for outcome in outcomes),
        soft=float(np.mean([credit for outcome in outcomes for credit in outcome.credits])),
    )


def _judge_clause(
    objects: Objects, clause: Clause, earlier: Sequence[_Outcome], classify_colours: ClassifyColours
) -> _Outcome:
    found = objects.get(clause.class_name, ())
    chosen, exact = found[: clause.count], len(found) == clause.count
    credits = [max(0.0, 1 - abs(len(found) - clause.count) / clause.count)]
    matched, strict = len(found) >= clause.count, exact
    if clause.colour is not None:
        right = list(classify_colours(clause.class_name, chosen)).count(clause.colour) if matched else 0
        matched = matched and right == clause.count
        strict = strict and matched
        credits.append(right / clause.count if exact else 0.0)
    if clause.position is not None:
        relation, target = clause.position[0], earlier[clause.position[1]]
        matched = matched and target.matched and _all_stand(chosen, relation, target.chosen)
        strict = strict and matched and target.strict
        credits.append(float(strict))
    return _Outcome(chosen, matched, strict, tuple(credits))


def _all_stand(objects: Sequence[Detection], relation: str, targets: Sequence[Detection]) -> bool:
    return all(relation in relative_position(a, b) for a in objects for b in targets)


def parse_request(prompt: str, metadata: Mapping[str, Any]) -> Request:
    """Metadata such as `{"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [...]}`.

    Raises:
        UnfitPromptError: what is missing or not GenEval's.
    """
    try:
        include, exclude = (
            tuple(_clause(entry, index) for index, entry in enumerate(metadata.get(name) or ()))
            for name in ("include", "exclude")
        )
        if not include:
            raise ValueError("'include' is missing or empty")
        return Request(_one_of(metadata.get("tag"), TAGS), include, exclude)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        needed = '{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": ...}'
        raise UnfitPromptError(f"lacks metadata as in GenEval's files ({error!r}): {needed}", prompt) from error


def _clause(entry: Mapping[str, Any], index: int) -> Clause:
    count, colour, position = entry["count"], entry.get("color"), entry.get("position")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count {count!r} is no whole number of at least 1")
    if position is not None:
        relation, target = position
        position = _one_of(relation, POSITIONS), _one_of(target, range(index))  # later clauses are not judged yet
    return Clause(_one_of(entry["class"], CLASSES), count, colour and _one_of(colour, COLOURS), position)


def _one_of(given: Any, known: Sequence[Any]) -> Any:
    if given not in known:
        raise ValueError(f"{given!r} is none of {', '.join(map(str, known))}")
    return given
