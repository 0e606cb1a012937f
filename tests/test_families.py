"""Every model family on a small pipeline in its real folder format, against diffusers' own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor

from diffusionopd.evaluation.sampling import sample_latents
from diffusionopd.losses import distillation_loss
from diffusionopd.models.acceleration import choose_attention, compile_blocks
from diffusionopd.models.backbone import CLASSIFIER_FREE, Backbone
from diffusionopd.models.conditions import NEGATIVE, Conditions, Row
from diffusionopd.models.loading import load_backbone, load_text_encoder, read_model
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import LoraWeights
from diffusionopd.models.lora_fit import linear_layers
from diffusionopd.models.merged import MergedTeachers
from diffusionopd.models.policies import STUDENT, Policies, Request
from diffusionopd.transitions import transition

from .families import CASES
from .families.common import PROMPTS, STEPS, Case, random_lora

TEACHER = "teacher"


@dataclass
class Small:
    """A family's pipeline on disk, and its texts."""

    case: Case
    folder: Path
    rows: list[Row]  # of the prompts
    negative: Conditions

    @cached_property
    def texts(self) -> Conditions:
        """Of both prompts in one batch."""
        return Conditions.of(self.rows)

    def backbone(self, **options: Any) -> Backbone:
        """A fresh one."""
        made = load_backbone(str(self.folder), **options)
        made.negative = self.negative
        return made

    def noise(self, backbone: Backbone) -> Tensor:
        """The start of both samples."""
        shape = backbone.latent_shape(self.case.resolution)
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    def draw(self, backbone: Backbone, guidance: float) -> Tensor:
        """Both samples' latents as evaluation makes them."""
        start = self.noise(backbone)
        return sample_latents(backbone, self.texts, start, STEPS, guidance, resolution=self.case.resolution)

    def sample(self, backbone: Backbone, guidance: float) -> Tensor:
        """The same as diffusers calls latents."""
        return self.case.latents(backbone, self.draw(backbone, guidance))

    def stock(self, pipe: Any, backbone: Backbone, guidance: float, output: str = "latent") -> Tensor:
        """The same by diffusers."""
        common = {
            "prompt": self.case.prompts(self.folder), "num_inference_steps": STEPS, "output_type": output,
            "height": self.case.resolution, "width": self.case.resolution, "max_sequence_length": self.case.length,
        }  # fmt: skip
        return self.case.stock(pipe, self.noise(backbone), guidance, common)

    def pipeline(self, dtype: torch.dtype = torch.float32) -> Any:
        """Diffusers' own."""
        pipe = DiffusionPipeline.from_pretrained(self.folder, dtype=dtype, **self.case.parts(self.folder))
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="module", params=list(CASES))
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(case.family) / "model"
    case.build(folder)
    encode = load_text_encoder(str(folder), max_sequence_length=case.length)
    rows = encode([*case.prompts(folder), NEGATIVE])
    return Small(case, folder, list(rows[:2]), Conditions.of(rows[2:]))


def far(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


class Given(Exception):
    """What a VAE is given to decode."""


def given_to(vae: Any, draw: Callable[[], Any]) -> Tensor:
    """The first sample's latents as they arrive at a VAE."""

    def decode(z: Tensor, *args: Any, **options: Any) -> None:
        raise Given(z[:1])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Given) as caught:
        patch.setattr(vae, "decode", decode)
        draw()
    return caught.value.args[0]


def test_sampling_is_the_stock_pipelines(small):
    backbone, pipe, found = small.backbone(), small.pipeline(), {}
    for guidance in small.case.guidances:
        found[guidance] = small.sample(backbone, guidance)
        assert far(found[guidance], small.stock(pipe, backbone, guidance)) < 1e-5, guidance
    if len(found) > 1:
        first, *rest = found.values()
        assert all(far(other, first) > 1e-2 for other in rest), "guidance has an effect"
    mine = given_to(backbone.vae, lambda: backbone.decode(small.draw(backbone, guidance)))
    theirs = given_to(pipe.vae, lambda: small.stock(pipe, backbone, guidance, "pt"))
    assert mine.shape == theirs.shape and far(mine, theirs) < 1e-5
    images = backbone.decode(small.noise(backbone))
    assert images.shape == (2, 3, small.case.resolution, small.case.resolution) and bool(images.isfinite().all())


