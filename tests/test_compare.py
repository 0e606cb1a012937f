"""Models compared: the paper's table, its averages against the paper's own rows, what is refused, the page."""

from __future__ import annotations

import csv
import io
import json
import re
import runpy
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusionopd.evaluation.results import EvaluationError, Record, Summary, averages_json, summarise
from tools.report import (
    ComparisonError,
    Evaluation,
    Model,
    compare,
    csv_table,
    published,
    published_models,
    read_models,
    render_comparison,
    text_comparison,
)
from tools.report.comparison import min_max, unequal_settings

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "compare.py"
SETTINGS = {"model": "m", "lora": None, "num_inference_steps": 40, "guidance_scale": 4.5, "resolution": 512, "seed": 42}


def write(folder: Path, scores: dict[str, list[float]], pictures: bool = False, prompt: str = "p", **settings) -> None:
    """An evaluation's files: `scores` by sample."""
    folder.mkdir(parents=True)
    count = len(next(iter(scores.values())))
    records = [
        Record(i, f'{prompt} <{i}> & "q"', {}, {name: values[i] for name, values in scores.items()})
        for i in range(count)
    ]
    (folder / "average_scores.json").write_text(json.dumps(averages_json(summarise(records))))
    (folder / "evaluation_results.jsonl").write_text("".join(json.dumps(vars(r)) + "\n" for r in records))
    described = SETTINGS | {"rewards": list(scores), "images_per_prompt": 1} | settings
    (folder / "evaluation_settings.json").write_text(json.dumps(described))
    for i in range(count if pictures else 0):
        (folder / "images").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (16 * i, 0, 0)).save(folder / "images" / f"{i:05d}.jpg")


def model(name: str, **data_sets: dict[str, float]) -> Model:
    """A measured model from means alone."""
    return Model(
        name,
        {
            data_set: Evaluation({score: Summary(mean, 0.01, 4) for score, mean in scores.items()})
            for data_set, scores in data_sets.items()
        },
    )


def values(comparison, title="Average") -> list[float | None]:
    return list(next(each for each in comparison.averages if each.title == title).values)


@pytest.fixture
def runs(tmp_path) -> Path:
    for level, name in ((0.2, "base"), (0.8, "student")):
        scores = {"tiny_compose": [level, 1.0], "tiny_soft": [level, level]}
        write(tmp_path / name / "compose", scores, pictures=True, rewards=["tiny_compose"])
        write(tmp_path / name / "scene", {"tiny_scene": [level, 0.5, level]}, pictures=True, prompt="view")
    return tmp_path


def test_min_max_leaves_gaps_and_columns_without_spread():
    nan = np.nan
    given = np.array([[1.0, nan, 3.0, nan], [3.0, 5.0, 3.0, nan], [2.0, 9.0, 3.0, nan]])
    expected = [[0.0, nan, nan, nan], [1.0, 0.0, nan, nan], [0.5, 1.0, nan, nan]]
    np.testing.assert_array_equal(min_max(given), expected)


def test_averages_of_the_papers_rows():
    """Against a computation of its own; where it stands to the paper's column is pinned, because they do not agree."""
    rows = [[float(value) for value in row] for row in published.ROWS.values()]
    columns = list(zip(*rows, strict=True))
    expected = [
        statistics.fmean((v - min(c)) / (max(c) - min(c)) for v, c in zip(row, columns, strict=True)) for row in rows
    ]
    ours = values(compare(published_models()))
    assert ours == pytest.approx(expected)
    assert [round(value, 3) for value in ours] == [0, 0.566, 0.5, 0.619, 0.857, 0.821, 0.731, 0.934, 0.984]
    printed = [float(value) for value in published.AVERAGES.values()]
    assert list(published.AVERAGES) == list(published.ROWS)
    assert max(abs(a - b) for a, b in zip(ours, printed, strict=True)) == pytest.approx(0.159, abs=5e-4)
    # All but the aesthetics teacher stand in the paper's order, and the best and the worst row are the paper's.
    others = [i for i, name in enumerate(published.ROWS) if name not in ("Aes teacher", "GenEval teacher")]
    assert sorted(others, key=ours.__getitem__) == sorted(others, key=printed.__getitem__)
    assert (np.argmax(ours), np.argmin(ours)) == (np.argmax(printed), np.argmin(printed))


