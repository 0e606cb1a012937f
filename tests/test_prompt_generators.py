"""Generated prompts: the grammar is GenEval's to the letter, files are what scorers read, nothing excluded occurs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import chain

import pytest

from diffusionopd.data.prompts import PromptError, load_prompts
from diffusionopd.rewards.geneval.classes import CLASSES, TAGS
from diffusionopd.rewards.ocr import wanted_text
from tools.prompts import geneval, ocr
from tools.prompts.__main__ import main
from tools.prompts.mixture import allocate, apportion, drawn

from .conftest import ROOT

# Lines of the published test set, one or two a tag, with its quirks of number and article.
PUBLISHED = """\
{"tag": "single_object", "include": [{"class": "bowl", "count": 1}], "prompt": "a photo of a bowl"}
{"tag": "single_object", "include": [{"class": "orange", "count": 1}], "prompt": "a photo of an orange"}
{"tag": "two_object", "include": [{"class": "bowl", "count": 1}, {"class": "skis", "count": 1}], "prompt": "a photo of \
a bowl and a skis"}
{"tag": "counting", "include": [{"class": "wine glass", "count": 2}], "exclude": [{"class": "wine glass", "count": 3}],\
 "prompt": "a photo of two wine glasses"}
{"tag": "counting", "include": [{"class": "stop sign", "count": 4}], "exclude": [{"class": "stop sign", "count": 5}],\
 "prompt": "a photo of four stop signs"}
{"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "purple"}], "prompt": "a photo of a purple cup"}
{"tag": "position", "include": [{"class": "laptop", "count": 1}, {"class": "cow", "count": 1, "position": ["right of", \
0]}], "prompt": "a photo of a cow right of a laptop"}
{"tag": "color_attr", "include": [{"class": "handbag", "count": 1, "color": "pink"}, {"class": "scissors", "count": 1, \
"color": "black"}], "prompt": "a photo of a pink handbag and a black scissors"}
""".splitlines()


def space(tag):
    size, make = geneval.SPACES[tag]
    return [make(number) for number in range(size)]


# --- GenEval ---------------------------------------------------------------------------------------------------------


def test_published_lines_are_lines_of_the_grammar():
    lines = {json.dumps(record) for tag in TAGS if tag != "color_attr" for record in space(tag)}
    size, make = geneval.SPACES["color_attr"]
    objects = [n for n in range(0, size, 90) if [c["class"] for c in make(n)["include"]] == ["handbag", "scissors"]]
    lines |= {json.dumps(make(number)) for number in range(objects[0], objects[0] + 90)}
    assert set(PUBLISHED) <= lines
    articles = [geneval.article(name) for name in ("umbrella", "hair drier", "oven")]
    assert articles == ["an umbrella", "a hair drier", "an oven"]
    plurals = [geneval.plural(name) for name in ("bus", "scissors", "knife", "person")]
    assert plurals == ["buses", "scissorses", "knifes", "persons"]


def test_spaces_hold_each_prompt_once():
    sizes = {"single_object": 80, "two_object": 6320, "counting": 240, "colors": 790, "position": 25_280}
    assert {*sizes, "color_attr"} == set(geneval.SPACES) == set(geneval.SHARES) == set(TAGS)
    for tag, size in sizes.items():
        records = space(tag)
        assert len(records) == size == len({record["prompt"] for record in records})
        assert {record["tag"] for record in records} == {tag}
    assert not any("person" in record["prompt"] for record in space("colors"))
    assert "person" not in geneval.COLOURABLE and len(geneval.COLOURABLE) == len(CLASSES) - 1
    size, make = geneval.SPACES["color_attr"]
    assert size == 79 * 78 * 10 * 9
    for number in (0, 1, 89, 90, 91, size // 2, size - 1):
        first, second = make(number)["include"]
        assert first["class"] != second["class"] and first["color"] != second["color"]
    assert len({make(number)["prompt"] for number in range(0, size, 37)}) == len(range(0, size, 37))


def test_shares_are_those_of_flow_grpo_with_repeats_and_larger_tags_fill_up_without():
    lines = geneval.generate(1700, 0, repeat=True)
    tags = Counter(json.loads(line)["tag"] for line in lines)
    assert tags == {"position": 700, "counting": 500, "color_attr": 300, "colors": 100, "two_object": 100}
    counting = Counter(line for line in lines if '"counting"' in line)
    assert len(counting) == 240 and set(counting.values()) == {2, 3}  # evenly
    lines = geneval.generate(3400, 0)
    assert len(set(lines)) == 3400
    tags = Counter(json.loads(line)["tag"] for line in lines)
    assert (tags["counting"], tags["position"]) == (240, pytest.approx((3400 - 240) * 7 / 12, abs=1))


def test_excluded_prompts_are_absent_in_either_order():
    gone = [f"a photo of two {geneval.plural(name)}" for name in CLASSES]
    swapped = "a photo of a skis and a bowl"
    prompts = {json.loads(line)["prompt"] for line in geneval.generate(20_000, 1, [*gone, swapped])}
    assert not prompts & {*gone, swapped, "a photo of a bowl and a skis"}
    assert len({prompt for prompt in prompts if prompt.endswith("zebras")}) == 2  # three and four


def test_too_many_prompts_are_refused_with_the_maximum(monkeypatch):
    monkeypatch.setattr(geneval, "SHARES", geneval.SHARES | {"color_attr": 0})  # half a million prompts less to make
    excluded = [json.loads(line)["prompt"] for line in PUBLISHED]
    # The tags that are used, less the excluded ones of these; pairs go in both orders.
    maximum = 6320 + 240 + 790 + 25_280 - (2 + 2 + 1 + 1)
    counting = [record["prompt"] for record in space("counting")]
    for message, *arguments in (
        (f"1 to {maximum} ", maximum + 1, 0, excluded),
        ("--count 0", 0, 0),
        ("--exclude", 10, 0, counting, True),
    ):
        with pytest.raises(PromptError, match=message):
            geneval.generate(*arguments)


# --- text rendering --------------------------------------------------------------------------------------------------


def test_ocr_prompts_differ_and_ask_for_the_words_meant_in_equal_shares():
    prompts = ocr.generate(1000, 5)
    assert len(set(prompts)) == 1000 and all(prompt.count('"') == 2 for prompt in prompts)
    assert all(wanted_text(prompt) == ocr.essence(prompt) for prompt in prompts)
    hours = [prompt for prompt in prompts if re.search(r'"Open \d', prompt)]
    assert len(hours) == pytest.approx(1000 / len(ocr.KINDS), abs=1)
    words = ocr.essence(hours[0])
    assert not any(ocr.essence(p) == words for p in ocr.generate(1000, 5, [f'A door with "{words.upper()}" on it']))


def test_numbers_of_a_kind_are_its_prompts_one_to_one(monkeypatch):
    assert all(ocr.size(kind) >= 100_000 for kind in ocr.KINDS)
    assert '"Apples $1.00"' in ocr.make("price", 0) and ocr.make("price", 0)[0].isupper()
    monkeypatch.setitem(ocr.KINDS, "small", ("things", "{} {}", "first second"))
    own = {"things": ["a sign", "a wall"], "first": ["No", "Mind"], "second": ["Dogs", "Cats", "Exit"]}
    for name, words in own.items():
        monkeypatch.setitem(ocr.WORDS, name, words)
    scenes = [len(ocr.WORDS[name]) for name in ("styles", "places", "lettering")]
    assert ocr.size("small") == 12 * len(ocr.SENTENCES) * math.prod(scenes)
    some = range(0, ocr.size("small"), 7)
    assert len({ocr.make("small", number) for number in some}) == len(some)
    texts = [ocr.make("small", number).split('"')[1] for number in range(6)]
    assert texts == ["No Dogs", "No Cats", "No Exit", "Mind Dogs", "Mind Cats", "Mind Exit"]


def test_word_lists_have_no_repeats_and_no_quotation_marks():
    assert all(len(set(words)) == len(words) for words in ocr.WORDS.values())
    assert not set("\"“”„‘’'{}") & set("".join(chain.from_iterable(ocr.WORDS.values())))
    assert set().union(*([things, *parts.split()] for things, _, parts in ocr.KINDS.values())) <= set(ocr.WORDS)


# --- the mixture -----------------------------------------------------------------------------------------------------


def test_every_prompt_goes_to_a_kind_and_small_kinds_are_filled_first():
    assert apportion(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert apportion(17, {"a": 7, "b": 10}) == {"a": 7, "b": 10}
    assert allocate(100, {"a": 1, "b": 1, "c": 2}, {"a": 5, "b": 500, "c": 500}) == {"a": 5, "b": 32, "c": 63}
    weights, available = {"a": 1, "b": 5, "c": 0}, {"a": 9, "b": 3, "c": 50}
    assert allocate(12, weights, available) == {"a": 9, "b": 3}
    with pytest.raises(PromptError, match="1 to 12 "):
        allocate(13, weights, available)


def test_drawn_is_a_permutation_and_lazy():
    everything = drawn(50, int, lambda number: number % 2 == 0, 100, "key")
    assert sorted(everything) == list(range(0, 50, 2)) != everything
    assert drawn(50, int, lambda number: number % 2 == 0, 5, "key") == everything[:5]
    assert len(drawn(10**15, int, lambda number: True, 3, "key")) == 3


# SHA-256 of files that were written when the generators were first released.
RELEASED = {
    ("geneval", "--repeat"): "36476f9bc04e91e1e95627c69dc96049e750b4325a003a7287c6b298c8586b4f",
    ("geneval",): "98d40e7605f5e150536f3eb80b2e531dc5a1dd623a2bcc81aa57ac895d3879c4",
    ("ocr",): "413dd1a17ef25774052d5901abdf522b3d5de81ccfe7d9b83b249252949aa4ea",
}


@pytest.mark.parametrize("kind", RELEASED)
def test_a_seed_gives_the_bytes_that_it_always_gave(tmp_path, kind):
    main([*kind, "--output", str(tmp_path / "file"), "--count", "3000", "--seed", "7"])
    assert hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest() == RELEASED[kind]


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_writes_files_that_load_and_does_not_overwrite(tmp_path):
    exclude, output = tmp_path / "test_metadata.jsonl", tmp_path / "new" / "train_metadata.jsonl"
    exclude.write_text("\n".join(PUBLISHED))
    arguments = ["geneval", "--output", str(output), "--count", "300", "--seed", "7", "--exclude", str(exclude)]
    main(arguments)
    prompts = load_prompts(output.parent, "geneval", "train")
    assert len(prompts) == 300 and {"tag", "include", "prompt"} <= set(prompts[0].metadata)
    first = output.read_bytes()
    with pytest.raises(SystemExit, match=r"error: .*--force"):
        main(arguments)
    main([*arguments, "--force"])
    assert output.read_bytes() == first  # the seed decides
    main([*arguments, "--force", "--seed", "8"])
    assert output.read_bytes() != first
    exclude.unlink()
    with pytest.raises(SystemExit, match=str(exclude)):
        main([*arguments, "--force"])
    assert [path.name for path in output.parent.iterdir()] == ["train_metadata.jsonl"]


def test_command_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "tools.prompts", "ocr", "--output", "train.txt", "--count", "50"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(load_prompts(tmp_path, "general_ocr", "train")) == 50
