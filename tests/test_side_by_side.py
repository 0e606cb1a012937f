"""Tasks side by side: rounds of batches that hold several tasks are rounds of a batch for each."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from diffusionopd.config_schema import ConfigError
from diffusionopd.data.batches import Batches, NoiseSettings, join, side_by_side
from diffusionopd.data.prompts import Prompt
from diffusionopd.data.rounds import RoundShape
from diffusionopd.data.sampler import PromptSampler
from diffusionopd.data.tasks import Task
from diffusionopd.models import acceleration
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.flux1 import Flux1
from diffusionopd.models.policies import STUDENT
from diffusionopd.models.qwen_image import QwenImage
from diffusionopd.models.qwen_image_edit import QwenImageEdit
from diffusionopd.models.sana import Sana
from diffusionopd.models.z_image import ZImage
from diffusionopd.rows import put, runs, take
from diffusionopd.training import check, passes, train
from diffusionopd.training.costs.models import read_pipeline
from diffusionopd.training.costs.round import HEADROOM, memory, step_cost
from diffusionopd.training.passes import ROUNDS_WORTH_COMPILING, with_compile, with_passes
from diffusionopd.training.resume import Resume

from .helpers import (
    assert_bitwise,
    assert_near,
    kept_gradients,
    loss_table,
    make_batches,
    make_opd,
    metrics,
    perturb,
    state,
    train_forked,
    with_rows,
)

CPU = torch.device("cpu")
TASKS, STEPS = "train__tasks_per_pass", "train__gradient_accumulation_steps"


def test_rows_are_taken_and_put_back():
    x = torch.arange(14).view(7, 2)
    for rows in ([0, 1, 2, 3, 4, 5, 6], [2], [0, 3, 4, 6], [5, 6]):
        assert torch.equal(take(x, rows), x[rows])
        others = sorted(set(range(7)) - set(rows))
        parts = [(some, take(x, some)) for some in (others, rows) if some]
        assert torch.equal(put(parts), x)
    assert runs([0, 1, 4, 6, 7]) == [slice(0, 2), slice(4, 5), slice(6, 8)]


def unequal(backbone, text, guidances=(1.0, 3.0, 1.0), steps=((0, 2), (1, 2, 3), (0, 1)), **options):
    """Three tasks that have nothing in common: weights, guidance, steps."""
    batches = make_batches(backbone, text, guidances, tasks="aba", **options)
    batches[2:] = with_rows(batches[2:], task="c", sample=0)
    batches = [with_rows([b], weight=w, steps=s)[0] for b, w, s in zip(batches, (0.5, 2.0, 0.75), steps, strict=True)]
    return [
        dataclasses.replace(b, rows=tuple(dataclasses.replace(r, sample=i) for i, r in enumerate(b.rows)))
        for b in batches
    ]


ALL = ((0, 1, 2, 3),) * 3


@pytest.mark.parametrize(
    ("options", "given", "changes"),
    [
        ({}, {}, {}),
        ({"solver": "flow", "noise_level": 0.7, "guidance": 2.0}, {"watched": True}, {}),
        ({"solver": "dpm2"}, {"watched": True}, {}),
        ({"solver": "cps", "noise_level": 0.5, "inner": 2}, {}, {"strength": 1.5}),
        ({"guidance": 2.0, "conditional_weight": 0.5, "beta": 0.1}, {"guidances": (4.0, 3.0, 2.0)}, {}),
        ({"solver": "dance", "noise_level": 0.3, "loss": "policy_gradient"}, {"steps": ALL}, {}),
        (
            {"solver": "ddim", "noise_level": 0.8, "self_normalize": True},
            {"steps": ALL, "watched": True},
            {"strength": 0.5, "reference": "teacher_b"},
        ),
    ],
)
def test_a_joined_round_is_that_of_a_batch_for_each_task(
    backbone, adapters, text, monkeypatch, options, given, changes
):
    perturb(adapters)
    batches = unequal(backbone, text, **given)
    batches[0] = with_rows(batches[:1], **changes)[0]
    learner = make_opd(backbone, adapters, text, **options)
    learner.policies.side_by_side = False
    expected, gradient = kept_gradients(learner, batches, monkeypatch)
    learner.policies.side_by_side = True
    joined = side_by_side(batches, 2 if given else 3)
    assert len(joined) == (2 if given else 1)
    found, together = kept_gradients(learner, joined, monkeypatch)
    # The surrogate's noise is what two states differ by over a small std, which rounding moves by more.
    rel = 1e-4 if options.get("loss") == "policy_gradient" else 1e-5
    torch.testing.assert_close(loss_table(found), loss_table(expected), rtol=rel, atol=1e-9)
    torch.testing.assert_close(found.losses.counts, expected.losses.counts)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert_near(together, gradient, rel=rel)
    images = [
        {
            (row.task, row.sample): x
            for batch, latents in result.images
            for row, x in zip(batch.rows, latents, strict=True)
        }
        for result in (found, expected)
    ]
    assert images[0].keys() == images[1].keys() and bool(images[0]) == bool(given.get("watched"))
    for key, x in images[0].items():
        torch.testing.assert_close(x, images[1][key], rtol=1e-5, atol=1e-5)


def test_a_step_is_one_pass_of_each_kind(backbone, adapters, text, monkeypatch):
    """Teachers and student with a gradient over the rows that are trained there; without over those that walk."""
    learner, calls, forward = make_opd(backbone, adapters, text), [], backbone._forward
    monkeypatch.setattr(
        backbone, "_forward", lambda x, *rest: (calls.append((len(x), torch.is_grad_enabled())), forward(x, *rest))[1]
    )
    learner.round([join(unequal(backbone, text))])
    # Of two rows each: trained at (0, 2), (1, 2, 3) under guidance, (0, 1).
    frozen, grad = False, True
    assert calls == [
        *[(2, False), (4, frozen), (4, grad)],
        *[(2, False), (2 + 4, frozen), (4, grad)],
        *[(2 + 4, frozen), (4, grad)],
        *[(4, frozen), (2, grad)],
    ]
    assert adapters.active == STUDENT


def test_only_batches_of_the_same_samples_are_joined(backbone, text):
    batches = make_batches(backbone, text, tasks="aabb")
    for tasks in (2, 3):
        joined = side_by_side(batches, tasks)
        assert [[(row.task, row.sample) for row in batch.rows] for batch in joined] == [
            [("a", 0), ("a", 1), ("b", 0), ("b", 1)],
            [("a", 2), ("a", 3), ("b", 2), ("b", 3)],
        ]
        assert torch.equal(joined[1].step_noise(2), torch.cat([batches[n].step_noise(2) for n in (1, 3)]))
    assert all(mine is other for mine, other in zip(side_by_side(batches, 1), batches, strict=True))


class NoText:
    """In the place of a text cache."""

    def get(self, texts, device=None, dtype=None):
        return Conditions({"pooled": torch.zeros(len(texts), 1)})


def test_batches_are_joined_inside_an_optimizer_step(backbone, adapters, text):
    """Three tasks of two batches in two steps: one batch of each task in a step."""
    shape = RoundShape(3, 1, 3, 2, 2, 2, 1, accumulation=3, tasks_per_pass=3)
    tasks, sampler = [Task(name) for name in "abc"], PromptSampler([Prompt("")], 42, 0, 4)
    known = {"prompts": dict.fromkeys("abc", [Prompt("")]), "samplers": dict.fromkeys("abc", sampler)}
    found = Batches(
        shape, tasks, NoiseSettings(prefetch=False), **known, text=NoText(), latent_shape=(2, 2, 2),
        steps=lambda index, task: (task,), wants_images=lambda index: True, device=CPU, dtype=torch.float32,
    ).round(0)  # fmt: skip
    first = [("".join(batch.slices), batch.rows[0].sample) for batch in found]
    assert first == [("abc", 0), ("abc", 2)]
    assert [row.steps for row in found[0].rows] == [(0,), (0,), (1,), (1,), (2,), (2,)] and found[0].steps == (0, 1, 2)
    learner = make_opd(backbone, adapters, text)
    learner.shape = shape
    assert learner.parts(found) == [[0], [1]]


# --- runs -------------------------------------------------------------------------------------------------------------

RUNS = {
    "opd": {"train__steps_per_rollout": 2, "sample__noise_level": 0.7},
    "sft": {STEPS: 4},
    "nft": {STEPS: 4, "train__beta": 0.1, "train__distill_weight": 1.0},
    "grpo": {STEPS: 4, "train__num_inner_epochs": 2, "train__distill_weight": 1.0},
}


def assert_same(a, b, rel=1e-5):
    """Losses, gradients and counted evaluations of two runs."""
    rows = [metrics(folder.parent.parent) for folder in (a, b)]
    for mine, other in zip(*rows, strict=True):
        assert mine.keys() == other.keys() and mine["evaluations"] == other["evaluations"]
        for key in [key for key in mine if key == "grad_norm" or key.startswith(("loss", "distill"))]:
            assert mine[key] == pytest.approx(other[key], rel=rel), (mine["round"], key)


@pytest.mark.parametrize(
    "algorithm", ["opd", "nft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "grpo"))]
)
def test_a_run_is_the_same_side_by_side(tiny_config, shared, pattern, algorithm):
    """And each task's weight, guidance and target are its own; small steps, so that rounding stays rounding."""
    tasks = [{**task, "weight": weight} for task, weight in zip(shared[0], (1.0, 3.0), strict=True)]
    tasks[1]["strength"] = 1.0 if algorithm == "sft" else 1.25
    for task in tasks:
        task["proxy_reward"] = {pattern: 1.0}
    options = {"train__algorithm": algorithm, "num_epochs": 2, "train__learning_rate": 1e-5, "save_freq": 1}
    options |= {"sample__num_steps": 3}
    options |= RUNS[algorithm] | {"train__teachers": tasks}
    separate, joined = (train(tiny_config(run_name=f"{n}", **options, **{TASKS: n})) for n in (1, 0))
    assert_same(joined, separate)
    resumed = train(tiny_config(run_name="resumed", resume_from=str(joined.parent / "checkpoint-1"), **options))
    assert_bitwise(state(resumed), state(joined))