def test_the_papers_columns_come_first_in_its_order():
    quality = {"imagereward": 1.0, "hpsv2": 0.3, "clipscore": 0.3, "pickscore": 22.0, "aesthetic": 5.0, "mine": 1.0}
    drawbench, more = quality | {"unifiedreward": 0.7}, {"geneval": 0.6, "geneval_overall": 0.5}
    comparison = compare([model("a", zoo={"tiny": 0.1}, drawbench=drawbench, ocr={"ocr": 0.9}, geneval=more)])
    assert [column.title for column in comparison.main] == [*published.COLUMNS, "tiny", "mine"]
    assert [column.title for column in comparison.details] == ["geneval"]
    shown = {column.title: column.text(comparison.models[0]) for column in comparison.main}
    assert (shown["GenEval"], shown["UnifiedReward"], shown["PickScore"]) == ("0.500", "3.50", "22.00")


def test_a_column_is_of_one_data_set_for_all_rows():
    both = {"pickscore": {"aesthetic": 5.0}, "drawbench": {"aesthetic": 6.0}}
    assert compare([model("a", **both), model("b", **both)]).main[0].data_set == "drawbench"
    models = [model("a", **both), model("b", pickscore={"aesthetic": 5.5})]
    comparison = compare(models)
    column = comparison.main[0]
    assert (column.data_set, [column.text(each) for each in models]) == ("pickscore", ["5.00", "5.50"])
    assert [(each.score, each.data_set) for each in comparison.details] == [("aesthetic", "drawbench")]
    fallback = compare([model("a", geneval={"geneval": 0.5}), model("b", geneval={"geneval": 0.6})])
    assert fallback.main[0].score == "geneval"


def test_averages_over_different_columns_are_not_compared():
    full = [model("a", x={"ocr": 0.0, "hpsv2": 0.0}), model("b", x={"ocr": 0.5, "hpsv2": 1.0})]
    comparison = compare([*full, model("c", x={"ocr": 1.0})])
    average, common = comparison.averages
    assert values(comparison) == [0.0, 0.75, 1.0]
    assert values(comparison, "Common") == [0.0, 0.5, 1.0]
    assert [average.is_best(i) for i in range(3)] == [False, True, False]
    assert [common.is_best(i) for i in range(3)] == [False, False, True]
    text = text_comparison(comparison)
    assert "1.000 (1/2)" in text
    assert "c: average over 1 of 2 columns (OCR)." in text
    assert "cannot be compared" in text
    assert [each.title for each in compare(full).averages] == ["Average"]
    equal = compare([full[0], model("b", x={"ocr": 1.0, "hpsv2": 1.0}), model("c", x={"ocr": 1.0})])
    assert values(equal) == [0.0, 1.0, 1.0]
    assert [equal.averages[0].is_best(i) for i in range(3)] == [False, True, False]
    several = {"a": {"ocr": 0.0}, "b": {"ocr": 1.0, "hpsv2": 1.0}, "c": {"hpsv2": 2.0}}
    crossed = compare([model(name, x=scores) for name, scores in several.items()])
    assert [each.title for each in crossed.averages] == ["Average"]  # no column that all have
    assert not any(crossed.averages[0].is_best(i) for i in range(3))


def test_what_no_two_rows_differ_in_is_in_no_average():
    comparison = compare([model("a", x={"ocr": 1.0, "hpsv2": 0.2}), model("b", x={"ocr": 1.0, "hpsv2": 0.3})])
    assert values(comparison) == [0.0, 1.0]
    assert "OCR is in no average: it takes two rows that differ." in comparison.notes
    alone = compare([model("a", x={"ocr": 1.0})])
    assert alone.averages == []
    assert "*" not in text_comparison(alone).splitlines()[2]