def test_prompts_of_several_lengths_in_a_batch_are_each_alone(small):
    backbone, guidance = small.backbone(), small.case.guidances[-1]
    x = small.noise(backbone)
    with torch.no_grad():
        together, _ = backbone.velocity(x, 0.6, small.texts, guidance)
        alone = [backbone.velocity(x[i : i + 1], 0.6, Conditions.of([small.rows[i]]), guidance)[0] for i in range(2)]
        swapped, _ = backbone.velocity(x, 0.6, Conditions.of(small.rows[::-1]), guidance)
        guidances, before = torch.tensor([1.0, guidance]), backbone.nfe
        mixed, conditional = backbone.velocity(x, torch.tensor([0.6, 0.4]), small.texts, guidances)
        assert backbone.nfe - before == 1 + backbone.nfe_at(guidance)
        own = [
            backbone.velocity(x[i : i + 1], s, Conditions.of([small.rows[i]]), g)
            for i, (s, g) in enumerate(((0.6, 1.0), (0.4, guidance)))
        ]
    assert far(together, torch.cat(alone)) < 1e-5
    assert far(swapped, together) > 1e-3, "the prompt has an effect"
    assert far(mixed, torch.cat([v for v, _ in own])) < 1e-5 and far(conditional, torch.cat([c for _, c in own])) < 1e-5


def test_a_student_learns_in_every_module_but_the_inert(small):
    """Teacher equal to the student: no loss. Another: a gradient everywhere, with activation checkpointing the same."""
    backbone = small.backbone()
    adapters = random_lora(backbone, STUDENT)
    adapters.add_copy(TEACHER, STUDENT)
    policies, x, guidance = Policies(backbone, adapters), small.noise(backbone), small.case.guidances[-1]
    step = transition("cps", 0.8, 0.6, 0.7)

    def loss() -> Tensor:
        ((target, _),) = policies.frozen([Request(TEACHER, x, 0.8, small.texts, guidance)])
        return distillation_loss(step, policies.student(x, 0.8, small.texts, guidance)[0], target).mean()

    assert loss().item() == 0
    for parameter in adapters.parameters(TEACHER):
        parameter.data += 0.05 * torch.randn_like(parameter)

    def gradients() -> dict[str, Tensor]:
        for parameter in adapters.parameters(STUDENT):
            parameter.grad = None
        loss().backward()
        found = {name: layer.lora_B[STUDENT].weight.grad for name, layer in adapters._layers(STUDENT)}
        return {name: grad for name, grad in found.items() if grad is not None and grad.any()}

    plain, names = gradients(), {name for name, _ in adapters._layers(STUDENT)}
    assert names - plain.keys() == names & backbone.inert_of(backbone.transformer)
    assert all(any(name.endswith(end) for name in names) for end in backbone.LORA_TARGETS)
    backbone.transformer.enable_gradient_checkpointing()
    again = gradients()
    assert again.keys() == plain.keys() and all(far(again[name], plain[name]) < 1e-5 for name in plain)


