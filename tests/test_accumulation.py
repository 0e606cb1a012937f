"""Several rounds for one optimizer step: the gradient of one large round, kept across checkpoints and processes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from diffusionopd.algorithms.base import STUDENT
from diffusionopd.algorithms.optim import NonFiniteError, StudentOptimizer
from diffusionopd.config_schema import ConfigError, check
from diffusionopd.rewards import REGISTRY
from diffusionopd.training import checkpoint, train

from . import test_opd, test_stage1
from .test_trainer import assert_bitwise, launch, metrics

STEPS = "train__gradient_accumulation_steps"


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["opd", "nft", "grpo"])
def test_rounds_that_share_a_step_are_one_round_with_all_their_batches(kind, backbone, adapters, text, monkeypatch):
    """Each group of prompts a round of its own, then all in one round: the same losses, gradient and norm."""
    test_opd.perturb(adapters)
    if kind == "opd":
        learner = test_opd.make_distiller(backbone, adapters, text, "flow_sde", 0.7)
        batches = test_opd.make_batches(backbone, text, (1.0, 2.0))
    else:
        learner = test_stage1.make(kind, backbone, adapters, text)
        batches = test_stage1.make_batches(backbone, text, tasks="ab")
    seen = []
    monkeypatch.setattr(
        learner.optimizer._scaler,
        "step",
        lambda adamw: seen.append([p.grad.clone() for p in learner.optimizer.parameters if p.grad is not None]),
    )
    large = learner.round(batches)
    before = [p.clone() for p in adapters.parameters(STUDENT)]
    first = learner.round(batches[:1], step=False)
    assert first.grad_norm is None
    assert len(seen) == 1
    second = learner.round(batches[1:])
    assert all(torch.equal(p, q) for p, q in zip(adapters.parameters(STUDENT), before, strict=True))
    torch.testing.assert_close(torch.cat([first.losses, second.losses]), large.losses, rtol=1e-5, atol=1e-7)
    assert second.grad_norm == pytest.approx(large.grad_norm, rel=1e-5)
    for mine, other in zip(seen[1], seen[0], strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


def make_optimizer(**changes):
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    return StudentOptimizer(parameters, lr=0.1, max_grad_norm=1e9, **changes)


def backward(optimizer, factor):
    optimizer.backward(factor * sum(p.square().sum() for p in optimizer.parameters))


@pytest.mark.parametrize("dynamic_scale", [False, True])
def test_a_step_takes_the_mean_of_the_kept_rounds_also_after_a_restart(dynamic_scale):
    """Restarted in between, and with another loss scale: the step is the same, and so is what follows."""
    whole = make_optimizer(dynamic_scale=dynamic_scale)
    backward(whole, 1.0)
    whole.keep()
    backward(whole, 3.0)
    whole.keep()
    cut = make_optimizer(dynamic_scale=dynamic_scale, loss_scale=8.0)
    cut.load_state(whole.state_tensors(), whole.state_scalars())
    for optimizer in (whole, cut):
        backward(optimizer, 5.0)
        assert optimizer.step() == pytest.approx(3.0 * 2 * 7**0.5)  # the mean factor, of 2 x in 7 places
        assert not any(key.endswith("gradient") for key in optimizer.state_tensors())
        assert "kept" not in optimizer.state_scalars()
        backward(optimizer, 1.0)
        optimizer.step()
    for mine, other in zip(cut.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_kept_gradient_that_is_not_finite_stops_at_once():
    optimizer = make_optimizer()
    backward(optimizer, float("nan"))
    with pytest.raises(NonFiniteError, match="nan"):
        optimizer.keep()
    assert optimizer.state_tensors() == {}


def test_an_overflow_of_fp16_costs_all_rounds_of_the_step():
    optimizer = make_optimizer(dynamic_scale=True)
    backward(optimizer, float("inf"))
    optimizer.keep()
    backward(optimizer, 1.0)
    before = optimizer.state_scalars()["scale"]
    assert optimizer.step() is None
    assert optimizer.state_scalars() == optimizer.state_scalars() | {"scale": before / 2}
    assert all(torch.equal(p, torch.ones_like(p)) for p in optimizer.parameters)
    backward(optimizer, 1.0)
    assert optimizer.step() == pytest.approx(2 * 7**0.5)


# ---- whole runs ------------------------------------------------------------------------------------------------------


def state(folder):
    return checkpoint.load_state(folder / "state")[0]


@pytest.mark.parametrize("algorithm", ["opd", "nft"])
def test_a_step_every_second_round(tiny_config, tmp_path, algorithm):
    """Between steps nothing moves, not even averages; a run that is cut there goes on bit for bit."""
    options = {"train__ema": True, "train__ema_interval": 1, STEPS: 4, "train__algorithm": algorithm, "save_freq": 1}
    if algorithm == "nft":
        options |= {"sample__num_image_per_prompt": 2}
    whole = train(tiny_config(run_name="whole", num_epochs=4, **options))
    rows = metrics(tmp_path / "logs" / "whole")
    assert [row["grad_norm"] is None for row in rows] == [True, False, True, False]
    assert all(row["loss"] is not None for row in rows)
    saved = [state(whole.parent / f"checkpoint-{n}") for n in (1, 2, 3, 4)]
    moving = [name for name in saved[0] if name.startswith(("student.", "ema.", "old."))]
    assert any(name.startswith("old.") for name in moving) == (algorithm == "nft")
    for name in moving:
        assert torch.equal(saved[1][name], saved[2][name]), name
    for part in {name.split(".")[0] for name in moving}:
        assert any(not torch.equal(saved[0][n], saved[1][n]) for n in moving if n.startswith(f"{part}.")), part
    assert any(name.endswith("gradient") for name in saved[2])
    assert not any(name.endswith("gradient") for name in saved[1])
    train(tiny_config(run_name="cut", num_epochs=3, **options))
    resumed = train(tiny_config(run_name="cut", num_epochs=4, resume_from="auto", **options))
    assert_bitwise(state(whole), state(resumed))
    assert_bitwise(*(load_file(run / "lora" / "adapter_model.safetensors") for run in (whole, resumed)))


def test_another_number_of_processes_takes_the_kept_gradient_over(tiny_config, tmp_path):
    """One round in one process, the other, with the step, in two."""
    one = {"num_epochs": 2, "sample__train_batch_size": 4, "train__batch_size": 4, STEPS: 4, "save_freq": 1}
    whole = train(tiny_config(run_name="whole", **one))
    two = tiny_config(run_name="two", num_epochs=2, resume_from=str(whole.parent / "checkpoint-1"), **{STEPS: 4})
    (tmp_path / "config.json").write_text(json.dumps(two.to_dict()))
    script = tmp_path / "run.py"
    script.write_text(
        "import json\nfrom ml_collections import ConfigDict\nfrom diffusionopd.training import train\n"
        f"train(ConfigDict(json.load(open({str(tmp_path / 'config.json')!r}))))\n"
    )
    launch(script)
    (row,) = metrics(tmp_path / "logs" / "two")
    assert row["grad_norm"] == pytest.approx(metrics(tmp_path / "logs" / "whole")[1]["grad_norm"], rel=2e-4)
    mine, other = state(whole), state(tmp_path / "logs" / "two" / "checkpoints" / "checkpoint-2")
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-3, atol=5e-5)


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_says_how_often(tiny_config):
    plan = check(tiny_config(num_epochs=7, **{STEPS: 6}), 1, REGISTRY)
    assert (plan.rounds_per_step, plan.batches_per_step) == (3, 2)
    assert [plan.updates_after(n) for n in range(1, 8)] == [None, None, 1, None, None, 2, None]
    assert "an optimizer step every 3 rounds" in plan.describe()
    assert "note: the last 1 of num_epochs 7 rounds end in no optimizer step" in plan.describe()
    plan = check(tiny_config(num_epochs=6, **{STEPS: 2}), 1, REGISTRY)
    assert (plan.rounds_per_step, plan.updates_after(5)) == (1, 5)
    assert "note" not in plan.describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({STEPS: 3}, r"is 3, but one optimizer step a round needs 2. Set it to 2 \(.*\), or a multiple of it"),
        ({STEPS: 3, "train__algorithm": "sft"}, "does not divide the 2 backward batches.*or a multiple of it"),
        ({STEPS: 4, "train__num_inner_epochs": 2}, "train.num_inner_epochs is 2, but .* all passes would be the same"),
    ],
)
def test_what_cannot_be_accumulated_is_refused(tiny_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(tiny_config(**changes), 1, REGISTRY)
