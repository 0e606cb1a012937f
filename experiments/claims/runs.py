"""A run, a stage of an arm with a seed: what comes before it, how it is made and scored, and its result's file."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import runpy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from diffusionopd.evaluation.results import read_records
from diffusionopd.files import write_atomically
from diffusionopd.training import check, load_config
from diffusionopd.training.plan import Plan
from experiments.claims.arms import EARLY, HALF, REWARDED, SHIPPED, Arm
from experiments.claims.config import SHIPPED_LORA, arms_of
from experiments.claims.results import Result, read_result
from experiments.claims.worlds import WORLDS
from tools.report.collect import read_metrics

CONFIG = "experiments/claims/config.py"
FIRST_SEED = 1
"""Validation chooses among candidates with this seed; the others are trained with what it chose."""
QUICK = {"save_freq": 2, "eval_freq": 2, "eval_num_prompts": 2}
QUICK_ROUNDS, QUICK_LINES = 2, 4
SECONDS = {"pass": 0.0036, "image": 0.048, "start": 5.0}
"""On one core of an AMD EPYC: a pass of one image (a backward pass is two), an image drawn and scored, a start."""
FORKS = multiprocessing.get_context("forkserver")
"""A run is a fork of a process that has imported what scripts need: a fifth of a short run's time."""
FORKS.set_forkserver_preload(["diffusionopd.training", "diffusionopd.evaluation.job"])


@cache
def arms_in(world: str) -> dict[str, Arm]:
    """The arms of a world."""
    return arms_of(WORLDS[world])


@cache
def planned(world: str, arm: str) -> Plan:
    """The checked configuration of an arm that trains."""
    return check(load_config(f"{CONFIG}:{world}/{arm}"), num_processes=1)


@dataclass(frozen=True)
class Run:
    """One stage of one arm with one seed in one world."""

    world: str
    arm: str
    stage: str
    seed: int

    @property
    def what(self) -> Arm:
        """Its arm."""
        return arms_in(self.world)[self.arm]

    @property
    def name(self) -> str:
        """Of its result's file."""
        return f"{self.arm}{'.' + self.stage if self.stage else ''}-seed{self.seed}"

    @property
    def rounds(self) -> int:
        """At its end."""
        return self.what.stages(len(WORLDS[self.world].tasks)).get(self.stage, 0)

    @property
    def teachers(self) -> list[Run]:
        """The runs whose LoRAs it takes."""
        if self.what.teachers != REWARDED:
            return []
        stage = next(
            s for s, n in arms_in(self.world)[self._teacher(0)].rounds.items() if n == self.what.teacher_rounds
        )
        return [Run(self.world, self._teacher(i), stage, self.seed) for i in range(len(WORLDS[self.world].tasks))]

    @property
    def needs(self) -> list[Run]:
        """Runs that come before it: teachers, the stage before, the run that is scored again."""
        stages = list(self.what.rounds)
        before = stages[: stages.index(self.stage)][-1:] if stages else []
        again = [Run(self.world, self.what.of, "", self.seed)] if self.what.kind == "again" else []
        return [*self.teachers, *(Run(self.world, self.arm, stage, self.seed) for stage in before), *again]

    def _teacher(self, index: int) -> str:
        return f"teacher_{WORLDS[self.world].names[index]}"


