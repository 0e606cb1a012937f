"""On a GPU: the same rounds as on a CPU, in every precision, with every kernel, resumed bitwise.

All of it is skipped without a CUDA device; `pytest -m gpu` runs it and the scorers' tests of the same mark.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from diffusionopd.models.acceleration import ATTENTION_BACKENDS, choose_attention, compile_blocks
from diffusionopd.models.loading import load_backbone
from diffusionopd.models.lora import Adapters
from diffusionopd.models.merged import MergedTeachers
from diffusionopd.training import train
from diffusionopd.training.profiling import profile

from .conftest import TARGETS
from .helpers import assert_bitwise, metrics, state, velocities

pytestmark = pytest.mark.gpu

GPU = "cuda"
RUNS = {
    "ode": {},
    "sde": {"sample__noise_level": 0.7},
    "surrogate": {"sample__noise_level": 0.7, "train__loss": "policy_gradient"},
    **{name: {"train__algorithm": name} for name in ("sft", "nft", "grpo", "grpo_guard")},
}


@pytest.fixture
def use(monkeypatch):
    """`use(device)`: what the next run trains on."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def choose(device):
        forget()
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())

    yield choose
    forget()


@pytest.fixture
def run(tiny_config, tmp_path, use, pattern):
    """`run(name, device, ...)`: three rounds on the device; the last checkpoint and the rows of `metrics.jsonl`."""

    def start(name, device=GPU, **changes):
        use(device)
        config = tiny_config(run_name=name, allow_tf32=False, **changes)
        for task in config.train.teachers:
            task["proxy_reward"] = {pattern: 1.0}
        last = train(config)
        return last, metrics(tmp_path / "logs" / name)

    return start


def assert_near(rows, others, rel):
    assert len(rows) == len(others) >= 3  # an evaluation of the start is a row, too
    for mine, other in zip(rows, others, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() - {"seconds"}:
            assert mine[key] == pytest.approx(other[key], rel=rel, abs=1e-6), (mine["round"], key)


@pytest.mark.parametrize("kind", list(RUNS))
def test_a_run_is_the_one_on_a_cpu(run, kind):
    """In float32, monitored and evaluated: the same noise, prompts, losses, gradients and scores."""
    options = {**RUNS[kind], "monitor_freq": 1, "eval_freq": 3, "eval_num_prompts": 2}
    (_, gpu), (_, cpu) = run("gpu", **options), run("cpu", "cpu", **options)
    assert "monitor/first/pattern" in gpu[1] or "reward/first" in gpu[1]
    assert_near(gpu, cpu, rel=1e-2)  # of GRPO: its loss on the policy's own samples is a sum that cancels


@pytest.mark.parametrize("kind", list(RUNS))
def test_half_precision_trains_towards_the_same(run, kind):
    # A constant scale of 1 leaves the dynamic one of float16 no overflow to learn from in the first rounds.
    options = {"train__loss_scale": 1.0, **RUNS[kind]}
    _, full = run("full", **options)
    for precision in ("bf16", "fp16"):
        _, half = run(precision, mixed_precision=precision, **options)
        assert half[0].keys() == full[0].keys()
        for mine, other in zip(half, full, strict=True):
            if kind in ("ode", "sde"):  # the others' losses are sums of large terms that cancel
                assert mine["loss"] == pytest.approx(other["loss"], rel=0.05)
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.3)


@pytest.mark.parametrize("kind", ["sde", "nft"])
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(run, kind):
    """In float16, whose loss scale is a part of the state."""
    options = {**RUNS[kind], "mixed_precision": "fp16", "train__ema": True, "train__ema_interval": 1}
    (complete, _), _ = run("complete", **options), run("parts", **{**options, "num_epochs": 2})
    resumed, _ = run("parts", resume_from="auto", **options)
    assert_bitwise(state(complete), state(resumed))


def test_switches_change_nothing_but_time(run):
    _, plain = run("plain", monitor_freq=1)
    elsewhere = {"vae_device": "cpu", "text_encoder_device": "cpu"}
    on = [{"train__merge_teachers": True}, {"activation_checkpointing": True}, elsewhere]
    for i, switch in enumerate([{"prefetch": False}, {"train__fused_optimizer": False}, *on]):
        _, switched = run(f"switched{i}", monitor_freq=1, **switch)
        assert_near(switched, plain, rel=0 if "prefetch" in switch else 2e-4)


def test_two_tasks_on_a_model_that_waits_on_the_host(run, pipeline_folder, shared):
    """One as it is, one with a LoRA, in one forward."""
    tasks = [{**task, "model": str(pipeline_folder)} for task in shared[0]]
    tasks[0]["lora_path"] = ""
    there, waiting = (run(f"on{place}", train__teachers=tasks, teacher_device=place)[1] for place in ("", "cpu"))
    assert_near(waiting, there, rel=2e-4)


@pytest.fixture
def half_model(pipeline_folder, make_lora):
    """`half_model(kind)`: base in half precision on the GPU, a student and two teachers."""

    def make(kind=Adapters):
        backbone = load_backbone(str(pipeline_folder), dtype=torch.bfloat16, device=GPU)
        adapters = kind(backbone.transformer)
        for seed in (1, 2):
            adapters.add_teacher(f"teacher_{seed}", make_lora(seed))
        adapters.add_student("student", rank=8, alpha=16, target_modules=TARGETS, seed=1)
        return backbone, adapters

    return make


def passes(backbone, adapters, text):
    """Velocity of each adapter `[4, 2, C, h, w]`, and the gradient of the student's."""
    found = velocities(backbone, adapters, text, ("teacher_1", None, "teacher_2", "student"))
    return torch.stack(found[:4]), torch.cat([gradient.flatten() for gradient in found[4:]])


def assert_passes_near(mine, other, rel):
    for a, b in zip(mine, other, strict=True):
        assert a.isfinite().all() and (a - b).norm() <= rel * b.norm()


@pytest.mark.parametrize("backend", list(ATTENTION_BACKENDS))
def test_every_kernel_of_attention_computes_the_same(half_model, text, backend):
    (backbone, adapters), plain = half_model(), half_model()
    choose_attention(backbone.transformer, backend, dtype=torch.bfloat16, device=torch.device(GPU))
    assert_passes_near(passes(backbone, adapters, text), passes(*plain, text), rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="Triton needs a C compiler")
@pytest.mark.parametrize("kind", [Adapters, MergedTeachers])
def test_compiled_blocks_compute_the_same(half_model, text, kind):
    (backbone, adapters), plain = half_model(kind), half_model(kind)
    compile_blocks(backbone.blocks())
    assert_passes_near(passes(backbone, adapters, text), passes(*plain, text), rel=0.02)


def test_the_profile_knows_the_gpu(tiny_config, tmp_path, use):
    use(GPU)
    found = profile(tiny_config(mixed_precision="fp16"), tmp_path / "profile", rounds=1)
    assert found["peak_bytes"] > 2**20 and found["machine"].startswith("cuda")
    assert json.loads((tmp_path / "profile" / "summary.json").read_text())["peak_bytes"] == found["peak_bytes"]
