"""Builds the embedded tiny world from nothing: `python -m diffusionopd.tiny.build`, 90 minutes on 2 CPU cores.

Stages, each skipped when its result is there: vae (5 minutes), base (40 minutes), teachers (10 minutes),
dataset (no time), check (20 minutes: scores on 384 prompts per task, the sample images), manifest. After an
interruption run the same command again. To rebuild a stage, delete its result: `<work>/vae`, `<work>/base`,
`<out>/teachers/<task>`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from diffusionopd.files import write_atomically
from diffusionopd.tiny import check, fit, train
from diffusionopd.tiny.grammar import TASKS, prompt_files

# Minutes of training: with all processes for vae and base, with one for each teacher.
VAE_MINUTES, BASE_MINUTES, TEACHER_MINUTES = 4.5, 40.0, 5.0


def vae(a: Namespace) -> None:
    """Train the autoencoder into the work folder."""
    if _is_missing("vae", a.work / "vae" / "config.json"):
        fit.spawn(train.train_vae, a.processes, a.work / "vae", a.minutes or VAE_MINUTES)


def base(a: Namespace) -> None:
    """Train, then copy the pipeline folder to its place without the traces of this machine."""
    trained = a.work / "base"
    if _is_missing("base", trained / "model_index.json"):
        for task in TASKS:  # drawn here, read by every process
            train.base_pool(task, a.work, train.load_vae(a.work))
        fit.spawn(train.train_base, a.processes, a.work, trained, a.minutes or BASE_MINUTES)
    shutil.rmtree(a.out / "model", ignore_errors=True)
    shutil.copytree(trained, a.out / "model")
    for path in (a.out / "model").rglob("*.json"):  # libraries note the folder that a part was loaded from
        content = json.loads(path.read_text(encoding="utf-8"))
        for key in content.keys() & {"_name_or_path", "name_or_path"}:
            del content[key]
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def teachers(a: Namespace) -> None:
    """Train as many at a time as there are processes."""
    folders = {task: a.out / "teachers" / task / "lora" for task in TASKS}
    missing = [t for t in TASKS if _is_missing(f"teacher {t}", folders[t] / "adapter_model.safetensors")]
    with ProcessPoolExecutor(a.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        fixed = a.out / "model", a.work
        minutes = a.minutes or TEACHER_MINUTES
        for future in [pool.submit(train.train_teacher, t, *fixed, folders[t], minutes) for t in missing]:
            future.result()


def dataset(a: Namespace) -> None:
    """Write the prompt files of all tasks."""
    for name, content in prompt_files().items():
        write_atomically(a.out / "dataset" / name, content)


def scores(a: Namespace) -> None:
    """Scores and sample images; SystemExit where a bound is missed."""
    missed = check.write_scores(a.out, a.processes)
    check.draw(a.out, a.out / "samples.png")
    if missed:
        raise SystemExit("bounds missed:\n  " + "\n  ".join(missed))


STAGES = {
    "vae": vae,
    "base": base,
    "teachers": teachers,
    "dataset": dataset,
    "check": scores,
    "manifest": lambda a: check.write_manifest(a.out),
}


def _is_missing(stage: str, result: Path) -> bool:
    if result.exists():
        print(f"{stage}: {result} is there, skipped", flush=True)
    return not result.exists()


def main(argv: Sequence[str] | None = None) -> None:
    """The stage that `--stage` names, or all of them in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--out", type=Path, default=Path("assets/tiny"), help="what is shipped")
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/tiny-build"), help="pools, training state; not shipped"
    )
    parser.add_argument("--minutes", type=float, help="training time of the stage instead of its default")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    a = parser.parse_args(argv)
    a.work.mkdir(parents=True, exist_ok=True)
    fit.one_thread()
    for name in STAGES if a.stage == "all" else (a.stage,):
        start = time.monotonic()
        STAGES[name](a)
        print(f"{name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
