"""The trainer on a small pipeline of every model family: each kernel and algorithm, processes, resuming, evaluation."""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from ml_collections import ConfigDict

from diffusionopd.data.noise import Stream, noise
from diffusionopd.models.acceleration import compile_blocks
from diffusionopd.models.backbone import Backbone
from diffusionopd.training import loading, train

from .conftest import ROOT
from .families import CASES
from .families.common import PROMPTS, STEPS, Case, write_lora
from .helpers import assert_bitwise, assert_equal_rounds, metrics, train_forked
from .test_fsdp import FSDP, LARGE, assert_same, last, train_sharded

pytestmark = pytest.mark.slow
TASKS = ("first", "second")
KERNELS = {"dpm1": 0.0, "dpm2": 0.0, "flow": 0.7, "dance": 0.3, "cps": 0.5, "ddim": 0.5}
"""Solver -> noise level."""


@dataclass
class World:
    """A family's small pipeline with a LoRA, prompts and a text cache for each of two tasks."""

    case: Case
    folder: Path
    teachers: list[dict[str, Any]]
    start: Path  # a LoRA for the student to start from
    guidance: float
    make_config: Callable[..., ConfigDict]

    def config(self, logdir: Path, **changes: Any) -> ConfigDict:
        """A run with everything at once that goes together: guidance, noise, EMA."""
        own = {
            "pretrained__model": str(self.folder), "cache_dir": str(self.folder.parent / "cache"),
            "resolution": self.case.resolution, "max_sequence_length": self.case.length, "num_epochs": 1,
            "train__teachers": copy.deepcopy(self.teachers), "train__lora_target_modules": None,
            "train__cfg": self.guidance > 1, "sample__guidance_scale": self.guidance, "eval_num_prompts": 2,
            "sample__eval_guidance_scale": self.guidance, "sample__eval_num_steps": STEPS, "sample__noise_level": 0.7,
        }  # fmt: skip
        return self.make_config(logdir, **own | changes)

    def run(self, logdir: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
        """Its metrics."""
        train(self.config(logdir, run_name=name, **changes))
        return metrics(logdir / name)


@pytest.fixture(scope="module", params=[name for name in CASES if name != "sd3"])  # of which all other runs are
def world(request, tmp_path_factory, make_config) -> World:
    case = CASES[request.param]
    root = tmp_path_factory.mktemp(case.family)
    folder, guidance, teachers = root / "model", max(case.guidances), []
    case.build(folder)
    for i, name in enumerate(TASKS):
        data = root / name
        data.mkdir()
        (data / "train.txt").write_text("".join(f"a {('red', 'blue')[i]} circle{' left' * n}\n" for n in range(7)))
        (data / "test.txt").write_text("\n".join(PROMPTS))
        lora = write_lora(folder, root / f"lora-{name}", seed=i + 1)
        teacher = {"dataset": str(data), "prompt_fn": "general_ocr", "proxy_reward": {"jpeg_compressibility": 1.0}}
        teachers.append(teacher | {"name": name, "lora_path": lora, "guidance_scale": (guidance, 1.0)[i]})
    start = Path(write_lora(folder, root / "lora-start", seed=9))
    return World(case, folder, teachers, start, guidance, make_config)


def test_every_kernel_and_algorithm_trains(world, tmp_path):
    """A student that starts as its first teacher, under that one's guidance, has nothing to learn there."""
    options = {"train__lora_path": world.teachers[0]["lora_path"], "train__lora_rank": 4}
    for solver, level in KERNELS.items():
        (row,) = world.run(tmp_path, solver, sample__solver=solver, sample__noise_level=level, **options)
        assert row["loss/first"] < 1e-9 * row["loss/second"] and row["grad_norm"] > 0, solver
    for algorithm in ("nft", "grpo", "sft"):
        noise_level = 0.7 if algorithm == "grpo" else 0.0
        (row,) = world.run(tmp_path, algorithm, train__algorithm=algorithm, sample__noise_level=noise_level)
        assert 0 < row["grad_norm"] < float("inf"), algorithm


def test_what_saves_memory_or_time_trains_the_same_student(world, tmp_path, monkeypatch):
    """Merged teachers, recomputed activations, compiled blocks, and nearly so bfloat16; other targets do not."""
    monkeypatch.setattr(loading, "check_compiler", lambda device: None)
    monkeypatch.setattr(loading, "compile_blocks", lambda blocks: compile_blocks(blocks, backend="eager"))
    plain = world.run(tmp_path, "plain")
    for name in ("train__merge_teachers", "activation_checkpointing", "compile"):
        assert_equal_rounds(world.run(tmp_path, name, **{name: True}), plain)
        assert_same(last(tmp_path, name), last(tmp_path, "plain"))
    torch._dynamo.reset()
    half = {"mixed_precision": "bf16", "train__merge_teachers": True, "activation_checkpointing": True}
    assert world.run(tmp_path, "half", **half)[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.05)
    beyond = [teacher | {"strength": 1.25} for teacher in world.teachers]
    for name, options in (
        ("beyond", {"train__teachers": beyond}),
        ("merge", {"train__student_init": "teachers", "train__lora_rank": 8}),
    ):
        row = world.run(tmp_path, name, **options)[0]
        assert row["loss"] > 0 and row["loss"] != pytest.approx(plain[0]["loss"], rel=1e-2), name
        more = row["evaluations"] > plain[0]["evaluations"]
        assert more is (name == "beyond"), name


def test_processes_and_interruptions_change_nothing(world, tmp_path):
    """Two processes, a base sharded over two, and a run resumed after its first round."""
    common = {"num_epochs": 2, "train__ema": True, "train__ema_interval": 1, "save_freq": 1, "eval_freq": 2}
    one = world.run(tmp_path, "one", **common, **LARGE)
    train_forked(world.config(tmp_path, run_name="two", **common))
    train_sharded(FSDP, world.config(tmp_path, run_name="sharded", **common), most=1.0)  # few and small blocks
    for name in ("two", "sharded"):
        assert_equal_rounds(one, metrics(tmp_path / name), rel=2e-3)
        assert_same(last(tmp_path, "one"), last(tmp_path, name))
    start = str(tmp_path / "one" / "checkpoints" / "checkpoint-1")
    resumed = world.run(tmp_path, "resumed", resume_from=start, **common, **LARGE)
    assert resumed[-1]["loss"] == one[-1]["loss"]
    assert_bitwise(last(tmp_path, "one"), last(tmp_path, "resumed"))


def test_a_finished_run_is_evaluated_as_the_stock_pipeline_draws(world, tmp_path, monkeypatch):
    """`scripts/evaluate.py` on the run, and the LoRA that it saved in diffusers' pipeline."""
    world.run(tmp_path, "run", train__lora_path=str(world.start), train__lora_rank=4, train__learning_rate=1e-2)
    seen, decode = [], Backbone.decode

    def kept(self: Backbone, latents: torch.Tensor) -> torch.Tensor:
        seen.append((self, latents))
        return decode(self, latents)

    monkeypatch.setattr(Backbone, "decode", kept)
    arguments = ["--checkpoint_path", tmp_path / "run", "--dataset", "first", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    ((backbone, latents),) = seen
    mine, side = world.case.latents(backbone, latents), world.case.resolution
    x = noise(backbone.latent_shape(side), [(Stream.EVALUATION, 42, i, 0) for i in range(2)])
    pipe = DiffusionPipeline.from_pretrained(world.folder, **world.case.parts(world.folder))
    pipe.set_progress_bar_config(disable=True)

    def error() -> float:
        common = {
            "prompt": list(PROMPTS), "num_inference_steps": STEPS, "output_type": "latent", "height": side,
            "width": side, "max_sequence_length": world.case.length,
        }  # fmt: skip
        return float((world.case.stock(pipe, x, world.guidance, common) - mine).abs().max() / mine.abs().max())

    without = error()
    pipe.load_lora_weights(tmp_path / "run" / "checkpoints" / "checkpoint-1" / "diffusers")
    assert error() < 1e-5 < 1e-2 < without
