"""The paper's claims (arXiv 2605.15055, sections 3.3 and 4) in a world, each with the rule by which runs decide it.

A number is decided where it is further from its limit than its 95% bound. The bound has two errors, shown apart: that
over prompts (of the differences, paired, clustered by what a split may not tear apart) and that over seeds, each with
Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from experiments.claims.results import Runs, rounds_to
from experiments.claims.worlds import WORLDS, World

HOLDS, FAILS, UNDECIDED, UNMEASURED = "holds", "does not hold", "undecided", "not measured yet"
MOST_SEEDS = 20
Terms = Sequence[tuple[float, str, str]]
"""A weighted sum of scores: (weight, run, task)."""


@dataclass(frozen=True)
class Part:
    """One number that has to be above 0; ``about``: which of several students it is of; ``open_because``: what keeps it
    from being decided whatever it is."""

    name: str
    values: Mapping[int, float]  # by seed
    prompt_error: float = 0.0  # standard error of the mean over seeds by the prompts alone
    clusters: int = 0  # of prompts, that it is from; of several tasks the fewest
    why_none: str = ""
    open_because: str = ""
    about: str = ""

    @property
    def mean(self) -> float | None:
        """Over the seeds; None without any."""
        return fmean(self.values.values()) if self.values else None

    @property
    def seed_error(self) -> float | None:
        """Standard error of the mean by the seeds alone; None for a single one."""
        return stdev(self.values.values()) / len(self.values) ** 0.5 if len(self.values) > 1 else None

    @property
    def bound(self) -> float:
        """Of 95%; infinite for a single seed."""
        return self._bound(len(self.values))

    @property
    def verdict(self) -> str:
        """Whether it is above 0."""
        if self.open_because:
            return UNDECIDED
        if self.mean is None:
            return UNMEASURED
        if abs(self.mean) <= self.bound:
            return UNDECIDED
        return HOLDS if self.mean > 0 else FAILS

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds would decide it, were mean, spread and the prompts' error to stay; None if not ``MOST_SEEDS``.

        The prompts are the same for every seed, so their error does not shrink as that over seeds does.
        """
        wanted = (n for n in range(2, MOST_SEEDS + 1) if abs(self.mean or 0) > self._bound(n))
        return next(wanted, None) if self.seed_error is not None and not self.open_because else None

    def fails_among(self, parts: int) -> bool:
        """Whether it is below 0 though there are so many parts, each of which might be by chance (Bonferroni)."""
        return self.verdict == FAILS and (self.mean or 0.0) < -self._bound(len(self.values), 0.05 / parts)

    def _bound(self, seeds: int, chance: float = 0.05) -> float:
        if self.seed_error is None or seeds < 2:
            return math.inf
        by_seeds = _t(seeds, chance) * self.seed_error * (len(self.values) / seeds) ** 0.5
        return math.hypot(by_seeds, _t(self.clusters, chance) * self.prompt_error if self.prompt_error else 0.0)


def _t(number: int, chance: float) -> float:
    """Half of the interval that misses a mean of so many by this chance, in standard errors."""
    return float(stats.t.ppf(1 - chance / 2, number - 1))


@dataclass(frozen=True)
class Claim:
    """What is claimed, how it is decided, and the numbers."""

    statement: str
    rule: str
    parts: Sequence[Part]

    @property
    def verdict(self) -> str:
        """A part that fails, also by the bound for so many, decides; else every part has to hold."""
        if any(part.fails_among(len(self.parts)) for part in self.parts):
            return FAILS
        found = {part.verdict for part in self.parts} or {UNMEASURED}
        if UNMEASURED in found:
            return UNMEASURED
        return HOLDS if found == {HOLDS} else UNDECIDED

    @property
    def by_student(self) -> dict[str, Claim]:
        """The same claim of each student alone that its parts are about."""
        students = dict.fromkeys(part.about for part in self.parts if part.about)
        return {each: replace(self, parts=[part for part in self.parts if part.about == each]) for each in students}


