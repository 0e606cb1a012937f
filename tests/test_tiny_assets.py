"""What is shipped under assets/tiny is what the code describes: files, shapes, and scores above their bounds."""

import json
from pathlib import Path

import pytest

from diffusionopd.tiny import check, models
from diffusionopd.tiny.flow import generate
from diffusionopd.tiny.grammar import TASKS, captions, file_captions

ASSETS = Path(__file__).parents[1] / "assets" / "tiny"


@pytest.fixture(scope="module")
def base():
    return check.load(ASSETS)


def test_what_is_shipped_is_small_safe_and_in_the_manifest():
    files = check.describe(ASSETS)
    assert files == json.loads((ASSETS / check.MANIFEST).read_text())["files"]
    assert sum(entry["bytes"] for entry in files.values()) < 25e6
    assert {Path(name).suffix for name in files} <= {".json", ".jsonl", ".md", ".model", ".png", ".safetensors", ".txt"}
    for path in ASSETS.rglob("*.json*"):  # no folder of the machine that built it
        text = path.read_text(encoding="utf-8")
        assert not [word for word in ("/home/", "/root/", "/tmp/", ".cache/") if word in text], path
    recorded = json.loads((ASSETS / "scores.json").read_text())
    assert (recorded["prompts_per_task"], recorded["teacher_guidance_scale"]) == (384, check.TEACHER_GUIDANCE)
    assert check.violations(recorded["results"]) == []


def test_shipped_parts_are_those_of_the_code(base):
    """Same names, shapes and tokens as `models.pipeline` makes."""
    config, built = base.transformer.config, models.pipeline(models.autoencoder(0), seed=0)
    assert (config.num_layers, tuple(config.dual_attention_layers), config.qk_norm) == (4, (0,), "rms_norm")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        shapes = [{k: v.shape for k, v in getattr(pipe, name).state_dict().items()} for pipe in (base, built)]
        assert shapes[0] == shapes[1], name
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        assert getattr(base, name).get_vocab() == getattr(built, name).get_vocab()
        assert getattr(base, name).model_max_length == models.CONTEXT


def test_captions_fit_the_context_and_lose_nothing(base):
    """No unknown token, no truncation, and no two captions alike: quotes and digits survive."""
    texts = [c.text for task in TASKS for split in ("train", "test") for c in captions(task, split)]
    for tokenizer in (base.tokenizer, base.tokenizer_2, base.tokenizer_3):
        ids = tokenizer(texts).input_ids
        assert max(map(len, ids)) <= models.CONTEXT
        assert len({tuple(row) for row in ids}) == len(set(texts))
        assert all(row.count(tokenizer.eos_token_id) == 1 for row in ids)
    assert not any(base.tokenizer_3.unk_token_id in row for row in ids)


def test_the_stock_pipeline_makes_images_that_do_not_depend_on_the_batch(base):
    texts = [c.text for c in file_captions("compose", "test")[:3]]
    together, alone = generate(base, texts, steps=2), generate(base, texts, steps=2, batch=1)
    assert together.shape == (3, 3, 64, 64) and together.float().std() > 12
    assert (together.int() - alone.int()).abs().max() <= 1  # rounding


@pytest.mark.parametrize("task", [*(pytest.param(t, marks=pytest.mark.slow) for t in TASKS[:-1]), TASKS[-1]])
def test_shipped_weights_score_as_recorded(base, task):
    """A few prompts, with margins of about three standard errors."""
    if task == "ocr":
        pytest.importorskip("rapidocr")
    prompts, name = file_captions(task, "test")[:48], f"tiny_{task}"
    guidance = check.TEACHER_GUIDANCE[task]
    teacher = check.score(check.load(ASSETS, task), task, guidance, prompts)[name]
    weak = check.score(base, task, 1.0, prompts)[name]
    assert teacher > check.TEACHER_BOUND[task] - (0.05 if task == "scene" else 0.15)
    assert teacher > weak + 0.1
