"""`python -m tests.kill` in a short form: a run that is killed and restarted ends as the undisturbed one."""

from __future__ import annotations

import json

import pytest

from diffusionopd.training.checkpoint import load_state, save_state

from .kill import differences, main


@pytest.mark.slow
def test_a_killed_run_ends_as_the_undisturbed_one(tmp_path):
    """Four kills; and the comparison sees what it should."""
    work, file = tmp_path / "work", tmp_path / "figures.json"
    options = ["--kills", "4", "--rounds", "2", "--seed", "1", "--work", str(work), "--json", str(file)]
    assert main(options) == 0
    figures = json.loads(file.read_text())
    assert figures["kills"] == sum(figures["by_phase"].values()) == 4
    assert figures["differences"] == [] and figures["damaged"] == 0
    expected, found = work / "runs" / "undisturbed", work / "runs" / "killed-1"
    last = found / "checkpoints" / "checkpoint-2"
    tensors, scalars = load_state(last / "state")
    tensors["ema.3"].view(-1)[0] += 1e-7
    save_state(last / "state", tensors, scalars | {"round": 3})
    (found / "metrics.jsonl").write_text((found / "metrics.jsonl").read_text().replace('"loss"', '"loss_"'))
    (found / "samples" / "round-000001.png").unlink()
    expect = ["tensor ema.3", "state round", "file samples/round-000001.png"]
    # The row of the start, which has no loss, comes first.
    assert differences(expected, found) == [*expect, "metrics of round 2", "metrics of round 3"]
