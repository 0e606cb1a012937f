"""Several rounds for one optimizer step: the gradient of one large round, kept across checkpoints and processes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from diffusionopd.algorithms.optim import NonFiniteError, OptimizerSettings, StudentOptimizer
from diffusionopd.config_schema import ConfigError
from diffusionopd.models.policies import STUDENT
from diffusionopd.training import check, train

from .helpers import (
    assert_bitwise,
    assert_near,
    gradients,
    make_batches,
    make_learner,
    make_opd,
    metrics,
    perturb,
    state,
    train_forked,
)

STEPS = "train__gradient_accumulation_steps"


@pytest.mark.parametrize("kind", ["opd", "nft", "grpo"])
def test_rounds_that_share_a_step_are_one_round_with_all_their_batches(kind, backbone, adapters, text, monkeypatch):
    """Each group of prompts a round of its own, then all in one round: the same losses, gradient and norm."""
    perturb(adapters)
    if kind == "opd":
        learner = make_opd(backbone, adapters, text, "flow", 0.7)
        batches = make_batches(backbone, text, (1.0, 2.0))
    else:
        learner = make_learner(kind, backbone, adapters, text)
        batches = make_batches(backbone, text, size=4, steps=range(3))
    seen = []
    monkeypatch.setattr(learner.optimizer._scaler, "step", lambda adamw: seen.append(gradients(adapters)))
    large = learner.round(batches)
    before = [p.clone() for p in adapters.parameters(STUDENT)]
    first = learner.round(batches[:1], step=False)
    assert first.grad_norm is None and len(seen) == 1
    second = learner.round(batches[1:])
    assert all(torch.equal(p, q) for p, q in zip(adapters.parameters(STUDENT), before, strict=True))
    assert first.losses.means() | second.losses.means() == pytest.approx(large.losses.means(), rel=1e-5, abs=1e-7)
    assert second.grad_norm == pytest.approx(large.grad_norm, rel=1e-5)
    assert_near(seen[1], seen[0], rel=1e-5)


def make_optimizer(dynamic_scale=False, **settings):
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    settings = OptimizerSettings(**{"learning_rate": 0.1, "max_grad_norm": 1e9, "loss_scale": 1.0, **settings})
    return StudentOptimizer(parameters, settings, dynamic_scale)


def backward(optimizer, factor):
    optimizer.backward(factor * sum(p.square().sum() for p in optimizer.parameters))


def test_a_step_takes_the_mean_of_the_kept_rounds_also_after_a_restart():
    """Restarted in between, and with another loss scale: the step is the same, and so is what follows a step before."""
    for dynamic_scale in (False, True):
        complete = make_optimizer(dynamic_scale)
        backward(complete, 0.5)
        complete.step()
        size = sum(p.square().sum() for p in complete.parameters).item() ** 0.5
        for factor in (1.0, 3.0):
            backward(complete, factor)
            complete.keep()
        cut = make_optimizer(dynamic_scale, loss_scale=8.0)
        cut.load_state(complete.state_tensors(), complete.state_scalars())
        for mine, other in zip(cut.parameters, complete.parameters, strict=True):
            mine.data.copy_(other)
        for optimizer in (complete, cut):
            backward(optimizer, 5.0)
            assert optimizer.step() == pytest.approx(3.0 * 2 * size)  # the mean factor, of 2 x
            assert not any(key.endswith("gradient") for key in optimizer.state_tensors())
            assert "kept" not in optimizer.state_scalars()
            backward(optimizer, 1.0)
            optimizer.step()
        for mine, other in zip(cut.parameters, complete.parameters, strict=True):
            torch.testing.assert_close(mine, other)


def test_steps_done_are_restored_and_an_optimizer_that_counts_in_whole_numbers_gets_one(monkeypatch):
    """As bitsandbytes' does, whose moments are numbers below 256, of the blocks' largest; at twice the loss scale."""
    done, again, given = make_optimizer(), make_optimizer(loss_scale=2.0), []
    for _ in range(2):
        backward(done, 1.0)
        done.step()
    for own in done._adamw.state.values():
        own["step"], own["state1"] = 2, torch.tensor([7, 255], dtype=torch.uint8)
        own["absmax1"], own["absmax2"] = torch.tensor([3.0]), torch.tensor([5.0])
    monkeypatch.setattr(again._adamw, "load_state_dict", lambda state: given.extend(state["state"].values()))
    again.load_state(done.state_tensors(), done.state_scalars())
    assert again.steps == 2 and [(own["step"], type(own["step"])) for own in given] == [(2, int)] * 2
    for own in given:
        assert own["state1"].tolist() == [7, 255] and (own["absmax1"], own["absmax2"]) == (6.0, 20.0)


def test_a_kept_gradient_that_is_not_finite_stops_at_once_or_costs_all_rounds_of_the_step():
    optimizer = make_optimizer()
    backward(optimizer, float("nan"))
    with pytest.raises(NonFiniteError):
        optimizer.keep()
    assert optimizer.state_tensors() == {}
    optimizer = make_optimizer(dynamic_scale=True)  # of fp16, where it is an overflow
    backward(optimizer, float("inf"))
    optimizer.keep()
    backward(optimizer, 1.0)
    before = optimizer.state_scalars()["scale"]
    assert optimizer.step() is None
    assert optimizer.state_scalars() == optimizer.state_scalars() | {"scale": before / 2}
    assert all(torch.equal(p, torch.ones_like(p)) for p in optimizer.parameters)
    backward(optimizer, 1.0)
    assert optimizer.step() == pytest.approx(2 * 7**0.5)


def test_a_step_every_second_round(tiny_config, tmp_path):
    """Between steps nothing moves, not even averages; a run that is cut there goes on bit for bit."""
    options = {"train__ema": True, "train__ema_interval": 1, "train__algorithm": "nft", "save_freq": 1}
    options |= {STEPS: 4, "sample__num_batches_per_epoch": 2, "num_epochs": 4}
    complete = train(tiny_config(run_name="complete", **options))
    rows = metrics(tmp_path / "logs" / "complete")
    assert [row["grad_norm"] is None for row in rows] == [True, False, True, False]
    assert all(row["loss"] is not None for row in rows)
    saved = [state(complete.parent / f"checkpoint-{n}") for n in (1, 2, 3)]
    for part in ("student.", "ema.", "old."):
        moving = [name for name in saved[0] if name.startswith(part)]
        assert moving and all(torch.equal(saved[1][name], saved[2][name]) for name in moving), part
        assert any(not torch.equal(saved[0][name], saved[1][name]) for name in moving), part
    assert [any(name.endswith("gradient") for name in tensors) for tensors in saved] == [True, False, True]
    start = str(complete.parent / "checkpoint-3")
    resumed = train(tiny_config(run_name="cut", resume_from=start, **options))
    assert_bitwise(state(complete), state(resumed))
    assert_bitwise(*(load_file(run / "lora" / "adapter_model.safetensors") for run in (complete, resumed)))


def test_another_number_of_processes_takes_the_kept_gradient_over(tiny_config, tmp_path):
    """One round in one process, the other, with the step, in two."""
    one = {"num_epochs": 2, "sample__train_batch_size": 4, "train__batch_size": 4, STEPS: 4, "save_freq": 1}
    complete = train(tiny_config(run_name="complete", **one))
    start = str(complete.parent / "checkpoint-1")
    train_forked(tiny_config(run_name="two", num_epochs=2, resume_from=start, **{STEPS: 4}))
    (row,) = metrics(tmp_path / "logs" / "two")
    assert row["grad_norm"] == pytest.approx(metrics(tmp_path / "logs" / "complete")[1]["grad_norm"], rel=2e-4)
    mine, other = state(complete), state(tmp_path / "logs" / "two" / "checkpoints" / "checkpoint-2")
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-3, atol=5e-5)


def test_the_plan_says_how_often(tiny_config):
    plan = check(tiny_config(num_epochs=7, **{STEPS: 6}), 1)
    assert (plan.shape.rounds_per_step, plan.shape.batches_per_step) == (3, 2)
    assert [plan.shape.updates_after(n) for n in range(1, 8)] == [None, None, 1, None, None, 2, None]
    (note,) = plan.notes
    assert "last 1 " in note and "num_epochs 7" in note
    plan = check(tiny_config(num_epochs=6, **{STEPS: 2}), 1)
    assert (plan.shape.rounds_per_step, plan.shape.updates_after(5), plan.notes) == (1, 5, ())


@pytest.mark.parametrize(
    ("changes", "key", "facts"),
    [
        ({STEPS: 3}, "train.gradient_accumulation_steps", "3 2"),
        ({STEPS: 3, "train__algorithm": "sft"}, "train.gradient_accumulation_steps", "3 4"),
        ({STEPS: 4, "train__num_inner_epochs": 2}, "train.num_inner_epochs", "2 1"),
    ],
)
def test_what_cannot_be_accumulated_is_refused(tiny_config, changes, key, facts):
    with pytest.raises(ConfigError) as caught:
        check(tiny_config(**changes), 1)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key} ") and all(fact in problem for fact in facts.split()), problem
