"""Fused layers against the stock ones of diffusers and PEFT, and against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora import Linear
from torch import nn

from benchmarks.upstream import restore_layers
from diffusionopd.models.backbone import load_backbone
from diffusionopd.models.fused import FusedLoraLinear, FusedRMSNorm, fuse_norms
from diffusionopd.models.lora import Adapters

from .conftest import TARGETS
from .helpers import perturb


def passes(backbone, adapters, text):
    """Velocities under each adapter and none, and the student's gradients."""
    x = torch.randn(2, *backbone.latent_shape(64), generator=torch.Generator().manual_seed(5))
    found = []
    for name in ("teacher_a", None, "teacher_b", "student"):
        adapters.use(name)
        with torch.set_grad_enabled(name == "student"):
            found.append(backbone.velocity(x, 0.7, text(2))[0])
    found[-1].square().mean().backward()
    gradients = [p.grad for p in adapters.parameters("student") if p.grad is not None and p.grad.any()]
    for parameter in adapters.parameters("student"):
        parameter.grad = None
    return [v.detach() for v in found] + gradients


def relative(mine, other):
    return ((mine - other).norm() / other.norm()).item()


def test_everything_is_fused_and_nothing_renamed(backbone, adapters, pipeline_folder):
    kinds = [type(module) for module in backbone.transformer.modules()]
    assert kinds.count(FusedRMSNorm) >= 8 and kinds.count(FusedLoraLinear) >= 8
    assert RMSNorm not in kinds and Linear not in kinds
    stock = load_backbone(str(pipeline_folder))
    names = set(stock.transformer.state_dict())
    restore_layers(stock.transformer)
    assert set(stock.transformer.state_dict()) == names
    assert FusedRMSNorm not in [type(module) for module in stock.transformer.modules()]


def test_velocities_and_gradients_are_those_of_the_stock_layers(backbone, adapters, text):
    perturb(adapters, std=0.05)
    fused = passes(backbone, adapters, text)
    restore_layers(backbone.transformer)
    stock = passes(backbone, adapters, text)
    assert len(fused) == len(stock) > 20
    for mine, other in zip(fused, stock, strict=True):
        assert relative(mine, other) < 1e-5


def test_in_half_precision_they_are_as_near_to_float32_as_the_stock_layers(
    backbone, adapters, text, pipeline_folder, make_lora
):
    perturb(adapters, std=0.05)
    exact = passes(backbone, adapters, text)
    half = load_backbone(str(pipeline_folder), dtype=torch.bfloat16)
    copies = Adapters(half.transformer)
    copies.add_student("student", rank=8, alpha=16, target_modules=TARGETS, seed=1)
    copies.add_teacher("teacher_a", make_lora(1))
    copies.add_teacher("teacher_b", make_lora(2, rank=6, alpha=3))
    perturb(copies, std=0.05)
    fused = passes(half, copies, text)
    restore_layers(half.transformer)
    stock = passes(half, copies, text)
    deviations = [(relative(mine, e), relative(other, e)) for mine, other, e in zip(fused, stock, exact, strict=True)]
    mean = [sum(column) / len(deviations) for column in zip(*deviations, strict=True)]
    assert 1e-4 < mean[0] < 1.1 * mean[1], mean


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_the_norm_is_the_formula(dtype, within):
    """One without weights or with a bias is left alone."""
    stock = RMSNorm(32, eps=1e-6).to(dtype)
    nn.init.normal_(stock.weight)
    block = nn.ModuleDict({"norm": copy.deepcopy(stock), "plain": RMSNorm(8, 1e-6, elementwise_affine=False)})
    block["biased"] = RMSNorm(8, 1e-6, bias=True)
    fuse_norms(block)
    assert [type(module) for module in block.values()] == [FusedRMSNorm, RMSNorm, RMSNorm]
    x = 3 * torch.randn(2, 5, 7, 32, dtype=dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * stock.weight.double()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block["norm"](x)
        assert y.dtype == dtype and relative(y.double(), exact) < within
