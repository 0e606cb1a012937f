"""LoRA loading accounts for every tensor, switching is exact, and saved students load in stock PEFT and diffusers."""

import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from diffusionopd.models.conditions import NEGATIVE, Conditions
from diffusionopd.models.loading import load_backbone
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import AdapterError, load_lora

from .conftest import TARGETS


def velocity(backbone, text, batch=2):
    x = torch.randn(batch, *backbone.latent_shape(64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return backbone.velocity(x, 0.7, text(batch))[0]


def peft_velocity(pipeline_folder, lora, text):
    """The same velocity with the LoRA applied by stock PEFT: the oracle."""
    backbone = load_backbone(str(pipeline_folder))
    backbone.transformer = PeftModel.from_pretrained(backbone.transformer, lora).eval()
    return velocity(backbone, text)


def edited(folder, tmp_path, edit):
    """A copy of a PEFT folder with `edit(tensors)` applied to its weights."""
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "adapter_model.safetensors")
    return copy


@pytest.mark.parametrize(
    ("rank", "alpha", "targets"), [(4, 8, None), (3, 1, ["attn.to_q", "attn.to_v"]), (8, 4, ["ff.net.2"])]
)
def test_teacher_equals_stock_peft(pipeline_folder, make_lora, text, rank, alpha, targets):
    lora = make_lora(7, rank=rank, alpha=alpha, targets=targets)
    backbone = load_backbone(str(pipeline_folder))
    adapters = Adapters(backbone.transformer)
    adapters.add_student("student", rank=8, alpha=16, target_modules=TARGETS)
    adapters.add_teacher("teacher", lora)
    adapters.use("teacher")
    expected = peft_velocity(pipeline_folder, lora, text)
    torch.testing.assert_close(velocity(backbone, text), expected, rtol=1e-5, atol=1e-6)


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


def test_stock_pipeline_gives_the_same_image(pipeline_folder, backbone, adapters, tmp_path):
    """The diffusers file, loaded by the stock pipeline, draws what our backbone draws."""
    from diffusionopd.evaluation.sampling import sample_latents
    from diffusionopd.models.loading import load_text_encoder

    with torch.no_grad():
        for p in adapters.parameters("student"):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    adapters.use("student")
    adapters.save_diffusers("student", tmp_path)
    latents = torch.randn(1, *backbone.latent_shape(64), generator=torch.Generator().manual_seed(2))
    encoder = load_text_encoder(str(pipeline_folder), max_sequence_length=14)
    prompt = "a photo of a red circle"
    backbone.negative = Conditions.of(encoder([NEGATIVE]))
    ours = backbone.decode(sample_latents(backbone, Conditions.of(encoder([prompt])), latents, 4, 2.0, resolution=64))

    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    pipeline.load_lora_weights(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        prompt, num_inference_steps=4, guidance_scale=2.0, height=64, width=64, latents=latents,
        max_sequence_length=14, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_alpha_per_module_and_files_without_metadata(pipeline_folder, make_lora, text, tmp_path):
    """Without a header diffusers assumes alpha = rank; `.alpha` tensors override it."""
    tensors = load_file(make_lora(3, rank=4, alpha=4) / "adapter_model.safetensors")
    renamed = {k.replace("base_model.model.", "transformer."): t for k, t in tensors.items()}
    save_file(renamed, tmp_path / "pytorch_lora_weights.safetensors")
    weights = load_lora(tmp_path)
    assert set(weights.alpha.values()) == {4.0}
    module = next(iter(weights.a))
    renamed[f"transformer.{module}.alpha"] = torch.tensor(2.0)
    save_file(renamed, tmp_path / "pytorch_lora_weights.safetensors")
    weights = load_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert weights.alpha[module] == 2.0
    backbone = load_backbone(str(pipeline_folder))
    adapters = Adapters(backbone.transformer)
    adapters.add_teacher("teacher", weights)
    layer = dict(backbone.transformer.named_modules())[module]
    assert layer.scaling["teacher"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(next(k for k in t if "lora_B" in k)), r"pair.*\.attn\."),
        (
            lambda t: [t.pop(k) for k in list(t) if "blocks.1.attn.to_q" in k],
            "no tensors.*1.attn.to_q",
        ),
        (lambda t: t.update({"base_model.model.extra.weight": torch.ones(2, 2)}), "unexpected tensors.*extra"),
        (lambda t: [t[k].zero_() for k in t if "lora_B" in k], "lora_B"),
        (
            lambda t: [t[k].zero_() for k in t if "2.attn.to_k.lora_B" in k],
            "lora_B.*: transformer_blocks.2.attn.to_k$",
        ),
        (lambda t: next(iter(t.values())).fill_(float("nan")), "not finite.*: transformer_blocks"),
        (
            lambda t: t.update({k: torch.ones(t[k].shape[0], 7) for k in list(t) if "blocks.0.attn.to_q.lora_A" in k}),
            "shapes of another base.*0.attn.to_q",
        ),
    ],
)
def test_broken_lora_is_refused_by_name(pipeline_folder, make_lora, tmp_path, edit, message):
    folder = edited(make_lora(4), tmp_path, edit)
    adapters = Adapters(load_backbone(str(pipeline_folder)).transformer)
    with pytest.raises(AdapterError, match=message):
        adapters.add_teacher("teacher", folder)
    assert not adapters.configs


