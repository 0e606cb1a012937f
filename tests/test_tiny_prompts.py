"""The tiny grammar: what is held out, and that the shipped prompt files are what the code writes."""

from pathlib import Path

import pytest

from diffusionopd.data.prompts import load_prompts
from diffusionopd.tiny.grammar import (
    COMPOSE_LINES,
    DIGITS,
    PROMPT_FN,
    RELATIONS,
    SPLITS,
    TASKS,
    TEST_LINES,
    captions,
    corrupt,
    draw,
    file_captions,
    groups,
    prompt_files,
)

ASSETS = Path(__file__).parents[1] / "assets" / "tiny"


def test_shipped_prompt_files_are_what_the_code_writes():
    shipped = {p.relative_to(ASSETS / "dataset").as_posix(): p for p in (ASSETS / "dataset").glob("*/*")}
    assert {name: path.read_text(encoding="utf-8") for name, path in shipped.items()} == prompt_files()


@pytest.mark.parametrize("task", TASKS)
def test_test_file_has_384_lines_of_held_out_prompts_only(task):
    lines = [caption.text for caption in file_captions(task, "test")]
    assert len(lines) == TEST_LINES
    assert set(lines) == {caption.text for caption in captions(task, "test")}
    assert not set(lines) & {caption.text for caption in captions(task, "train")}
    assert not set(lines) & {caption.text for caption in file_captions(task, "train")}


@pytest.mark.parametrize("task", TASKS)
def test_run_reads_the_shipped_files(task):
    """Through the reader of real runs, with texts and metadata intact."""
    for split in SPLITS:
        prompts = load_prompts(ASSETS / "dataset" / task, PROMPT_FN[task], split)
        expected = file_captions(task, split)
        assert [p.text for p in prompts] == [c.text for c in expected]
        if task == "compose":
            assert [p.metadata["include"] for p in prompts] == [c.metadata["include"] for c in expected]


def test_every_digit_is_trained_at_every_position():
    numbers = [caption.metadata["text"] for caption in captions("ocr", "train")]
    assert len(numbers) == 800
    for place in range(3):
        assert {number[place] for number in numbers} == set(DIGITS)


def test_pairs_are_held_out_in_both_orders_and_every_relation():
    def pairs(split):
        return {
            frozenset((i["color"], i["class"]) for i in caption.metadata["include"])
            for tag in ("two_object", "position")
            for caption in groups("compose", split)[tag]
        }

    assert pairs("train").isdisjoint(pairs("test"))
    for split in SPLITS:
        relations = {c.metadata["include"][1]["position"][0] for c in groups("compose", split)["position"]}
        assert relations == set(RELATIONS)


def test_metadata_has_the_form_of_geneval():
    held = {tag: group[0].metadata for tag, group in groups("compose", "test").items()}
    assert held.keys() == COMPOSE_LINES["test"].keys()
    for tag, metadata in held.items():
        assert metadata["tag"] == tag
        assert metadata["prompt"].startswith("a photo of ")
        assert all(i.keys() >= {"class", "count", "color"} for i in metadata["include"])
    reference, subject = held["position"]["include"]
    relation = subject["position"][0]
    assert subject["position"] == [relation, 0]
    words = "a photo of a {color} {class} " + relation
    assert held["position"]["prompt"] == f"{words.format(**subject)} a {reference['color']} {reference['class']}"
    counting = held["counting"]
    assert counting["exclude"][0]["count"] == counting["include"][0]["count"] + 1


@pytest.mark.parametrize("task", ["compose", "ocr"])
def test_label_noise_changes_the_caption_and_stays_in_the_training_split(task):
    import random

    rng = random.Random(0)
    train = {caption.text for caption in captions(task, "train")}
    for _ in range(300):
        caption = draw(task, rng)
        wrong = corrupt(task, caption, rng)
        assert wrong.text in train
        assert wrong.text != caption.text
