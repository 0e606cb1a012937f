"""What is SD3's alone, and mistakes of any base; `test_families.py` has what it shares with other families."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from diffusionopd.models.conditions import Conditions
from diffusionopd.models.loading import BackboneError, load_backbone, load_text_encoder, read_model, text_key

PROMPTS = ["a photo of a red circle", 'a sign that says "347"']


def test_a_pipeline_without_t5_works(pipeline_folder, tmp_path):
    """SD3 may be had without its largest encoder; its tokens are zeros then, as in the stock pipeline."""
    stock = StableDiffusion3Pipeline.from_pretrained(pipeline_folder, text_encoder_3=None, tokenizer_3=None)
    stock.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "text_encoder_3").exists()
    without, complete = (
        Conditions.of(load_text_encoder(str(folder), max_sequence_length=14)(PROMPTS))
        for folder in (tmp_path / "model", pipeline_folder)
    )
    assert without["tokens"].shape == complete["tokens"].shape
    assert torch.equal(without["tokens"][:, :14], complete["tokens"][:, :14]), "CLIP's tokens are the same"
    assert not without["tokens"][:, 14:].any()
    assert torch.equal(without["pooled"], complete["pooled"])


@pytest.mark.parametrize(("side", "parts"), [(64, [8, 1]), (256, [4, 1]), (512, [1, 1]), (1024, [1])])
def test_decoding_is_the_stock_pipelines_some_at_a_time(pipeline_folder, backbone, side, parts, monkeypatch):
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    channels, small, _ = backbone.latent_shape(64)
    latents = torch.randn(sum(parts), channels, small * side // 64, small * side // 64)
    decode, seen = backbone._decode, []
    monkeypatch.setattr(backbone, "_decode", lambda x: seen.append(len(x)) or decode(x))
    with torch.no_grad():
        raw = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor)
        expected = pipeline.image_processor.postprocess(raw.sample, output_type="pt")
    torch.testing.assert_close(backbone.decode(latents), expected, rtol=1e-5, atol=1e-5)
    assert seen == parts


def test_text_key_follows_the_encoders_and_nothing_else(pipeline_folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(pipeline_folder, copy)
    key = text_key(str(pipeline_folder))
    assert text_key(str(copy)) == key
    transformer = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(transformer).items()}, transformer)
    assert text_key(str(copy)) == key
    large, keys = copy / "text_encoder" / "large.txt", {key}
    for first, last in (b"00", b"10", b"01"):
        large.write_bytes(bytes([first, *bytes(3 * 2**20), last]))
        keys.add(text_key(str(copy)))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": [None, None]}))
    assert len({*keys, text_key(str(copy))}) == 5


def test_mistakes_are_named(backbone, text, tmp_path, pipeline_folder):
    with pytest.raises(ValueError, match="negative prompt"):
        backbone.velocity(torch.zeros(1, *backbone.latent_shape(64)), 0.5, text(1), 2.0)
    with pytest.raises(ValueError, match="multiple of 8"):
        backbone.latent_shape(63)
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(str(tmp_path))
    for other in ("Kolors", "QwenImageLayered", "QwenImageInpaint", "SanaSprint", "SanaControlNet", "SanaVideo"):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": f"{other}Pipeline"}))
        for load in (read_model, load_backbone, load_text_encoder):
            with pytest.raises(BackboneError, match=f"{other}Pipeline.*StableDiffusion3Pipeline"):
                load(str(tmp_path))
    copy = tmp_path / "model"
    shutil.copytree(pipeline_folder, copy)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(str(copy))
