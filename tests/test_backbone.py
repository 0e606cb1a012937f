"""The backbone against the stock pipeline and the plain transformer: nothing of SD3 is rewritten, only wrapped."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffusionopd.models.conditions import NEGATIVE, Conditions
from diffusionopd.models.loading import BackboneError, load_backbone, load_text_encoder, read_model, text_key

PROMPTS = ["a photo of a red circle", 'a sign that says "347"']


def test_velocity_is_the_transformer_at_a_thousand_sigma(backbone, text):
    x = torch.randn(2, *backbone.latent_shape(64))
    both = text(2)
    with torch.no_grad():
        v, conditional = backbone.velocity(x, 0.25, both)
        tokens, pooled = both["tokens"], both["pooled"]
        (expected,) = backbone.transformer(x, tokens, pooled, torch.tensor([250.0, 250.0]), return_dict=False)
    assert torch.equal(v, expected)
    assert conditional is v


def test_guidance_is_the_formula_of_two_plain_velocities(backbone, text):
    x = torch.randn(2, *backbone.latent_shape(64))
    positive, negative = text(2, 1), text(1, 2)
    with pytest.raises(ValueError, match="negative prompt"):
        backbone.velocity(x, 0.5, positive, 2.0)
    backbone.negative, before = negative, backbone.evaluations
    with torch.no_grad():
        guided, conditional = backbone.velocity(x, 0.5, positive, 3.0)
        assert backbone.evaluations - before == 2 * backbone.evaluations_at(3.0) == 4
        v_pos, v_neg = (backbone.velocity(x, 0.5, c)[0] for c in (positive, negative.expand(2)))
    torch.testing.assert_close(guided, v_neg + 3.0 * (v_pos - v_neg), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(conditional, v_pos, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rows_may_differ_in_noise_level_and_guidance(backbone, text):
    """One forward of three samples, of which one has no second branch, against three of their own."""
    x, conditions = torch.randn(3, *backbone.latent_shape(64)), text(3)
    backbone.negative = text(1, 2)
    sigmas, scales = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64), torch.tensor([3.0, 1.0, 1.5])
    before = backbone.evaluations
    together = backbone.velocity(x, sigmas, conditions, scales)
    assert backbone.evaluations - before == 5
    for i, (sigma, scale) in enumerate(zip(sigmas.tolist(), scales.tolist(), strict=True)):
        alone = backbone.velocity(x[i : i + 1], sigma, conditions.index(i), scale)
        for mine, other in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[i : i + 1], other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_samples_that_cannot_be_padded_have_forwards_of_their_own(backbone, text):
    """Their conditions arrive without padding, whatever the batch looks like."""

    class Strict(type(backbone)):
        PADDABLE = False

        def _forward(self, x, sigma, conditions, guidance):
            seen.append((len(x), conditions.padded_length))
            return super()._forward(x, sigma, conditions, guidance)

    seen, rows = [], [{"tokens": torch.randn(n, 128), "pooled": torch.randn(128)} for n in (9, 5)]
    strict = Strict(backbone.transformer, backbone.vae, backbone.scheduler)
    strict.negative = Conditions.of([rows[1]])
    x = torch.randn(2, *backbone.latent_shape(64))
    together = strict.velocity(x, 0.5, Conditions.of(rows), 2.0)
    assert seen == [(1, 5), (1, 5), (1, 9), (1, 5)]
    backbone.negative = strict.negative
    for i, row in enumerate(rows):
        parts = [backbone.velocity(x[i : i + 1], 0.5, Conditions.of([c]))[0] for c in (row, rows[1])]
        torch.testing.assert_close(together[0][i : i + 1], parts[1] + 2 * (parts[0] - parts[1]), rtol=1e-4, atol=1e-5)


def test_a_model_is_described_before_its_weights_load(pipeline_folder):
    info = read_model(str(pipeline_folder))
    assert info.family.__name__ == "StableDiffusion3"
    assert [info.evaluations_at(scale) for scale in (0.0, 1.0, 1.5)] == [1, 1, 2]
    assert info.configs["transformer"]["in_channels"] == 8


def test_text_and_schedule_are_the_stock_pipelines(pipeline_folder, backbone):
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    tokens, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=14, device="cpu"
    )
    encode = load_text_encoder(str(pipeline_folder), max_sequence_length=14)
    ours = Conditions.of(encode(PROMPTS))
    torch.testing.assert_close(ours["tokens"], tokens.detach())
    torch.testing.assert_close(ours["pooled"], pooled.detach())
    negative, empty = (encode([prompt])[0] for prompt in (NEGATIVE, ""))
    assert all(torch.equal(negative[name], empty[name]) for name in empty)
    pipeline.scheduler.set_timesteps(10)
    assert torch.equal(backbone.sigmas(10, 64), pipeline.scheduler.sigmas.double())
    assert backbone.sigmas(10, 64)[0] == 1.0
    assert backbone.sigmas(10, 64)[-1] == 0.0


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
        v, _ = backbone.velocity(x, 0.5, text(1))
        exact, _ = load_backbone(str(pipeline_folder)).velocity(x, 0.5, text(1))
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
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    for load in (read_model, load_backbone, load_text_encoder):
        with pytest.raises(BackboneError, match="KolorsPipeline.*StableDiffusion3Pipeline"):
            load(str(tmp_path))
    copy = tmp_path / "model"
    shutil.copytree(pipeline_folder, copy)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(str(copy))