def test_inert_modules_are_those_that_no_gradient_reaches(small):
    backbone = small.backbone()
    linear = [name for name, module in backbone.transformer.named_modules() if type(module) is torch.nn.Linear]
    adapters = Adapters(backbone.transformer)
    adapters.add_student(STUDENT, rank=2, alpha=2, target_modules=linear)
    for _, layer in adapters._layers(STUDENT):
        torch.nn.init.normal_(layer.lora_B[STUDENT].weight, std=0.1)
    adapters.use(STUDENT)
    v, _ = backbone.velocity(small.noise(backbone), 0.8, small.texts, 1.0)
    v.square().mean().backward()
    grads = {name: layer.lora_B[STUDENT].weight.grad for name, layer in adapters._layers(STUDENT)}
    unreached = {name for name, grad in grads.items() if grad is None or not grad.any()}
    assert unreached == backbone.inert_of(backbone.transformer)


def test_the_saved_lora_is_the_same_function_elsewhere(small, tmp_path):
    """In the stock pipeline, read again beside the base, and merged."""
    backbone = small.backbone()
    adapters = random_lora(backbone, STUDENT)
    guidance = small.case.guidances[-1]
    mine = small.sample(backbone, guidance)
    adapters.save_diffusers(STUDENT, tmp_path)
    pipe = small.pipeline()
    without = small.stock(pipe, backbone, guidance)
    pipe.load_lora_weights(tmp_path)
    layers = sum(isinstance(module, LoraLayer) for module in pipe.transformer.modules())
    assert layers == sum(1 for _ in adapters._layers(STUDENT))
    assert far(small.stock(pipe, backbone, guidance), mine) < 1e-5 < 1e-2 < far(without, mine)
    for kind in (Adapters, MergedTeachers):
        second = small.backbone()
        others = kind(second.transformer)
        others.add_teacher(TEACHER, tmp_path)
        others.use(TEACHER)
        assert far(small.sample(second, guidance), mine) < 1e-5, kind


@torch.no_grad()
def velocity(small: Small, backbone: Backbone) -> Tensor:
    return backbone.velocity(small.noise(backbone), 0.6, small.texts, small.case.guidances[-1])[0]


def test_a_chosen_attention_kernel_computes_the_same(small):
    backbone = small.backbone()
    expected = velocity(small, backbone)
    choose_attention(backbone.transformer, "math", dtype=torch.float32, device=backbone.device)
    assert far(velocity(small, backbone), expected) < 1e-5


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(small):
    expected, compiled = velocity(small, small.backbone()), small.backbone()
    compile_blocks(compiled.blocks(), backend="eager")
    assert far(velocity(small, compiled), expected) < 1e-5
    torch._dynamo.reset()


def test_half_precision_is_no_worse_than_the_stock_pipelines(small):
    guidance = small.case.guidances[-1]
    exact = small.sample(small.backbone(), guidance)
    backbone = small.backbone(dtype=torch.bfloat16)
    assert {p.dtype for p in backbone.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in backbone.vae.parameters()} == {torch.float32} == {velocity(small, backbone).dtype}
    half = small.sample(backbone, guidance)
    stock = small.stock(small.pipeline(torch.bfloat16), backbone, guidance).float()
    error, limit = ((v - exact).square().mean().sqrt() for v in (half, stock))
    assert error < 1.3 * limit, (error, limit)


def test_facts_known_before_weights_load_are_the_models(small):
    backbone = small.backbone()
    shapes = backbone.row_shapes(small.case.length, read_model(str(small.folder)).configs)
    for name, part in small.rows[1].items():
        most = shapes[name]
        assert part.shape[1:] == most[1:] and part.shape[0] <= most[0]
    assert shapes.keys() == small.rows[0].keys()
    with pytest.raises(ValueError, match=r"resolution.*33"):
        backbone.latent_shape(33)
    kind = backbone.guidance_of(backbone.configs)
    assert [backbone.nfe_at(scale) for scale in (0.0, 1.0, 3.5)] == [1, 1, 2 if kind == CLASSIFIER_FREE else 1]