def test_published_rows_keep_their_digits_and_their_average():
    ours = model("DiffusionOPD", ocr={"ocr": 0.95}, drawbench={"unifiedreward": 0.7})
    comparison = compare([*published_models(), ours])
    text = text_comparison(comparison)
    for words in ("1.498", "3.50*", "[0.929]", "published", "0.950", "not to 0.929"):
        assert words in text, words
    lines = list(csv.DictReader(io.StringIO(csv_table(comparison))))
    assert [line["source"] for line in lines[-2:]] == [published.SOURCE, "measured"]
    assert float(lines[-2]["UnifiedReward (drawbench)"]) == pytest.approx(3.5)
    assert lines[-1]["GenEval (geneval)"] == ""
    assert lines[-1]["Average number of columns"] == "2"


def test_published_rows_are_of_their_own_data_sets_only():
    comparison = compare([*published_models(), model("a", pickscore={"aesthetic": 5.0})])
    column = next(column for column in comparison.main if column.title == "Aesthetic")
    assert column.data_set == "pickscore"
    assert [column.text(each) for each in comparison.models] == ["–"] * 9 + ["5.00"]


def test_evaluations_are_found(runs, tmp_path):
    (tmp_path / "mopd").mkdir()
    (runs / "student").rename(tmp_path / "mopd" / "evaluation")
    base, student, one, run = read_models(
        [f"{runs}/base", f"student={tmp_path}/mopd", f"one={runs}/base/scene", f"{tmp_path}/mopd/evaluation"]
    )
    assert (base.name, list(base.evaluations)) == ("base", ["compose", "scene"])
    assert list(student.evaluations) == ["compose", "scene"]
    assert list(one.evaluations) == ["scene"]
    assert run.name == "mopd"
    assert base.evaluations["compose"].scores["tiny_compose"] == Summary(0.6, pytest.approx(0.4), 2)


def test_an_evaluation_that_stands_alone_has_the_data_set_of_its_settings_or_folder(tmp_path):
    write(tmp_path / "ocr", {"ocr": [0.1, 0.2]})
    write(tmp_path / "named", {"ocr": [0.3, 0.4]}, dataset="ocr")
    assert [list(m.evaluations) for m in read_models([f"{tmp_path}/ocr", f"{tmp_path}/named"])] == [["ocr"]] * 2


def test_unequal_settings_are_named_once(tmp_path):
    for name, steps in (("a", 40), ("b", 10)):
        for data_set in ("x", "y"):
            write(
                tmp_path / name / data_set, {"ocr": [1.0]}, num_inference_steps=steps, guidance_scale=steps, lora=name
            )
    write(tmp_path / "c" / "x", {"ocr": [1.0, 0.5]})
    models = read_models([f"{tmp_path}/{name}" for name in "abc"])
    assert unequal_settings(models[:2]) == ["num_inference_steps on x, y: 40 (a), 10 (b)"]
    assert unequal_settings([models[0], models[2]]) == ["number of prompts on x: 1 (a), 2 (c)"]
    write(tmp_path / "d" / "x", {"ocr": [1.0]}, prompt="another")
    assert unequal_settings([models[0], *read_models([f"{tmp_path}/d"])]) == ["prompts on x: not the same"]
    assert unequal_settings([*published_models(), model("e", ocr={"ocr": 1.0})]) == []


