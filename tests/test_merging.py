"""Merging LoRAs without training, and a student that starts at the sum of its teachers."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.utils import merge_utils

from diffusionopd.algorithms.optim import NonFiniteError
from diffusionopd.config_schema import ConfigError
from diffusionopd.data.batches import NoiseSettings
from diffusionopd.data.rounds import BatchSettings, round_shape
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import AdapterError, load_lora
from diffusionopd.models.merging import DENSITY, merge
from diffusionopd.training import train
from diffusionopd.training.checks import check
from diffusionopd.training.keys import load_config
from diffusionopd.training.resume import RunError
from diffusionopd.training.start import choose_scale

from .conftest import TARGETS


def effect(lora, module):
    """``alpha / r B A`` of a module, float64."""
    if module not in lora.a:
        return 0.0
    return lora.alpha[module] / lora.a[module].shape[0] * (lora.b[module].double() @ lora.a[module].double())


@pytest.fixture
def loras(make_lora):
    """Of other ranks, alphas and modules."""
    return [
        load_lora(make_lora(1)),
        load_lora(make_lora(2, rank=6, alpha=3, targets=["attn.to_q", "ff.net.2"])),
        load_lora(make_lora(3, rank=2, alpha=8, targets=["attn.to_q", "attn.to_v"])),
    ]


def test_the_sum_is_exact_where_ranks_allow_and_the_nearest_elsewhere(loras):
    total = sum(max(lora.a[module].shape[0] for module in lora.a) for lora in loras)
    scales, modules = (0.5, 1.0, -2.0), {module for lora in loras for module in lora.a}
    scaled = [lora.scaled(scale) for lora, scale in zip(loras, scales, strict=True)]
    exact, cut = (merge(scaled, rank) for rank in (total, 4))
    assert exact.weights.a.keys() == cut.weights.a.keys() == modules
    for module in modules:
        expected = sum(scale * effect(lora, module) for lora, scale in zip(loras, scales, strict=True))
        torch.testing.assert_close(effect(exact.weights, module), expected, rtol=1e-4, atol=1e-6)
        values = torch.linalg.svdvals(expected)
        rest = (effect(cut.weights, module) - expected).norm() / expected.norm()
        assert rest.item() ** 2 == pytest.approx(cut.lost[module], rel=1e-3, abs=1e-9)
        assert cut.lost[module] == pytest.approx((values[4:].norm() / values.norm()).item() ** 2, rel=1e-3, abs=1e-9)
        assert exact.lost[module] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_other_merges_are_those_of_peft_on_the_full_matrices(loras, method):
    twice = [merge(loras, 10**6, method) for _ in range(2)]
    for module, a in twice[0].weights.a.items():
        assert torch.equal(a, twice[1].weights.a[module])
        assert torch.equal(twice[0].weights.b[module], twice[1].weights.b[module])
        deltas = [effect(lora, module) for lora in loras if module in lora.a]
        found, ones = effect(twice[0].weights, module), torch.ones(len(deltas), dtype=torch.float64)
        if method == "ties":
            torch.testing.assert_close(found, merge_utils.ties(deltas, ones, DENSITY), rtol=1e-4, atol=1e-5)
        else:  # each value is the sum of those that are kept, doubled
            subsets = list(itertools.product((0, 1), repeat=len(deltas)))
            sums = torch.stack([sum(k * d for k, d in zip(kept, deltas, strict=True)) / DENSITY for kept in subsets])
            error, nearest = (sums - found).abs().min(0)
            assert error.max() < 1e-4 * sums.abs().max()
            for kept in torch.tensor(subsets)[nearest].unbind(-1):
                assert abs(kept.double().mean() - DENSITY) < 0.05


@torch.no_grad()
def test_a_student_takes_the_merge_and_keeps_what_is_fresh(backbone, loras, text):
    adapters = Adapters(backbone.transformer)
    adapters.add_student("student", rank=16, alpha=24, target_modules=[*TARGETS, "attn.to_q", "attn.to_v", "ff.net.2"])
    layers = dict(adapters._layers("student"))
    fresh = {module: layer.lora_A["student"].weight.clone() for module, layer in layers.items()}
    merged = merge(loras[:2], 16)
    for scale in (0.3, 0.6):  # again at another
        adapters.start_from("student", merged.weights, scale)
    for module, a in merged.weights.a.items():
        own_a, own_b = (getattr(layers[module], part)["student"].weight for part in ("lora_A", "lora_B"))
        torch.testing.assert_close(
            24 / 16 * own_b.double() @ own_a.double(), 0.6 * effect(merged.weights, module), rtol=1e-4, atol=1e-6
        )
        assert torch.equal(own_a[len(a) :], fresh[module][len(a) :])
        assert not own_b[:, len(a) :].any()
    adapters.add_student("narrow", rank=16, alpha=24, target_modules=["attn.to_q"])
    with pytest.raises(AdapterError, match=r"attn\.to_out|ff\.net"):
        adapters.start_from("narrow", merged.weights)


@pytest.mark.parametrize("largest", [0.5, 0.0])
def test_a_scale_at_which_the_student_is_not_finite_is_not_taken(largest):
    """The loss falls with the scale; none that is finite is an error with a remedy."""
    scales, said = [], []

    def round_of(batches, step):
        assert not step
        if scales[-1] > largest:
            raise NonFiniteError("the velocity is not finite")
        return SimpleNamespace(losses=SimpleNamespace(mean=1 - scales[-1]))

    adapters = SimpleNamespace(start_from=lambda student, weights, scale: scales.append(scale))
    algorithm = SimpleNamespace(round=round_of, optimizer=SimpleNamespace(discard=lambda: None))
    algorithm.policies, algorithm.shape = SimpleNamespace(adapters=adapters), SimpleNamespace(num_tasks=3)

    @dataclass
    class NoBatches:
        shape: Any
        settings: Any
        rank: int = 0

        def round(self, index):
            return []

    shape = round_shape(BatchSettings(2, 3, 1, 2, 3), 3, num_processes=1, num_rounds=1)
    arguments = (algorithm, NoBatches(shape, NoiseSettings()), SimpleNamespace(weights=None), said.append)
    if largest:
        choose_scale(*arguments)
        assert scales[-1] == 0.4 and said[0].startswith("at 0.4 times the sum") and "1 inf" in said[0]
    else:
        with pytest.raises(RunError, match="train.student_init_scale"):
            choose_scale(*arguments)


def test_a_run_starts_at_the_scale_with_the_smallest_loss(tmp_path, capsys):
    """Its first loss is the smallest that was tried, and it goes on from there; tried on all tasks, in whatever order
    they are trained, and on the same images, in whatever parts."""
    overrides = {"cache_dir": tmp_path / "text", "num_epochs": 1}
    overrides |= {"sample.num_steps": 3, "sample.train_batch_size": 2, "train.batch_size": 2, "train.lora_rank": 8}
    overrides |= {"monitor_freq": 0, "sample_freq": 0, "train.student_init_scale": 0.0}
    said = []
    parts = {"train.batch_size": 1, "train.gradient_accumulation_steps": 6}
    for name, changes in (("alternate", {"train.task_order": "alternate"}), ("parts", parts), ("together", {})):
        given = overrides | changes | {"save_dir": tmp_path / name}
        train(load_config("config/tiny.py:mopd_merged", [(name, str(value)) for name, value in given.items()]))
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "times the sum" in line]
        tried = [part.split() for part in line.rpartition(": ")[2].split(", ")]
        best = min(tried, key=lambda pair: float(pair[1]))
        assert line.startswith(f"at {best[0]} times") and len(tried) == 5
        said.append([float(number) for pair in tried for number in pair])
    assert said[0] == pytest.approx(said[2], rel=1e-3) and said[1] == pytest.approx(said[2], rel=1e-3)
    (row,) = map(json.loads, (tmp_path / "together" / "metrics.jsonl").read_text().splitlines())
    assert row["loss"] == pytest.approx(float(best[1]), rel=1e-3)


def test_a_start_is_one_and_has_teachers(tmp_path):
    for overrides, file, key in (
        ({"train.lora_path": "assets/tiny/teachers/ocr/lora"}, "config/tiny.py:mopd_merged", "student_init"),
        ({"train.student_init": "teachers"}, "config/teacher.py:tiny_scene", "student_init"),
        ({"train.lora_path": "5"}, "config/tiny.py:mopd_merged", "lora_path is 5"),
        (
            {"train.lora_target_modules": "('attn.to_q',)"},
            "config/tiny.py:mopd_merged",
            r"lora_target_modules .*attn\.",
        ),
    ):
        with pytest.raises(ConfigError, match=rf"train\.{key}"):
            check(load_config(file, [("save_dir", str(tmp_path)), *overrides.items()]), 1)