def contrast(runs: Runs, name: str, terms: Terms) -> Part:
    """The weighted sum of test scores on every seed that has them all."""
    if missing := sorted({run for _, run, _ in terms if not runs.get(run)}):
        return Part(name, {}, why_none=f"no run of {', '.join(missing)}")
    seeds = sorted(set.intersection(*(set(runs[run]) for _, run, _ in terms)))
    seeds = [seed for seed in seeds if all(runs[run][seed].test for _, run, _ in terms)]
    if not seeds:
        return Part(name, {}, why_none=f"no seed has all of {', '.join(sorted({run for _, run, _ in terms}))}")
    by_task: dict[str, np.ndarray] = {}  # [seeds, prompts]
    for weight, run, task in terms:
        scores = np.array([runs[run][seed].test[task] for seed in seeds], dtype=np.float64)
        by_task[task] = by_task.get(task, 0.0) + weight * scores
    values = dict(zip(seeds, sum(each.mean(1) for each in by_task.values()).tolist(), strict=True))
    world = WORLDS[runs[terms[0][1]][seeds[0]].world]
    errors = [_variance(each.mean(0), world.clusters(task)) for task, each in by_task.items()]
    clusters = min((count for _, count in errors if count > 1), default=0)
    return Part(name, values, math.sqrt(sum(variance for variance, _ in errors)), clusters)


def _variance(scores: np.ndarray, clusters: Sequence[int]) -> tuple[float, int]:
    """Of the mean of scores [prompts], of which those of one cluster may depend on each other; number of clusters.

    A quick run has the first prompts alone.
    """
    sums = np.bincount(clusters[: len(scores)], scores - scores.mean())
    count = len(sums)
    return (count / (count - 1) * float(np.square(sums).sum()) / len(scores) ** 2 if count > 1 else 0.0), count


def lead(runs: Runs, world: World, name: str, run: str, other: str | Mapping[str, str]) -> Part:
    """The average of a run minus that of another, or of one for each task: the mean over tasks, the base as 0 and the
    task's teacher as 1."""
    terms = []
    for task in world.names:
        gain = contrast(runs, "", [(1.0, f"teacher_{task}", task), (-1.0, "base", task)]).mean
        if not gain or gain <= 0:
            return Part(name, {}, why_none="no base or teachers, or no gain, to measure by")
        against = other if isinstance(other, str) else other[task]
        terms += [(sign / gain / len(world.names), each, task) for sign, each in ((1.0, run), (-1.0, against))]
    return contrast(runs, name, terms)


def claims(runs: Runs, world: World) -> list[Claim]:
    """Those that runs in a world decide."""
    return [
        Claim(
            "An off-the-shelf RL algorithm makes each task's teacher from its reward alone.",
            "The teacher's score on its own task is above half of the way from the base to 1.",
            list(_teachers(runs, world)),
        ),
        Claim(
            "One student reaches each of its teachers on the teacher's task.",
            "Student minus 0.97 times the teacher is above 0; each loss at its best rate by validation.",
            list(_student(runs, world)),
        ),
        Claim(
            "At equal cost the student is better than multi-task RL and cascade RL.",
            "Average of the student minus that of the other is above 0, at the same cost: with the teachers' in it, or "
            "without; each method at its best rate by validation.",
            list(_equal_cost(runs, world)),
        ),
        Claim(
            "The closed form beats the PPO-style surrogate at equal noise.",
            "Average of the closed form minus that of the surrogate, plain or with its baseline subtracted, is above 0 "
            "after as many rounds (the paper's loss, each at its best rate by validation).",
            [
                lead(runs, world, f"noise {noise}, {word} surrogate", f"closed_{noise}.80", f"{kind}_{noise}")
                for noise in ("0.3", "0.7")
                for kind, word in (("plain", "plain"), ("centred", "centred"))
            ],
        ),
        Claim(
            "Less noise is faster: the ODE needs fewer rounds (the paper: up to 5 times) than noise.",
            "Logarithm of the rounds until the validation curve has a share of the teacher's gain, noisy over "
            "the ODE, is above 0. Undecided where a run never gets there, does before its first evaluation, ends below "
            "it, or where the last time that the curves rise to it has another verdict than the first.",
            list(_speeds(runs, world)),
        ),
    ]  # fmt: skip


def sixth(variance: Sequence[Mapping[str, Any]]) -> Claim:
    """The claim on gradients, measured apart; ``variance``: the contents of the ``variance-seed<n>.json``."""
    return Claim(
        "The surrogate has the closed form's gradient on average, and score-function noise on top.",
        "Means over the steps: measured / predicted variance is within a quarter of 1; the squared error of "
        "the mean is below 1.5 times what that variance explains; noise is most of the variance. One part each.",
        list(_estimators(variance)),
    )


def fights(runs: Runs, world: World) -> list[Part]:
    """Multi-task RL minus each task's teacher, when it has cost as much as all of them: below 0, the tasks fight."""
    return [
        contrast(runs, f"{kind}, {task}", [(1.0, f"{kind}.teachers", task), (-1.0, f"teacher_{task}", task)])
        for kind in ("multitask_nft", "multitask_guard")
        for task in world.names
    ]


