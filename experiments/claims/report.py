"""The results as tables, plots, and verdicts on the paper's claims, world by world.

    python experiments/claims/report.py [--results DIR] [--output DIR]

Writes claims.md, claims.json and the plots. Runs that are not there yet are counted, not needed.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from experiments.claims.arms import AT_TEACHERS, EARLY, GROUPS, HALF, LOSSES, SHIPPED, TEACHER_ROUNDS, Arm
from experiments.claims.config import arms_of
from experiments.claims.figures import drawing, figures, means
from experiments.claims.results import (
    RESULTS,
    Chosen,
    ClaimsError,
    Result,
    Runs,
    candidates,
    read_results,
    rounds_to,
    staged,
)
from experiments.claims.verdicts import Claim, Part, claims, contrast, fights, lead, sixth
from experiments.claims.worlds import CANDIDATES, TINY, WORLDS, World

STRENGTHS = f"{TINY.name}-strengths.png"
COST_NOTE = (
    "Scores: mean over the different test prompts ± standard error over them, then standard deviation over seeds. "
    "Average: base 0, each task's NFT teacher 1. Lead: of the average, over the method by itself (of starts: the fresh "
    "student of the same teachers) with the same loss, and of that with the paper's loss, over ours; of strengths, "
    "over the student's own teachers. NFE: forward passes of single images, in thousands; cost: these and two more "
    "for each backward pass; and with the teachers' own, where these are made here. Not in them: five rounds' passes "
    "before a start whose scale is chosen by the loss. The base and the shipped teachers were trained on prompts of "
    "the same grammar, among them all for validation and about half of those for test here."
)


def rows(runs: Runs, world: World, group: str, chosen: Chosen) -> list[dict[str, Any]]:
    """A line for each arm of a group, and each of its stages, that has test scores; none for references alone."""
    arms, found = arms_of(world), []
    if not any(result.test for a in arms.values() if a.group == group and a.kind != "same" for result in _of(runs, a)):
        return []
    names = [(arm, stage) for arm in arms.values() if arm.group == group for stage in arm.rounds or ("",)]
    if group not in ("claims", "start"):  # the method by itself comes first, with our loss, then with the paper's
        best = (chosen.get((loss, HALF)) for loss in LOSSES)
        names = [*((arms[name], HALF) for name in best if name), *names]
    for arm, stage in names:
        name = staged(arm.name, stage)
        reference = _reference(arm, name, world, group, chosen)
        results = [result for result in runs.get(name, {}).values() if result.test]
        if not results:
            continue
        row = {
            "name": name,
            "label": f"{arm.label}{f', {results[0].rounds} rounds' if stage else ''}",
            "chosen": chosen.get((arm.choice, stage)) == arm.name,
            "scores": {task: contrast(runs, task, [(1.0, name, task)]) for task in world.names},
            "average": lead(runs, world, "", name, "base"),
            "lead": lead(runs, world, "", name, reference) if reference and name != reference else None,
        }
        made = list(runs.get(arm.of, {}).values()) if arm.kind == "again" else results
        row |= {"rounds": fmean(r.rounds for r in made), "seconds": fmean(r.seconds / max(1, r.rounds) for r in made)}
        for cost in ("forwards", "cost", "cost_with_teachers"):
            row[cost] = fmean(getattr(result, cost) for result in made) / 1000
        if arm.teachers == SHIPPED:
            row["cost_with_teachers"] = None  # which came with the world
        if isinstance(reference, dict):
            pairs = {task: [(1.0, name, task), (-1.0, teacher, task)] for task, teacher in reference.items()}
            row["beyond"] = {task: contrast(runs, task, pair) for task, pair in pairs.items()}
        if group == "start":
            shares = (0.9, 0.95)
            row["reached"] = {s: [_reached(runs, name, task, s, arm) for task in world.names] for s in shares}
        found.append(row)
    return found


def _reference(arm: Arm, name: str, world: World, group: str, chosen: Chosen) -> str | dict[str, str] | None:
    """The model over which a row leads, or those of each task."""
    if group == "claims":
        return None
    if group == "strength":
        age = "" if arm.teacher_rounds == TEACHER_ROUNDS else EARLY
        return {task: staged(f"teacher_{task}", age) for task in world.names}
    plain = {loss: staged(chosen.get((loss, HALF), ""), HALF) for loss in LOSSES}
    if group == "start":
        plain = {loss: f"fresh_{arm.teachers}_{loss}" for loss in LOSSES}
    return plain["paper" if "paper" in arm.name.split("_") and name != plain["paper"] else "opd"]


def _of(runs: Runs, arm: Arm) -> Iterator[Result]:
    """The results of an arm, at all stages."""
    for stage in arm.rounds or ("",):
        yield from runs.get(staged(arm.name, stage), {}).values()


def _reached(runs: Runs, name: str, task: str, share: float, arm: Arm) -> str:
    """Rounds until the validation curve has a share of the teacher's gain: mean over seeds; or where it is outside."""
    teacher = f"shipped_{task}" if arm.teachers == SHIPPED else f"teacher_{task}"
    shared = sorted(set(runs[name]) & set(runs.get(teacher, {})) & set(runs.get("base", {})))
    numbers = []
    for seed in shared:
        start, goal = runs["base"][seed].validation[task], runs[teacher][seed].validation[task]
        found = rounds_to(runs[name][seed].curve, task, start + share * (goal - start))
        if not found:
            return f"> {runs[name][seed].rounds}"
        numbers.append(found[0])
    return f"{fmean(numbers):.0f}" if numbers else "–"


