"""Kill a run at random moments, restart it each time, and compare the result with the undisturbed run's, bit for bit.

    python -m tests.kill --kills 100 --json kill.json

A small distillation in the tiny world (CPU) saves every round and evaluates every second. It is killed with SIGKILL,
restarted with ``resume_from=auto``, killed again, and when it reaches its end begun anew, until all kills are dealt. A
moment is drawn either from the run's whole time or inside one phase, so that the short ones get their share: start,
round, evaluation, writing a checkpoint, and the renaming and pruning after it. Every result must be the undisturbed
run's: student, optimizer, moving average, both LoRA files, metrics apart from ``seconds``, and sample images.

Importing the libraries takes longer than the rest of such a run. So this process imports them once and forks: a
restart is a new process, but the time of its imports, when nothing of a run is touched, is not among the moments of a
kill. Runs of several processes are forked alike, rendezvous by gloo, and are killed together.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from diffusionopd.algorithms.opd import Opd
from diffusionopd.training import checkpoint, load_config, loop, train

from .forked import Forked, Mark, start
from .helpers import rows

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("start", "round", "evaluation", "writing a checkpoint", "renaming and pruning", "between")
START, ROUND, EVALUATION, WRITING, PUBLISHING, BETWEEN = range(len(PHASES))
_MARKED = (  # the functions during which a run is in a phase; what is called within them may be in another
    (Opd, "round", ROUND),
    (loop, "_evaluate", EVALUATION),
    (checkpoint, "save", WRITING),
    (checkpoint, "_publish", PUBLISHING),
    (checkpoint, "_prune", PUBLISHING),
)
_POLL = 2e-4  # seconds
_TIMEOUT = 600.0  # seconds after which a run that neither ends nor is killed counts as hanging


def main(arguments: Sequence[str] | None = None) -> int:
    """Deal the kills, print a table, write ``--json``; 1 if any result differs."""
    args = parse(arguments)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Campaign(args, Path(args.work or folder).resolve()).run()
    result |= {"seconds": time.perf_counter() - started}
    print(table(result))
    settings = {name: value for name, value in vars(args).items() if name not in ("work", "json")}
    if args.json:
        machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        result |= {"date": time.strftime("%Y-%m-%d"), **machine, "settings": settings}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    return 1 if result["differences"] or result["damaged"] else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20, help="of the run that is killed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", help="folder for the runs, kept afterwards (default: a temporary one)")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args(arguments)
    if args.work and Path(args.work).exists():
        parser.error(f"--work {args.work} exists already; name a new folder")
    return args


def make_config(work: Path, name: str, rounds: int) -> Any:
    """The run ``name``: three tasks of one image per process, with everything on that writes or keeps state."""
    config = load_config(f"{ROOT / 'config' / 'tiny.py'}:mopd")
    config.update({"logdir": str(work / "runs"), "run_name": name, "cache_dir": str(work / "cache")})
    config.update({"num_epochs": rounds, "save_freq": 1, "num_checkpoint_limit": 2, "resume_from": "auto"})
    config.update({"eval_freq": 2, "eval_num_prompts": 1, "monitor_freq": 3, "sample_freq": 4})
    config.sample.update({"num_steps": 3, "eval_num_steps": 1, "noise_level": 0.7, "train_batch_size": 1})
    config.train.update({"batch_size": 1, "lora_rank": 4, "lora_alpha": 8})
    for task in config.train.teachers:
        task["proxy_reward"] = {"jpeg_compressibility": 1.0}
    return config


@dataclass
class Campaign:
    """All kills on one configuration."""

    args: argparse.Namespace
    work: Path
    lasted: dict[int, list[float]] = field(default_factory=dict)  # seconds of each visit of a phase, undisturbed
    starts: int = 0

    def run(self) -> dict[str, Any]:
        """The undisturbed run, then runs that are killed until the kills are dealt; what was found."""
        args, rng, dealt, runs, found = self.args, random.Random(self.args.seed), Counter[int](), 0, list[str]()
        self._watch(self._start("first"), (ROUND, 0, 0.0))  # encodes the prompts, once for all runs
        began = time.perf_counter()
        self._watch(self._start("undisturbed"))
        undisturbed = time.perf_counter() - began
        with tqdm(total=args.kills, unit="kill") as bar:
            while dealt.total() < args.kills:
                name, runs, ended = f"killed-{runs + 1}", runs + 1, False
                while not ended:
                    kill = self._draw(rng) if dealt.total() < args.kills else None
                    phase = self._watch(self._start(name), kill)
                    ended = phase is None
                    if phase is not None:
                        dealt[phase] += 1
                        bar.update()
                found += [f"{name}: {what}" for what in differences(self._folder("undisturbed"), self._folder(name))]
        logs = [path.read_text("utf-8", "replace") for path in self.work.glob("output/*/*")]
        return {
            "kills": dealt.total(),
            "by_phase": {name: dealt[i] for i, name in enumerate(PHASES)},
            "runs": runs,
            "rounds": args.rounds,
            "undisturbed_s": undisturbed,
            "damaged": sum(log.count("is damaged") for log in logs),
            "differences": found,
        }

    def _folder(self, name: str) -> Path:
        return self.work / "runs" / name

    def _start(self, name: str) -> tuple[Forked, Mark]:
        """The processes of a start of the run ``name``, and the phase that the first of them is in."""
        config, phase = make_config(self.work, name, self.args.rounds), Mark(START)

        def run(rank: int) -> None:
            os.chdir(ROOT)
            for owner, function, mark in _MARKED:
                setattr(owner, function, _marking(getattr(owner, function), mark, phase if rank == 0 else Mark()))
            train(config)

        self.starts += 1
        return start(run, self.args.processes, log=self.work / "output" / f"{self.starts}-{name}"), phase

    def _draw(self, rng: random.Random) -> tuple[int | None, int, float]:
        """(phase or None for any time, which of its visits, seconds after its beginning), at random."""
        phase = rng.choice((None, START, ROUND, EVALUATION, WRITING, PUBLISHING))
        if phase is None:
            rounds = sum(sum(times) for mark, times in self.lasted.items() if mark != START) / self.args.rounds
            return None, 0, rng.random() * (max(self.lasted[START]) + 3 * rounds)
        times = self.lasted[phase]
        visit = 0 if phase == START else rng.randrange(3)
        return phase, visit, rng.random() * sum(times) / len(times)

    def _watch(self, run: tuple[Forked, Mark], kill: tuple[int | None, int, float] | None = None) -> int | None:
        """Follow a run to its end and return None, or to the moment of its kill and return the phase it was in.

        Without a kill it is the undisturbed run, or the last start of a killed one, whose phases are timed.
        """
        (processes, mark), (wanted, visit, delay) = run, kill or (None, 0, math.inf)
        phase, began, visits = START, time.perf_counter(), Counter({START: 1})
        entered, reached = began, began if wanted in (None, START) else math.inf
        with processes:
            while processes.running() or any(processes.statuses):
                if failed := [rank for rank, status in enumerate(processes.statuses) if status]:
                    raise RuntimeError(f"rank {failed[0]} failed by itself: {processes.errors(failed[0])[-2000:]}")
                now, current = time.perf_counter(), mark.value
                if now - began > _TIMEOUT:
                    raise RuntimeError(f"the run hangs, in phase {PHASES[current]!r}; its output is in {self.work}")
                if current != phase:
                    if delay == math.inf:
                        self.lasted.setdefault(phase, []).append(now - entered)
                    phase, entered = current, now
                    visits[current] += 1
                    if current == wanted and visits[current] == visit + 1:
                        reached = now
                if now - reached >= delay:
                    processes.kill()
                    return mark.value
                time.sleep(_POLL)
        return None


def _marking(function: Callable, value: int, phase: Mark) -> Callable:
    """``function``, which says in ``phase`` that it is at work."""

    def marked(*args: Any, **kwargs: Any) -> Any:
        before = phase.value or BETWEEN  # after the first round it is never the start again
        phase.value = value
        try:
            return function(*args, **kwargs)
        finally:
            phase.value = before

    return marked


def differences(expected: Path, found: Path) -> list[str]:
    """What differs between two finished run folders; nothing, if the second is the first bit for bit."""
    problems = []
    last = (expected / "checkpoints" / "latest").read_text().strip()
    states = [checkpoint.load_state(run / "checkpoints" / last / "state") for run in (expected, found)]
    (a, scalars_a), (b, scalars_b) = states
    problems += [f"tensor {name}" for name in sorted(a.keys() | b.keys()) if not _same_bits(a.get(name), b.get(name))]
    problems += [f"state {name}" for name in sorted(scalars_a) if scalars_a[name] != scalars_b.get(name)]
    files = [f"checkpoints/{last}/{name}" for name in ("lora", "diffusers")] + ["samples"]
    for folder in files:
        names = {path.name for run in (expected, found) for path in (run / folder).glob("[!.]*")}
        for name in sorted(names):
            paths = [run / folder / name for run in (expected, found)]
            if not all(path.is_file() for path in paths) or _content(paths[0]) != _content(paths[1]):
                problems.append(f"file {folder}/{name}")
    metrics = [rows(run) for run in (expected, found)]
    problems += [f"metrics of round {i + 1}" for i, (x, y) in enumerate(zip(*metrics, strict=False)) if x != y]
    return problems + (["number of metrics lines"] if len(metrics[0]) != len(metrics[1]) else [])


def _same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numpy().tobytes() == b.numpy().tobytes()


def _content(path: Path) -> Any:
    """The bytes of a file; of safetensors those of its tensors, and its metadata, which is written in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{name:<22}{count:5d} kills" for name, count in result["by_phase"].items()]
    lines.append(f"{'together':<22}{result['kills']:5d} kills and restarts, over {result['runs']} runs")
    lines.append(f"{result['seconds']:.0f} s; a run of {result['rounds']} rounds takes {result['undisturbed_s']:.1f} s")
    lines.append(f"damaged checkpoints met: {result['damaged']}")
    found = result["differences"]
    verdict = (
        "every run ended bitwise as the undisturbed one" if not found else f"{len(found)} differences: {found[:9]}"
    )
    return "\n".join([*lines, verdict])


if __name__ == "__main__":
    sys.exit(main())
