"""Prompts with an image: how files name it, who reads it, and a student of teachers of both kinds."""

from __future__ import annotations

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionopd.config_schema import ConfigError
from diffusionopd.data.batches import Batch, Row, side_by_side
from diffusionopd.data.prompts import Prompt, PromptError, load_folders, load_prompts
from diffusionopd.models.conditions import NEGATIVE, Conditions, split_reference
from diffusionopd.models.loading import BackboneError, load_backbone, load_text_encoder, text_key
from diffusionopd.training import check, train

from .conftest import ROOT
from .families import CASES, qwen_image
from .families.common import PROMPTS, write_lora
from .helpers import metrics
from .test_families import Small, far
from .test_flux2 import assert_tells_what_is_cut

CASE = CASES["qwen_image_edit"]


def write_edits(folder, texts, sizes=((48, 48),)):
    """A data set of editing: images beside the file, other ones for each split."""
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        lines = []
        for i, text in enumerate(texts):
            width, height = sizes[i % len(sizes)]
            pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}{i}.png")
            lines.append(json.dumps({"prompt": text, "reference_image": f"{split}{i}.png"}))
        (folder / f"{split}_metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit") / "model"
    CASE.build(folder)
    return folder


def test_a_prompt_names_its_image(tmp_path):
    folder = write_edits(tmp_path / "edits", ["make it red", "make it red"])
    first, second = load_prompts(folder, "geneval", "train")
    assert first.text == second.text and first.key != second.key
    assert split_reference(first.key) == ("make it red", (folder / "train0.png").resolve())
    assert split_reference("a dog") == ("a dog", None) and split_reference(NEGATIVE) == (NEGATIVE, None)
    (folder / "train0.png").write_bytes((folder / "train1.png").read_bytes() + b" ")
    assert load_prompts(folder, "geneval", "train")[0].key != first.key, "another image, encoded again"


def test_what_cannot_be_edited_is_named_with_its_line(tmp_path):
    folder, text = write_edits(tmp_path / "edits", ["a", "b"], [(48, 48), (48, 32)]), {"prompt": "b"}
    file, square = folder / "train_metadata.jsonl", text | {"reference_image": "train0.png"}
    for lines, fact in (
        ([square, text | {"reference_image": "train1.png"}], r"train_metadata.jsonl, line 2.*48 x 32"),
        ([text | {"reference_image": "none.png"}], r"line 1.*reference_image"),
        ([text | {"reference_image": 3}], r"line 1.*reference_image"),
        ([text | {"reference_image": file.name}], r"line 1.*reference_image"),
        ([square, text], r"line 1.*line 2"),
    ):
        file.write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(PromptError, match=fact):
            load_prompts(folder, "geneval", "train")
    file.write_text(json.dumps(square))
    (plain := tmp_path / "plain").mkdir()
    (plain / file.name).write_text(json.dumps(text))
    with pytest.raises(PromptError, match=r"edits.*plain"):
        load_folders([folder, plain], "geneval", "train")


def test_a_base_that_draws_from_text_alone_refuses_images(tiny_config, pipeline_folder, tmp_path):
    folder = write_edits(tmp_path / "edits", ["a"] * 8)
    config = tiny_config()
    config.train.teachers[0].update(dataset=str(folder), prompt_fn="geneval")
    with pytest.raises(ConfigError, match=r"teachers\[0\].dataset.*reference_image"):
        check(config, 1)
    (key,) = {prompt.key for prompt in load_prompts(folder, "geneval", "test")[:1]}
    with pytest.raises(BackboneError, match="reference_image"):
        load_text_encoder(str(pipeline_folder), max_sequence_length=8)([key])


def test_prompts_without_an_image_are_qwen_images(model):
    encode = load_text_encoder(str(model), max_sequence_length=CASE.length)
    rows = encode([*PROMPTS, NEGATIVE])
    small = Small(CASE, model, list(rows[:2]), Conditions.of(rows[2:]))
    backbone = small.backbone()
    x = small.noise(backbone)
    common = {"prompt": PROMPTS, "num_inference_steps": 5, "output_type": "latent", "height": 32, "width": 32}
    expected = CASE.stock(small.pipeline(), x, 3.5, common | {"max_sequence_length": CASE.length})
    assert far(small.sample(backbone, 3.5), expected) < 1e-5


