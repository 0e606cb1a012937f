"""What makes a round faster changes nothing but its time: rounds with each switch against rounds without any."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from diffusionopd.models.acceleration import compile_blocks
from diffusionopd.models.merged import MergedTeachers
from diffusionopd.training import loading, setup, train

from .helpers import metrics, state

COMMON = {
    "num_epochs": 6, "sample__num_steps": 2, "sample__noise_level": 0.7, "sample__train_batch_size": 1,
    "train__batch_size": 1, "train__timestep_fraction": 1.0, "train__ema": True, "train__ema_interval": 1,
    "train__fused_optimizer": False, "prefetch": False,
}  # fmt: skip


def assert_same_rounds(rows, others, rel):
    assert len(rows) == len(others)
    for mine, other in zip(rows, others, strict=True):
        for key in ("loss", "loss/first", "loss/second", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], rel=rel), (mine["round"], key)


@pytest.fixture(scope="module")
def plain(make_config, tmp_path_factory):
    """The rows and the last state of the plain run."""
    last = train(make_config(tmp_path_factory.mktemp("plain"), **COMMON))
    return metrics(last.parent.parent), state(last)


@pytest.mark.parametrize(
    "switch",
    [
        {"train__fused_optimizer": True, "attention_backend": "math"},
        {"prefetch": True, "monitor_freq": 1},
        {"train__merge_teachers": True, "activation_checkpointing": True},
        pytest.param({"train__merge_teachers": True, "compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda switch: ",".join(switch),
)
def test_rounds_are_those_of_the_plain_run(tiny_config, plain, switch, monkeypatch):
    # Graphs of forward and backward as they are traced, without the minutes that generating code for them takes.
    monkeypatch.setattr(loading, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    monkeypatch.setattr(loading, "check_compiler", lambda device: None)
    chosen, choose, build, runs = [], loading.choose_attention, setup.build, []
    monkeypatch.setattr(loading, "choose_attention", lambda *a, **k: chosen.append(a[1]) or choose(*a, **k))
    monkeypatch.setattr(setup, "build", lambda *arguments: runs.append(build(*arguments)) or runs[-1])
    rows, tensors = plain
    assert rows[-1]["loss"] < 0.98 * rows[0]["loss"], "the rounds must train something"
    last = train(tiny_config(**(COMMON | switch)))
    (run,), block = runs, runs[0].backbone.transformer.transformer_blocks[0]
    effects = {
        "train__fused_optimizer": run.optimizer._adamw.defaults["fused"] and run.ema._model.foreach,
        "attention_backend": chosen == ["math"],
        "prefetch": run.batches._thread is not None,
        "train__merge_teachers": isinstance(run.adapters, MergedTeachers),
        "activation_checkpointing": run.backbone.transformer.is_gradient_checkpointing,
        "compile": block._compiled_call_impl is not None,
    }
    assert {name for name, there in effects.items() if there} == switch.keys() - {"monitor_freq"}
    assert_same_rounds(metrics(last.parent.parent), rows, rel=0 if "prefetch" in switch else 1e-4)
    averages, found = [name for name in tensors if name.startswith("ema.")], state(last)
    assert averages
    for name in averages:
        torch.testing.assert_close(found[name], tensors[name], rtol=1e-3, atol=5e-5)


def test_drawn_steps_do_not_depend_on_the_batch_size(tiny_config):
    drawn = COMMON | {"train__steps_per_rollout": 1, "num_epochs": 4, "train__timestep_fraction": 0.99}
    drawn |= {"sample__num_steps": 4, "sample__train_batch_size": 2}
    ones = train(tiny_config(run_name="ones", **drawn, train__gradient_accumulation_steps=4))
    twos = train(tiny_config(run_name="twos", **drawn | {"train__batch_size": 2}))
    rows = metrics(twos.parent.parent)
    assert_same_rounds(metrics(ones.parent.parent), rows, rel=1e-4)
    counted = [row["evaluations"] for row in rows]
    # Of two images per task: the steps up to the drawn one, and the teachers there, one of them under guidance.
    assert set(counted) <= {2 * (first + second + 3) for first in (1, 2, 3) for second in (1, 2, 3)}
    assert len(set(counted)) > 1, "rounds draw anew"
