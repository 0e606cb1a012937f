"""Run the paper's comparisons in the tiny world, keep every result, write the table, the plots and the verdicts.

    python experiments/claims/run.py                       all, seeds 1 2 3: hours; can be interrupted and resumed
    python experiments/claims/run.py opd sft --seeds 1     some of them (and the teachers that they need)
    python experiments/claims/run.py --short               three rounds each, to see that everything runs

A finished run is one file in results/, and is not run again unless its configuration now has another number of rounds;
a run that was interrupted, or is to be longer, goes on from its checkpoint where that is still there. After another
change of a configuration remove the run's file and its folder.
Evaluations (NFE) are forward passes of the transformer for one image; those that are backpropagated too are counted
beside them ("backwards"), because the methods differ in their share.
--jobs runs at once, one thread each. The report comes from the results that are there, also when runs failed;
python experiments/claims/report.py writes it alone.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

from ml_collections import ConfigDict
from tqdm import tqdm

from diffusionopd.config_schema import redacted
from diffusionopd.evaluation.results import read_averages, read_records
from diffusionopd.files import write_atomically
from diffusionopd.training import check, load_config
from experiments.claims.curves import ClaimsError, Point, Result, read_result
from experiments.claims.experiments import DISTILLED, LABELS, TASKS, TEACHERS
from experiments.claims.report import RESULTS, write

CONFIG = "experiments/claims/config.py"
DATASETS = dict(zip(TASKS, ("compose", "tiny_ocr", "scene"), strict=True))
SHORT = {"num_epochs": 3, "save_freq": 2, "eval_freq": 3, "eval_num_prompts": 4}
"""Settings of the short form."""


@cache
def settings(experiment: str) -> ConfigDict:
    """The configuration of an experiment that trains."""
    return load_config(f"{CONFIG}:{experiment}")


@dataclass(frozen=True)
class Run:
    """One experiment with one seed."""

    experiment: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files: ``<experiment>-seed<n>``."""
        return f"{self.experiment}-seed{self.seed}"

    @property
    def needs(self) -> tuple[Run, ...]:
        """Runs whose LoRAs this one takes as teachers."""
        return tuple(Run(teacher, self.seed) for teacher in TEACHERS) if self.experiment in DISTILLED else ()

    @property
    def trained(self) -> bool:
        """Whether there is anything to train: the base and the shipped teachers are only evaluated."""
        return self.experiment != "base" and not self.experiment.startswith("shipped_")


@dataclass(frozen=True)
class Runner:
    """Where runs happen, where results go, and how long they are."""

    logs: Path
    results: Path
    short: bool

    def result_file(self, run: Run) -> Path:
        """The JSON file of a finished run."""
        return self.results / f"{run.name}.json"

    def folder(self, run: Run) -> Path:
        """The run folder that training writes."""
        return self.logs / run.name

    def is_done(self, run: Run) -> bool:
        """Whether there is a result of as many rounds as the configuration has."""
        file = self.result_file(run)
        return file.is_file() and read_result(file).rounds == self._rounds(run)

    def can_teach(self, run: Run) -> bool:
        """Whether the run's last LoRA is here: results are kept with the code, run folders may be gone or half made."""
        return self.is_done(run) and self._latest(run) == f"checkpoint-{self._rounds(run)}"

    def do(self, run: Run) -> None:
        """Train, evaluate, write the result. Raises RuntimeError with the end of the log of what failed.

        A run that has a result is only trained again, for its LoRA.
        """
        if run.trained:
            self._train(run)
        if not self.is_done(run):
            self._evaluate(run)
            write_atomically(self.result_file(run), json.dumps(asdict(self._result(run)), indent=1) + "\n")

    def _rounds(self, run: Run) -> int:
        if not run.trained:
            return 0
        return SHORT["num_epochs"] if self.short else settings(run.experiment).num_epochs

    def _latest(self, run: Run) -> str:
        file = self.folder(run) / "checkpoints" / "latest"
        return file.read_text(encoding="utf-8").strip() if file.is_file() else ""

    def _train(self, run: Run) -> None:
        changes = {"seed": run.seed, "save_dir": self.folder(run), "resume_from": "auto"}
        for i, teacher in enumerate(run.needs):
            lora = self.folder(teacher) / "checkpoints" / self._latest(teacher) / "lora"
            changes[f"train.teachers[{i}].lora_path"] = lora
        flags = [f"--config.{key}={value}" for key, value in (changes | (SHORT if self.short else {})).items()]
        self._start(run, "train", "scripts/train_opd.py", "--config", f"{CONFIG}:{run.experiment}", *flags)

    def _evaluate(self, run: Run) -> None:
        which = ["--checkpoint_path", str(self.folder(run))]
        if run.experiment == "base":
            which = ["--base", "--config", f"{CONFIG}:opd"]
        elif not run.trained:
            which = ["--teacher", run.experiment.removeprefix("shipped_"), "--config", "config/tiny.py:mopd"]
        flags = ["--output_dir", str(self._evaluation(run)), "--limit", "6" if self.short else "128"]
        flags += ["--seed", str(run.seed), "--num_inference_steps", "10", "--dataset", *DATASETS.values(), "--resume"]
        self._start(run, "evaluate", "scripts/evaluate.py", *which, *flags)

    def _evaluation(self, run: Run) -> Path:
        return self.folder(run) / f"evaluation-{self._rounds(run)}"

    def _start(self, run: Run, what: str, *command: str) -> None:
        log = self.logs / f"{run.name}.{what}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        environment |= {"TRANSFORMERS_VERBOSITY": "error"}
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=output)
        if done.returncode:
            end = log.read_text(encoding="utf-8")[-1500:]
            raise RuntimeError(f"{what} ended with status {done.returncode}; the end of {log}:\n{end}")

    def _result(self, run: Run) -> Result:
        """The result of a run from the files of its training and evaluation."""
        folders = {task: self._evaluation(run) / dataset for task, dataset in DATASETS.items()}
        rows, curve, evaluations, backwards = [], [], 0.0, 0
        if run.trained:
            text = (self.folder(run) / "metrics.jsonl").read_text(encoding="utf-8")
            # Without round 0, the evaluation of the start: the curves begin with the base's.
            rows = [row for line in text.splitlines() if (row := json.loads(line))["round"]]
            backwards = check(settings(run.experiment), num_processes=1).nfe_per_round.student * len(rows)
        else:  # a curve of one point, on the test prompts that trainings are monitored on: the first, with their noise
            count = SHORT["eval_num_prompts"] if self.short else settings("opd").eval_num_prompts
            records = {task: read_records(folder / "evaluation_results.jsonl") for task, folder in folders.items()}
            first = {
                task: [r.scores[f"tiny_{task}"] for r in rs if r.sample_id < count] for task, rs in records.items()
            }
            curve = [Point(0, 0.0, {task: fmean(scores) for task, scores in first.items()})]
        for row in rows:
            evaluations += row["evaluations"]
            if seen := {t: row[f"eval/{t}/tiny_{t}"] for t in TASKS if f"eval/{t}/tiny_{t}" in row}:
                curve.append(Point(row["round"], evaluations, seen))
        averages = {task: read_averages(folder / "average_scores.json") for task, folder in folders.items()}
        return Result(
            experiment=run.experiment,
            label=LABELS[run.experiment],
            seed=run.seed,
            form="short" if self.short else "full",
            rounds=len(rows),
            seconds=round(sum(row["seconds"] for row in rows), 1),
            evaluations=evaluations,
            teacher_evaluations=sum(read_result(self.result_file(teacher)).evaluations for teacher in run.needs),
            curve=curve,
            final={task: averages[task][f"tiny_{task}"] for task in TASKS},
            machine=f"{platform.machine()}, {os.cpu_count()} cores, one thread a run",
            date=datetime.date.today().isoformat(),
            backwards=backwards,
        )