@dataclass(frozen=True)
class Runner:
    """Where runs happen and where results go.

    ``quick``: a few rounds. ``test``: whether test prompts are scored; of several arms of one choice only those that
    are ``chosen``, by world, name and stage; teachers at an ``early`` stage only for arms that have them.
    """

    logs: Path
    results: Path
    quick: bool = False
    test: bool = True
    chosen: frozenset[tuple[str, str, str]] = frozenset()
    early: bool = True

    def tests(self, run: Run) -> bool:
        """Whether a run is scored on test prompts."""
        if not self.test or run.stage == EARLY and not self.early:
            return False
        return not run.what.choice or (run.world, run.arm, run.stage) in self.chosen

    def waits(self, run: Run) -> bool:
        """Whether it is beyond the stage or the seed with which validation chooses, and was not chosen yet."""
        if not run.what.choice or self._goes_on(run):
            return False
        rounds, other_seed = run.what.rounds, self.test and run.seed != FIRST_SEED  # a screen has all seeds
        return other_seed or rounds.get(run.stage, 0) > rounds.get(run.what.decisive, 0)

    def _goes_on(self, run: Run) -> bool:
        """Whether it was chosen, at its stage or a later one."""
        stages = list(run.what.rounds) or [""]
        return any((run.world, run.arm, stage) in self.chosen for stage in stages[stages.index(run.stage) :])

    def file(self, run: Run) -> Path:
        """The JSON file of a finished run."""
        return self.results / run.world / f"{run.name}.json"

    def folder(self, run: Run) -> Path:
        """The run folder of its training: one for all stages of an arm."""
        arm = run.what.of if run.what.kind == "again" else run.arm
        return self.logs / run.world / f"{arm}-seed{run.seed}"

    def rounds(self, run: Run) -> int:
        """At its end."""
        stages = list(run.what.rounds)
        return QUICK_ROUNDS * (1 + stages.index(run.stage)) if self.quick and run.rounds else run.rounds

    def lora(self, run: Run) -> Path:
        """The student at the end of a run."""
        again = Run(run.world, run.what.of, "", run.seed) if run.what.kind == "again" else run
        return self.folder(run) / "checkpoints" / f"checkpoint-{self.rounds(again)}" / "lora"

    def is_done(self, run: Run) -> bool:
        """Whether there is a result of as many rounds, with test scores where these are wanted."""
        if not self.file(run).is_file():
            return False
        result = read_result(self.file(run))
        made = result.made_by in ("", run.what.digest) and result.rounds == (self.rounds(run) if run.rounds else 0)
        return made and (bool(result.test) or not self.tests(run))

    def can_teach(self, run: Run) -> bool:
        """Whether its LoRA is here: results are kept with the code, run folders may be gone."""
        return self.lora(run).is_dir()

    def do(self, run: Run) -> None:
        """Train, score, write the result. Raises RuntimeError with the end of the log of what failed."""
        if run.rounds and not self.can_teach(run):
            self._train(run)
        if not self.is_done(run):
            scores = {split: self._evaluate(run, split) for split in self._splits(run)}
            write_atomically(self.file(run), json.dumps(asdict(self._result(run, scores))) + "\n")

    def cost(self, run: Run) -> float:
        """Estimated seconds on one core of what ``do`` would have to do now."""
        seconds, world = 0.0, WORLDS[run.world]
        if run.rounds and not self.can_teach(run):
            nfe, plan = planned(run.world, run.arm).nfe_per_round, planned(run.world, run.arm)
            before = sum(self.rounds(each) for each in run.needs if each.arm == run.arm)
            rounds = self.rounds(run) - before
            passes = 3 * nfe.student + nfe.teacher + nfe.sampling + nfe.base
            lines = sum(len(t.lines("validation")) for t in world.tasks if run.what.task in ("", t.name))
            lines = 2 * len(world.tasks) if self.quick else lines
            scored = lines * (1 + rounds // plan.watch.eval_freq)
            seconds += SECONDS["start"] + rounds * passes * SECONDS["pass"] + scored * SECONDS["image"]
        if not self.is_done(run):
            for split in self._splits(run):
                images = sum(QUICK_LINES if self.quick else len(task.lines(split)) for task in world.tasks)
                seconds += SECONDS["start"] + images * SECONDS["image"] * (2 if run.what.guidance > 1 else 1)
        return seconds

    def _splits(self, run: Run) -> list[str]:
        """Which prompts it is scored on at its end; validation comes with a training."""
        return [*([] if run.rounds else ["validation"]), *(["test"] if self.tests(run) else [])]

    def _train(self, run: Run) -> None:
        changes = {"num_epochs": self.rounds(run), "seed": run.seed, "resume_from": "auto"}
        changes["save_dir"] = self.folder(run)
        for i, lora in enumerate(self._teacher_loras(run)):
            changes[f"train.teachers[{i}].lora_path"] = lora
        flags = [f"--config.{key}={value}" for key, value in (changes | (QUICK if self.quick else {})).items()]
        self._start(run, "train", "scripts/train_opd.py", "--config", f"{CONFIG}:{run.world}/{run.arm}", *flags)

    def _teacher_loras(self, run: Run) -> list[str]:
        if run.what.teachers == SHIPPED:
            return [SHIPPED_LORA.format(task.shipped) for task in WORLDS[run.world].tasks]
        return [str(self.lora(teacher)) for teacher in run.teachers]

    def _evaluate(self, run: Run, split: str) -> dict[str, list[float]]:
        """Task -> score of each different prompt."""
        arm, world, output = run.what, WORLDS[run.world], self.folder(run) / "scores" / run.name / split
        if arm.kind == "base":
            which = ["--base"]
        elif arm.kind == "merge":
            which = ["--merge", arm.merge[0], "--merge_scale", str(arm.merge[1]), "--lora", *self._teacher_loras(run)]
        elif arm.kind == "lora":
            which = ["--lora", SHIPPED_LORA.format(next(t.shipped for t in world.tasks if t.name == arm.task))]
        else:
            which = ["--lora", str(self.lora(run))]
        flags = ["--output_dir", str(output), "--seed", str(run.seed), "--num_inference_steps", "10", "--resume"]
        flags += ["--limit", str(QUICK_LINES)] if self.quick else []
        flags += ["--guidance_scale", str(arm.guidance), "--dataset", *world.names]
        self._start(run, split, "scripts/evaluate.py", *which, "--config", f"{CONFIG}:{run.world}/{split}", *flags)
        found = {}
        for task in world.tasks:
            folder = output / task.name if len(world.tasks) > 1 else output
            by_prompt: dict[str, list[float]] = {}
            for record in read_records(folder / "evaluation_results.jsonl"):
                by_prompt.setdefault(record.prompt, []).append(record.scores[task.reward])
            found[task.name] = [round(fmean(values), 5) for values in by_prompt.values()]
        return found

    def _start(self, run: Run, what: str, *command: str) -> None:
        start(self.logs / run.world / f"{run.name}.{what}.log", *command)

    def _result(self, run: Run, scores: dict[str, dict[str, list[float]]]) -> Result:
        world, rows, curve, backwards = WORLDS[run.world], [], [], 0
        rewards = {task.name: f"eval/{task.name}/{task.reward}" for task in world.tasks}
        if run.rounds:
            rows = [row for row in read_metrics(self.folder(run)) if row["round"] <= self.rounds(run)]
            backwards = planned(run.world, run.arm).nfe_per_round.student
            for row in rows:
                if seen := {task: row[key] for task, key in rewards.items() if key in row}:
                    curve.append((row["round"], seen))
            rows = [row for row in rows if row["round"]]  # round 0 is the evaluation of the start
        else:
            curve = [(0, {task: fmean(values) for task, values in scores["validation"].items()})]
        teachers = [read_result(self.file(teacher)) for teacher in run.teachers]
        return Result(
            world=run.world,
            arm=run.arm,
            stage=run.stage,
            seed=run.seed,
            quick=self.quick,
            digest=world.digest(),
            rounds=len(rows),
            seconds=round(sum(row["seconds"] for row in rows), 1),
            forwards=sum(row["evaluations"] for row in rows),
            backwards=float(backwards * len(rows)),
            teacher_forwards=sum(teacher.forwards for teacher in teachers),
            teacher_backwards=sum(teacher.backwards for teacher in teachers),
            curve=curve,
            test=scores.get("test", {}),
            machine=f"{platform.machine()}, {os.cpu_count()} cores, one thread a run",
            date=datetime.date.today().isoformat(),
            made_by=run.what.digest,
        )


def start(log: Path, *command: str) -> None:
    """Run a script in a process of its own. Raises RuntimeError with the end of its log if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")  # of an earlier start
    process = FORKS.Process(target=_script, args=(command, log))
    process.start()
    process.join()
    if process.exitcode:
        end = log.read_text(encoding="utf-8")[-1500:]
        raise RuntimeError(f"{command[0]} ended with status {process.exitcode}; the end of {log}:\n{end}")


def _script(command: Sequence[str], log: Path) -> None:
    """Be ``command``, its output in a file."""
    with log.open("w", encoding="utf-8") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


def plan(world: str, arms: Sequence[str], seeds: Sequence[int], stages: Sequence[str] = ()) -> list[Run]:
    """The runs, each once, what others need before them; seed by seed, so that complete comparisons come early.

    Candidates among which validation chooses come with the seed with which it does, whichever are asked for.

    ``stages``: of the arms that have them, only these.
    """
    found: dict[Run, None] = {}

    def add(run: Run) -> None:
        for each in run.needs:
            add(each)
        found.setdefault(run)

    for seed in sorted({FIRST_SEED, *seeds}):
        for name in arms:
            asked = [arms_in(world)[name]]
            if asked[0].kind == "same":  # as what validation chooses
                choice = asked[0].of.removesuffix(f".{HALF}")
                asked = [arm for arm in arms_in(world).values() if arm.choice == choice]
            for arm in asked:
                if seed in seeds or arm.choice:
                    for stage in [s for s in arm.rounds if s in stages] or arm.rounds or ("",):
                        add(Run(world, arm.name, stage, seed))
    return list(found)