def test_text_queries_of_the_last_block_may_stay_untrained(backbone, make_lora, tmp_path):
    """The last block drops its text stream: nothing ever reaches the LoRA of its text queries."""
    folder = edited(make_lora(4), tmp_path, lambda t: [t[k].zero_() for k in t if "3.attn.add_q_proj.lora_B" in k])
    adapters = Adapters(backbone.transformer, backbone.inert_modules())
    adapters.add_teacher("teacher", folder)
    assert list(adapters.configs) == ["teacher"]


def test_unknown_modules_truncated_files_and_missing_sources(pipeline_folder, make_lora, tmp_path):
    adapters = Adapters(load_backbone(str(pipeline_folder)).transformer)
    renamed = edited(
        make_lora(4), tmp_path, lambda t: [t.update({k.replace("blocks.3", "blocks.9"): t.pop(k)}) for k in list(t)]
    )
    with pytest.raises(AdapterError, match="base model.*: transformer_blocks.9"):
        adapters.add_teacher("teacher", renamed)
    file = renamed / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AdapterError, match=str(renamed)):
        adapters.add_teacher("teacher", renamed)
    file.unlink()
    with pytest.raises(AdapterError, match="adapter_model.safetensors"):
        adapters.add_teacher("teacher", renamed)
    with pytest.raises(AdapterError, match="holds no LoRA"):
        load_lora(pipeline_folder)
    with pytest.raises(AdapterError, match="no LoRA at 'no/such/place/at all'"):
        load_lora("no/such/place/at all")
    with pytest.raises(AdapterError, match="no such local path"):
        load_lora("nobody/nothing/lora")


def test_hub_id_with_a_subfolder_downloads_that_folder_alone(make_lora, tmp_path, monkeypatch):
    """`owner/name/sub/folder`: the hub client is imitated by a folder laid out as the repository."""
    shutil.copytree(make_lora(9), tmp_path / "OCRTeacher" / "lora")
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("diffusionopd.models.lora_files.snapshot_download", snapshot_download)
    assert load_lora("quanhaol/DiffusionOPD/OCRTeacher/lora").a
    assert asked == [("quanhaol/DiffusionOPD", ["OCRTeacher/lora", "OCRTeacher/lora/*"])]
    with pytest.raises(AdapterError, match="quanhaol/DiffusionOPD has no .* 'Nobody/lora'"):
        load_lora("quanhaol/DiffusionOPD/Nobody/lora")


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
