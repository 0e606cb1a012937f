"""Text encoders and VAE elsewhere than the training: the same results, and a device that is not there is said early."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from diffusionopd.config_schema import ConfigError
from diffusionopd.models import text_cache
from diffusionopd.models.loading import BackboneError, encoder_place, find_device
from diffusionopd.training import train

from .helpers import assert_bitwise, student

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_what_a_device_name_means(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, training, expected in (("", GPU, GPU), (None, CPU, CPU), ("cpu", GPU, CPU), ("cuda:1", GPU, "cuda:1")):
        assert find_device(name, training, "vae_device") == torch.device(expected)
    with pytest.raises(BackboneError, match="vae_device is 'cuda:2'.* 2 GPUs"):
        find_device("cuda:2", GPU, "vae_device")
    # Encoders compute in float32 on a CPU beside a GPU.
    assert encoder_place("cpu", GPU, torch.float16) == (CPU, torch.float32)
    assert encoder_place("", CPU, torch.bfloat16) == (CPU, torch.bfloat16)
    assert encoder_place("", GPU, torch.float16) == (GPU, torch.float16)


def test_latents_follow_the_vae(backbone):
    """Meta stands for a second device: images come out on it, from latents that were elsewhere."""
    vae = AutoencoderKL.from_config(backbone.vae.config).to_empty(device="meta")
    moved = type(backbone)(backbone.transformer, vae, backbone.scheduler, vae_device="meta")
    images = moved.decode(torch.randn(2, *moved.latent_shape(64)))
    assert images.device.type == "meta"
    assert images.shape == (2, 3, 64, 64)
    assert moved.device == CPU


def test_a_device_that_is_not_there_stops_the_run_at_once(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for key in ("text_encoder_device", "vae_device"):
        with pytest.raises(BackboneError, match=f"{key} is 'cuda:1'.* 0 GPUs"):
            train(tiny_config(**{key: "cuda:1"}))
        with pytest.raises(ConfigError, match=f"{key} is 'gpu1'"):
            train(tiny_config(**{key: "gpu1"}))
    assert not (tmp_path / "logs").exists()


def test_a_device_that_is_named_is_the_one_used(finished_runs, finished, tmp_path, monkeypatch):
    """Here the training's own: nothing changes."""
    whole, places, load = finished_runs("opd"), [], text_cache.load_text_encoder

    def noted(*args, **options):
        places.append((options["device"], options["dtype"]))
        return load(*args, **options)

    monkeypatch.setattr(text_cache, "load_text_encoder", noted)
    where = {"text_encoder_device": "cpu", "vae_device": "cpu", "cache_dir": str(tmp_path / "cache")}
    _, config = finished("opd", num_epochs=1, resume_from="", run_name="named", **where)
    assert_bitwise(student(train(config)), student(whole / "checkpoints" / "checkpoint-1"))
    assert places == [(CPU, torch.float32)]
