"""The benchmark scripts run as they are documented and write what they promise; what they measure is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.round import WAYS, parse, time_all
from benchmarks.world import World

from .conftest import ROOT

SMALL = "--random small --steps 2 --batch_size 1".split()
TINY = "--steps 2 --repeats 1 --batch_size 1 --ways upstream default".split()


def start(script: str, *options: str, cwd=ROOT, timeout: int = 200, **environment: str) -> None:
    command = [sys.executable, str(ROOT / script), *options]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "keys"),
    [
        ("benchmarks/round.py", [*TINY, "separate", "merged", "floor"], ("needed_flops", "matrix_flops_per_second")),
        # what is meant for a GPU, on the same architecture, small
        ("benchmarks/round.py", [*TINY, "checkpointing", "floor", *SMALL, "--tasks", "1"], ("needed_flops",)),
        ("experiments/gradient_scale.py", ["--steps", "2", "--batch_size", "1"], ("gradient_rms", "relative_gap")),
    ],
)
def test_script_writes_its_figures(tmp_path, script, options, keys):
    """From another folder and without PYTHONPATH, as a user may start it."""
    file = tmp_path / "figures.json"
    start(script, *options, "--json", str(file), cwd=tmp_path)
    figures = json.loads(file.read_text())
    assert all(figures[key] > 0 for key in keys) and str(ROOT) not in file.read_text()
    for way in figures.get("ways", {}).values():
        assert all(way[key] > 0 for key in ("seconds", "to_default", "to_upstream", "to_floor"))


def test_an_interrupt_keeps_what_was_measured():
    done = []

    def round_():
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(True)

    seconds, peaks = time_all({"a": round_, "b": round_}, {"a": 0, "b": 0}, repeats=5, device="cpu")
    assert [len(seconds[name]) for name in "ab"] == [2, 1] and peaks == {}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "preset"), [("small", "small_mopd"), ("small_z_image", "small_z_image")])
def test_a_random_model_is_distilled_by_the_projects_own_script(shape, preset, tmp_path):
    """What stands for the published model where it cannot be had, small: built, and a round of it profiled."""
    environment = {"FULL_SIZE": str(tmp_path / "full"), "PYTHONPATH": str(ROOT)}
    start("benchmarks/full_size.py", "--shape", shape, "--dtype", "float32", timeout=300, **environment)
    sizes = {
        "cache_dir": tmp_path / "cache",
        "sample.num_steps": 2,
        "train.batch_size": 1,
        "sample.train_batch_size": 1,
    }
    options = ["--config", f"benchmarks/full_size_config.py:{preset}", "--rounds", "1", "--output", str(tmp_path)]
    options += [f"--config.{key}={value}" for key, value in sizes.items()]
    start("tools/profile_round.py", *options, timeout=300, **environment)
    stages = json.loads((tmp_path / "summary.json").read_text())["stage_seconds"]
    assert {"forward, teacher_geneval", "forward, student"} <= stages.keys()


@pytest.mark.slow
def test_exact_ways_of_the_round_benchmark_train_the_same_student():
    """What is compared is the same work: after two rounds the students agree to rounding."""

    class RecordingWorld(World):
        def setup(self, **switches):
            self.built = super().setup(**switches)
            return self.built

    def values(algorithm):
        return torch.cat([p.detach().clone().flatten() for p in algorithm.optimizer.parameters])

    flags = [*SMALL, "--tasks", "2", "--steps", "3"]
    started, students = values(World(parse(flags)).setup()[0]), {}
    for name, way in WAYS.items():
        if way.exact == "yes" and "compiled" not in name:
            world = RecordingWorld(parse(flags))
            round_ = way.build(world)
            for _ in range(2):
                round_()
            students[name] = values(world.built[0])
    assert len(students) >= 7
    # Over all values together: Adam turns the rounding of a gradient near zero into a step of full length.
    moved = (students["default"] - started).norm()
    assert moved > 1e-3
    for name, student in students.items():
        assert (student - students["default"]).norm() < 1e-3 * moved, name
