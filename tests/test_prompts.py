"""Prompt files: what is accepted, what is refused and how it is named; prompt sampling: coverage and purity."""

import json
import re
from collections import Counter

import pytest

from diffusionopd.data.prompts import Prompt, PromptError, load_folders, load_prompts
from diffusionopd.data.sampler import PromptSampler


def write(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# --- files -----------------------------------------------------------------------------------------------------------


def test_text_file_is_one_prompt_a_line(tmp_path):
    """Repeated ones are kept; a byte order mark is none."""
    lines = "  a sign that says 'hi'\t\n\n   \nA ünïcode 日本 prompt\r\ntwice\ntwice\nno newline at the end"
    write(tmp_path, "train.txt", b"\xef\xbb\xbf" + lines.encode())
    texts = ["a sign that says 'hi'", "A ünïcode 日本 prompt", "twice", "twice", "no newline at the end"]
    assert load_prompts(tmp_path, "general_ocr", "train") == [Prompt(text) for text in texts]


def test_geneval_file_keeps_the_whole_object_for_the_scorer(tmp_path):
    records = [
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
        {"prompt": 'line\u2028separator and "quotes"', "include": []},
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write(tmp_path, "test_metadata.jsonl", "\n".join(lines) + "\n\n")
    prompts = load_prompts(str(tmp_path), "geneval", "test")
    assert [prompt.text for prompt in prompts] == [record["prompt"] for record in records]
    assert [prompt.metadata for prompt in prompts] == records


def test_lines_end_with_line_feeds_and_carriage_returns_alone(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        write(tmp_path, "train.txt", end.join(["a red lake", "", "a\u2028b\x0bc\x85d", "a blue town"]) + end)
        read = load_prompts(tmp_path, "general_ocr", "train")
        assert [prompt.text for prompt in read] == ["a red lake", "a\u2028b\x0bc\x85d", "a blue town"]
        assert [prompt.source for prompt in read] == [f"{tmp_path / 'train.txt'}, line {n}" for n in (1, 3, 4)]


def test_lines_of_another_format_are_refused_as_text(tmp_path):
    for content, at in (
        ('a dog\n{"prompt": "a cat"}\n{"text": "a cow"}', ("line 2", "line 3", "geneval")),
        ("1\ta dog\n2\ta cat\n", ("1\\ta dog",)),
    ):
        write(tmp_path, "train.txt", content)
        with pytest.raises(PromptError) as error:
            load_prompts(tmp_path, "general_ocr", "train")
        assert all(part in str(error.value) for part in ("train.txt", *at))
    write(tmp_path, "train.txt", "{red|blue} car\nwith\ta tab\n{}x\n")
    assert len(load_prompts(tmp_path, "general_ocr", "train")) == 3


def test_all_bad_lines_are_named_up_to_a_number(tmp_path):
    write(tmp_path, "train_metadata.jsonl", "".join('{"prompt": "good"}\nbad\n' for _ in range(13)))
    with pytest.raises(PromptError) as error:
        load_prompts(tmp_path, "geneval", "train")
    named = re.findall(r"line (\d+):", str(error.value))
    assert named == [str(2 * n) for n in range(1, 11)] and "13" in str(error.value) and "3 more" in str(error.value)


def test_prompts_can_be_keys():
    assert len({Prompt("a", {"x": [1]}), Prompt("a", {"x": [1]}), Prompt("b")}) == 2


@pytest.mark.parametrize(("prompt_fn", "name"), [("general_ocr", "test.txt"), ("geneval", "test_metadata.jsonl")])
def test_a_file_that_is_none_or_holds_none_is_named(tmp_path, prompt_fn, name):
    with pytest.raises(PromptError, match=rf"{name} does not exist.*{prompt_fn}"):
        load_prompts(tmp_path, prompt_fn, "test")
    for content in ("", "\n\n", "   \n\t\n", b"\xef\xbb\xbf"):
        write(tmp_path, name, content)
        with pytest.raises(PromptError, match=rf"{name}.*no prompt"):
            load_prompts(tmp_path, prompt_fn, "test")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(PromptError, match=rf"{name} cannot be read"):
        load_prompts(tmp_path, prompt_fn, "test")


def test_not_utf8_names_the_line(tmp_path):
    write(tmp_path, "train.txt", b"fine\nalso fine\ncaf\xe9 in latin-1\n")
    with pytest.raises(PromptError, match=r"train\.txt, line 3: .*UTF-8"):
        load_prompts(tmp_path, "general_ocr", "train")


def test_malformed_line_is_named_with_file_and_line(tmp_path):
    for line in (
        "{'prompt': 'single quotes'}",
        '{"prompt": "cut',
        '{"prompt": "a", "score": NaN}',
        "[" * 100_000,
        '["prompt"]',
        "null",
        '{"Prompt": "wrong case"}',
        '{"prompt": 3}',
        '{"prompt": null}',
        '{"prompt": "  "}',
        '{"prompt": "half \\ud800 pair"}',
    ):
        write(tmp_path, "train_metadata.jsonl", '{"prompt": "good"}\n\n' + line + "\n")
        with pytest.raises(PromptError, match=r"train_metadata\.jsonl, line 3: "):
            load_prompts(tmp_path, "geneval", "train")


def test_several_folders_are_one_after_another_with_the_first_prompts_of_each(tmp_path):
    for name, lines in (("a", "1\n2\n3\n"), ("b", "4\n"), ("c", "5\n6\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.txt").write_text(lines)
    found, places = load_folders([tmp_path / name for name in "bac"], "general_ocr", "test", 2)
    assert [prompt.text for prompt in found] == ["4", "1", "2", "5", "6"]
    assert places == {"b": range(1), "a": range(1, 3), "c": range(3, 5)}
    only = "general_ocr", "test"
    assert load_folders([tmp_path / "a"], *only)[0] == load_prompts(tmp_path / "a", *only)


def test_unknown_format_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(PromptError, match="'ocr'.*general_ocr"):
        load_prompts(tmp_path, "ocr", "train")


# --- sampling --------------------------------------------------------------------------------------------------------


def sampler(count, groups, seed=42, task=0):
    return PromptSampler([Prompt(f"prompt {i}") for i in range(count)], seed, task, groups)


def walk(sampler, rounds, groups):
    return [sampler.index(r, g) for r in range(rounds) for g in range(groups)]


@pytest.mark.parametrize(("count", "groups"), [(7, 3), (10, 5), (1, 4), (3, 8), (64, 6)])
def test_each_prompt_comes_once_in_every_epoch(count, groups):
    epochs = 4
    order = walk(sampler(count, groups), -(-epochs * count // groups), groups)
    for epoch in range(epochs):
        assert Counter(order[epoch * count : (epoch + 1) * count]) == Counter(range(count))


def test_epochs_seeds_and_tasks_have_orders_of_their_own():
    count = 50
    orders = [tuple(walk(sampler(count, 1, seed, task), 2 * count, 1)) for seed in (0, 1) for task in (0, 1)]
    halves = [half for order in orders for half in (order[:count], order[count:])]
    assert len(set(halves)) == len(halves)
    assert tuple(range(count)) not in halves


def test_a_draw_depends_on_its_counters_alone():
    """Asked in any order, by fresh samplers or by one, in rounds of any size: position alone counts."""
    count, groups, rounds = 11, 4, 9
    reference, one = walk(sampler(count, groups), rounds, groups), sampler(count, groups)
    backwards = [one.index(r, g) for r in reversed(range(rounds)) for g in reversed(range(groups))]
    fresh = [sampler(count, groups).index(r, g) for r in range(rounds) for g in range(groups)]
    assert backwards[::-1] == fresh == walk(sampler(count, 2), 2 * rounds, 2) == reference


@pytest.mark.parametrize("rounds", [range(0), range(1), range(3, 7), range(0, 100), range(50, 60, 3)])
@pytest.mark.parametrize("count", [5, 40])
def test_used_by_lists_what_the_rounds_draw(count, rounds):
    one = sampler(count, 4)
    assert one.used_by(rounds) == sorted({one.index(r, g) for r in rounds for g in range(4)})


def test_used_by_of_an_endless_run_is_immediate():
    assert sampler(1000, 6).used_by(range(10**12)) == list(range(1000))
