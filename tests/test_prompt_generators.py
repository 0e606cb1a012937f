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


@pytest.mark.parametrize(
    ("tag", "size"),
    [("single_object", 80), ("two_object", 6320), ("counting", 240), ("colors", 790), ("position", 25_280)],
)
def test_small_spaces_hold_each_prompt_once(tag, size):
    records = space(tag)
    assert len(records) == size == len({record["prompt"] for record in records})
    assert {record["tag"] for record in records} == {tag}


def test_color_attr_numbers_are_all_pairs_of_two_colours_and_two_objects():
    size, make = geneval.SPACES["color_attr"]
    assert size == 79 * 78 * 10 * 9
    for number in (0, 1, 89, 90, 91, size // 2, size - 1):
        first, second = make(number)["include"]
        assert first["class"] != second["class"] and first["color"] != second["color"]
    assert len({make(number)["prompt"] for number in range(0, size, 37)}) == len(range(0, size, 37))


def test_every_tag_has_a_space():
    assert set(geneval.SPACES) == set(geneval.SHARES) == set(TAGS)


def test_people_have_no_colour():
    assert not any("person" in record["prompt"] for record in space("colors"))
    assert "person" not in geneval.COLOURABLE and len(geneval.COLOURABLE) == len(CLASSES) - 1


def test_articles_and_plurals_follow_the_letters():
    assert [geneval.article(name) for name in ("umbrella", "hair drier", "oven")] == [
        "an umbrella",
        "a hair drier",
        "an oven",
    ]
    assert [geneval.plural(name) for name in ("bus", "scissors", "knife", "person")] == [
        "buses",
        "scissorses",
        "knifes",
        "persons",
    ]


def test_shares_are_those_of_flow_grpo_with_repeats():
    lines = geneval.generate(1700, 0, repeat=True)
    tags = Counter(json.loads(line)["tag"] for line in lines)
    assert tags == {"position": 700, "counting": 500, "color_attr": 300, "colors": 100, "two_object": 100}
    counting = Counter(line for line in lines if '"counting"' in line)
    assert len(counting) == 240 and set(counting.values()) == {2, 3}  # evenly


def test_without_repeats_each_prompt_comes_once_and_larger_tags_fill_up():
    lines = geneval.generate(3400, 0)
    assert len(set(lines)) == 3400
    tags = Counter(json.loads(line)["tag"] for line in lines)
    assert tags["counting"] == 240
    assert tags["position"] == pytest.approx((3400 - 240) * 7 / 12, abs=1)


def test_excluded_prompts_are_absent_in_either_order():
    gone = [f"a photo of two {geneval.plural(name)}" for name in CLASSES]
    swapped = "a photo of a skis and a bowl"
    lines = geneval.generate(20_000, 1, [*gone, swapped])
    prompts = {json.loads(line)["prompt"] for line in lines}
    assert not prompts & {*gone, swapped, "a photo of a bowl and a skis"}
    assert len({prompt for prompt in prompts if prompt.endswith("zebras")}) == 2  # three and four


def test_too_many_prompts_are_refused_with_the_maximum(monkeypatch):
    monkeypatch.setattr(geneval, "SHARES", geneval.SHARES | {"color_attr": 0})  # half a million prompts less to make
    excluded = [json.loads(line)["prompt"] for line in PUBLISHED]
    # The tags that are used, less the excluded ones of these; pairs go in both orders.
    maximum = 6320 + 240 + 790 + 25_280 - (2 + 2 + 1 + 1)
    with pytest.raises(PromptError, match=rf"1 to {maximum} "):
        geneval.generate(maximum + 1, 0, excluded)
    with pytest.raises(PromptError, match="--count 0"):
        geneval.generate(0, 0)
    with pytest.raises(PromptError, match="every kind"):
        geneval.generate(10, 0, [record["prompt"] for record in space("counting")], repeat=True)


# --- text rendering --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ocr_prompts():
    return ocr.generate(4000, 5)


def test_scorer_finds_the_words_meant(ocr_prompts):
    assert all(prompt.count('"') == 2 for prompt in ocr_prompts)
    assert all(wanted_text(prompt) == ocr.essence(prompt) for prompt in ocr_prompts)
    assert '"Apples $1.00"' in ocr.make("price", 0) and ocr.make("price", 0)[0].isupper()


def test_ocr_prompts_differ_and_kinds_have_equal_shares(ocr_prompts):
    assert len(set(ocr_prompts)) == 4000
    assert sum(bool(re.search(r'"Open \d', prompt)) for prompt in ocr_prompts) == pytest.approx(
        4000 / len(ocr.KINDS), abs=1
    )
    assert all(ocr.size(kind) >= 100_000 for kind in ocr.KINDS)


def test_numbers_of_a_kind_are_its_prompts_one_to_one(monkeypatch):
    monkeypatch.setitem(ocr.KINDS, "small", ("things", "{} {}", "first second"))
    for name, words in {
        "things": ["a sign", "a wall"],
        "first": ["No", "Mind"],
        "second": ["Dogs", "Cats", "Exit"],
    }.items():
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


def test_excluded_words_are_asked_for_in_no_prompt(ocr_prompts):
    words = ocr.essence(next(prompt for prompt in ocr_prompts if '"Open ' in prompt))
    assert not any(ocr.essence(p) == words for p in ocr.generate(4000, 5, [f'A door with "{words.upper()}" on it']))


# --- the mixture -----------------------------------------------------------------------------------------------------


def test_apportion_gives_every_prompt_to_a_kind():
    assert apportion(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert apportion(17, {"a": 7, "b": 10}) == {"a": 7, "b": 10}


def test_allocate_fills_small_kinds_first():
    assert allocate(100, {"a": 1, "b": 1, "c": 2}, {"a": 5, "b": 500, "c": 500}) == {"a": 5, "b": 32, "c": 63}
    assert allocate(12, {"a": 1, "b": 5, "c": 0}, {"a": 9, "b": 3, "c": 50}) == {"a": 9, "b": 3}
    with pytest.raises(PromptError, match="1 to 12 "):
        allocate(13, {"a": 1, "b": 5, "c": 0}, {"a": 9, "b": 3, "c": 50})


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


def test_command_writes_files_that_load_and_does_not_overwrite(tmp_path, capsys):
    exclude = tmp_path / "test_metadata.jsonl"
    exclude.write_text("\n".join(PUBLISHED))
    output = tmp_path / "new" / "train_metadata.jsonl"
    arguments = ["geneval", "--output", str(output), "--count", "300", "--seed", "7", "--exclude", str(exclude)]
    main(arguments)
    assert "300 lines, 300 different" in capsys.readouterr().out
    prompts = load_prompts(output.parent, "geneval", "train")
    assert len(prompts) == 300 and {"tag", "include", "prompt"} <= set(prompts[0].metadata)
    first = output.read_bytes()
    with pytest.raises(SystemExit, match=r"error: .*--force"):
        main(arguments)
    main([*arguments, "--force"])
    assert output.read_bytes() == first  # the seed decides
    assert [path.name for path in output.parent.iterdir()] == ["train_metadata.jsonl"]


def test_command_runs_as_a_module_and_its_seed_counts(tmp_path):
    command = [sys.executable, "-m", "tools.prompts", "ocr", "--output", "train.txt", "--count", "50"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(load_prompts(tmp_path, "general_ocr", "train")) == 50
    main(["ocr", "--output", str(tmp_path / "test.txt"), "--count", "50", "--seed", "1"])
    assert (tmp_path / "test.txt").read_text() != (tmp_path / "train.txt").read_text()


def test_command_names_an_unreadable_exclusion(tmp_path):
    arguments = ["ocr", "--output", str(tmp_path / "x.txt"), "--count", "5", "--exclude", str(tmp_path / "none.txt")]
    with pytest.raises(SystemExit, match=r"none\.txt does not exist"):
        main(arguments)
    assert list(tmp_path.iterdir()) == []
