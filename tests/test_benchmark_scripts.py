"""The benchmark scripts run as they are documented and write what they promise; what they measure is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import adapter_switch, launches
from benchmarks.round import WAYS, parse, time_all
from benchmarks.world import RANDOM, World
from diffusionopd.models.lora import LoraLayer

from .conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "keys"),
    [
        (
            "benchmarks/round.py",
            "--steps 2 --timestep_fraction 1 --repeats 1 --batch_size 1 "
            "--ways upstream default separate merged floor".split(),
            {"needed_flops", "matrix_flops_per_second"},
        ),
        (
            "benchmarks/round.py",  # what is meant for a GPU, on the same architecture, small
            "--random small --tasks 1 --steps 2 --repeats 1 --batch_size 1 --ways upstream default checkpointing "
            "floor".split(),
            {"needed_flops", "matrix_flops_per_second"},
        ),
        ("experiments/gradient_scale.py", ["--steps", "2", "--batch_size", "1"], {"gradient_rms", "relative_gap"}),
    ],
)
def test_script_writes_its_figures(tmp_path, script, options, keys):
    """From another folder and without PYTHONPATH, as a user may start it."""
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / script), *options, "--json", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(file.read_text())
    assert keys <= figures.keys()
    assert all(figures[key] > 0 for key in keys)
    assert str(ROOT) not in file.read_text()
    for way in figures.get("ways", {}).values():
        assert way["seconds"] > 0 and way["to_default"] > 0 and way["to_upstream"] > 0 and way["to_floor"] > 0


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch, though no GPU")
def test_fused_layers_make_fewer_launches():
    found = launches.count(RANDOM["small"])
    for name in ("adapted", "bare"):
        assert found["fused"][name].total() < 0.75 * found["stock"][name].total()
    assert found["fused"]["adapted"]["_fused_rms_norm"] > 0 and found["stock"]["adapted"]["rsqrt"] > 0


def test_an_interrupt_keeps_what_was_measured():
    done = []

    def round_():
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(True)

    seconds, peaks = time_all({"a": round_, "b": round_}, {"a": 0, "b": 0}, repeats=5, device="cpu")
    assert [len(seconds[name]) for name in "ab"] == [2, 1] and peaks == {}


@pytest.mark.slow
def test_a_random_model_is_distilled_by_the_projects_own_script(tmp_path):
    """What stands for the published model where it cannot be had, small: built, and a round of it profiled."""
    environment = {**os.environ, "FULL_SIZE": str(tmp_path / "full"), "PYTHONPATH": str(ROOT)}
    for command in (
        [str(ROOT / "benchmarks" / "full_size.py"), "--shape", "small", "--dtype", "float32"],
        [
            *("tools/profile_round.py", "--config", "benchmarks/full_size_config.py:small_mopd", "--rounds", "1"),
            *("--output", str(tmp_path / "profile"), "--config.sample.num_steps=2", "--config.train.batch_size=1"),
            *("--config.sample.train_batch_size=1", f"--config.cache_dir={tmp_path / 'cache'}"),
        ],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert {"forward, teacher_geneval", "forward, student"} <= json.loads(
        (tmp_path / "profile" / "summary.json").read_text()
    )["stage_seconds"].keys()


@pytest.mark.slow
def test_exact_ways_of_the_round_benchmark_train_the_same_student():
    """What is compared is the same work: after two rounds the students agree to rounding."""
    flags = ["--random", "small", "--tasks", "2", "--steps", "2", "--timestep_fraction", "1", "--batch_size", "1"]
    started = values(World(parse(flags)).setup()[0])
    students = {}
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


def values(algorithm):
    return torch.cat([p.detach().clone().flatten() for p in algorithm.optimizer.parameters])


class RecordingWorld(World):
    """Remembers what a way built."""

    def setup(self, **switches):
        self.built = super().setup(**switches)
        return self.built


def test_a_switch_touches_no_layer():
    """Its cost does not depend on the number of layers: all of them share one list of active names."""
    transformer, adapters = adapter_switch.build()
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 191
    assert len({id(layer.active_adapters) for layer in layers}) == 1
    for name in adapter_switch.NAMES:
        adapters.use(name)
        assert layers[0].active_adapters == [name]
