"""What makes a round faster changes nothing but its time: ten rounds with each switch against ten without any."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch

from diffusionopd.models.acceleration import compile_blocks
from diffusionopd.training import checkpoint, train

COMMON = {
    "num_epochs": 10,
    "eval_freq": 0,
    "sample__num_steps": 2,
    "sample__noise_level": 0.7,
    "sample__train_batch_size": 1,
    "train__batch_size": 1,
    "train__timestep_fraction": 1.0,
    "train__ema": True,
    "train__ema_interval": 1,
    "train__fused_optimizer": False,
    "prefetch": False,
}
KEYS = ("loss", "loss/first", "loss/second", "grad_norm")


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """What the plain run left, filled by the first test that needs it."""
    return {}


def rows(tiny_config, tmp_path, **changes) -> list[dict]:
    train(tiny_config(**(COMMON | changes)))
    lines = (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in KEYS} for line in lines]


def averages(tmp_path) -> list[torch.Tensor]:
    """The moving average of the student after the last round."""
    tensors, _ = checkpoint.load_state(tmp_path / "logs" / "run" / "checkpoints" / "checkpoint-10" / "state")
    found = [tensors[name] for name in sorted(tensors) if name.startswith("ema.")]
    assert found
    return found


@pytest.mark.parametrize(
    "switch",
    [
        {"train__fused_optimizer": True},
        {"train__merge_teachers": True},
        {"prefetch": True, "monitor_freq": 1},
        {"attention_backend": "math"},
        {"train__merge_teachers": True, "activation_checkpointing": True},
        {"train__merge_teachers": True, "compile": True},
    ],
    ids=lambda switch: ",".join(f"{k}={v}" for k, v in switch.items()),
)
def test_ten_rounds_are_those_of_the_plain_run(tiny_config, tmp_path, plain, switch, monkeypatch):
    # Graphs of forward and backward as they are traced, without the minutes that generating code for them takes.
    monkeypatch.setattr("diffusionopd.training.setup.compile_blocks", partial(compile_blocks, backend="aot_eager"))
    monkeypatch.setattr("diffusionopd.training.setup.check_compiler", lambda device: None)
    if not plain:
        plain["rows"] = rows(tiny_config, tmp_path)
        plain["averages"] = averages(tmp_path)
        assert plain["rows"][-1]["loss"] < 0.98 * plain["rows"][0]["loss"], "ten rounds must train something"
        (tmp_path / "logs" / "run").rename(tmp_path / "logs" / "plain")
    switched = rows(tiny_config, tmp_path, **switch)
    assert len(switched) == 10
    for mine, other in zip(switched, plain["rows"], strict=True):
        for key in KEYS:
            assert mine[key] == pytest.approx(other[key], rel=0 if "prefetch" in switch else 1e-4), key
    for mine, other in zip(averages(tmp_path), plain["averages"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=5e-5)


def test_drawn_steps_do_not_depend_on_the_batch_size(tiny_config, tmp_path):
    drawn = {"train__steps_per_rollout": 1, "num_epochs": 4, "train__timestep_fraction": 0.99, "sample__num_steps": 4}
    ones = rows(tiny_config, tmp_path, sample__train_batch_size=2, train__gradient_accumulation_steps=4, **drawn)
    (tmp_path / "logs" / "run").rename(tmp_path / "logs" / "ones")
    twos = rows(tiny_config, tmp_path, sample__train_batch_size=2, train__batch_size=2, **drawn)
    for mine, other in zip(ones, twos, strict=True):
        for key in KEYS:
            assert mine[key] == pytest.approx(other[key], rel=1e-4), key
    lines = (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()
    counted = [json.loads(line)["evaluations"] for line in lines]
    # Of two pictures a task: the steps up to the drawn one, and the teachers there, one of them under guidance.
    assert set(counted) <= {2 * (first + second + 3) for first in (1, 2, 3) for second in (1, 2, 3)}
    assert len(set(counted)) > 1, "rounds draw anew"
