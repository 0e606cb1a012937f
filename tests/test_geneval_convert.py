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


# Of a depth that the tiny model does not have.
DEEP = {
    "backbone.stages.2.blocks.17.ffn.layers.0.0.weight": (
        "pixel_level_module.encoder.swin.encoder.layers.2.blocks.17.mlp.fc1.weight"
    ),
    "panoptic_head.pixel_decoder.input_convs.2.conv.bias": "pixel_level_module.decoder.input_projections.2.0.bias",
    "panoptic_head.pixel_decoder.encoder.layers.5.norms.1.bias": (
        "pixel_level_module.decoder.encoder.layers.5.final_layer_norm.bias"
    ),
    "panoptic_head.transformer_decoder.layers.8.attentions.0.attn.in_proj_weight": (
        "transformer_module.decoder.layers.8.cross_attn.in_proj_weight"
    ),
}


def test_names_of_deep_layers():
    found = {key: list(convert.convert_state({key: torch.zeros(4)})) for key in DEEP}
    assert found == {key: [f"model.{name}"] for key, name in DEEP.items()}


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


def test_joint_projections_are_split_in_order():
    whole = torch.arange(18.0).view(9, 2)
    swin = convert.convert_state({"backbone.stages.1.blocks.0.attn.w_msa.qkv.weight": whole})
    assert [name.split("attention.")[1] for name in swin] == ["q_proj.weight", "k_proj.weight", "v_proj.weight"]
    assert torch.equal(torch.cat(list(swin.values())), whole)
    prefix = "panoptic_head.transformer_decoder.layers.0.attentions."
    decoder = convert.convert_state({f"{prefix}1.attn.in_proj_bias": whole[:, 0]})
    assert [name.split("self_attn.")[1] for name in decoder] == ["q_proj.bias", "k_proj.bias", "v_proj.bias"]
    assert len(convert.convert_state({f"{prefix}0.attn.in_proj_bias": whole[:, 0]})) == 1


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


def test_the_official_configuration_has_the_official_sizes():
    with torch.device("meta"):
        model = convert.Mask2FormerForUniversalSegmentation(convert.swin_small_config())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["class_predictor.weight"] == (81, 256)
    assert shapes["model.transformer_module.queries_features.weight"] == (100, 256)
    assert len([name for name in shapes if name.endswith("cross_attn.in_proj_weight")]) == 9
    assert len([name for name in shapes if name.endswith("self_attn.sampling_offsets.weight")]) == 6
    assert len([name for name in shapes if "layers.2.blocks" in name and name.endswith("layernorm_before.bias")]) == 18


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
    for content in ({"weight": torch.zeros(1)}, {"state_dict": {"a": Path("/")}}, [1]):
        torch.save(content, other)
        with pytest.raises(RewardError, match="is not the checkpoint"):
            convert.read_checkpoint(str(other))
    other.write_bytes(b"<html>not found</html>")
    with pytest.raises(RewardError, match="is not the checkpoint"):
        convert.read_checkpoint(str(other))
