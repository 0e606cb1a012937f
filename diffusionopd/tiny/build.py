"""Builds the embedded tiny world from nothing: `python -m diffusionopd.tiny.build`, 90 minutes on 2 CPU cores.

Stages, each skipped when its result is there: vae (5 minutes), base (40 minutes), teachers (10 minutes),
dataset (no time), check (20 minutes: scores on 384 prompts per task, the sample images, the manifest). After an
interruption run the same command again: base training goes on from its last state in the work folder, at most two
minutes old. To rebuild a stage, delete its result: `<work>/vae`, `<work>/base` with `<work>/base-state.pt`,
`<out>/teachers/<task>`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from diffusionopd.tiny import check, dataset, fit, train_base, train_teacher, train_vae
from diffusionopd.tiny.grammar import TASKS

#: Minutes of training with both cores for vae and base, with one core for each teacher.
MINUTES = {"vae": 4.5, "base": 40.0, "teachers": 5.0}
STAGES = ("vae", "base", "teachers", "dataset", "check")


class Build:
    """Paths and number of processes; one method per stage."""

    def __init__(self, out: Path, work: Path, minutes: float | None, processes: int) -> None:
        self.out, self.work, self.processes = out, work, processes
        self.minutes = MINUTES if minutes is None else dict.fromkeys(MINUTES, minutes)
        work.mkdir(parents=True, exist_ok=True)

    def vae(self) -> None:
        """Trains the autoencoder into the work folder."""
        if not _is_there("vae", self.work / "vae" / "config.json"):
            fit.spawn(train_vae.train, self.processes, self.work / "vae", self.minutes["vae"])

    def base(self) -> None:
        """Trains, then copies the pipeline folder to its place without the traces of this machine."""
        trained = self.work / "base"
        if not _is_there("base", trained / "model_index.json"):
            fit.spawn(train_base.train, self.processes, self.work, trained, self.minutes["base"])
        shutil.rmtree(self.out / "model", ignore_errors=True)
        shutil.copytree(trained, self.out / "model")
        for path in (self.out / "model").rglob("*.json"):
            _forget_paths(path)

    def teachers(self) -> None:
        """As many at a time as there are processes."""
        folders = {task: self.out / "teachers" / task / "lora" for task in TASKS}
        missing = [t for t in TASKS if not _is_there(f"teacher {t}", folders[t] / "adapter_model.safetensors")]
        fit.one_thread()
        with ProcessPoolExecutor(self.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            model, minutes = self.out / "model", self.minutes["teachers"]
            training = [pool.submit(train_teacher.train, t, model, self.work, folders[t], minutes) for t in missing]
            for future in training:
                future.result()

    def dataset(self) -> None:
        """Writes the prompt files of all tasks."""
        dataset.write(self.out / "dataset")

    def check(self) -> None:
        """Scores, sample images and manifest; raises SystemExit where a bound is missed."""
        fit.one_thread()
        missed = check.write_scores(self.out, self.processes)
        check.draw(self.out).save(self.out / "samples.png", optimize=True)
        self.manifest()
        if missed:
            raise SystemExit("bounds missed:\n  " + "\n  ".join(missed))

    def manifest(self) -> None:
        """Writes sizes and sha256 of what is shipped."""
        check.write_manifest(self.out)


def _is_there(stage: str, result: Path) -> bool:
    if result.exists():
        print(f"{stage}: {result} is there, skipped", flush=True)
    return result.exists()


def _forget_paths(path: Path) -> None:
    """Libraries note the folder that a part was loaded from."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and content.keys() & {"_name_or_path", "name_or_path"}:
        content = {k: v for k, v in content.items() if k not in ("_name_or_path", "name_or_path")}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
        getattr(build, stage)()
        print(f"{stage}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
