"""The paper's claims (arXiv 2605.15055, sections 3.3 and 4), each with the rule by which runs decide it.

A claim is a statement and its rule (`claims.toml`), and rows; a row is a name, the experiments that it needs, and what
is measured on one seed of them (NaN where that is undefined).
"""

from __future__ import annotations

import math
import operator
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.claims.curves import Result, Runs, area, at_evaluations, curve_from_base, monitored, rounds_to
from experiments.claims.experiments import BASELINES, TASKS, TEACHERS

HOLDS, FAILS, UNMEASURED = "holds", "does not hold", "not measured yet"
COMPARE = {"≥": operator.ge, ">": operator.gt, "≤": operator.le}
SCALE = ("base", *TEACHERS)
"""What the normalised average is measured by."""
Seed = Mapping[str, Result]
"""Experiment -> result, all of one seed."""
Row = tuple[str, Sequence[str], Callable[[Seed], float]]


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of the values; None for a single one."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


@dataclass(frozen=True)
class Part:
    """One number that has to satisfy ``value relation limit``, for the mean over the seeds that have it."""

    name: str
    relation: str
    limit: float
    values: Mapping[int, float]  # by seed
    why_none: str = ""  # why there are no values
    undefined: Sequence[int] = ()  # seeds with all runs that have no value all the same

    @property
    def mean(self) -> float | None:
        """Over the seeds; None without any."""
        return fmean(self.values.values()) if self.values else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean over seeds; None for a single one."""
        return standard_error(list(self.values.values()))

    @property
    def is_close(self) -> bool:
        """Whether the mean is less than its standard error away from the limit."""
        return self.mean is not None and abs(self.mean - self.limit) < (self.standard_error or 0.0)

    @property
    def verdict(self) -> str:
        """`HOLDS` or `FAILS` for the mean, `UNMEASURED` without one."""
        return UNMEASURED if self.mean is None else HOLDS if self._satisfied(self.mean) else FAILS

    @property
    def seeds_that_hold(self) -> int:
        """How many seeds satisfy the relation, each by itself."""
        return sum(map(self._satisfied, self.values.values()))

    def _satisfied(self, value: float) -> bool:
        return bool(COMPARE[self.relation](value, self.limit))


@dataclass(frozen=True)
class Claim:
    """What is claimed, how it is decided, and the numbers."""

    statement: str
    rule: str
    parts: Sequence[Part]

    @property
    def verdict(self) -> str:
        """A part that fails decides; else every part has to be measured."""
        found = {part.verdict for part in self.parts}
        return next(verdict for verdict in (FAILS, UNMEASURED, HOLDS) if verdict in found)


def claims(runs: Runs, variance: Mapping[str, Any] | None) -> list[Claim]:
    """All claims; ``variance`` is the content of ``variance.json``, None before it was measured."""
    found = []
    for c in tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))["claims"]:
        rows = ROWS[c["rows"]]() if c["rows"] in ROWS else ()
        parts = [_part(runs, c["relation"], c["limit"], *row) for row in rows] or list(_estimators(variance))
        found.append(Claim(c["statement"], c["rule"], parts))
    return found


def _part(
    runs: Runs, relation: str, limit: float, name: str, needs: Sequence[str], measure: Callable[[Seed], float]
) -> Part:
    """A row on every seed for which all the needed runs are there."""
    found = {seed: measure(one) for seed, one in _seeds(runs, needs).items()}
    values = {seed: value for seed, value in found.items() if not math.isnan(value)}
    why_none = ""
    if missing := [name for name in needs if not runs.get(name)]:
        why_none = f"no run of {', '.join(missing)}"
    elif not found:
        why_none = f"no seed has all of {', '.join(needs)}"
    elif not values:
        why_none = "undefined: no gap to measure by, no curve, or a level never reached"
    return Part(name, relation, limit, values, why_none, tuple(seed for seed in found if seed not in values))


def _seeds(runs: Runs, needs: Sequence[str]) -> dict[int, Seed]:
    """Seed -> the needed experiments' results, of the seeds that have them all."""
    shared = sorted(set.intersection(*(set(runs.get(name, {})) for name in needs)))
    return {seed: {name: runs[name][seed] for name in needs} for seed in shared}