def test_two_processes_are_one_side_by_side(tiny_config, tmp_path):
    options = {"num_epochs": 2, "train__learning_rate": 1e-5, "train__steps_per_rollout": 2}
    one = train(tiny_config(run_name="one", **options, sample__train_batch_size=4, train__batch_size=4))
    train_forked(tiny_config(run_name="two", **options))
    two = tmp_path / "logs" / "two" / "checkpoints" / "checkpoint-2"
    rows = [metrics(folder.parent.parent) for folder in (one, two)]
    for mine, other in zip(*rows, strict=True):
        for key in ("loss", "loss/first", "loss/second", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], rel=1e-5)


def test_the_number_is_chosen_once_printed_and_kept(tiny_config, capsys):
    """All tasks on a CPU; a resumed run keeps its checkpoint's unless the configuration names one."""
    options = {"num_epochs": 1, "sample__num_steps": 2}
    last = train(tiny_config(run_name="one", **options, **{TASKS: 1}))
    for given, expected in ((0, 1), (2, 2), (7, 2)):
        capsys.readouterr()
        options = {"resume_from": str(last), "num_epochs": 2, "sample__num_steps": 2}
        train(tiny_config(run_name=f"now_{given}", **options, **{TASKS: given}), dry_run=True)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("side by side")]
        assert line.split()[3] == str(expected)
    with pytest.raises(ConfigError, match=r"train\.tasks_per_pass"):
        check(tiny_config(**{TASKS: -1}), 1)


