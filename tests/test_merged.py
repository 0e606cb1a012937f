"""A merged teacher is the teacher: same velocities, and nothing else of the model notices."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from diffusionopd.models.loading import load_backbone
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import AdapterError, load_lora
from diffusionopd.models.merged import MergedTeachers

from .helpers import assert_bitwise, perturb, velocity, with_loras


@pytest.fixture
def both(pipeline_folder, make_lora):
    """Two equal models with a student and three teachers, one of which adapts other modules; merged in the second."""

    def build(kind, dtype=torch.float32):
        backbone = load_backbone(str(pipeline_folder), dtype=dtype)
        adapters = with_loras(backbone, make_lora, kind)
        other = load_lora(make_lora(2, rank=6, alpha=3, targets=["attn.to_q", "ff.net.2"]))
        adapters.add_teacher("other", other.scaled(-1.5))  # as train.teachers[i].scale has it
        perturb(adapters, std=0.05)
        return backbone, adapters

    return lambda dtype=torch.float32: (build(Adapters, dtype), build(MergedTeachers, dtype))


@torch.no_grad()
def test_velocities_are_those_of_the_unmerged_adapters(both, text):
    (plain, adapters), (merged, switched) = both()
    base = dict(merged.transformer.named_parameters())
    for name in ("teacher_a", "student", "other", "teacher_a", None, "other", "student"):
        adapters.use(name)
        switched.use(name)
        assert switched.active == name
        mine, other = velocity(merged, text), velocity(plain, text)
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        if name in ("student", None):
            assert torch.equal(mine, other), "the student's and the base's arithmetic is untouched"
    after = dict(merged.transformer.named_parameters())
    assert base.keys() == after.keys()
    assert all(base[name] is after[name] for name in base), "the base's own matrices are back"


@torch.no_grad()
def test_half_precision_rounds_the_sum_once(both, text):
    """The merged teacher in bfloat16 is no further from the exact one than the unmerged one, up to a factor."""
    (exact, adapters), _ = both()
    adapters.use("teacher_a")
    expected = velocity(exact, text)
    errors = []
    for backbone, own in both(torch.bfloat16):
        own.use("teacher_a")
        errors.append((velocity(backbone, text) - expected).norm().item())
    assert errors[1] < 2 * errors[0]
    assert errors[1] < 0.05 * expected.norm().item()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_students_graph_survives_a_teachers_pass(both, text, checkpointing):
    gradients = []
    for between, (backbone, adapters) in zip(((), ("teacher_a", None, "other")), both(), strict=True):
        if checkpointing:
            backbone.transformer.enable_gradient_checkpointing()
        adapters.use("student")
        v = velocity(backbone, text)
        for name in between:
            with torch.no_grad(), adapters.using(name):
                velocity(backbone, text, 0.3)
        assert adapters.active == "student"
        v.square().mean().backward()
        gradients.append({n: p.grad for n, p in backbone.transformer.named_parameters() if p.grad is not None})
    assert_bitwise(*gradients)


def test_adding_and_saving_while_a_teacher_is_in_use(both, text, make_lora, tmp_path):
    (_, adapters), (backbone, merged) = both()
    merged.use("teacher_a")
    merged.add_teacher("teacher_c", make_lora(3))
    adapters.add_teacher("teacher_c", make_lora(3))
    assert merged.active == "teacher_a"
    for kind, saved in ((adapters, tmp_path / "plain"), (merged, tmp_path / "merged")):
        kind.save_peft("student", saved)
        kind.save_diffusers("student", saved)
    for file in (tmp_path / "plain").glob("*.safetensors"):
        assert_bitwise(load_file(tmp_path / "merged" / file.name), load_file(file))
    for mine, other in zip(merged._merged["teacher_c"], merged._merged["teacher_a"], strict=True):
        (layer, copy), (_, first) = mine, other
        base = next(base for exchanged, base in merged._exchanged if exchanged is layer)
        delta = layer.scaling["teacher_c"] * layer.lora_B["teacher_c"].weight @ layer.lora_A["teacher_c"].weight
        torch.testing.assert_close(copy.weight, base.weight + delta, rtol=1e-6, atol=1e-7)
        assert copy.bias is first.bias is base.bias
    with pytest.raises(AdapterError, match="no adapter 'nobody'"):
        merged.use("nobody")
    assert merged.active == "teacher_a"


def test_memory_is_that_of_the_adapted_matrices(both):
    _, (backbone, merged) = both()
    adapted = {n for n, m in backbone.transformer.named_modules() if "teacher_a" in getattr(m, "lora_A", {})}
    assert len(adapted) == 31
    expected = sum(backbone.transformer.get_submodule(n).get_base_layer().weight.numel() * 4 for n in adapted)
    assert merged.merged_bytes()["teacher_a"] == expected
    assert 0 < merged.merged_bytes()["other"] < expected * 4
