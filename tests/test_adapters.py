"""LoRA loading accounts for every tensor, and switching is exact."""

import shutil

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from diffusionopd.models.loading import load_backbone
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import AdapterError, load_lora

from .conftest import TARGETS
from .helpers import velocity


def edited(folder, tmp_path, edit):
    """A copy of a PEFT folder whose tensors are `edit(name, tensor)`; those that are None are left out."""
    copy = shutil.copytree(folder, tmp_path / "edited")
    tensors = {name: edit(name, tensor) for name, tensor in load_file(copy / "adapter_model.safetensors").items()}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, copy / "adapter_model.safetensors")
    return copy


def test_switching_is_exact_and_a_fresh_student_is_the_base(pipeline_folder, backbone, adapters, text):
    base = velocity(load_backbone(str(pipeline_folder)), text)
    outputs = {}
    for name in ("teacher_a", "student", None, "teacher_b", "teacher_a"):
        adapters.use(name)
        output = velocity(backbone, text)
        assert name not in outputs or torch.equal(outputs[name], output)
        outputs[name] = output
    assert torch.equal(outputs[None], base)
    assert torch.equal(outputs["student"], base), "lora_B starts at zero"
    assert not torch.allclose(outputs["teacher_a"], base, atol=1e-3)
    assert not torch.allclose(outputs["teacher_a"], outputs["teacher_b"], atol=1e-3)


def test_only_the_student_is_trainable_and_float32(backbone, adapters):
    trainable = [n for n, p in backbone.transformer.named_parameters() if p.requires_grad]
    assert len(trainable) == len(adapters.parameters("student"))
    assert all(".student." in n for n in trainable)
    assert all(p.dtype == torch.float32 for p in adapters.parameters("student"))


def test_student_initialisation_is_a_function_of_the_seed(pipeline_folder):
    def first_a(seed):
        adapters = Adapters(load_backbone(str(pipeline_folder)).transformer)
        torch.manual_seed(torch.randint(1000, ()).item())  # the global generator must not matter
        adapters.add_student("student", rank=4, alpha=8, target_modules=TARGETS, seed=seed)
        return adapters.parameters("student")[0]

    assert torch.equal(first_a(3), first_a(3))
    assert not torch.equal(first_a(3), first_a(4))


def test_norms_are_those_of_the_matrices(adapters):
    """Of what an adapter adds, as PEFT itself makes it, and of what it adds to."""
    layers = [(m, n) for m in adapters.transformer.modules() if isinstance(m, LoraLayer) for n in m.lora_A]
    for name in ("student", "teacher_a", "teacher_b"):
        own = [layer for layer, adapter in layers if adapter == name]
        added = sum(layer.get_delta_weight(name).double().square().sum().item() for layer in own) ** 0.5
        assert adapters.added_norm(name) == pytest.approx(added, rel=1e-5) and (added > 0) == (name != "student")
        base = sum(layer.get_base_layer().weight.double().square().sum().item() for layer in own) ** 0.5
        assert adapters.base_norm(name) == pytest.approx(base, rel=1e-5)


def test_using_restores_the_previous_adapter(adapters):
    adapters.use("teacher_a")
    with adapters.using(None):
        assert adapters.active is None
    assert adapters.active == "teacher_a"
    with pytest.raises(AdapterError, match="no adapter 'nobody'"):
        adapters.use("nobody")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda n, t: None if "1.attn.to_q.lora_B" in n else t, r"pair.*1\.attn\.to_q"),
        (lambda n, t: None if "1.attn.to_q" in n else t, r"no tensors.*1\.attn\.to_q"),
        (lambda n, t: t[0] if "1.attn.to_q.lora_A" in n else t, r"unexpected tensors.*1\.attn\.to_q"),
        (lambda n, t: t * ("lora_B" not in n), "lora_B"),
        (lambda n, t: t * ("2.attn.to_k.lora_B" not in n), r"lora_B.*: transformer_blocks\.2\.attn\.to_k$"),
        (lambda n, t: t * float("nan"), "not finite.*: transformer_blocks"),
        (lambda n, t: t[:, :7] if "0.attn.to_q.lora_A" in n else t, r"shapes of another base.*0\.attn\.to_q"),
    ],
)
def test_broken_lora_is_refused_by_name(backbone, make_lora, tmp_path, edit, message):
    adapters = Adapters(backbone.transformer)
    with pytest.raises(AdapterError, match=message):
        adapters.add_teacher("teacher", edited(make_lora(4), tmp_path, edit))
    assert not adapters.configs


def test_truncated_files_and_missing_sources(pipeline_folder, make_lora, tmp_path):
    folder = edited(make_lora(4), tmp_path, lambda n, t: t)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AdapterError, match=str(folder)):
        load_lora(folder)
    file.unlink()
    with pytest.raises(AdapterError, match="adapter_model.safetensors"):
        load_lora(folder)
    with pytest.raises(AdapterError, match="holds no LoRA"):
        load_lora(pipeline_folder)
    with pytest.raises(AdapterError, match="no LoRA at 'no/such/place/at all'"):
        load_lora("no/such/place/at all")
    with pytest.raises(AdapterError, match="no such local path"):
        load_lora("nobody/nothing/lora")


@pytest.mark.parametrize("name", ["student", "teacher_a"])
def test_on_a_base_in_half_precision_weights_take_part_as_they_are_now(pipeline_folder, make_lora, text, name):
    """As if they were of that dtype themselves, bit for bit, also after a change; a gradient is one of float32."""
    results = []
    for own in (False, True):
        backbone = load_backbone(str(pipeline_folder), dtype=torch.bfloat16)
        adapters = Adapters(backbone.transformer)
        adapters.add_student("student", rank=8, alpha=16, target_modules=TARGETS)
        adapters.add_teacher("teacher_a", make_lora(1))
        adapters.use(name)
        x = torch.randn(2, *backbone.latent_shape(64), generator=torch.Generator().manual_seed(5))
        before = backbone.velocity(x, 0.7, text(2))[0]
        with torch.no_grad():
            for i, parameter in enumerate(adapters.parameters(name)):
                parameter.add_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter) * (i % 3))
        if own:
            backbone.transformer._forward_pre_hooks.clear()
            for layer in (module for module in backbone.transformer.modules() if isinstance(module, LoraLayer)):
                layer.narrowed.clear()
                layer.lora_A.to(torch.bfloat16)
                layer.lora_B.to(torch.bfloat16)
        v = backbone.velocity(x, 0.7, text(2))[0]
        assert not torch.equal(v, before)
        if name == "student":
            v.square().mean().backward()
        gradients = [p.grad for p in adapters.parameters("student") if p.grad is not None]
        assert own or {gradient.dtype for gradient in gradients} <= {torch.float32}
        results.append([v.detach(), *(gradient.float() for gradient in gradients)])
    assert len(results[0]) == len(results[1]) > (20 if name == "student" else 0)
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))
