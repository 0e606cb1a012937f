"""The benchmark scripts run as they are documented and write what they promise; what they measure is not tested."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import adapter_switch
from diffusionopd.adapters import LoraLayer

from .conftest import ROOT


@pytest.mark.parametrize(
    ("script", "options", "keys"),
    [
        ("round.py", ["--steps", "2", "--repeats", "1", "--batch_size", "1"], {"reference_s", "fused_s", "floor_s"}),
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


def test_a_switch_touches_no_layer():
    """Its cost does not depend on the number of layers: all of them share one list of active names."""
    transformer, adapters = adapter_switch.build()
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 191
    assert len({id(layer.active_adapters) for layer in layers}) == 1
    for name in adapter_switch.NAMES:
        adapters.use(name)
        assert layers[0].active_adapters == [name]
