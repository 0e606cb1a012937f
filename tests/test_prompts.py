"""Prompt files: what is accepted, what is refused and how it is named; prompt sampling: coverage and purity."""

import json
import re
from collections import Counter
from functools import partial

import pytest

from diffusionopd.data.prompts import Prompt, PromptError, load_folders, load_prompts
from diffusionopd.data.sampler import PromptSampler


@pytest.fixture
def read(tmp_path):
    """`read(content, prompt_fn)`: the prompts of a training file with this content, str or bytes."""

    def write_and_read(content, prompt_fn="general_ocr"):
        name = {"geneval": "train_metadata.jsonl"}.get(prompt_fn, "train.txt")
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_prompts(tmp_path, prompt_fn, "train")

    return write_and_read


def texts(prompts):
    return [prompt.text for prompt in prompts]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_prompt_a_line_as_it_is(read):
    """Repeated ones too; without blanks at its ends and a byte order mark."""
    found = read(b"\xef\xbb\xbf  a sign that says 'hi'\t\n\n   \n" + "A ünïcode 日本 prompt\r\ntwice\ntwice".encode())
    assert found == [Prompt(text) for text in ("a sign that says 'hi'", "A ünïcode 日本 prompt", "twice", "twice")]
    assert len(read("{red|blue} car\nwith\ta tab\n{}x\n")) == 3, "no JSON, and no table"
    assert len({Prompt("a", {"x": [1]}), Prompt("a", {"x": [1]}), Prompt("b")}) == 2, "prompts can be keys"


def test_geneval_file_keeps_the_whole_object_for_the_scorer(read):
    records = [
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
        {"prompt": 'line\u2028separator and "quotes"', "include": []},
    ]
    found = read("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n", "geneval")
    assert texts(found) == [record["prompt"] for record in records]
    assert [prompt.metadata for prompt in found] == records


def test_lines_end_with_line_feeds_and_carriage_returns_alone(read, tmp_path):
    for end in ("\n", "\r\n", "\r"):
        found = read(end.join(["a red lake", "", "a\u2028b\x0bc\x85d", "a blue town"]) + end)
        assert texts(found) == ["a red lake", "a\u2028b\x0bc\x85d", "a blue town"]
        assert [prompt.source for prompt in found] == [f"{tmp_path / 'train.txt'}, line {n}" for n in (1, 3, 4)]


def test_what_is_no_prompt_is_named_with_its_file_and_line(read, tmp_path):
    text, geneval = "general_ocr", "geneval"
    for prompt_fn, content, *facts in (
        (text, 'a dog\n{"prompt": "a cat"}\n{"text": "a cow"}', "line 2", "line 3", "geneval"),
        (text, "1\ta dog\n2\ta cat\n", "1\\ta dog"),
        (text, b"fine\nalso fine\ncaf\xe9 in latin-1\n", "line 3: ", "UTF-8"),
        *((geneval, f'{{"prompt": "good"}}\n\n{line}\n', "line 3: ") for line in (
            "{'prompt': 'single quotes'}", '{"prompt": "cut', '{"prompt": "a", "score": NaN}', "[" * 100_000,
            '["prompt"]', "null", '{"Prompt": "wrong case"}', '{"prompt": 3}', '{"prompt": null}', '{"prompt": "  "}',
            '{"prompt": "half \\ud800 pair"}',
        )),
        *((prompt_fn, content, "no prompt") for prompt_fn in (text, geneval)
          for content in ("", "\n\n", "   \n\t\n", b"\xef\xbb\xbf")),
    ):  # fmt: skip
        with pytest.raises(PromptError) as error:
            read(content, prompt_fn)
        name = "train_metadata.jsonl" if prompt_fn == geneval else "train.txt"
        assert all(fact in str(error.value) for fact in (str(tmp_path / name), *facts)), content[:80]
    with pytest.raises(PromptError) as error:
        read('{"prompt": "good"}\nbad\n' * 13, geneval)
    named = re.findall(r"line (\d+):", str(error.value))
    assert named == [str(2 * n) for n in range(1, 11)] and "13" in str(error.value) and "3 more" in str(error.value)