def test_rows_are_no_longer_than_is_set_and_cuts_are_told(model):
    prompts = CASE.prompts(model)
    whole = load_text_encoder(str(model), max_sequence_length=CASE.length)(prompts)
    lengths = [len(row["tokens"]) for row in whole]
    assert_tells_what_is_cut(model, prompts, lengths)
    rows = load_text_encoder(str(model), max_sequence_length=lengths[0])(prompts)
    for row, full in zip(rows, whole, strict=True):
        assert torch.equal(row["tokens"], full["tokens"][: lengths[0]])
        assert torch.equal(row["negative"], full["negative"])
    with pytest.raises(ValueError, match="max_sequence_length"):  # the image itself is longer
        load_text_encoder(str(model), max_sequence_length=len(whole[0]["negative"]) - 1)(prompts)


@pytest.mark.slow
def test_one_student_of_a_teacher_that_draws_and_one_that_edits(model, make_config, tmp_path, monkeypatch):
    edits = write_edits(tmp_path / "edits", [f"make it {'very ' * i}red" for i in range(4)])
    draws = tmp_path / "draws"
    draws.mkdir()
    for split in ("train", "test"):
        (draws / f"{split}.txt").write_text("".join(f"a {'big ' * i}circle\n" for i in range(4)))
    common = {"proxy_reward": {"jpeg_compressibility": 1.0}, "guidance_scale": 3.5}
    teachers = [
        common | {"name": "draw", "dataset": str(draws), "prompt_fn": "general_ocr"},
        common | {"name": "edit", "dataset": str(edits), "prompt_fn": "geneval"},
    ]
    for i, teacher in enumerate(teachers):
        teacher["lora_path"] = write_lora(model, tmp_path / teacher["name"], seed=i + 1)
    options = {
        "pretrained__model": str(model), "cache_dir": str(tmp_path / "cache"), "resolution": 32, "num_epochs": 12,
        "train__cfg": True, "max_sequence_length": CASE.length, "train__teachers": teachers,
        "train__lora_target_modules": None,
        "sample__guidance_scale": 3.5, "sample__eval_guidance_scale": 3.5, "eval_freq": 12, "eval_num_prompts": 2,
        "train__learning_rate": 1e-2, "save_freq": 12, "sample_freq": 12,
    }  # fmt: skip
    train(make_config(tmp_path, **options))
    rows = metrics(tmp_path / "run")
    trained = [row for row in rows if "loss" in row]
    for task in ("draw", "edit"):
        first, last = (sum(row[f"loss/{task}"] for row in part) for part in (trained[:3], trained[-3:]))
        assert last < 0.7 * first, task
        assert f"eval/{task}/jpeg_compressibility" in rows[-1]
    # The teacher that draws may be the transformer of another pipeline.
    qwen_image.build(tmp_path / "qwen-image")
    teachers[0] |= {"model": str(tmp_path / "qwen-image" / "transformer"), "lora_path": ""}
    train(make_config(tmp_path, **options | {"run_name": "model", "num_epochs": 1, "eval_freq": 0}))
    (row,) = metrics(tmp_path / "model")
    assert row["loss/draw"] > 0 and row["loss/edit"] == pytest.approx(trained[0]["loss/edit"], rel=1e-4)
    # A student that is the editing teacher has nothing to learn there: both see the same image.
    start = {"train__lora_path": teachers[1]["lora_path"], "train__lora_rank": 4, "num_epochs": 1, "eval_freq": 0}
    train(make_config(tmp_path, **options | start | {"run_name": "same"}))
    (row,) = metrics(tmp_path / "same")
    assert row["loss/edit"] < 1e-9 * row["loss/draw"]
    arguments = ["--checkpoint_path", tmp_path / "run", "--dataset", "edit", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    results = (tmp_path / "out" / "evaluation_results.jsonl").read_text().splitlines()
    assert [json.loads(line)["metadata"]["reference_image"] for line in results] == [f"test{i}.png" for i in range(4)]


def test_the_cache_knows_the_vae_that_images_are_encoded_with(model, tmp_path):
    key = text_key(str(model))
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-4] + b"else")
        assert text_key(str(model)) != key
    finally:
        weights.write_bytes(before)
    assert load_backbone(str(model)).row_shapes(CASE.length, load_backbone(str(model)).configs)["image"] == (4, 8, 8)


def test_tasks_of_both_kinds_have_passes_of_their_own():
    def batch(name, **parts):
        rows = (Row(name, 0, Prompt("a"), "", 1.0),)
        return Batch(rows, torch.zeros(1, 1, 2, 2), Conditions(parts), lambda stream, step: torch.zeros(1, 1, 2, 2))

    text, image = torch.zeros(1, 3, 2), torch.zeros(1, 1, 2, 2)
    drawn = [batch(name, tokens=text) for name in "ab"]
    edited = batch("c", tokens=text, negative=text, image=image)
    joined = side_by_side([drawn[0], edited, drawn[1]], 3)
    assert [[row.task for row in each.rows] for each in joined] == [["a", "b"], ["c"]]
