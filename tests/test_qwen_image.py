"""What is Qwen-Image's and Qwen-Image 2.1's alone: images, noise levels, LoRAs under the names published for them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from PIL import Image
from safetensors.torch import save_file

from diffusionopd.models.latents import unpack
from diffusionopd.models.loading import BackboneError, load_backbone, read_model
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import load_lora
from diffusionopd.models.lora_fit import fit
from diffusionopd.models.schedules import LINSPACE
from diffusionopd.training.costs.count import UncountableError, measure_frozen
from diffusionopd.training.costs.models import read_pipeline

from .families import qwen_image, qwen_image21


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen") / "model"
    qwen_image.build(path)
    return path


def test_pipelines_that_draw_with_more_than_a_prompt_are_refused(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for kind in ("QwenImageLayeredPipeline", "QwenImageInpaintPipeline"):
        copy = tmp_path / kind
        copy.mkdir()
        for part in folder.iterdir():
            if part.is_dir():
                (copy / part.name).symlink_to(part)
        (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}), encoding="utf-8")
        with pytest.raises(BackboneError, match=kind):
            read_model(str(copy))


def test_images_are_the_stock_pipelines_on_white(tmp_path):
    for family, side, channels in ((qwen_image, 32, 3), (qwen_image21, 64, 4)):
        model = tmp_path / family.__name__
        family.build(model)
        pipe, backbone = DiffusionPipeline.from_pretrained(model, **family.CASE.parts(model)), load_backbone(str(model))
        options = {"prompt": "a", "num_inference_steps": 2, "height": side, "width": side}
        images, found = (
            pipe(**options, output_type=kind, generator=torch.Generator().manual_seed(0)).images
            for kind in ("pil", "latent")
        )
        shape = backbone.latent_shape(side)
        x = found.transpose(1, 2).reshape(1, *shape) if family is qwen_image21 else unpack(found, *shape[1:])
        assert len(images[0].getbands()) == channels
        white = Image.new("RGBA", images[0].size, "white")
        expected = np.asarray(Image.alpha_composite(white, images[0].convert("RGBA")).convert("RGB")) / 255
        ours = backbone.decode(x)[0].permute(1, 2, 0).numpy()
        assert np.abs(ours - expected).max() < 1.6 / 255 and expected.std() > 0.01


def test_levels_of_the_pipeline_itself_may_be_had_in_other_numbers(tmp_path):
    qwen_image21.build(tmp_path)
    backbone = load_backbone(str(tmp_path))
    own, fewer = backbone.sigmas(5, 64), backbone.sigmas(3, 64)
    assert torch.equal(fewer, own[[0, 2, 4, 5]])
    assert not torch.equal(backbone.sigmas(5, 64, LINSPACE), own) and len(backbone.sigmas(9, 64)) == 10


def flat(name):
    return name.replace(".", "_")


SPELLINGS = {
    "kohya": (lambda n: f"lora_unet_{flat(n)}", "lora_down", "lora_up", True),
    "lightx2v": (lambda n: n, "lora_down", "lora_up", True),
    "ComfyUI": (lambda n: f"diffusion_model.{n}", "lora_A", "lora_B", False),
    "ComfyUI with alphas": (lambda n: f"diffusion_model.{n}", "lora_down", "lora_up", True),
    "DiffSynth": (lambda n: n, "lora_A.default", "lora_B.default", False),
    "diffusers": (lambda n: f"transformer.{n}", "lora_A", "lora_B", False),
}
"""Tool -> a module's name there, the halves' names, whether it has alphas."""


def test_published_loras_are_what_diffusers_reads(folder, tmp_path):
    """Every linear layer under every tool's names; the oracle is the pipeline's own converter."""
    empty = read_model(str(folder)).empty_transformer()
    linear = {n: m.weight.shape for n, m in empty.named_modules() if isinstance(m, torch.nn.Linear)}
    generator = torch.Generator().manual_seed(0)
    for tool, (spell, down, up, alphas) in SPELLINGS.items():
        tensors = {}
        for i, (name, (out, width)) in enumerate(linear.items()):
            rank = 2 + i % 3
            tensors[f"{spell(name)}.{down}.weight"] = torch.randn(rank, width, generator=generator)
            tensors[f"{spell(name)}.{up}.weight"] = torch.randn(out, rank, generator=generator)
            if alphas:
                tensors[f"{spell(name)}.alpha"] = torch.tensor(1.0 + i % 2)
        file = tmp_path / f"{flat(tool)}.safetensors"
        save_file(tensors, file)
        theirs = QwenImagePipeline.lora_state_dict(str(file))
        ours = fit(load_lora(file), empty)
        assert ours.a.keys() == linear.keys(), tool
        for name in linear:
            expected = (theirs[f"transformer.{name}.lora_{half}.weight"].double() for half in "BA")
            found = ours.scale_of(name) * ours.b[name].double() @ ours.a[name].double()
            b, a = expected
            assert (found - b @ a).norm() <= 1e-6 * found.norm(), (tool, name)


def test_a_teacher_is_not_refused_for_what_never_trains(folder, tmp_path):
    """The last block's text stream has zero lora_B however long a LoRA of all attention layers is trained."""
    backbone = load_backbone(str(folder))
    adapters = Adapters(backbone.transformer)
    adapters.add_student("student", rank=2, alpha=2, target_modules=backbone.LORA_TARGETS, seed=0)
    for name, layer in adapters._layers("student"):
        if name not in backbone.inert_of(backbone.transformer):
            torch.nn.init.normal_(layer.lora_B["student"].weight, std=0.1)
    adapters.save_diffusers("student", tmp_path)
    assert fit(load_lora(tmp_path), read_model(str(folder)).empty_transformer()).b


def test_a_model_whose_cost_cannot_be_counted_is_named(tmp_path):
    """Its transformer looks at a mask to find its sequence."""
    qwen_image21.build(tmp_path)
    with pytest.raises(UncountableError, match="repeat_interleave"):
        measure_frozen(read_pipeline(str(tmp_path)), 64, 8)
