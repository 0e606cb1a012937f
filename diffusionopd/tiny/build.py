"""Builds the embedded tiny world from nothing: `python -m diffusionopd.tiny.build`, 90 minutes on 2 CPU cores.

Stages, each skipped when its result is there: vae (5 minutes), base (40 minutes), teachers (10 minutes),
dataset (no time), check (20 minutes: scores on 384 prompts a task, the sample picture, the manifest). After an
interruption run the same command again: base training goes on from its last state in the work folder, at most two
minutes old. To rebuild a stage, delete its result: `<work>/vae`, `<work>/base` with `<work>/base-state.safetensors`,
`<out>/teachers/<task>`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusionopd.tiny import check, dataset, manifest, parallel, samples
from diffusionopd.tiny.grammar import TASKS

#: Minutes of training with both cores for vae and base, with one core for each teacher.
MINUTES = {"vae": 4.5, "base": 40.0, "teachers": 5.0}


class Build:
    """Paths and number of processes; one method a stage."""

    def __init__(self, out: Path, work: Path, minutes: float | None, processes: int) -> None:
        self.out, self.work, self.minutes, self.processes = out, work, minutes, processes
        work.mkdir(parents=True, exist_ok=True)

    def _minutes(self, stage: str) -> str:
        return str(MINUTES[stage] if self.minutes is None else self.minutes)

    def vae(self) -> None:
        """Trains the autoencoder into the work folder."""
        if (self.work / "vae" / "config.json").exists():
            return _skipped("vae", self.work / "vae")
        arguments = ["--out", str(self.work / "vae"), "--minutes", self._minutes("vae")]
        parallel.spawn("diffusionopd.tiny.train_vae", arguments, self.processes)

    def base(self) -> None:
        """Trains, then copies the pipeline folder to its place without the traces of this machine."""
        trained = self.work / "base"
        if not (trained / "model_index.json").exists():
            arguments = ["--work", str(self.work), "--out", str(trained), "--minutes", self._minutes("base")]
            parallel.spawn("diffusionopd.tiny.train_base", arguments, self.processes)
        else:
            _skipped("base", trained)
        shutil.rmtree(self.out / "model", ignore_errors=True)
        shutil.copytree(trained, self.out / "model")
        for path in (self.out / "model").rglob("*.json"):
            _forget_paths(path)

    def teachers(self) -> None:
        """As many at a time as there are processes."""
        missing = [t for t in TASKS if not (self._lora(t) / "adapter_model.safetensors").exists()]
        if not missing:
            return _skipped("teachers", self.out / "teachers")
        for first in range(0, len(missing), self.processes):
            parallel.wait_all([self._start_teacher(t) for t in missing[first : first + self.processes]])

    def _lora(self, task: str) -> Path:
        return self.out / "teachers" / task / "lora"

    def _start_teacher(self, task: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "diffusionopd.tiny.train_teacher", "--task", task, "--work", str(self.work)]
        command += ["--model", str(self.out / "model"), "--out", str(self._lora(task))]
        command += ["--minutes", self._minutes("teachers")]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def dataset(self) -> None:
        """Writes the prompt files of all tasks."""
        dataset.write(self.out / "dataset")

    def check(self) -> None:
        """Scores, sample picture and manifest; raises SystemExit where a bound is missed."""
        arguments = ["--assets", str(self.out), "--work", str(self.work)]
        parallel.spawn("diffusionopd.tiny.check", arguments, self.processes)
        missed = check.combine(self.out, self.work, self.processes)
        samples.draw(self.out).save(self.out / "samples.png", optimize=True)
        self.manifest()
        if missed:
            raise SystemExit("bounds missed:\n  " + "\n  ".join(missed))

    def manifest(self) -> None:
        """Writes sizes and sha256 of what is shipped."""
        manifest.write(self.out)


def _skipped(stage: str, result: Path) -> None:
    print(f"{stage}: {result} is there, skipped", flush=True)


def _forget_paths(path: Path) -> None:
    """Libraries note the folder that a part was loaded from."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and content.keys() & {"_name_or_path", "name_or_path"}:
        content = {k: v for k, v in content.items() if k not in ("_name_or_path", "name_or_path")}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


STAGES = ("vae", "base", "teachers", "dataset", "check")


def main(argv: Sequence[str] | None = None) -> None:
    """The stage that `--stage` names, or all of them in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "manifest", "all"), default="all")
    parser.add_argument("--out", type=Path, default=Path("assets/tiny"), help="what is shipped")
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/tiny-build"), help="pools, training state; not shipped"
    )
    parser.add_argument("--minutes", type=float, help="training time of the stage instead of its default")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    a = parser.parse_args(argv)
    build = Build(a.out, a.work, a.minutes, a.processes)
    for stage in STAGES if a.stage == "all" else (a.stage,):
        start = time.monotonic()
        run: Callable[[], None] = getattr(build, stage)
        run()
        print(f"{stage}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
