"""What is SANA's alone: whole numbers as time, an instruction before prompts, sampling of first or second order."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.sana import pipeline_sana

from diffusionopd.evaluation.sampling import sample_latents
from diffusionopd.models.conditions import NEGATIVE, Conditions
from diffusionopd.models.loading import BackboneError, load_backbone, load_text_encoder, read_model
from diffusionopd.models.sana import Sana

from .families.sana import build, scheduler, stock
from .test_bases import scheduled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sana") / "model"
    build(path)
    return path


def test_times_are_the_schedulers_for_every_number_of_steps(folder):
    """Also where cutting the time of the rounded level gives another one, which is so for some."""
    backbone, differ = load_backbone(str(folder)), 0
    for shift in (1.0, 3.0, 5.0):
        theirs = backbone.scheduler = scheduler(flow_shift=shift)
        for num_steps in range(1, 200, 2):
            theirs.set_timesteps(num_steps)
            levels, exact, times = backbone.sigmas(num_steps, 32), theirs.sigmas.double(), theirs.timesteps.tolist()
            assert float((levels - exact).abs().max()) < 2e-7 and levels[0] < 1
            for given in (levels, levels.float().double()):
                assert (given[:-1] * 1000).floor().tolist() == times, (shift, num_steps)
            differ += (exact[:-1] * 1000).floor().tolist() != times
    assert differ


def both(path, x, guidance=1.0):
    """Latents after five steps from ``x``, as evaluation makes them and as the stock pipeline does."""
    encode, backbone = load_text_encoder(str(path)), load_backbone(str(path))
    text, backbone.negative = (Conditions.of(encode([prompt])) for prompt in ("a red circle", NEGATIVE))
    mine = sample_latents(backbone, text, x, 5, guidance, resolution=32)
    common = {"prompt": ["a red circle"], "num_inference_steps": 5, "output_type": "latent", "height": 32, "width": 32}
    theirs = stock(DiffusionPipeline.from_pretrained(path), x, guidance, common)
    return mine, (mine - theirs).abs().max() / theirs.abs().max()


def test_with_a_scheduler_of_euler_steps_it_is_sampled_by_them_at_their_times(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    scheduled("FlowMatchEulerDiscreteScheduler", shift=3.0)(copy)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    (mine, error), (by_euler, error_of_euler) = both(folder, x), both(copy, x)
    assert max(error, error_of_euler) < 1e-5 < 1e-2 < (mine - by_euler).abs().max() / mine.abs().max()


def test_what_newer_and_larger_ones_have_beside_it(tmp_path):
    """SANA 1.5 normalises queries and keys over all heads, those for 2048 pixels and more have positions."""
    build(tmp_path / "model", qk_norm="rms_norm_across_heads", interpolation_scale=2.0)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert both(tmp_path / "model", x, guidance=3.5)[1] < 1e-5


def test_the_instruction_stands_before_prompts_alone(folder):
    encode = load_text_encoder(str(folder), max_sequence_length=20)
    empty, negative, *again = encode(["", NEGATIVE, "a cat", NEGATIVE, ""])
    assert len(negative["tokens"]) == 1 < len(empty["tokens"]), "not the empty prompt, which stands behind it"
    assert torch.equal(again[1]["tokens"], negative["tokens"]) and torch.equal(again[2]["tokens"], empty["tokens"])


def test_a_prompt_is_called_cut_where_its_last_token_goes(folder):
    for length, is_cut in ((18, False), (19, True)):  # characters
        encode = load_text_encoder(str(folder), max_sequence_length=20)
        shorter, longer, _ = encode(["b" * (length - 1) + end for end in ("a", "c", "")])
        assert torch.equal(shorter["tokens"], longer["tokens"]) is is_cut is bool(encode.cut)


def test_sprint_is_refused(tmp_path):
    build(tmp_path / "sprint", guidance_embeds=True)
    with pytest.raises(BackboneError, match="Sprint"):
        read_model(str(tmp_path / "sprint"))


def test_the_default_resolution_is_that_of_the_pipelines_bins():
    vae = {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}
    for size, name in ((16, "512"), (32, "1024"), (64, "2048"), (128, "4096")):
        defaults = Sana.defaults_of({"transformer": {"sample_size": size}, "vae": vae})
        assert [defaults.resolution] * 2 == getattr(pipeline_sana, f"ASPECT_RATIO_{name}_BIN")["1.0"]