def test_missing_and_unreadable_files_and_formats_are_named(tmp_path):
    (tmp_path / "train.txt").mkdir()
    for folder, prompt_fn, fact in (
        ("nowhere", "general_ocr", "train.txt does not exist.*general_ocr"),
        ("nowhere", "geneval", "train_metadata.jsonl does not exist.*geneval"),
        ("", "general_ocr", "cannot be read"),
        ("", "ocr", "'ocr'.*general_ocr"),
    ):
        with pytest.raises(PromptError, match=fact):
            load_prompts(tmp_path / folder, prompt_fn, "train")


def test_several_folders_are_one_after_another_with_the_first_prompts_of_each(tmp_path):
    for name, lines in (("a", "1\n2\n3\n"), ("b", "4\n"), ("c", "5\n6\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.txt").write_text(lines)
    found, places = load_folders([tmp_path / name for name in "bac"], "general_ocr", "test", 2)
    assert texts(found) == ["4", "1", "2", "5", "6"]
    assert places == {"b": range(1), "a": range(1, 3), "c": range(3, 5)}
    only = "general_ocr", "test"
    assert load_folders([tmp_path / "a"], *only)[0] == load_prompts(tmp_path / "a", *only)


# --- sampling --------------------------------------------------------------------------------------------------------


def prompts(count):
    return [Prompt(f"prompt {i}") for i in range(count)]


def walk(sampler, rounds, groups):
    return [sampler.index(r, g) for r in range(rounds) for g in range(groups)]


@pytest.mark.parametrize(("count", "groups"), [(7, 3), (10, 5), (1, 4), (3, 8), (64, 6)])
def test_each_prompt_comes_once_in_every_epoch(count, groups):
    epochs = 4
    rounds = -(-epochs * count // groups)
    order = walk(PromptSampler(prompts(count), 42, 0, groups), rounds, groups)
    for epoch in range(epochs):
        assert Counter(order[epoch * count : (epoch + 1) * count]) == Counter(range(count))


def test_epochs_seeds_and_tasks_have_orders_of_their_own():
    count = 50
    orders = [
        tuple(walk(PromptSampler(prompts(count), seed, task, 1), 2 * count, 1)) for seed in (0, 1) for task in (0, 1)
    ]
    halves = [half for order in orders for half in (order[:count], order[count:])]
    assert len(set(halves)) == len(halves)
    assert tuple(range(count)) not in halves


def test_a_draw_depends_on_its_position_alone():
    """Asked in any order, by one sampler or, as by several processes or after a resume, by fresh ones; also where six
    groups a round are two rounds of three."""
    make, groups, rounds = partial(PromptSampler, prompts(11), 3, 1), 6, 9
    reference, sampler = walk(make(groups), rounds, groups), make(groups)
    backwards = [sampler.index(r, g) for r in reversed(range(rounds)) for g in reversed(range(groups))]
    fresh = [make(groups).index(r, g) for r in range(rounds) for g in range(groups)]
    assert backwards[::-1] == fresh == reference == walk(make(3), 2 * rounds, 3)


@pytest.mark.parametrize("rounds", [range(0), range(1), range(3, 7), range(0, 100), range(50, 60, 3)])
@pytest.mark.parametrize("count", [5, 40])
def test_used_by_lists_what_the_rounds_draw(count, rounds):
    sampler = PromptSampler(prompts(count), 1, 0, 4)
    assert sampler.used_by(rounds) == sorted({sampler.index(r, g) for r in rounds for g in range(4)})


def test_used_by_of_an_endless_run_is_immediate():
    assert PromptSampler(prompts(1000), 1, 0, 6).used_by(range(10**12)) == list(range(1000))