def test_as_many_tasks_as_memory_allows(tiny_config, shared, monkeypatch):
    """On a GPU, by the counted bytes; one where teachers' models or graphs would be many."""
    five = [{**shared[0][0], "name": name} for name in "abcde"]
    options = {"train__teachers": five, "sample__num_batches_per_epoch": 5, STEPS: 5}
    plan = check(tiny_config(**options), 1)
    resume, cuda = Resume(plan.values, plan.values, 1), torch.device("cuda")
    pipeline = read_pipeline(plan.values["pretrained.model"])
    cost = step_cost(plan, pipeline, plan.shape.backward_size)
    fixed = sum(memory(plan, cost, 1).values()) - cost.activations
    for room, expected in ((0.5, 1), (2.1, 2), (3.1, 3), (4.1, 3), (99, 5)):  # 4 and 1 are no fewer passes than 3 and 2
        free = (fixed + room * cost.activations) / HEADROOM
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert with_passes(plan, resume, cuda).shape.tasks_per_pass == expected, room
    assert with_passes(plan, resume, CPU).shape.tasks_per_pass == 5
    assert with_passes(plan, dataclasses.replace(resume, tasks_per_pass=2), cuda).shape.tasks_per_pass == 2
    drawn = check(tiny_config(**options, compile=True, train__steps_per_rollout=1), 1)
    assert with_passes(drawn, resume, cuda).shape.tasks_per_pass == 1


