"""The official weights: mmdetection's names and layouts on a tiny Mask2Former of random weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diffusionopd.rewards import RewardError
from diffusionopd.rewards.geneval import convert
from diffusionopd.rewards.geneval.detector import build_detector
from tests.geneval_tiny import mmdet_state, save_checkpoint, tiny_config, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_patch_merging_gives_the_same_after_conversion(model):
    """mmdetection unfolds 2 x 2 patches, channel by channel; transformers concatenates four slices."""
    torch.manual_seed(0)
    key = "backbone.stages.0.downsample."
    state = {f"{key}norm.weight": torch.rand(64), f"{key}norm.bias": torch.rand(64)}
    state[f"{key}reduction.weight"] = torch.randn(32, 64)
    x = torch.randn(2, 16, 6, 10)
    patches = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)
    normed = F.layer_norm(patches, (64,), state[f"{key}norm.weight"], state[f"{key}norm.bias"])
    wanted = normed @ state[f"{key}reduction.weight"].T

    module = type(model.model.pixel_level_module.encoder.swin.encoder.layers[0].downsample)(dim=16)
    names = {name.split("downsample.")[1]: value for name, value in convert.convert_state(state).items()}
    module.load_state_dict(names)
    torch.testing.assert_close(module(x.flatten(2).transpose(1, 2), (6, 10)), wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture
def small(monkeypatch):
    """The official checkpoint is as small as `tiny_model`."""
    monkeypatch.setattr(convert, "swin_small_config", tiny_config)


def test_a_checkpoint_becomes_the_model_it_was_made_from(model, tmp_path, small):
    path = save_checkpoint(tmp_path / "official.pth", mmdet_state(model))
    (loaded,) = build_detector("converted", str(path), "cpu", torch.float32).args
    wanted = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert name in convert.UNUSED or torch.equal(value, wanted[name]), name
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_official_model_has_the_official_sizes_and_is_made_of_every_entry():
    with torch.device("meta"):
        model = convert.Mask2FormerForUniversalSegmentation(convert.swin_small_config())
        converted = convert.convert_state(mmdet_state(model))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in converted.items()} == {
        name: shape for name, shape in shapes.items() if name not in convert.UNUSED
    }
    assert shapes["class_predictor.weight"] == (81, 256)
    assert shapes["model.transformer_module.queries_features.weight"] == (100, 256)
    for end, number in (
        ("cross_attn.in_proj_weight", 9),
        ("sampling_offsets.weight", 6),
        ("layernorm_before.bias", 24),
    ):
        assert len([name for name in shapes if name.endswith(end)]) == number


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda state: state.pop("panoptic_head.cls_embed.bias"), r"Missing.*class_predictor.bias"),
        (lambda state: state.update({"backbone.extra": torch.zeros(1)}), r"Unexpected.*backbone.extra"),
        (lambda state: state.update({"panoptic_head.cls_embed.bias": torch.zeros(134)}), "size mismatch"),
        (lambda state: state.update({"backbone.stages.0.downsample.norm.bias": torch.zeros(7)}), "unflatten"),
    ],
)  # fmt: skip
def test_every_entry_is_accounted_for(model, change, what, tmp_path, small):
    state = mmdet_state(model)
    change(state)
    with pytest.raises(RewardError, match=f"(?s)is not the checkpoint.*{what}"):
        convert.convert(str(save_checkpoint(tmp_path / "changed.pth", state)))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(RewardError, match=r"none.pth.*tools.download rewards geneval"):
        build_detector("converted", str(tmp_path / "none.pth"), "cpu", torch.float32)
    other = tmp_path / "other.pth"
    for content in ({"weight": torch.zeros(1)}, {"state_dict": {"a": Path("/")}}):
        torch.save(content, other)
        with pytest.raises(RewardError, match="is not the checkpoint"):
            convert.read_checkpoint(str(other))
