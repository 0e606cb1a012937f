"""What is wrong with a configuration, collected so that all of it is reported together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be run. ``problems`` lists what is wrong, where, and what to do about it."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in the configuration:" + "".join(f"\n  - {problem}" for problem in self.problems))


class Problems:
    """Collects what is wrong, and remembers which keys are unusable, so that later checks do not build on them.

    What is wrong with a key that ends in one of ``ignored`` is not reported.
    """

    def __init__(self, ignored: tuple[str, ...] = ()) -> None:
        self.found: list[str] = []
        self._bad: set[str] = set()
        self._ignored = ignored

    def add(self, key: str, what: str, remedy: str) -> None:
        """Note that ``key`` is unusable: ``what`` is wrong (a predicate) and what to do about it."""
        self._bad.add(key)
        if not key.endswith(self._ignored):
            self.found.append(f"{key} {what}. {remedy}".rstrip())

    def add_together(self, keys: list[str], what: str, remedy: str, said: bool = True) -> None:
        """Note that several keys are unusable for one reason, ``what`` they are, in one line, or in none."""
        self._bad.update(keys)
        if said:
            self.found.append(f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} {what}. {remedy}".rstrip())

    def good(self, *keys: str) -> bool:
        """Whether nothing has been found wrong with any of ``keys``, so that checks may build on their values."""
        return not self._bad.intersection(keys)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean X?`` for the known name most like ``name``, or an empty string."""
    candidates = list(known)
    found = difflib.get_close_matches(name, candidates, n=1)
    if not found and "." in name:  # the right key in the wrong section
        leaf = name.rpartition(".")[2]
        found = [candidate for candidate in candidates if candidate.rpartition(".")[2] == leaf][:1]
    return f" Did you mean {found[0]}?" if found else ""