# ---- teachers and student --------------------------------------------------------------------------------------------


def _teachers() -> Iterator[Row]:
    for teacher in (*TEACHERS, "guard_scene"):
        algorithm, task = teacher.split("_")
        needs = ("base", f"shipped_{task}", teacher)
        yield f"{task}, {'GRPO-Guard' if algorithm == 'guard' else 'NFT'}", needs, partial(_share_of_gap, task)


def _share_of_gap(task: str, seed: Seed) -> float:
    base, shipped, own = (result.final[task].mean for result in seed.values())
    return (own - base) / (shipped - base) if shipped > base else math.nan


def _student() -> Iterator[Row]:
    return ((task, ("opd", teacher), partial(_share, task)) for task, teacher in zip(TASKS, TEACHERS, strict=True))


def _share(task: str, seed: Seed) -> float:
    student, teacher = (result.final[task].mean for result in seed.values())
    return student / teacher if teacher > 0 else math.nan


# ---- averages --------------------------------------------------------------------------------------------------------


def normalised_average(seed: Seed, scores: Mapping[str, float]) -> float:
    """Mean over tasks of ``(score - lowest) / (highest - lowest)``, over base and the seed's teachers on all prompts.

    This scale does not depend on what is compared on it. NaN where all of them score the same.
    """
    parts = []
    for task in TASKS:
        levels = [seed[name].final[task].mean for name in SCALE]
        low, high = min(levels), max(levels)
        parts.append((scores[task] - low) / (high - low) if low < high else math.nan)
    return sum(parts) / len(TASKS)


def averages(runs: Runs, experiment: str) -> dict[int, float]:
    """Seed -> normalised average of the finished model, of the seeds that have it, the base and the teachers."""
    found = _seeds(runs, (*SCALE, experiment)).items()
    every = {seed: normalised_average(one, one[experiment].means()) for seed, one in found}
    return {seed: average for seed, average in every.items() if not math.isnan(average)}


def _lead(name: str, other: str, cost: Callable[..., float], seed: Seed) -> float:
    """Normalised average of one run minus another's after ``cost`` (of both) evaluations, on the same prompts for both.

    NaN where either has no curve or nothing can be normalised.
    """
    pair = (seed[name], seed[other])
    if not all(result.curve for result in pair):
        return math.nan
    evaluations = cost(*pair)
    if all(evaluations >= result.evaluations for result in pair):
        scores = [result.means() for result in pair]
    else:
        scores = [at_evaluations(curve_from_base(result, seed["base"]), evaluations) for result in pair]
    first, second = (normalised_average(seed, each) for each in scores)
    return first - second


def _equal_cost() -> Iterator[Row]:
    costs: dict[str, Callable[..., float]]
    costs = {"with": lambda opd, other: opd.with_teachers, "without": lambda opd, other: opd.evaluations}
    for word, cost in costs.items():
        for baseline in BASELINES:
            measure = partial(_lead, "opd", baseline, cost)
            yield f"{baseline}, {word} the teachers' cost", (*SCALE, "opd", baseline), measure


def lead_over_the_best(runs: Runs, baseline: str) -> dict[int, float]:
    """Seed -> average of the student minus that of the baseline at its best monitored point, teachers' cost counted in.

    The best of many noisy points flatters the baseline; at the end of its run a training that collapsed flatters the
    student. The truth is between the two.
    """
    found = {}
    for seed, one in _seeds(runs, (*SCALE, "opd", baseline)).items():
        points = [p.scores for p in one[baseline].curve if p.evaluations <= one["opd"].with_teachers]
        best = max((normalised_average(one, scores) for scores in points), default=math.nan)
        lead = normalised_average(one, {task: monitored(one["opd"], task) for task in TASKS}) - best
        if not math.isnan(lead):
            found[seed] = lead
    return found


