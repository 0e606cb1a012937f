"""FLUX.2-dev, whose guidance is an input and whose tokenizer is a processor's."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from transformers import AutoTokenizer

from diffusionopd.evaluation.results import EvaluationError
from diffusionopd.models.conditions import Conditions, split_reference
from diffusionopd.models.loading import BackboneError, load_backbone, load_text_encoder, read_model
from diffusionopd.models.teacher_models import read_teacher_model
from diffusionopd.training.loading import find_teacher_models
from scripts import evaluate

from .families.common import PROMPTS
from .families.flux2 import CASE, DEV
from .test_families import Small, far


def test_dev_is_the_stock_pipeline_with_its_processors_tokenizer(tmp_path):
    """PixtralProcessor needs torchvision, texts its tokenizer alone."""
    DEV.build(tmp_path)
    rows = load_text_encoder(str(tmp_path), max_sequence_length=DEV.length)(PROMPTS)
    small = Small(DEV, tmp_path, rows, Conditions.of(rows[:1]))
    pipe, backbone = DiffusionPipeline.from_pretrained(tmp_path, tokenizer=None), small.backbone()
    pipe.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    with torch.no_grad():
        found = [small.sample(backbone, guidance) for guidance in DEV.guidances]
        stock = [small.stock(pipe, backbone, guidance) for guidance in DEV.guidances]
    assert max(map(far, found, stock)) < 1e-5 < 1e-2 < far(*found)
    assert backbone.nfe == 2 * 2 * 5
    asked = pipe.tokenizer.apply_chat_template(format_input(PROMPTS), tokenize=True, return_dict=True)["input_ids"]
    assert_tells_what_is_cut(tmp_path, PROMPTS, [len(ids) for ids in asked])


def assert_tells_what_is_cut(folder, prompts, lengths):
    """At these lengths, which the prompts have with what is around them."""
    for limit in lengths:
        encode = load_text_encoder(str(folder), max_sequence_length=limit)
        encode(prompts)
        longer = [split_reference(prompt)[0] for prompt, n in zip(prompts, lengths, strict=True) if n > limit]
        assert list(encode.cut) == longer


def test_a_distilled_teacher_beside_its_base_has_no_guidance(tmp_path):
    """It is its pipeline that says so."""
    for name in ("base", "distilled"):
        CASE.build(tmp_path / name)
    index = tmp_path / "distilled" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": True}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base" / "tokenizer")
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    options = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": True, "return_dict": True}
    ids = tokenizer.apply_chat_template(asked, **options)["input_ids"]
    assert_tells_what_is_cut(tmp_path / "base", PROMPTS, list(map(len, ids)))
    base = load_backbone(str(tmp_path / "base"))
    teacher = read_teacher_model(str(tmp_path / "distilled"), read_model(str(tmp_path / "base")))
    assert base.nfe_at(4.0) == 2 and teacher.nfe_at(4.0) == teacher.load(base).nfe_at(4.0) == 1
    alone = read_teacher_model(str(tmp_path / "distilled" / "transformer"), read_model(str(tmp_path / "base")))
    assert alone.nfe_at(4.0) == 2
    config, prompts = tmp_path / "config.json", tmp_path / "prompts" / "test.txt"
    prompts.parent.mkdir()
    prompts.write_text("a\n")
    for model, other, refused in (("base", "distilled", True), ("distilled", "base", False)):
        own, base = str(tmp_path / other), str(tmp_path / model)
        config.write_text(json.dumps({"train": {"teachers": [{"name": "a", "model": own, "guidance_scale": 4.0}]}}))
        flags = ["--config", config, "--model", base, "--teacher", "a", "--output_dir", tmp_path / "out"]
        flags += ["--dataset", prompts.parent, "--rewards", "jpeg_compressibility"]
        flags = evaluate.parse_flags([*map(str, flags)])
        task = SimpleNamespace(name="a", model=own, guidance_scale=4.0)
        settings = SimpleNamespace(source={"model": base}, resolution=32)
        plan = SimpleNamespace(teachers=[task], teacher_models={}, read=lambda kind, given=settings: given)
        for look, error in (
            (lambda flags=flags: evaluate.make_job(flags), EvaluationError),
            (lambda plan=plan: find_teacher_models(plan), BackboneError),
        ):
            with pytest.raises(error, match="distilled.*1.0") if refused else nullcontext():
                look()
