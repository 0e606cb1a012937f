"""What is Qwen-Image's and Qwen-Image 2.1's alone: images and noise levels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusionopd.models.latents import unpack
from diffusionopd.models.loading import load_backbone
from diffusionopd.models.schedules import LINSPACE
from diffusionopd.training.costs.count import UncountableError, measure_frozen
from diffusionopd.training.costs.models import read_pipeline

from .families import qwen_image, qwen_image21


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


def test_two_threads_may_decode_at_once(tmp_path):
    """Its VAE keeps what it saw of an image on itself, and images are scored beside training."""
    qwen_image.build(tmp_path)
    backbone = load_backbone(str(tmp_path))
    latents = [torch.randn(n, *backbone.latent_shape(32), generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    alone = [backbone.decode(x) for x in latents]
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda i: (i % 2, backbone.decode(latents[i % 2])), range(40)):
            torch.testing.assert_close(found[1], alone[found[0]])


def test_levels_of_the_pipeline_itself_may_be_had_in_other_numbers(tmp_path):
    qwen_image21.build(tmp_path)
    backbone = load_backbone(str(tmp_path))
    own, fewer = backbone.sigmas(5, 64), backbone.sigmas(3, 64)
    assert torch.equal(fewer, own[[0, 2, 4, 5]])
    assert not torch.equal(backbone.sigmas(5, 64, LINSPACE), own) and len(backbone.sigmas(9, 64)) == 10


def test_a_model_whose_cost_cannot_be_counted_is_named(tmp_path):
    """Its transformer looks at a mask to find its sequence."""
    qwen_image21.build(tmp_path)
    with pytest.raises(UncountableError, match="repeat_interleave"):
        measure_frozen(read_pipeline(str(tmp_path)), 64, 8)
