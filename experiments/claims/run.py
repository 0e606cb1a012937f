"""Run the comparisons in the tiny world and in a world in which tasks fight; keep every result; write the report.

    python experiments/claims/run.py --dry_run             what there is to do, and its cost in core-hours
    python experiments/claims/run.py                       all of it, seeds 1 2 3; the same command continues it
    python experiments/claims/run.py claims start --worlds tiny --seeds 1    some groups of arms, and what they need
    python experiments/claims/run.py --arms opd_0.001      some arms
    python experiments/claims/run.py --quick               two rounds each on a few prompts, to see that everything runs
    python experiments/claims/run.py screen                which world has tasks that fight: validation alone

A finished stage of an arm is one file in results/<world>/ and is not repeated; an interrupted training goes on from its
checkpoint in --logs. After a change of an arm remove its files and its folder. --jobs runs at once, one thread each.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

from tqdm import tqdm

from diffusionopd.config_schema import redacted
from experiments.claims.arms import EARLY_TEACHER_ROUNDS, GROUPS, Arm
from experiments.claims.report import screen, write
from experiments.claims.results import RESULTS, ClaimsError, read_results
from experiments.claims.runs import Run, Runner, arms_in, plan, start
from experiments.claims.worlds import CANDIDATES, FIGHTING, TINY, WORLDS

SCREEN = "screen"
"""A run of the candidates for the second world, on validation prompts."""
QUICK_FLAGS = {
    "variance": ("--draws", "2", "--probes", "1", "--pictures", "2", "--rounds", "0"),
    "beyond": ("--prompts", "2", "--images", "2", "--quick"),
}


def _depth(run: Run) -> int:
    """How many runs must come one after another before it."""
    return max((1 + _depth(each) for each in run.needs), default=0)


def to_do(runs: Sequence[Run], runner: Runner) -> dict[Run, None]:
    """What has no result yet, and what that builds on where its folder is gone: made again, it has the same weights."""
    wanted = dict.fromkeys(run for run in runs if not runner.is_done(run))
    for run in reversed(runs):
        if run in wanted and not (run.rounds and runner.can_teach(run)):
            wanted |= dict.fromkeys(each for each in run.needs if not runner.can_teach(each))
    return wanted


def run_all(runs: Sequence[Run], runner: Runner, jobs: int) -> list[str]:
    """Do what is to do, ``jobs`` at a time; returns the messages of what failed."""
    wanted = to_do(runs, runner)
    started: dict[Run, Future] = {}

    def do(run: Run) -> None:
        wait([started[each] for each in run.needs if each in started])
        if not all(map(runner.can_teach, run.needs)):
            raise RuntimeError("what it builds on is missing")
        bar.set_postfix_str(f"{run.world} {run.name}")
        runner.do(run)

    with tqdm(total=len(runs), initial=len(runs) - len(wanted), unit="run") as bar, ThreadPoolExecutor(jobs) as pool:
        # What others wait for is started before them, and at once: who waits has a worker for himself.
        for run in sorted(filter(wanted.__contains__, runs), key=lambda run: (run.seed, _depth(run))):
            started[run] = pool.submit(do, run)
        try:
            for _ in as_completed(started.values()):
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    errors = {run: future.exception() for run, future in started.items()}
    return [redacted(f"{run.world} {run.name}: {error}") for run, error in errors.items() if error]


def chosen_arms(results: Path, worlds: Iterable[str]) -> frozenset[tuple[str, str, str]]:
    """World, name and stage of the arms that validation has chosen so far."""
    found = ((world, read_results(results, WORLDS[world])[1]) for world in worlds)
    return frozenset((world, arm, stage) for world, chosen in found for (_, stage), arm in chosen.items())


def measure(runner: Runner, what: str, seed: int, *flags: str) -> str:
    """Have ``<what>.py`` measure with a seed, unless it has; returns what failed."""
    file = runner.results / f"{what}-seed{seed}.json"
    if file.is_file():
        return ""
    flags = ("--seed", str(seed), "--output", str(file), *flags, *(QUICK_FLAGS[what] if runner.quick else ()))
    try:
        start(runner.logs / f"{file.stem}.log", f"experiments/claims/{what}.py", *flags)
    except RuntimeError as error:
        return f"{file.stem}: {error}"
    return ""


def measure_more(runner: Runner, groups: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    """What is measured beside the scores of arms; what failed, or nothing, of each."""
    for seed in dict.fromkeys(run.seed for run in runs):
        if "claims" in groups:
            yield measure(runner, "variance", seed)
        if "strength" in groups and any(run.world == TINY.name for run in runs):
            yield measure(runner, "beyond", seed, "--logs", str(runner.logs), "--results", str(runner.results))


def forecast(runs: Sequence[Run], runner: Runner) -> str:
    """What is left to do and its cost, by world and group; the first arm of a choice stands for the chosen one until
    validation has chosen."""
    chosen = chosen_arms(runner.results, dict.fromkeys(run.world for run in runs))
    decided = {(world, arms_in(world)[arm].choice) for world, arm, _ in chosen}
    open_ = [run for run in runs if run.what.choice and (run.world, run.what.choice) not in decided]
    first = {(run.world, run.what.choice): run.arm for run in reversed(open_)}
    stand_in = {(run.world, run.arm, run.stage) for run in open_ if first[run.world, run.what.choice] == run.arm}
    runner = replace(runner, chosen=chosen | stand_in)
    runs = [run for run in runs if not runner.waits(run)]
    wanted, rows, total = to_do(runs, runner), [], 0.0
    for world in dict.fromkeys(run.world for run in runs):
        for group in GROUPS:
            own = [run for run in runs if run.world == world and run.what.group == group]
            left = [run for run in own if run in wanted]
            hours = sum(map(runner.cost, left)) / 3600
            total += hours
            if own:
                rows.append(f"  {world:10} {group:9} {len(own):4} runs, {len(left):4} to do  {hours:7.1f} core-hours")
    return "\n".join([*rows, f"  in all {total:.1f} core-hours (estimated)"])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, SCREEN, []], help="default: all but the screen")
    parser.add_argument("--arms", nargs="+", default=[], help="some arms of the groups")
    parser.add_argument(
        "--worlds", nargs="+", choices=list(WORLDS), help="default: the tiny world and the one that fights"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2 * 2), help="runs at once")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done and what it costs, and stop")
    parser.add_argument("--quick", action="store_true", help="two rounds a stage, seed 1, results in --logs")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "claims", help="run folders")
    return parser.parse_args(arguments)


def chosen_runs(flags: argparse.Namespace) -> list[Run]:
    """The runs that the flags ask for. ClaimsError for an arm that no world has."""
    screen, seeds = flags.groups == [SCREEN], flags.seeds[:1] if flags.quick else flags.seeds
    worlds = flags.worlds or ([w.name for w in CANDIDATES] if screen else [TINY.name, *FIGHTING])
    if unknown := [name for name in flags.arms if not any(name in arms_in(world) for world in worlds)]:
        raise ClaimsError(
            f"no arm {', '.join(unknown)} in {', '.join(worlds)}; there are {', '.join(arms_in(worlds[0]))}"
        )
    runs = []
    for world in worlds:
        arms = [arm for arm in arms_in(world).values() if not flags.arms or arm.name in flags.arms]
        if screen:
            runs += plan(world, [arm.name for arm in arms if _screens(arm)], seeds, ("teachers",))
        else:
            groups = flags.groups or list(GROUPS)
            runs += plan(world, [arm.name for arm in arms if arm.group in groups], seeds)
    return runs


def _screens(arm: Arm) -> bool:
    """Teachers, what their sum is worth, and multi-task RL at their cost: no distillation."""
    return arm.name == "base" or arm.choice in ("multitask_nft", "sum_rewarded") or arm.name.startswith("teacher_")


def main() -> None:
    """Flags to results."""
    flags = parse()
    logs = (flags.logs / "quick" if flags.quick else flags.logs).resolve()
    os.chdir(ROOT)  # configurations name files from there
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    runner = Runner(logs, logs / "results" if flags.quick else RESULTS, flags.quick, test=flags.groups != [SCREEN])
    try:
        runs = chosen_runs(flags)
        for world in dict.fromkeys(run.world for run in runs):
            WORLDS[world].write_prompts(ROOT)
        early = any(run.what.teachers and run.what.teacher_rounds == EARLY_TEACHER_ROUNDS for run in runs)
        runner = replace(runner, early=early)
        print(f"{len(runs)} runs; folders in {runner.logs}, results in {runner.results}\n{forecast(runs, runner)}")
        if flags.dry_run:
            return
        failures = run_all([run for run in runs if not runner.waits(run)], runner, flags.jobs)
        if runner.test and not failures:  # with all candidates there
            further = replace(runner, chosen=chosen_arms(runner.results, dict.fromkeys(run.world for run in runs)))
            failures = run_all([run for run in runs if not further.waits(run)], further, flags.jobs)
        if runner.test and not flags.arms:
            failures += [*filter(None, measure_more(runner, flags.groups or list(GROUPS), runs))]
        lines = write(runner.results, runner.results) if runner.test else screen(runner.results)
        print("\n".join(lines))
    except ClaimsError as error:
        sys.exit(f"error: {error}")
    print("\n".join(failures) or "all done")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
