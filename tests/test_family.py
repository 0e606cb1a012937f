"""The published SD3 family: each architecture, small but with its own options, loads in the real format and trains."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel

from diffusionopd.config_schema import ConfigError
from diffusionopd.models.loading import load_backbone
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import load_lora
from diffusionopd.models.policies import STUDENT
from diffusionopd.training import check, load_config, train
from diffusionopd.training.costs.models import PUBLISHED, read_pipeline

from .conftest import ROOT, TARGETS
from .families.common import write_lora
from .helpers import metrics

# But for turbo, which is large with other weights.
MODELS = [model for model in PUBLISHED if model.startswith("stabilityai/") and not model.endswith("turbo")]
OPD = f"{ROOT}/config/opd.py"
# Of the tiny world's text encoders and VAE, so that a transformer fits beside them.
TINY = {
    "in_channels": 8, "out_channels": 8, "joint_attention_dim": 128, "pooled_projection_dim": 128, "sample_size": 16,
    "attention_head_dim": 16,
}  # fmt: skip


def reduced(model: str) -> dict:
    """The published configuration with fewer blocks and heads: its options stay, and in proportion its dual blocks."""
    config = PUBLISHED[model] | TINY
    layers, heads = config["num_layers"] // 6, config["num_attention_heads"] // 12
    dual = tuple(range(len(config["dual_attention_layers"]) * layers // config["num_layers"]))
    width = heads * config["attention_head_dim"]
    small = {"num_layers": layers, "num_attention_heads": heads, "caption_projection_dim": width}
    return config | small | {"dual_attention_layers": dual}


@pytest.mark.parametrize("model", MODELS)
def test_each_member_keeps_its_options_and_trains(model, pipeline_folder, tiny_config, tmp_path):
    """Dual attention in the first half of the medium 3.5 only, norms from 3.5 on, each its table of positions; one of
    them without T5."""
    folder, complete = tmp_path / "model", model == MODELS[-1]
    left_out = ("transformer", "text_encoder_3", "tokenizer_3")[: 1 if complete else 3]
    shutil.copytree(pipeline_folder, folder, ignore=shutil.ignore_patterns(*left_out))
    index = json.loads((folder / "model_index.json").read_text()) | dict.fromkeys(left_out[1:], [None, None])
    (folder / "model_index.json").write_text(json.dumps(index))
    torch.manual_seed(0)
    SD3Transformer2DModel(**reduced(model)).save_pretrained(folder / "transformer")
    assert len(read_pipeline(str(folder)).encoders) == (3 if complete else 2)
    transformer = load_backbone(str(folder)).transformer
    blocks, dual = transformer.transformer_blocks, model.endswith("3.5-medium")
    assert [block.attn2 is not None for block in blocks] == [dual and i < 2 for i in range(len(blocks))]
    assert all((block.attn.norm_q is not None) == ("3.5" in model) for block in blocks)
    assert transformer.config.pos_embed_max_size == (384 if dual else 192)

    guided = {"sample__guidance_scale": 2.0, "train__cfg": True, "cache_dir": str(tmp_path / "cache")}
    config = tiny_config(pretrained__model=str(folder), num_epochs=2, **guided)
    for i, task in enumerate(config.train.teachers):
        task["lora_path"] = write_lora(folder, tmp_path / f"teacher{i}", seed=i)
    last = train(config)
    rows = metrics(tmp_path / "logs" / "run")
    assert rows[0]["loss"] > 0 and rows[1]["grad_norm"] > 0
    a = load_lora(last / "lora").a
    assert len(a) == 8 * len(blocks) - 1, "every target of every block; the last has no to_add_out"


def test_the_configurations_ask_for_teachers_and_target_every_attention_projection_of_their_base(monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = [(f"train.teachers[{i}].dataset", "assets/tiny/dataset/scene") for i in range(3)]
    overrides += [("train.teachers[2].prompt_fn", "general_ocr"), ("monitor_freq", "0"), ("eval_freq", "0")]
    teachers = [(f"train.teachers[{i}].lora_path", "assets/tiny/teachers/scene/lora") for i in range(3)]
    for name, targets in (("sd3_medium_mopd", 191), ("sd35_large_mopd", 303)):
        config = load_config(f"{OPD}:{name}", overrides)
        with torch.device("meta"):
            adapters = Adapters(SD3Transformer2DModel(**PUBLISHED[config.pretrained.model]))
            own = config.train.lora_target_modules or TARGETS
            adapters.add_student(STUDENT, rank=2, alpha=4, target_modules=own)
        assert len(adapters.parameters(STUDENT)) == 2 * targets
        with pytest.raises(ConfigError) as caught:
            check(config, 8)
        assert [problem.split()[0] for problem in caught.value.problems] == [key for key, _ in teachers]
        assert check(load_config(f"{OPD}:{name}", [*overrides, *teachers]), 8).shape.images_per_round == 72
