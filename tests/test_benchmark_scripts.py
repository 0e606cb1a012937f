"""The benchmark scripts run as they are documented and write what they promise; what they measure is not tested."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import adapter_switch
from benchmarks.round import WAYS, parse
from benchmarks.world import World
from diffusionopd.adapters import LoraLayer
from diffusionopd.learner import STUDENT

from .conftest import ROOT


@pytest.mark.parametrize(
    ("script", "options", "keys"),
    [
        (
            "round.py",
            "--steps 2 --timestep_fraction 1 --repeats 1 --batch_size 1 --ways upstream default merged floor".split(),
            {"needed_flops", "matrix_flops_per_second"},
        ),
        (
            "round.py",  # what is meant for a GPU, on the same architecture, small
            "--random small --tasks 1 --steps 2 --repeats 1 --batch_size 1 --ways upstream default checkpointing "
            "floor".split(),
            {"needed_flops", "matrix_flops_per_second"},
        ),
        ("gradient_scale.py", ["--steps", "2", "--batch_size", "1"], {"gradient_rms", "relative_gap"}),
    ],
)
def test_script_writes_its_figures(tmp_path, script, options, keys):
    """From another folder and without PYTHONPATH, as a user may start it."""
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options, "--json", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(file.read_text())
    assert keys <= figures.keys()
    assert all(figures[key] > 0 for key in keys)
    assert str(ROOT) not in file.read_text()


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.exact == "yes" and "compiled" not in name])
def test_exact_ways_of_the_round_benchmark_train_the_same_student(name, tmp_path):
    """What is compared is the same work: after two rounds the students agree to rounding."""
    flags = ["--random", "small", "--tasks", "2", "--steps", "2", "--timestep_fraction", "1", "--batch_size", "1"]
    students = {}
    for way in ("default", name):
        world = RecordingWorld(parse(flags))
        round_ = WAYS[way].build(world)
        for _ in range(2):
            round_()
        students[way] = [p.detach() for p in parameters(world.built)]
    # Over all values together: Adam turns the rounding of a gradient near zero into a step of full length.
    default, other = (torch.cat([p.flatten() for p in students[way]]) for way in ("default", name))
    started = torch.cat([p.detach().flatten() for p in parameters(World(parse(flags)).distiller()[0])])
    assert (default - started).norm() > 1e-3
    assert (other - default).norm() < 1e-3 * (default - started).norm()


def parameters(distiller):
    return distiller.adapters.parameters(STUDENT)


class RecordingWorld(World):
    """Remembers the distiller that a way built."""

    def distiller(self, **switches):
        made = super().distiller(**switches)
        self.built = made[0]
        return made


def test_a_switch_touches_no_layer():
    """Its cost does not depend on the number of layers: all of them share one list of active names."""
    transformer, adapters = adapter_switch.build()
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 191
    assert len({id(layer.active_adapters) for layer in layers}) == 1
    for name in adapter_switch.NAMES:
        adapters.use(name)
        assert layers[0].active_adapters == [name]
