"""Fused layers against the stock ones of diffusers and PEFT, and against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora import Linear
from torch import nn

from benchmarks.upstream import restore_layers
from diffusionopd.models.fused import FusedLoraLinear, fuse_norms, narrow
from diffusionopd.models.loading import load_backbone

from .helpers import perturb, velocities, with_loras

EACH = ("teacher_a", None, "teacher_b", "student")


def relative(mine, other):
    return ((mine - other).norm() / other.norm()).item()


def test_everything_is_fused_and_nothing_renamed(backbone, adapters, pipeline_folder):
    kinds = [type(module) for module in backbone.transformer.modules()]
    assert kinds.count(nn.RMSNorm) >= 8 and kinds.count(FusedLoraLinear) >= 8
    assert RMSNorm not in kinds and Linear not in kinds
    stock = load_backbone(str(pipeline_folder))
    names = set(stock.transformer.state_dict())
    restore_layers(stock.transformer)
    assert set(stock.transformer.state_dict()) == names
    assert nn.RMSNorm not in [type(module) for module in stock.transformer.modules()]


def test_velocities_and_gradients_are_those_of_the_stock_layers(backbone, adapters, text):
    perturb(adapters, std=0.05)
    fused = velocities(backbone, adapters, text, EACH)
    restore_layers(backbone.transformer)
    stock = velocities(backbone, adapters, text, EACH)
    assert len(fused) == len(stock) > 20
    for mine, other in zip(fused, stock, strict=True):
        assert relative(mine, other) < 1e-5


def test_in_half_precision_they_are_as_near_to_float32_as_the_stock_layers(
    backbone, adapters, text, pipeline_folder, make_lora
):
    perturb(adapters, std=0.05)
    exact = velocities(backbone, adapters, text, EACH)
    half = load_backbone(str(pipeline_folder), dtype=torch.bfloat16)
    copies = with_loras(half, make_lora)
    perturb(copies, std=0.05)
    fused = velocities(half, copies, text, EACH)
    restore_layers(half.transformer)
    stock = velocities(half, copies, text, EACH)
    deviations = [(relative(mine, e), relative(other, e)) for mine, other, e in zip(fused, stock, exact, strict=True)]
    mean = [sum(column) / len(deviations) for column in zip(*deviations, strict=True)]
    assert 1e-4 < mean[0] < 1.1 * mean[1], mean


def test_narrowed_weights_that_the_loss_does_not_reach_have_no_gradient(pipeline_folder, make_lora):
    """Zeros would let the optimizer's momentum and weight decay move them."""
    half = load_backbone(str(pipeline_folder), dtype=torch.bfloat16)
    with_loras(half, make_lora)
    layers = [layer for layer in half.transformer.modules() if isinstance(layer, FusedLoraLinear)][:2]
    reached, other = ([layer.lora_A["student"].weight, layer.lora_B["student"].weight] for layer in layers)
    for weight in (*reached, *other):
        weight.requires_grad_(True)
    narrow(layers, "student")
    sum(part.float().square().sum() for part in layers[0].narrowed["student"]).backward()
    for weight in reached:
        torch.testing.assert_close(weight.grad, 2 * weight.detach(), rtol=1e-2, atol=1e-6)
    assert [weight.grad for weight in other] == [None, None]


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_the_norm_is_the_formula(dtype, within):
    """One without weights or with a bias is left alone."""
    stock = RMSNorm(32, eps=1e-6).to(dtype)
    nn.init.normal_(stock.weight)
    block = nn.ModuleDict({"norm": copy.deepcopy(stock), "plain": RMSNorm(8, 1e-6, elementwise_affine=False)})
    block["biased"] = RMSNorm(8, 1e-6, bias=True)
    fuse_norms(block)
    assert [type(module) for module in block.values()] == [nn.RMSNorm, RMSNorm, RMSNorm]
    x = 3 * torch.randn(2, 5, 7, 32, dtype=dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * stock.weight.double()
    y = block["norm"](x)
    assert y.dtype == dtype and relative(y.double(), exact) < within