def beside_teachers(runs: Runs, baseline: str) -> dict[str, dict[int, float]]:
    """Task -> seed -> score of one model of all tasks minus the teacher's, at equal evaluations in all.

    The baseline's curve is read where it has cost as much as the three teachers together, on the monitored prompts as
    theirs: about 0 means that the tasks learn side by side as well as alone, below 0 that they fight.
    """
    found: dict[str, dict[int, float]] = {task: {} for task in TASKS}
    for seed, one in _seeds(runs, (*SCALE, baseline)).items():
        other, teachers = one[baseline], [one[name] for name in TEACHERS]
        if all(result.curve for result in (other, *teachers)):
            cost = sum(teacher.evaluations for teacher in teachers)
            scores = at_evaluations(curve_from_base(other, one["base"]), cost)
            for task, teacher in zip(TASKS, teachers, strict=True):
                found[task][seed] = scores[task] - monitored(teacher, task)
    return found


def _closed_form() -> Iterator[Row]:
    for noise in ("03", "07"):
        pair = (f"opd_noise{noise}", f"ppo_noise{noise}")
        final = partial(_lead, *pair, lambda *both: min(result.evaluations for result in both))
        for name, measure in {"final": final, "area": partial(_lead_in_area, pair)}.items():
            yield f"noise 0.{noise[1]}, {name}", (*SCALE, *pair), measure


def _lead_in_area(pair: Sequence[str], seed: Seed) -> float:
    """Difference of the normalised averages, each a mean over the rounds from 0 to the end of the shorter curve."""
    curves = [curve_from_base(seed[name], seed["base"]) for name in pair]
    if not all(curves):
        return math.nan
    end = min(curve[-1].round for curve in curves)
    first, second = (area([(p.round, normalised_average(seed, p.scores)) for p in curve], end) for curve in curves)
    return first - second


# ---- speed, estimators -----------------------------------------------------------------------------------------------


def _speeds() -> Iterator[Row]:
    levels: dict[str, Callable[[float, float], float]]
    levels = {"90%": lambda base, teacher: 0.9 * teacher, "half of the gap": lambda base, teacher: (base + teacher) / 2}
    for name, level in levels.items():
        for task, teacher in zip(TASKS, TEACHERS, strict=True):
            yield f"{task}, {name}", ("base", teacher, "opd_noise00", "opd_noise07"), partial(_speed, task, level)


def _speed(task: str, level: Callable[[float, float], float], seed: Seed) -> float:
    """Rounds of noise 0.7 over rounds of the ODE to the level; NaN without curves, where neither gets there, or where
    the base is there already.
    """
    base, teacher, *pair = seed.values()
    start, goal = monitored(base, task), level(monitored(base, task), monitored(teacher, task))
    if start >= goal or not all(result.curve for result in (teacher, *pair)):
        return math.nan
    ode, noisy = (rounds_to(curve_from_base(result, base), task, goal) for result in pair)
    if ode is None:
        return math.nan if noisy is None else 0.0
    return (pair[1].curve[-1].round if noisy is None else noisy) / ode


def _estimators(variance: Mapping[str, Any] | None) -> Iterator[Part]:
    """Means of ratios over the measured states of each noise level, so that no step outweighs the others."""
    rules = {
        "difference of measured and predicted variance": ("≤", 0.25),
        "squared error of the mean / that expected": ("≤", 1.5),
        "noise / total variance": (">", 0.5),
    }
    if variance is None:
        reason = "no variance.json: python experiments/claims/variance.py"
        yield from (Part(name, *rule, {}, reason) for name, rule in rules.items())
        return
    for level in variance["settings"]["levels"]:
        states = [state for state in variance["states"] if state["noise"] == level]
        values = (
            abs(fmean(state["variance"] / state["predicted"] for state in states) - 1),
            fmean(state["error"] / state["variance"] for state in states),
            fmean(state["variance"] / (state["variance"] + state["between_pictures"]) for state in states),
        )
        for (name, rule), value in zip(rules.items(), values, strict=True):
            yield Part(f"noise {level}, {name}", *rule, {variance["settings"]["seed"]: value})


ROWS = {
    "teachers": _teachers,
    "student": _student,
    "equal_cost": _equal_cost,
    "closed_form": _closed_form,
    "speeds": _speeds,
}
"""`rows` of `claims.toml` -> what is measured."""
