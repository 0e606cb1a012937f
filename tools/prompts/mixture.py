"""How many prompts of each kind a generated file gets, and which: sampling without replacement from numbered spaces."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from diffusionopd.data.prompts import PromptError

T = TypeVar("T")


def allocate(count: int, weights: Mapping[str, float], available: Mapping[str, int]) -> dict[str, int]:
    """Split `count` in proportion to the weights, but no kind beyond what it has; the others share the rest.

    Raises:
        PromptError: all kinds of positive weight together have fewer than `count`; the message says how many.
    """
    weights = {kind: weight for kind, weight in weights.items() if weight > 0}
    maximum = sum(available[kind] for kind in weights)
    if not 0 < count <= maximum:
        raise PromptError(f"--count {count} is outside what can be generated: 1 to {maximum} different prompts")
    full: dict[str, int] = {}
    while True:
        unfilled = {kind: weight for kind, weight in weights.items() if kind not in full}
        shares = apportion(count - sum(full.values()), unfilled) if unfilled else {}
        exceeded = {kind: available[kind] for kind, share in shares.items() if share >= available[kind]}
        if not exceeded:
            return full | shares
        full |= exceeded


def apportion(count: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Split `count` in proportion to the weights; what rounding leaves goes to the largest remainders."""
    total = sum(weights.values())
    exact = {kind: count * weight / total for kind, weight in weights.items()}
    shares = {kind: int(value) for kind, value in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: shares[kind] - exact[kind])  # stable: ties in the order given
    for kind in by_remainder[: count - sum(shares.values())]:
        shares[kind] += 1
    return shares


def drawn(size: int, make: Callable[[int], T], accepted: Callable[[T], bool], limit: int, key: str) -> list[T]:
    """Up to `limit` accepted members of a space of `size`, each once, in an order that depends on the key alone."""
    return list(itertools.islice(filter(accepted, map(make, _permutation(size, random.Random(key)))), limit))


def _permutation(size: int, rng: random.Random) -> Iterator[int]:
    """The numbers below `size` in random order: Fisher-Yates that stores only what it has moved."""
    moved: dict[int, int] = {}
    for i in range(size):
        j = rng.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)


def shuffled(items: Iterable[T], key: str) -> list[T]:
    """The items in an order that depends on the key and their number alone."""
    result = list(items)
    random.Random(key).shuffle(result)
    return result
