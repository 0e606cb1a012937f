"""The benchmark scripts run as they are documented and write what they promise; what they measure is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.peers.flow_factory import check, padded
from benchmarks.round import PRESETS, WAYS, beside, parse, time_all
from benchmarks.world import RANK, TINY_TEACHERS, World

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
        ("benchmarks/round.py", [*TINY, "floor", "--batches", "2", "--teachers", *TINY_TEACHERS[:2]], ()),
        # what is meant for a GPU, on the same architecture, small
        ("benchmarks/round.py", [*TINY, "checkpointing", "floor", *SMALL, "--tasks", "1"], ()),
        ("benchmarks/round.py", "--preset verl-omni --random small --repeats 1 --steps 4".split(), ()),
        ("experiments/gradient_scale.py", ["--steps", "2", "--batch_size", "1"], ("gradient_rms", "relative_gap")),
    ],
)
def test_script_writes_its_figures(tmp_path, script, options, keys):
    """From another folder and without PYTHONPATH, as a user may start it."""
    file = tmp_path / "figures.json"
    start(script, *options, "--json", str(file), cwd=tmp_path)
    figures = json.loads(file.read_text())
    assert all(figures[key] > 0 for key in keys) and str(ROOT) not in file.read_text()
    assert script != "benchmarks/round.py" or figures["ways"]
    for way in figures.get("ways", {}).values():
        assert all(way[key] > 0 for key in ("seconds", "to_default", "to_upstream", "to_floor"))


def test_a_preset_is_the_published_setting_and_flags_win():
    preset = PRESETS["verl-omni"]
    args = parse(["--preset", "verl-omni"])
    assert (args.random, args.tasks, args.batch_size * args.batches) == ("sd35", 1, 64)
    assert (args.resolution, args.steps, args.max_sequence_length) == (384, 10, 256)
    assert all(any(str(seconds) in line for line in beside(args)) for seconds in preset.published.values())
    args = parse(["--steps", "4", "--preset", "verl-omni", "--resolution", "512", "--ways", "default"])
    assert (args.steps, args.resolution, args.ways) == (4, 512, ["default"])
    changed = beside(args)[-1]  # is told, so that nobody compares it
    assert "steps 4" in changed and "resolution 512" in changed and "tasks" not in changed


def test_several_batches_are_the_round_of_one():
    """The same images, whole or in parts: the same mean loss and gradient, before the optimizer's step."""
    found = []
    for sizes in ("--batch_size 4", "--batch_size 2 --batches 2", "--batch_size 1 --batches 4"):
        flags = f"--random small --tasks 2 --steps 3 --resolution 32 {sizes}".split()
        algorithm, batches = World(parse(flags)).setup()
        result = algorithm.round(batches)
        found.append((result.losses.mean, result.grad_norm))
    assert found[0][1] > 0
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_a_peers_checkout_must_be_one(tmp_path):
    with pytest.raises(SystemExit) as error:
        check(tmp_path)
    assert str(tmp_path) in str(error.value) and "opd/trainer.py" in str(error.value)


def test_a_padded_teacher_has_the_same_effect(tmp_path):
    def effects(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        sides = [{n: t.double() for n, t in tensors.items() if f".lora_{side}." in n} for side in "AB"]
        scale = config["lora_alpha"] / config["r"]
        return {n: scale * sides[1][n.replace(".lora_A.", ".lora_B.")] @ a for n, a in sides[0].items()}, config["r"]

    teacher = Path(TINY_TEACHERS[1])
    (before, rank), (after, wide) = effects(teacher), effects(padded(teacher, tmp_path / "wide"))
    assert rank < wide == RANK and before.keys() == after.keys()
    for name, effect in before.items():
        torch.testing.assert_close(after[name], effect)


def test_an_interrupt_keeps_what_was_measured():
    done = []

    def round_():
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(True)

    seconds, peaks = time_all({"a": round_, "b": round_}, {"a": 0, "b": 0}, repeats=5, device="cpu")
    assert [len(seconds[name]) for name in "ab"] == [2, 1] and peaks == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "preset"), [("small", "small_mopd"), ("small", "small_merge"), ("small_z_image", "small_z_image")]
)
def test_a_random_model_is_distilled_by_the_projects_own_script(shape, preset, tmp_path):
    """What stands for the published model where it cannot be had, small: built, and a round of it profiled."""
    environment = {"FULL_SIZE": str(tmp_path / "full"), "PYTHONPATH": str(ROOT)}
    start("benchmarks/full_size.py", "--shape", shape, "--dtype", "float32", timeout=300, **environment)
    sizes = {"cache_dir": tmp_path / "cache", "sample.num_steps": 2 if "merge" not in preset else 8}
    sizes |= {"train.batch_size": 1, "sample.train_batch_size": 1}
    options = ["--config", f"benchmarks/full_size_config.py:{preset}", "--rounds", "1", "--output", str(tmp_path)]
    options += [f"--config.{key}={value}" for key, value in sizes.items()]
    start("tools/profile_round.py", *options, timeout=300, **environment)
    stages = json.loads((tmp_path / "summary.json").read_text())["stage_seconds"]
    assert {"forward, frozen policies", "forward, student"} <= stages.keys()


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
