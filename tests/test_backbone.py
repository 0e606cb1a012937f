"""The backbone against the stock pipeline and the plain transformer: nothing of SD3 is rewritten, only wrapped."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffusionopd.models.backbone import BackboneError, load_backbone, load_text_encoder, text_key
from diffusionopd.models.conditions import TextEmbeddings

PROMPTS = ["a photo of a red circle", 'a sign that says "347"']


def test_velocity_is_the_transformer_at_a_thousand_sigma(backbone, text):
    x = torch.randn(2, *backbone.latent_shape(64))
    both = text(2)
    with torch.no_grad():
        v = backbone.velocity(x, 0.25, both)
        (expected,) = backbone.transformer(x, both.tokens, both.pooled, torch.tensor([250.0, 250.0]), return_dict=False)
    assert torch.equal(v, expected)


def test_guidance_is_the_formula_of_two_plain_velocities(backbone, text):
    x = torch.randn(2, *backbone.latent_shape(64))
    positive, negative = text(2, 1), text(1, 2)
    with torch.no_grad():
        guided = backbone.velocity(x, 0.5, positive, 3.0, negative)
        v_pos, v_neg = backbone.velocity(x, 0.5, positive), backbone.velocity(x, 0.5, negative.expand(2))
    torch.testing.assert_close(guided, v_neg + 3.0 * (v_pos - v_neg), rtol=1e-4, atol=1e-5)
    assert torch.equal(backbone.velocity(x, 0.5, positive, 1.0, negative).detach(), v_pos)
    with pytest.raises(ValueError, match="needs the embeddings of the empty prompt"):
        backbone.velocity(x, 0.5, positive, 2.0)


def test_text_and_schedule_are_the_stock_pipelines(pipeline_folder, backbone):
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    tokens, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=14, device="cpu"
    )
    ours = load_text_encoder(str(pipeline_folder), max_sequence_length=14)(PROMPTS)
    torch.testing.assert_close(ours.tokens, tokens.detach())
    torch.testing.assert_close(ours.pooled, pooled.detach())
    pipeline.scheduler.set_timesteps(10)
    assert torch.equal(backbone.sigmas(10, 64), pipeline.scheduler.sigmas.double())
    assert backbone.sigmas(10, 64)[0] == 1.0
    assert backbone.sigmas(10, 64)[-1] == 0.0


@pytest.mark.parametrize("how", ["saved without", "folders deleted"])
def test_a_pipeline_without_t5_works(pipeline_folder, tmp_path, how):
    """SD3 may be had without its largest encoder; its tokens are zeros then, as in the stock pipeline."""
    if how == "saved without":
        stock = StableDiffusion3Pipeline.from_pretrained(pipeline_folder, text_encoder_3=None, tokenizer_3=None)
        stock.save_pretrained(tmp_path / "model")
    else:
        left_out = shutil.ignore_patterns("text_encoder_3", "tokenizer_3")
        shutil.copytree(pipeline_folder, tmp_path / "model", ignore=left_out)
    assert not (tmp_path / "model" / "text_encoder_3").exists()
    embeddings = load_text_encoder(str(tmp_path / "model"), max_sequence_length=14)(PROMPTS)
    whole = load_text_encoder(str(pipeline_folder), max_sequence_length=14)(PROMPTS)
    assert embeddings.tokens.shape == whole.tokens.shape
    assert torch.equal(embeddings.tokens[:, :14], whole.tokens[:, :14]), "CLIP's tokens are the same"
    assert not embeddings.tokens[:, 14:].any()
    assert torch.equal(embeddings.pooled, whole.pooled)


def test_decoding_is_the_stock_pipelines(pipeline_folder, backbone):
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    latents = torch.randn(3, *backbone.latent_shape(64))
    with torch.no_grad():
        raw = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor)
        expected = pipeline.image_processor.postprocess(raw.sample, output_type="pt")
    torch.testing.assert_close(backbone.decode(latents, chunk=2), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_holds_the_base_and_not_the_velocity(pipeline_folder, text):
    backbone = load_backbone(str(pipeline_folder), dtype=torch.bfloat16)
    assert {p.dtype for p in backbone.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in backbone.vae.parameters()} == {torch.float32}
    x = torch.randn(1, *backbone.latent_shape(64))
    with torch.no_grad():
        v = backbone.velocity(x, 0.5, text(1))
        exact = load_backbone(str(pipeline_folder)).velocity(x, 0.5, text(1))
    assert v.dtype == torch.float32
    assert (v - exact).norm() < 0.05 * exact.norm()


def test_text_key_follows_the_encoders_and_nothing_else(pipeline_folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(pipeline_folder, copy)
    key = text_key(str(pipeline_folder))
    assert text_key(str(copy)) == key
    (copy / "transformer" / "config.json").write_text("{}")
    assert text_key(str(copy)) == key
    weights = copy / "text_encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert text_key(str(copy)) != key


def test_mistakes_are_named(backbone, tmp_path, pipeline_folder):
    with pytest.raises(ValueError, match="multiple of 8"):
        backbone.latent_shape(63)
    with pytest.raises(BackboneError, match="cannot be loaded.*complete diffusers pipeline folder"):
        load_backbone(str(tmp_path))
    copy = tmp_path / "model"
    shutil.copytree(pipeline_folder, copy)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(str(copy))


def test_embeddings_keep_batches_apart(text):
    both = text(2)
    joined = TextEmbeddings.cat([both.index(0), both.index(1)])
    assert torch.equal(joined.tokens, both.tokens)
    assert torch.equal(both.index(1).expand(3).pooled[2], both.pooled[1])