def plan(experiments: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs, each once, teachers before what needs them; seed by seed, so that complete comparisons come early."""
    wanted = [Run(experiment, seed) for seed in seeds for experiment in experiments]
    return list(dict.fromkeys(each for run in wanted for each in (*run.needs, run)))


def run_all(runs: Sequence[Run], runner: Runner, jobs: int) -> list[str]:
    """Do what has no result yet, ``jobs`` at a time; returns the messages of what failed."""
    wanted = {run for run in runs if not runner.is_done(run)}
    # A teacher whose folder is gone is trained again, to the same weights, for the students that still need it.
    wanted |= {teacher for run in wanted for teacher in run.needs if not runner.can_teach(teacher)}
    started: dict[Run, Future] = {}

    def do(run: Run) -> None:
        wait([started[teacher] for teacher in run.needs if teacher in started])
        if not all(map(runner.can_teach, run.needs)):
            raise RuntimeError("its teachers are missing")
        bar.set_postfix_str(run.name)
        runner.do(run)

    with tqdm(total=len(runs), initial=len(runs) - len(wanted), unit="run") as bar, ThreadPoolExecutor(jobs) as pool:
        for run in filter(wanted.__contains__, runs):  # teachers are started before those that wait for them
            started[run] = pool.submit(do, run)
        try:
            for _ in as_completed(started.values()):
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    errors = {run: future.exception() for run, future in started.items()}
    return [redacted(f"{run.name}: {error}") for run, error in errors.items() if error]


def main() -> None:
    """Flags to results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", choices=[*LABELS, []], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2 * 2), help="runs at once")
    parser.add_argument("--short", action="store_true", help="three rounds each, results in --logs")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "claims", help="run folders")
    flags = parser.parse_args()
    logs = (flags.logs / "short" if flags.short else flags.logs).resolve()
    os.chdir(ROOT)  # configurations name files from there
    runner = Runner(logs, logs / "results" if flags.short else RESULTS, flags.short)
    seeds = flags.seeds[:1] if flags.short else flags.seeds
    runs = plan(flags.experiments or list(LABELS), seeds)
    print(f"{len(runs)} runs; folders in {runner.logs}, results in {runner.results}")
    try:
        failures = run_all(runs, runner, flags.jobs)
        if any(map(runner.is_done, runs)):
            print("\n".join(write(runner.results, runner.results)))
    except ClaimsError as error:
        sys.exit(f"error: {error}")
    print("\n".join(failures) or "all done")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