def _teachers(runs: Runs, world: World) -> Iterator[Part]:
    for kind, tasks in (("teacher", world.names), ("guard", world.names[-1:])):
        for task in tasks:
            one = contrast(runs, f"{kind}_{task}", [(1.0, f"{kind}_{task}", task), (-0.5, "base", task)])
            yield replace(one, values={s: v - 0.5 for s, v in one.values.items()})


def _student(runs: Runs, world: World) -> Iterator[Part]:
    rows = {"our loss": "opd.80", "the paper's loss": "paper.80"}
    rows |= {f"{label}, twice the rounds": run.removesuffix(".80") for label, run in rows.items()}
    for label, run in rows.items():
        for task in world.names:
            one = contrast(runs, f"{label}, {task}", [(1.0, run, task), (-0.97, f"teacher_{task}", task)])
            yield replace(one, about=label)


def _equal_cost(runs: Runs, world: World) -> Iterator[Part]:
    baselines = {
        "with the teachers' cost": ("multitask_nft", "multitask_guard", "cascade_nft"),
        "without": ("multitask_nft.alone", "multitask_guard.alone", "cascade_alone"),
    }
    for label, run in {"our loss": "opd.80", "the paper's loss": "paper.80"}.items():
        for cost, others in baselines.items():
            for other in others:
                one = lead(runs, world, f"{label} - {other.partition('.')[0]}, {cost}", run, other)
                yield replace(one, about=label)


def _speeds(runs: Runs, world: World) -> Iterator[Part]:
    for noise in ("0.3", "0.7"):
        for task in world.names:
            for share in (0.5, 0.9):
                yield speed(runs, f"noise {noise}, {task}, {share:.0%}", f"closed_{noise}", "closed_0", task, share)


def speed(runs: Runs, name: str, slow: str, fast: str, task: str, share: float) -> Part:
    """``ln`` of the rounds of one run over those of another to a share of the teacher's gain, on validation.

    By the first time that a curve rises to it; curves of few prompts fall again, so that the last time must not have
    another verdict.
    """
    needed = [slow, fast, f"teacher_{task}"]
    if missing := [run for run in needed if not runs.get(run)]:
        return Part(name, {}, why_none=f"no run of {', '.join(missing)}")
    first, last, why = dict[int, float](), dict[int, float](), ""
    for seed in sorted(set.intersection(*(set(runs[run]) for run in needed))):
        start, goal = runs[fast][seed].curve[0][1][task], runs[f"teacher_{task}"][seed].validation[task]
        level, curves = start + share * (goal - start), [runs[run][seed].curve for run in (slow, fast)]
        found = [rounds_to(curve, task, level) for curve in curves]
        if all(times and times[0] > curve[1][0] for times, curve in zip(found, curves, strict=True)):
            first[seed], last[seed] = (math.log(found[0][i] / found[1][i]) for i in (0, -1))
            if any(curve[-1][1][task] < level for curve in curves):
                why = why or "a curve ends below the level"
        else:
            why = "never reached, or before the first evaluation, in a seed"
    if not why and Part(name, first).verdict != (other := Part(name, last)).verdict:
        why = f"by the last time that the curves rise to the level {other.mean:+.3f} ± {other.bound:.3f}"
    return Part(name, first, why_none="" if first or why else "no seed has all", open_because=why)


def _estimators(variance: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    """Means of ratios over the measured states of each noise level, so that no step outweighs the others."""
    if not variance:
        yield Part("all", {}, why_none="no variance-seed<n>.json: python experiments/claims/variance.py")
        return
    for level in variance[0]["settings"]["levels"]:
        for kind in ("plain", "centred"):
            parts: dict[str, dict[int, float]] = {}
            for one in variance:
                states = [state for state in one["states"] if state["noise"] == level]
                found = [(state[kind], state["between_pictures"]) for state in states]
                fit = fmean(s["variance"] / s["predicted"] for s, _ in found)
                error = fmean(s["error"] / s["variance"] for s, _ in found)
                noise = fmean(s["variance"] / (s["variance"] + between) for s, between in found)
                values = {
                    "0.25 - abs(measured / predicted variance - 1)": 0.25 - abs(fit - 1),
                    "1.5 - squared error of the mean / that expected": 1.5 - error,
                    "noise / total variance - 0.5": noise - 0.5,
                }
                for name, value in values.items():
                    parts.setdefault(name, {})[one["settings"]["seed"]] = value
            for name, by_seed in parts.items():
                yield Part(f"noise {level}, {kind}: {name}", by_seed)
