"""The tiny grammar: what is held out, and that the shipped prompt files are what the code writes."""

import random
from pathlib import Path

import pytest

from diffusionopd.data.prompts import load_prompts
from diffusionopd.tiny import grammar
from diffusionopd.tiny.grammar import PROMPT_FN, SPLITS, TASKS, captions, corrupt, draw, file_captions, groups

DATASET = Path(__file__).parents[1] / "assets" / "tiny" / "dataset"


def test_shipped_prompt_files_are_what_the_code_writes():
    shipped = {p.relative_to(DATASET).as_posix(): p.read_text(encoding="utf-8") for p in DATASET.glob("*/*")}
    assert shipped == grammar.prompt_files()


@pytest.mark.parametrize("task", TASKS)
def test_files_are_read_and_test_lines_are_of_held_out_prompts_only(task):
    distinct, lines = {}, {}
    for split in SPLITS:  # through the reader of real runs, with texts and metadata intact
        prompts, expected = load_prompts(DATASET / task, PROMPT_FN[task], split), file_captions(task, split)
        distinct[split], lines[split] = ({c.text for c in found} for found in (captions(task, split), expected))
        assert [p.text for p in prompts] == [c.text for c in expected]
        if task == "compose":
            assert [p.metadata["include"] for p in prompts] == [c.metadata["include"] for c in expected]
    assert len(prompts) == grammar.TEST_LINES and lines["test"] == distinct["test"]
    assert not lines["test"] & (distinct["train"] | lines["train"])


def test_every_digit_is_trained_at_every_position():
    numbers = [caption.metadata["text"] for caption in captions("ocr", "train")]
    assert len(numbers) == 800
    for place in range(3):
        assert {number[place] for number in numbers} == set(grammar.DIGITS)


def test_pairs_are_held_out_in_both_orders_and_every_relation():
    pairs = {}
    for split in SPLITS:
        held = [c.metadata["include"] for tag in ("two_object", "position") for c in groups("compose", split)[tag]]
        pairs[split] = {frozenset((i["color"], i["class"]) for i in include) for include in held}
        relations = {c.metadata["include"][1]["position"][0] for c in groups("compose", split)["position"]}
        assert relations == set(grammar.RELATIONS)
    assert pairs["train"].isdisjoint(pairs["test"])


def test_metadata_has_the_form_of_geneval():
    held = {tag: group[0].metadata for tag, group in groups("compose", "test").items()}
    assert held.keys() == grammar.COMPOSE_LINES["test"].keys()
    for tag, metadata in held.items():
        assert metadata["tag"] == tag and metadata["prompt"].startswith("a photo of ")
        assert all(i.keys() >= {"class", "count", "color"} for i in metadata["include"])
    reference, subject = held["position"]["include"]
    relation = subject["position"][0]
    assert subject["position"] == [relation, 0]
    words = "a photo of a {color} {class} " + relation
    assert held["position"]["prompt"] == f"{words.format(**subject)} a {reference['color']} {reference['class']}"
    counting = held["counting"]
    assert counting["exclude"][0]["count"] == counting["include"][0]["count"] + 1


def test_label_noise_changes_the_caption_and_stays_in_the_training_split():
    for task in ("compose", "ocr"):
        rng, train = random.Random(0), {caption.text for caption in captions(task, "train")}
        for _ in range(300):
            caption = draw(task, rng)
            assert corrupt(task, caption, rng).text in train - {caption.text}