def measured(part: Part) -> str:
    """A score for people: mean, error over prompts, spread over seeds."""
    if part.mean is None:
        return "–"
    spread = "" if part.seed_error is None else f" / {part.seed_error * len(part.values) ** 0.5:.3f}"
    return f"{part.mean:.3f} ± {part.prompt_error:.3f}{spread}"


def difference(part: Part | None) -> str:
    """A difference for people: mean, 95% bound, whether it is one."""
    if part is None or part.mean is None:
        return "–"
    bound = f" ± {part.bound:.3f}" if part.seed_error is not None else ""
    return f"{part.mean:+.3f}{bound}" + ("" if abs(part.mean) > part.bound else " (undecided)")


def part_cells(part: Part) -> list[str]:
    """A line of a claim's table."""
    if part.mean is None:
        return [part.name, "–", "–", "–", f"{part.verdict}: {part.open_because or part.why_none}"]
    seeds = ", ".join(f"{value:+.3f}" for value in part.values.values())
    verdict = f"**{part.verdict}**" + (f": {part.open_because}" if part.open_because else "")
    if part.verdict == "undecided" and not part.open_because:
        more = (
            f"{part.seeds_needed} seeds would decide it" if part.seeds_needed else "more than 20 seeds would be needed"
        )
        verdict += ": one seed" if part.seed_error is None else f": {more}, if mean and spread stay"
    by_seeds = "–" if part.seed_error is None else f"{part.seed_error:.3f}"
    by_prompts = f"{part.prompt_error:.3f}" if part.clusters else "–"  # of a speed it is not known
    return [part.name, f"{part.mean:+.3f}", f"{by_prompts} / {by_seeds}", seeds, verdict]


def _world(folder: Path, world: World) -> dict[str, Any] | None:
    runs, chosen = read_results(folder, world)
    if not any(result.test for by_seed in runs.values() for result in by_seed.values()):
        return None
    results = [result for by_seed in runs.values() for result in by_seed.values()]
    every = ((arm, stage) for arm in arms_of(world).values() if arm.kind != "same" for stage in arm.rounds or ("",))
    known = {_known(arm, stage) for arm, stage in every}
    return {
        "world": world,
        "runs": runs,
        "quick": results[0].quick,
        "claims": claims(runs, world),
        "fights": fights(runs, world),
        "tables": {title: found for group, title in GROUPS.items() if (found := rows(runs, world, group, chosen))},
        "chosen": chosen,
        "candidates": {one: found for one in chosen if (found := _candidates(runs, world, *one))},
        "seeds": sorted({result.seed for result in results}),
        "there": len(known & {_known(arms_of(world)[result.arm], result.stage) for result in results}),
        "known": len(known),
        "plots": figures(runs, world),
    }


def _known(arm: Arm, stage: str) -> tuple[str, str]:
    """What is counted: beyond the stage at which it is chosen, one of a choice is trained."""
    return arm.name if arm.chosen_at(stage) == stage else arm.choice, stage


