"""Finished runs as they stand in their files: scores by prompt, scores along training, costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from experiments.claims.config import arms_of
from experiments.claims.worlds import World

RESULTS = Path(__file__).with_name("results")
REMEDY = "python experiments/claims/run.py"


class ClaimsError(ValueError):
    """Results that cannot be read or put side by side; the message says what, where and the remedy."""


@dataclass(frozen=True)
class Result:
    """One arm at one of its stages with one seed. Passes are of single images through the transformer."""

    world: str
    arm: str
    stage: str
    seed: int
    quick: bool
    digest: str  # of the world's prompts
    rounds: int
    seconds: float  # of the training
    forwards: float
    backwards: float
    teacher_forwards: float  # of the runs that made its teachers
    teacher_backwards: float
    curve: Sequence[tuple[int, Mapping[str, float]]]  # round -> task -> score on validation prompts
    test: Mapping[str, Sequence[float]]  # task -> score of each different prompt, in file order; none in a screen
    machine: str
    date: str
    made_by: str = ""  # digest of the arm; of earlier results not known

    @property
    def name(self) -> str:
        """Arm and stage."""
        return staged(self.arm, self.stage)

    @property
    def cost(self) -> float:
        """Forward passes, and two more for each backward pass."""
        return self.forwards + 2 * self.backwards

    @property
    def cost_with_teachers(self) -> float:
        """That of the training and of its teachers'."""
        return self.cost + self.teacher_forwards + 2 * self.teacher_backwards

    @property
    def validation(self) -> Mapping[str, float]:
        """Task -> score at the end, or at the last evaluation before it."""
        return self.curve[-1][1] if self.curve else {}

    def score(self, task: str) -> float:
        """Mean over the different test prompts."""
        return fmean(self.test[task])


Chosen = dict[tuple[str, str], str]
"""Choice and stage -> the arm that validation chose."""
Runs = dict[str, dict[int, Result]]
"""Arm or ``arm.stage`` -> seed -> result."""


def staged(arm: str, stage: str) -> str:
    """The name of an arm at a stage."""
    return f"{arm}.{stage}" if stage else arm


def read_result(file: Path) -> Result:
    """The result in a file; ClaimsError if it is none."""
    try:
        return Result(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ClaimsError(f"{file} is no result of a run ({error!r}); remove it and run {REMEDY} again") from error


def read_results(folder: Path, world: World) -> tuple[Runs, Chosen]:
    """Every result of a world, also under the names of choices (with their stages), and which arm each of these is.

    Of the arms of one choice that are there, the one with the best mean over tasks and the seeds that they share on
    validation prompts, at that stage; beyond the decisive one, at that. ClaimsError for a file that is none, for other
    prompts, and for quick runs among others.
    """
    runs: Runs = {}
    digest = world.digest()
    for file in sorted((folder / world.name).glob("*-seed*.json")):
        result = read_result(file)
        if result.digest != digest:
            raise ClaimsError(f"{file} was measured on other prompts; move it elsewhere and run {REMEDY} again")
        runs.setdefault(result.name, {})[result.seed] = result
    if len({result.quick for by_seed in runs.values() for result in by_seed.values()}) > 1:
        raise ClaimsError(f"{folder} mixes quick runs with others; move one kind elsewhere")
    arms, chosen = arms_of(world), Chosen()
    for choice, any_arm in {arm.choice: arm for arm in arms.values() if arm.choice}.items():
        for stage in any_arm.rounds or ("",):
            if scores := candidates(runs, world, choice, any_arm.chosen_at(stage)):
                best = max(scores, key=lambda name: scores[name])
                chosen[choice, stage] = best
                if staged(best, stage) in runs:
                    runs[staged(choice, stage)] = runs[staged(best, stage)]
    for arm in arms.values():
        if arm.kind == "same" and arm.of in runs:
            runs[arm.name] = runs[arm.of]
    return runs, chosen


def candidates(runs: Runs, world: World, choice: str, stage: str) -> dict[str, float]:
    """The arms of a choice that are there -> mean over tasks and the seeds that all of them have, on validation, at a
    stage; empty without such a seed."""
    arms = [arm for arm in arms_of(world).values() if arm.choice == choice]
    among = {arm.name: runs.get(staged(arm.name, stage), {}) for arm in arms}
    among = {name: by_seed for name, by_seed in among.items() if by_seed}
    seeds = sorted(set.intersection(*map(set, among.values()))) if among else []
    return {name: fmean(overall(by_seed[seed], world) for seed in seeds) for name, by_seed in among.items() if seeds}


def overall(result: Result, world: World) -> float:
    """Mean over the tasks at its end, on validation."""
    return fmean(result.validation[task] for task in world.names)


def rounds_to(curve: Sequence[tuple[int, Mapping[str, float]]], task: str, level: float) -> list[float]:
    """Rounds, with fraction, at which the linearly interpolated curve rises to a level; the first is 0 where it
    is there at the start."""
    points = [(number, scores[task]) for number, scores in curve]
    found = [0.0] if points[0][1] >= level else []
    for (before, low), (number, score) in pairwise(points):
        if low < level <= score:
            found.append(before + (level - low) / (score - low) * (number - before))
    return found
