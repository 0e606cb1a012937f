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
    write(tmp_path, "train.txt", "  a sign that says 'hi'\t\n\n   \nA ünïcode 日本 prompt\r\nno newline at the end")
    assert load_prompts(tmp_path, "general_ocr", "train") == [
        Prompt("a sign that says 'hi'"),
        Prompt("A ünïcode 日本 prompt"),
        Prompt("no newline at the end"),
    ]


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


def test_byte_order_mark_is_ignored(tmp_path):
    write(tmp_path, "train.txt", b"\xef\xbb\xbfa red cube\n")
    assert load_prompts(tmp_path, "general_ocr", "train") == [Prompt("a red cube")]


def test_repeated_prompts_are_kept(tmp_path):
    write(tmp_path, "train.txt", "twice\ntwice\n")
    assert len(load_prompts(tmp_path, "general_ocr", "train")) == 2


def test_prompts_can_be_keys():
    assert len({Prompt("a", {"x": [1]}), Prompt("a", {"x": [1]}), Prompt("b")}) == 2


@pytest.mark.parametrize("content", ["", "\n\n", "   \n\t\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(("prompt_fn", "name"), [("general_ocr", "test.txt"), ("geneval", "test_metadata.jsonl")])
def test_file_without_prompts_is_named(tmp_path, prompt_fn, name, content):
    write(tmp_path, name, content)
    with pytest.raises(PromptError, match=rf"{name}.*no prompt"):
        load_prompts(tmp_path, prompt_fn, "test")


@pytest.mark.parametrize(("prompt_fn", "name"), [("general_ocr", "train.txt"), ("geneval", "train_metadata.jsonl")])
def test_missing_file_is_named_with_what_reads_it(tmp_path, prompt_fn, name):
    with pytest.raises(PromptError, match=rf"{name} does not exist.*{prompt_fn}"):
        load_prompts(tmp_path / "nowhere", prompt_fn, "train")


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "train.txt").mkdir()
    with pytest.raises(PromptError, match="cannot be read"):
        load_prompts(tmp_path, "general_ocr", "train")


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


def test_a_draw_depends_on_its_counters_alone():
    """Asked in any order, by fresh samplers or by one, after a resume or not: the same prompt."""
    count, groups, rounds = 11, 4, 9
    reference = walk(PromptSampler(prompts(count), 3, 1, groups), rounds, groups)
    sampler = PromptSampler(prompts(count), 3, 1, groups)
    backwards = [sampler.index(r, g) for r in reversed(range(rounds)) for g in reversed(range(groups))]
    assert backwards[::-1] == reference
    fresh = [PromptSampler(prompts(count), 3, 1, groups).index(r, g) for r in range(rounds) for g in range(groups)]
    assert fresh == reference


def test_position_alone_counts_so_that_batch_geometry_only_regroups():
    """Six groups a round walk the same sequence as two rounds of three."""
    assert walk(PromptSampler(prompts(20), 5, 0, 6), 10, 6) == walk(PromptSampler(prompts(20), 5, 0, 3), 20, 3)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_processes_divide_a_round_without_changing_it(world):
    """Each process asks for its own contiguous share; together they are the round of one process."""
    groups, rounds = 6, 8
    expected = walk(PromptSampler(prompts(13), 9, 2, groups), rounds, groups)
    samplers = [PromptSampler(prompts(13), 9, 2, groups) for _ in range(world)]
    share = groups // world
    together = [
        samplers[rank].index(r, rank * share + i) for r in range(rounds) for rank in range(world) for i in range(share)
    ]
    assert together == expected


@pytest.mark.parametrize("rounds", [range(0), range(1), range(3, 7), range(0, 100), range(50, 60, 3)])
@pytest.mark.parametrize("count", [5, 40])
def test_used_by_lists_what_the_rounds_draw(count, rounds):
    sampler = PromptSampler(prompts(count), 1, 0, 4)
    assert sampler.used_by(rounds) == sorted({sampler.index(r, g) for r in rounds for g in range(4)})


def test_used_by_of_an_endless_run_is_immediate():
    assert PromptSampler(prompts(1000), 1, 0, 6).used_by(range(10**12)) == list(range(1000))
