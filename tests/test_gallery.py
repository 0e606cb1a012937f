"""The gallery: each image is that of its model, prompt and seed; the page has them in their places; nothing is lost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from diffusionopd.evaluation.sampling import ImageGenerator
from diffusionopd.models.conditions import NEGATIVE
from diffusionopd.models.loading import load_backbone, text_key
from diffusionopd.models.lora_files import load_lora
from diffusionopd.models.text_cache import TextCache
from diffusionopd.rewards.images import to_uint8
from tools.gallery import draw, main, make_job, parse_flags, rows_of
from tools.report import Drawn, render_gallery

from .pages import Page

PROMPTS = ["a photo of 1 first circles", 'a <b>"blue"</b> square & more']
SEEDS = [3, 1]


@pytest.fixture
def run(finished, tmp_path):
    (tmp_path / "mine.txt").write_text("\n".join(PROMPTS))
    folder, _ = finished()
    return [str(folder), "--prompts", str(tmp_path / "mine.txt"), "--seeds", *map(str, SEEDS)]


def by_hand(base, cache, lora, scale, guidance):
    """Images by prompt and seed, one at a time, with the LoRA merged into the weights: the oracle."""
    backbone = load_backbone(str(base))
    backbone.negative = cache.get([NEGATIVE])
    weights = dict(backbone.transformer.named_modules())
    for name, a in lora.a.items() if lora else ():
        weights[name].weight.data += scale * lora.alpha[name] / len(a) * lora.b[name] @ a
    found = []
    for number, prompt in enumerate(PROMPTS):
        for seed in SEEDS:
            found += list(to_uint8(ImageGenerator(backbone, cache, 2, guidance, 64, seed)([prompt], [(number, 0)])))
    return np.stack(found).astype(int)


def test_every_image_is_that_of_its_model_prompt_and_seed(run, pipeline_folder, shared):
    job = make_job(parse_flags([*run, "--scales", "0", "-0.5", "1", "--teachers", "--batch_size", "3"]))
    columns = list(draw(job, SEEDS, torch.device("cpu"), torch.float32))
    cache = TextCache(job.cache_dir, text_key(**job.source), job.max_sequence_length, torch.float32)
    student, (first, second) = load_lora(f"{run[0]}/checkpoints/checkpoint-3"), shared[0]
    teachers = [(load_lora(task["lora_path"]), 1.0, task["guidance_scale"]) for task in (first, second)]
    expected = [(None, 1.0, 1.0), *teachers, (student, -0.5, 1.0), (student, 1.0, 1.0)]
    assert [column.title for column in columns] == [
        "base", "teacher first", "teacher second", "student at -0.5", "student",
    ]  # fmt: skip
    drawn = [np.stack(column.images).astype(int) for column in columns]
    for images, how in zip(drawn, expected, strict=True):
        assert abs(images - by_hand(pipeline_folder, cache, *how)).max() <= 1  # of 255, by rounding
    assert len({images.tobytes() for images in drawn}) == 5 and rows_of(job, SEEDS)[1] == (PROMPTS[0], "seed 1")


def test_command_writes_a_page_and_never_over_another(run, tmp_path, capsys):
    for name in ("gallery.html", "gallery-2.html"):
        main([*run, "--output", str(tmp_path / "out"), "--num_inference_steps", "1"])
        assert str(tmp_path / "out" / name) in capsys.readouterr().out
        page = Page((tmp_path / "out" / name).read_text())
        expected = [f"{m} for “{p}”, seed {s}" for p in PROMPTS for s in SEEDS for m in ("base", "student")]
        assert [image["alt"] for image in page.images] == expected
        assert str(tmp_path) not in page.text


def test_rows_that_share_a_caption_show_it_once_and_columns_are_asked_one_by_one():
    asked, black = [], np.zeros((600, 600, 3), np.uint8)

    def columns():
        for name in "ab":
            asked.append(name)
            yield Drawn(name, (asked.append(f"{name}{i}") or black.copy() for i in range(3)), "n <b>")

    rows = [("one", "seed 1"), ("one", "seed 2"), ("two", "")]
    page = Page(render_gallery("t", rows, columns(), [("fact", "<b>")], ["a note"]))
    assert asked == ["a", "a0", "a1", "a2", "b", "b0", "b1", "b2"]
    assert (page.text.count("one"), page.text.count("n <b>"), len(page.images)) == (1, 2, 6)
    with pytest.raises(ValueError):
        render_gallery("t", rows, [Drawn("a", [black] * 2)])


def test_mistakes_end_in_one_line_before_weights_load(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.gallery.load_policies", lambda *arguments: pytest.fail("weights were loaded"))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "adapter_config.json").write_text("{}")
    output = ["--output", str(tmp_path / "out")]
    config = tmp_path / "logs" / "run" / "checkpoints" / "checkpoint-3" / "config.json"
    values = json.loads(config.read_text())
    values["train"]["algorithm"] = "nft"
    config.write_text(json.dumps(values))
    for fact, *arguments in (
        ("seed", *run, "--seeds", "-1"), ("nan", *run, "--scales", "nan"), ("resolution", *run, "--resolution", "65"),
        ("batch_size", *run, "--batch_size", "0"), ("num_steps", *run, "--num_inference_steps", "0"),
        ("guidance_scale", *run, "--guidance_scale", "-1"), ("none.txt", *run, "--prompts", str(tmp_path / "none.txt")),
        ("nft", *run, "--teachers"), *((name, str(tmp_path / name), *run[1:]) for name in ("alone", "nothing")),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{fact}[^\n]*$"):
            main([*arguments, *output])
    assert not (tmp_path / "out").exists()