def _candidates(runs: Runs, world: World, choice: str, stage: str) -> dict[str, float]:
    """The arms among which validation chose at a stage, by label, best first; none where another stage's is taken."""
    arms = arms_of(world)
    any_arm = next(arm for arm in arms.values() if arm.choice == choice)
    if any_arm.chosen_at(stage) != stage:
        return {}
    after = f", {any_arm.stages(len(world.tasks))[stage]} rounds" if stage else ""
    scores = {arms[name].label + after: score for name, score in candidates(runs, world, choice, stage).items()}
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def as_json(found: Sequence[Mapping[str, Any]], estimators: Claim) -> list[dict[str, Any]]:
    """Verdicts and numbers as plain values; the sixth claim, measured with the shipped teachers, is an entry apart."""

    def claim(one: Claim) -> dict[str, Any]:
        parts = [{**asdict(p), "mean": p.mean, "seed_error": p.seed_error, "verdict": p.verdict} for p in one.parts]
        students = {student: own.verdict for student, own in one.by_student.items()}
        verdicts = {"verdict": one.verdict, "by_student": students}
        return {"statement": one.statement, "rule": one.rule, **verdicts, "parts": parts}

    worlds = [
        {
            "world": w["world"].name,
            "chosen": {staged(*one): arm for one, arm in w["chosen"].items()},
            "claims": list(map(claim, w["claims"])),
        }
        for w in found
    ]
    return [*worlds, {"world": "shipped teachers", "chosen": {}, "claims": [claim(estimators)]}]


def measured_apart(results: Path, what: str) -> list[dict[str, Any]]:
    """What a script beside the runs wrote, by seed. ClaimsError for files of different settings."""
    files = sorted(results.glob(f"{what}-seed*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if len({json.dumps({**one["settings"], "seed": 0}, sort_keys=True) for one in found}) > 1:
        raise ClaimsError(f"{', '.join(map(str, files))} were measured with different settings; move some elsewhere")
    return found


def write(results: Path, output: Path) -> list[str]:
    """Read a folder of results, write claims.md, claims.json and the plots; returns the verdicts and where they are.

    Raises ClaimsError for results that cannot be read or put side by side.
    """
    variance, beyond = measured_apart(results, "variance"), measured_apart(results, "beyond")
    found, estimators = [one for world in WORLDS.values() if (one := _world(results, world))], sixth(variance)
    if not found:
        raise ClaimsError(f"{results} holds no results with test scores; make some: python experiments/claims/run.py")
    output.mkdir(parents=True, exist_ok=True)
    for one in found:
        for name, figure in one["plots"].items():
            figure.savefig(output / f"{one['world'].name}-{name}", dpi=110, metadata={"Software": None})
    if beyond:
        drawing(beyond, TINY).savefig(output / STRENGTHS, dpi=110, metadata={"Software": None})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"measured": measured, "difference": difference, "part_cells": part_cells}
    page = environment.get_template("claims.md.j2").render(
        worlds=found,
        estimators=estimators,
        variance=variance,
        note=COST_NOTE,
        drawn=means(beyond),
        drawn_seeds=len(beyond),
        drawn_figure=STRENGTHS,
        tasks=TINY.names,
    )
    (output / "claims.md").write_text(page, encoding="utf-8")
    (output / "claims.json").write_text(
        json.dumps(as_json(found, estimators), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    verdicts = []
    for one in found:
        for number, claim in enumerate(one["claims"], 1):
            verdicts.append(f"{one['world'].name}: {number}. {claim.verdict:17s} {claim.statement}")
            verdicts += [f"  of {student}: {own.verdict}" for student, own in claim.by_student.items()]
    verdicts.append(f"shipped teachers: 6. {estimators.verdict:17s} {estimators.statement}")
    return [*verdicts, f"wrote {output / 'claims.md'}, claims.json and the plots"]


def screen(results: Path) -> list[str]:
    """For each candidate world, how far multi-task RL and the sum of the teachers are behind each teacher.

    Validation scores, mean over seeds; of several rates or scales the best one that is there. Multi-task RL at the
    teachers' cost: a world in which it is .10 behind on some task is one in which tasks fight.
    """
    lines = [f"{'world':10} {'model':28} minus each task's teacher, validation"]
    for world in CANDIDATES:
        runs, chosen = read_results(results, world)
        for choice, stage in (("multitask_nft", AT_TEACHERS), ("sum_rewarded", "")):
            if (choice, stage) in chosen:
                best = staged(chosen[choice, stage], stage)
                behind = ", ".join(f"{task} {_behind(runs, best, task)}" for task in world.names)
                lines.append(f"{world.name:10} {best:28} {behind}")
    return lines


def _behind(runs: Runs, name: str, task: str) -> str:
    teachers = runs.get(f"teacher_{task}", {})
    found = [runs[name][s].validation[task] - teachers[s].validation[task] for s in set(runs[name]) & set(teachers)]
    return f"{fmean(found):+.3f}" if found else "–"


def main() -> None:
    """Flags to files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the worlds' results")
    parser.add_argument("--output", type=Path, help="default: the folder of the results")
    flags = parser.parse_args()
    try:
        print("\n".join(write(flags.results, flags.output or flags.results)))
    except ClaimsError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