def test_the_arguments_for_guidance_are_those_that_the_stock_pipeline_is_compared_at(small):
    given: dict[str, Any] = {}

    def record(*args: Any, **options: Any) -> None:
        given.update(options)
        raise Given

    case = CASES[small.case.family.removesuffix("_edit")]  # whose pipeline for prompts without images is qwen_image's
    for guidance in case.guidances:
        with pytest.raises(Given):
            case.stock(record, torch.zeros(2, 4, 4, 4), guidance, {"prompt": list(PROMPTS)})
        for name, value in small.backbone().pipeline_guidance(guidance).items():
            assert value == (given[name][0] if isinstance(given[name], list) else given[name])


def test_teachers_may_adapt_every_layer_and_be_asked_together(small):
    """LoRAs on all linear layers, also those that are not given samples along their first dimension."""
    backbone, x = small.backbone(), small.noise(small.backbone())
    adapters, generator = Adapters(backbone.transformer), torch.Generator().manual_seed(1)
    for name in ("one", "two"):
        a, b = {}, {}
        for module, (rows, columns) in linear_layers(backbone.transformer).items():
            a[module] = torch.randn(2, columns, generator=generator) * columns**-0.5
            b[module] = torch.randn(rows, 2, generator=generator) * 0.05
        adapters.add_teacher(name, LoraWeights(name, a, b, dict.fromkeys(a, 2.0)))
    policies = Policies(backbone, adapters)
    rows = [Conditions.of([row]) for row in small.rows]
    asked = [
        Request(name, x[i : i + 1], sigma, rows[i])
        for name, i, sigma in (("one", 0, 0.8), ("two", 1, 0.5), (None, 1, 0.5))
    ]
    found = {}
    for policies.side_by_side in (True, False):
        found[policies.side_by_side] = torch.cat([v for v, _ in policies.frozen(asked)])
    assert far(found[True], found[False]) < 1e-5
    assert far(found[True][1:2], found[True][2:]) > 1e-3, "the LoRA has an effect"


def test_variants_have_their_own_defaults_and_other_models_of_the_same_classes_are_refused(small):
    backbone = small.backbone()

    def with_another(part: str, changes: dict[str, Any]) -> dict[str, Any]:
        return {**backbone.configs, part: {**backbone.configs[part], **changes}}

    assert not backbone.unsupported(backbone.configs)
    assert all(backbone.unsupported(with_another(*other)) for other in small.case.refused)
    for part, changes, expected in small.case.variants:
        configs = with_another(part, changes)
        defaults = backbone.defaults_of(configs)
        assert (backbone.guidance_of(configs), defaults.num_steps, defaults.guidance_scale) == expected


def test_each_sample_has_its_own_lora_in_one_forward(small):
    """Of several ranks and noise levels, beside the base and with the negative prompt's branch, as each alone."""
    backbone, guidance = small.backbone(), small.case.guidances[-1]
    adapters, x, asked = Adapters(backbone.transformer), small.noise(backbone), []
    for rank in (2, 3):
        adapters.add_student(f"{rank}", rank=rank, alpha=8, target_modules=backbone.LORA_TARGETS, seed=rank)
        adapters._teachers.append(f"{rank}")
        for parameter in adapters.parameters(f"{rank}"):
            torch.nn.init.normal_(parameter, std=0.1)
    policies = Policies(backbone, adapters)
    for name, row, sigma, scale in (
        ("2", 0, 0.8, guidance), (None, 1, 0.5, guidance), ("3", 1, 0.5, 1.0), ("2", 1, 0.5, guidance)
    ):  # fmt: skip
        asked.append(Request(name, x[row : row + 1], sigma, Conditions.of([small.rows[row]]), scale))
    forwards, found = [], {}
    backbone.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    for policies.side_by_side in (True, False):
        found[policies.side_by_side] = torch.cat([v for v, _ in policies.frozen(asked)])
        assert not policies.side_by_side or len(forwards) == (1 if backbone.PADDABLE else backbone.nfe)
    assert far(found[True], found[False]) < 1e-5
    assert far(found[True][1:2], found[True][3:4]) > 1e-3, "the LoRA has an effect"