class Elements(HTMLParser):
    """Start tags with their attributes; tags must be closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_has_the_same_prompts_of_all_models(runs):
    (runs / "student" / "scene" / "images" / "00001.jpg").unlink()
    comparison = compare(read_models([f"<b>={runs}/base", f"{runs}/student"]))
    page = render_comparison(comparison, "Two <models>", num_images=2)
    elements = Elements(page)
    alts = [attrs["alt"] for tag, attrs in elements.tags if tag == "img"]
    assert alts == [
        f'{name} for “{prompt} <{i}> & "q"”'
        for prompt, i in (("p", 0), ("p", 1), ("view", 0), ("view", 2))
        for name in ("<b>", "student")
    ]
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", page)
    for words in ("Two <models>", "tiny_scene 0.800", "± 0.400", "guidance 4.5", "Further scores"):
        assert words in elements.text, words
    assert page.count("★") == 1 + 2 + 1 + 1  # the legend, two columns, one detail, the average
    for image in (runs / "base" / "compose" / "images").iterdir():
        image.unlink()
    assert "Evaluated without --save_images: <b>." in Elements(render_comparison(comparison, "")).text
    assert "Images" not in Elements(render_comparison(comparison, "", num_images=0)).text


def test_published_rows_have_nothing_in_other_columns():
    comparison = compare([*published_models(), model("a", geneval={"geneval": 0.6, "geneval_overall": 0.5})])
    assert [column.of(comparison.models[0]) for column in comparison.details] == [None]
    assert "Cascade NFT" not in render_comparison(comparison, "").split("Further scores")[1]


def test_pictures_of_other_prompts_are_not_side_by_side(tmp_path):
    write(tmp_path / "a" / "x", {"ocr": [1.0]}, pictures=True)
    write(tmp_path / "b" / "x", {"ocr": [0.5]}, pictures=True, prompt="another")
    page = render_comparison(compare(read_models([f"{tmp_path}/a", f"{tmp_path}/b"])), "")
    assert "<img" not in page and "prompts on x: not the same" in page


def test_large_pictures_are_shrunk(tmp_path):
    write(tmp_path / "a" / "x", {"ocr": [1.0]}, pictures=True)
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    file = tmp_path / "a" / "x" / "images" / "00000.jpg"
    Image.fromarray(noise).save(file)
    page = render_comparison(compare(read_models([f"{tmp_path}/a"])), "")
    assert len(page) < file.stat().st_size * 0.6


def run_script(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_script_writes_three_files(runs, monkeypatch, capsys):
    output = runs / "out" / "here"
    run_script(monkeypatch, f"{runs}/base", f"{runs}/student", "--output", str(output), "--pictures", "1")
    printed = capsys.readouterr().out
    assert "tiny_compose" in printed and f"written to {output}" in printed
    assert sorted(path.name for path in output.iterdir()) == ["comparison.csv", "comparison.html", "comparison.txt"]
    assert (output / "comparison.txt").read_text().strip() in printed
    assert [line["model"] for line in csv.DictReader((output / "comparison.csv").open())] == ["base", "student"]


def test_mistakes_end_in_one_line(runs, monkeypatch, tmp_path):
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            run_script(monkeypatch, *arguments, "--output", str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        message = str(caught.value.code)
        assert message.startswith("error: ") and "\n" not in message
        return message

    assert "no evaluation in" in error(f"{runs}/nothing")
    (tmp_path / "empty").mkdir()
    assert "no evaluation in" in error(f"{tmp_path}/empty")
    assert "two models are called 'base'" in error(f"{runs}/base", f"base={runs}/student")
    (runs / "base" / "scene" / "average_scores.json").write_text('{"tiny_scene": 0.')
    assert "average_scores.json cannot be read" in error(f"{runs}/base")


def test_malformed_files_are_named(runs):
    scene = runs / "base" / "scene"
    (scene / "evaluation_settings.json").write_text("[1]")
    with pytest.raises(ComparisonError, match="cannot be read as settings"):
        read_models([str(scene)])
    (scene / "average_scores.json").write_text('{"tiny_scene": NaN}')
    with pytest.raises(ComparisonError, match="'tiny_scene' is nan"):
        read_models([str(scene)])
    (scene / "average_scores.json").write_text("[]")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_models([str(scene)])
    (scene / "average_scores.json").unlink()
    with pytest.raises(ComparisonError, match="not finished.*--resume"):
        read_models([str(scene)])


def test_averages_of_the_upstream_release_are_enough(tmp_path):
    for name, value in (("a", 0.5), ("b", 0.75)):
        (tmp_path / name / "ocr").mkdir(parents=True)
        (tmp_path / name / "ocr" / "average_scores.json").write_text(json.dumps({"ocr": value}))
    comparison = compare(read_models([f"{tmp_path}/a", f"{tmp_path}/b"]))
    text = text_comparison(comparison)
    assert "0.750*" in text and "± 0" not in text
    assert "settings not recorded" in render_comparison(comparison, "")
