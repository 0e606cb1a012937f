"""Policies: what is frozen is asked without gradient, in any order, and the student is in use afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffusionopd.models.lora import Adapters
from diffusionopd.models.policies import STUDENT, Policies, Request

from .helpers import perturb

POLICIES = ("teacher_b", None, "teacher_a", "teacher_b", None)


@pytest.fixture
def policies(backbone, adapters, text):
    backbone.negative = text(1, 9)
    perturb(adapters, std=0.05)
    return Policies(backbone, adapters)


def requests(policies, text):
    """Five requests of different policies, sizes, noise levels and guidance, the last two of them by row."""
    generator = torch.Generator().manual_seed(3)
    shape = policies.backbone.latent_shape(64)
    sigmas = (0.9, 0.5, 0.3, torch.tensor([0.9, 0.1]), torch.tensor([0.7, 0.2]))
    scales = (1.0, 2.0, 3.0, 1.0, torch.tensor([1.0, 4.0]))
    rows = (1, 3, 2, 2, 2)
    return [
        Request(policy, torch.randn(n, *shape, generator=generator), sigma, text(n, i), scale)
        for i, (policy, n, sigma, scale) in enumerate(zip(POLICIES, rows, sigmas, scales, strict=True))
    ]


def test_every_request_has_its_own_answer(policies, adapters, text, monkeypatch):
    """Equal policies are asked one after another; the base alone needs no student."""
    policies.side_by_side = False
    asked, used, use = requests(policies, text), [], adapters.use
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "use", lambda name: (used.append(name), use(name))[1])
        answers = policies.frozen(asked)
    assert used == ["teacher_b", "teacher_b", None, None, "teacher_a", STUDENT] and adapters.active == STUDENT
    for request, (answer, conditional) in zip(asked, answers, strict=True):
        assert answer.dtype == torch.float32 and not answer.requires_grad
        with torch.no_grad(), adapters.using(request.policy):
            own = policies.backbone.velocity(request.x, request.sigma, request.conditions, request.guidance)
        assert torch.equal(answer, own[0]) and torch.equal(conditional, own[1])
    backwards = policies.frozen(asked[::-1])[::-1]
    assert all(torch.equal(mine[0], other[0]) for mine, other in zip(answers, backwards, strict=True))
    assert policies.frozen([]) == []


def test_the_base_alone_needs_no_student(backbone, text):
    x = torch.randn(1, *backbone.latent_shape(64))
    ((answer, _),) = Policies(backbone, Adapters(backbone.transformer)).frozen([Request(None, x, 0.5, text(1))])
    with torch.no_grad():
        assert torch.equal(answer, backbone.velocity(x, 0.5, text(1))[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_students_gradient_survives_requests_before_its_backward(policies, adapters, text, checkpointing):
    if checkpointing:
        policies.backbone.transformer.enable_gradient_checkpointing()
    gradients = []
    for between in ([], requests(policies, text)):
        x = torch.randn(2, *policies.backbone.latent_shape(64), generator=torch.Generator().manual_seed(5))
        guided, conditional = policies.student(x, 0.7, text(2), 2.0)
        policies.frozen(between)
        (guided.square().mean() + conditional.mean()).backward()
        gradients.append([p.grad.clone() for p in adapters.parameters(STUDENT) if p.grad is not None])
        policies.backbone.transformer.zero_grad()
    assert gradients[0]
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))


def test_teachers_of_any_rank_and_modules_share_a_forward_with_the_base(policies, adapters, make_lora, text):
    """Each row has its own LoRA, the negative prompt's row too; answers are those of forwards of their own."""
    narrow, attention = ["attn.to_q", "ff.net.0.proj", "norm1.linear"], adapters.configs[STUDENT].target_modules
    adapters.add_teacher("narrow", make_lora(5, rank=7, alpha=4, targets=narrow))
    copy = "a copy that may change"
    adapters.add_copy(copy, STUDENT)
    asked = requests(policies, text)
    asked += [dataclasses.replace(asked[1], policy=policy) for policy in ("narrow", copy, "narrow")]
    forwards, forward = [], policies.backbone._forward
    policies.backbone._forward = lambda x, *rest: (forwards.append(len(x)), forward(x, *rest))[1]
    found = {}
    for policies.side_by_side in (True, False):
        forwards.clear()
        found[policies.side_by_side] = policies.frozen(asked)
        # Rows: 1 + 2 * 3 + 2 * 2 + 2 + (2 + 1), and 2 * 3 three times more, of which the copy's are alone.
        assert forwards == ([28, 6] if policies.side_by_side else [1, 2, 6, 3, 4, 6, 6, 6])
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=1e-5)
    assert attention and adapters.active == STUDENT and not adapters._chosen
    x, conditions = asked[1].x, asked[1].conditions
    with torch.no_grad():
        torch.testing.assert_close(policies.student(x, 0.5, conditions), policies.student(x, 0.5, conditions))
    adapters.add_teacher("later", make_lora(6, rank=9))
    asked = [dataclasses.replace(asked[1], policy=policy) for policy in ("later", "narrow")]
    policies.side_by_side = True
    both, policies.side_by_side = policies.frozen(asked), False
    torch.testing.assert_close(both, policies.frozen(asked), rtol=1e-5, atol=1e-5)


def test_operators_of_a_forward_do_not_grow_with_the_teachers(policies, adapters, make_lora, text):
    for seed in range(5):
        adapters.add_teacher(f"more_{seed}", make_lora(seed + 50, rank=3 + seed))
    counts = []
    for names in (("more_0", "more_1"), [f"more_{seed}" for seed in range(5)]):
        shape = policies.backbone.latent_shape(64)
        asked = [Request(name, torch.zeros(1, *shape), 0.5, text(1, 7)) for name in names]
        policies.frozen(asked)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            policies.frozen(asked)
        counts.append(sum(event.name in ("aten::bmm", "aten::mm", "aten::addmm") for event in profiler.events()))
    assert counts[0] == counts[1] > 0


def test_a_layer_that_cannot_tell_its_samples_says_so(policies, adapters, text):
    adapters.use_each(["teacher_a", "teacher_b", None])
    with pytest.raises(ValueError, match=r"train\.tasks_per_pass"), torch.no_grad():
        policies.backbone.velocity(torch.zeros(2, *policies.backbone.latent_shape(64)), 0.5, text(2))