@pytest.mark.parametrize(
    ("device", "given", "changes", "environment", "expected"),
    [
        ("cuda", None, {}, {}, True),
        ("cuda", False, {}, {}, False),
        ("cpu", None, {}, {}, False),
        ("cpu", True, {}, {}, True),
        ("cuda", None, {"num_epochs": ROUNDS_WORTH_COMPILING - 1}, {}, False),
        ("cuda", None, {"train__steps_per_rollout": 1}, {}, False),
        ("cuda", None, {}, {"ACCELERATE_USE_DEEPSPEED": "true"}, False),
        ("cuda", None, {}, {"PATH": "", "CC": ""}, False),
        ("cuda", None, {"compiled": False}, {}, False),  # as in the rounds before
        ("cuda", None, {"compiled": True, "num_epochs": 3}, {}, True),
        ("cpu", None, {"compiled": True}, {}, False),
    ],
)
def test_blocks_are_compiled_by_default_where_it_pays(
    tiny_config, monkeypatch, device, given, changes, environment, expected
):
    monkeypatch.setattr(acceleration, "find_spec", lambda name: True)
    changes = dict(changes)
    compiled = changes.pop("compiled", None)
    plan = check(tiny_config(**{"num_epochs": ROUNDS_WORTH_COMPILING, "compile": given, **changes}), 1)
    resume = Resume(plan.values, plan.values, 1, compiled=compiled)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = with_compile(plan, resume, torch.device(device))
    assert found.values["compile"] is expected
    assert bool(set(found.notes) - set(plan.notes)) == (device == "cuda" and given is None and not expected), "told why"


def test_models_whose_prompts_differ_in_length_are_not_compiled_by_default(tiny_config, monkeypatch):
    monkeypatch.setattr(acceleration, "find_spec", lambda name: True)
    plan = check(tiny_config(num_epochs=ROUNDS_WORTH_COMPILING), 1)
    fresh = Resume(plan.values, plan.values, 1)
    assert with_compile(plan, fresh, torch.device("cuda")).values["compile"]
    for family, fixed in ((Flux1, True), (QwenImage, False), (QwenImageEdit, False), (ZImage, False), (Sana, False)):
        assert fixed == family.FIXED_LENGTH
        monkeypatch.setattr(passes, "read_pipeline", lambda family=family, **source: SimpleNamespace(family=family))
        assert with_compile(plan, fresh, torch.device("cuda")).values["compile"] is fixed
