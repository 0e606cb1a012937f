"""Models compared: the paper's table, its averages against the paper's own rows, what is refused, the page."""

from __future__ import annotations

import csv
import io
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusionopd.evaluation.results import EvaluationError, Record, Summary, averages_json, summarise
from tools.compare import main
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
from tools.report.comparison import unequal_settings

from .pages import Page

SETTINGS = {"model": "m", "lora": None, "num_inference_steps": 40, "guidance_scale": 4.5, "resolution": 512, "seed": 42}


def write(folder: Path, scores: dict[str, list[float]], pictures: bool = False, prompt: str = "p", **settings) -> None:
    """An evaluation's files: `scores` by sample."""
    (folder / "images").mkdir(parents=True)
    samples = enumerate(zip(*scores.values(), strict=True))
    records = [Record(i, f'{prompt} <{i}> & "q"', {}, dict(zip(scores, v, strict=True))) for i, v in samples]
    (folder / "average_scores.json").write_text(json.dumps(averages_json(summarise(records))))
    (folder / "evaluation_results.jsonl").write_text("".join(json.dumps(vars(r)) + "\n" for r in records))
    described = SETTINGS | {"rewards": list(scores), "images_per_prompt": 1} | settings
    (folder / "evaluation_settings.json").write_text(json.dumps(described))
    for i in range(len(records) if pictures else 0):
        Image.new("RGB", (16, 16), (16 * i, 0, 0)).save(folder / "images" / f"{i:05d}.jpg")


def model(name: str, **data_sets: dict[str, float]) -> Model:
    """A measured model from means alone."""
    scores = {d: {score: Summary(mean, 0.01, 4) for score, mean in means.items()} for d, means in data_sets.items()}
    return Model(name, {data_set: Evaluation(found) for data_set, found in scores.items()})


def of_x(**models: dict[str, float]):
    """The comparison of models on one data set."""
    return compare([model(name, x=scores) for name, scores in models.items()])


def shown(columns, comparison) -> dict[str, str]:
    """The first model's values by title."""
    return {column.title: column.text(comparison.models[0]) for column in columns}


@pytest.fixture
def runs(tmp_path) -> Path:
    for level, name in ((0.2, "base"), (0.8, "student")):
        scores = {"tiny_compose": [level, 1.0], "tiny_soft": [level, level]}
        write(tmp_path / name / "compose", scores, pictures=True, rewards=["tiny_compose"])
        write(tmp_path / name / "scene", {"tiny_scene": [level, 0.5, level]}, pictures=True, prompt="view")
    return tmp_path


def test_averages_of_the_papers_rows():
    """Against a computation of its own; where it stands to the paper's column is pinned, because they do not agree."""
    rows = [[float(value) for value in row] for row in published.ROWS.values()]
    columns = list(zip(*rows, strict=True))
    means = [
        statistics.fmean((v - min(c)) / (max(c) - min(c)) for v, c in zip(row, columns, strict=True)) for row in rows
    ]
    ours = list(compare(published_models()).averages[0].values)
    assert ours == pytest.approx(means)
    assert [round(value, 3) for value in ours] == [0, 0.566, 0.5, 0.619, 0.857, 0.821, 0.731, 0.934, 0.984]
    printed = [float(value) for value in published.AVERAGES.values()]
    assert max(abs(a - b) for a, b in zip(ours, printed, strict=True)) == pytest.approx(0.159, abs=5e-4)
    # All but the aesthetics teacher stand in the paper's order, and the best and the worst row are the paper's.
    others = [i for i, name in enumerate(published.ROWS) if name not in ("Aes teacher", "GenEval teacher")]
    assert sorted(others, key=ours.__getitem__) == sorted(others, key=printed.__getitem__)
    assert (np.argmax(ours), np.argmin(ours)) == (np.argmax(printed), np.argmin(printed))


def test_the_papers_columns_come_first_and_each_is_of_one_data_set_for_all_rows():
    quality = {"imagereward": 1.0, "hpsv2": 0.3, "clipscore": 0.3, "pickscore": 22.0, "aesthetic": 5.0, "mine": 1.0}
    drawbench, more = quality | {"unifiedreward": 0.7}, {"geneval": 0.6, "geneval_overall": 0.5}
    comparison = compare([model("a", zoo={"tiny": 0.1}, drawbench=drawbench, ocr={"ocr": 0.9}, geneval=more)])
    assert [column.title for column in comparison.main] == [*published.COLUMNS, "tiny", "mine"]
    assert [column.title for column in comparison.details] == ["geneval"]
    values = shown(comparison.main, comparison)
    assert (values["GenEval"], values["UnifiedReward"], values["PickScore"]) == ("0.500", "3.50", "22.00")

    both = {"pickscore": {"aesthetic": 5.0}, "drawbench": {"aesthetic": 6.0}}
    assert compare([model("a", **both), model("b", **both)]).main[0].data_set == "drawbench"
    comparison = compare([model("a", **both), model("b", pickscore={"aesthetic": 5.5})])
    column, models = comparison.main[0], comparison.models
    assert (column.data_set, [column.text(each) for each in models]) == ("pickscore", ["5.00", "5.50"])
    assert [(each.score, each.data_set) for each in comparison.details] == [("aesthetic", "drawbench")]
    assert compare([model(name, geneval={"geneval": 0.5}) for name in "ab"]).main[0].score == "geneval"


def test_benchmarks_of_today_have_titles_and_scales_of_their_own():
    found = {
        "geneval2": {"geneval2": 0.4567, "geneval2_am": 0.8, "geneval2_count_questions": 2.5, "geneval2_unseen": 0.01},
        "dpgbench": {"dpgbench": 0.8412}, "wise": {"wise": 0.5, "wise_cultural": 0.25}, "drawbench": {"hpsv3": 10.987},
        "compbench_color": {"compbench_attribute": 0.81234}, "compbench_complex": {"compbench_complex": 0.37},
    }  # fmt: skip
    evaluations = model("a", **found).evaluations
    asked = {n: replace(each, settings={"rewards": [next(iter(each.scores))]}) for n, each in evaluations.items()}
    comparison = compare([Model("a", asked)])
    assert shown(comparison.main, comparison) == {
        "GenEval 2": "45.7", "DPG-Bench": "84.12", "WISE": "0.500", "HPSv3": "10.99", "CompBench color": "0.8123",
        "CompBench complex": "0.3700",
    }  # fmt: skip
    assert shown(comparison.details, comparison) == {
        "geneval2_am": "80.000", "geneval2_count_questions": "2.500", "geneval2_unseen": "0.010",
        "wise_cultural": "0.250",
    }  # fmt: skip
    assert any("times 100" in note for note in comparison.notes)


def test_averages_over_different_columns_are_not_compared_and_what_no_two_rows_differ_in_is_in_none():
    full = {"a": {"ocr": 0.0, "hpsv2": 0.0}, "b": {"ocr": 0.5, "hpsv2": 1.0}}
    comparison = of_x(**full, c={"ocr": 1.0})
    average, common = comparison.averages
    assert (average.title, average.values, average.best) == ("Average", [0.0, 0.75, 1.0], [False, True, False])
    assert (common.title, common.values, common.best) == ("Common", [0.0, 0.5, 1.0], [False, False, True])
    assert "1.000 (1/2)" in text_comparison(comparison)
    assert [each.title for each in of_x(**full).averages] == ["Average"]
    (crossed,) = of_x(a={"ocr": 0.0}, b={"ocr": 1.0, "hpsv2": 1.0}, c={"hpsv2": 2.0}).averages
    assert crossed.best == [False] * 3, "no column that all have"
    equal = of_x(a={"ocr": 1.0, "hpsv2": 0.2}, b={"ocr": 1.0, "hpsv2": 0.3}).averages[0]
    assert (equal.values, [column.title for column in equal.columns]) == ([0.0, 1.0], ["HPSv2.1"])
    alone = of_x(a={"ocr": 1.0})
    assert alone.averages == [] and "*" not in text_comparison(alone).splitlines()[2]


def test_published_rows_keep_their_digits_and_have_nothing_in_other_columns():
    ours = model("DiffusionOPD", ocr={"ocr": 0.95}, drawbench={"unifiedreward": 0.7})
    comparison = compare([*published_models(), ours])
    for words in ("1.498", "3.50*", "[0.929]", "0.950"):
        assert words in text_comparison(comparison), words
    lines = list(csv.DictReader(io.StringIO(csv_table(comparison))))
    assert [line["source"] for line in lines[-2:]] == [published.SOURCE, "measured"]
    assert float(lines[-2]["UnifiedReward (drawbench)"]) == pytest.approx(3.5)
    assert (lines[-1]["GenEval (geneval)"], lines[-1]["Average number of columns"]) == ("", "2")

    comparison = compare([*published_models(), model("a", pickscore={"aesthetic": 5.0})])
    column = next(column for column in comparison.main if column.title == "Aesthetic")
    assert [column.text(each) for each in comparison.models] == ["–"] * 9 + ["5.00"], "they are of DrawBench"
    comparison = compare([*published_models(), model("a", geneval={"geneval": 0.6, "geneval_overall": 0.5})])
    assert [column.of(comparison.models[0]) for column in comparison.details] == [None]
    assert "Cascade NFT" not in render_comparison(comparison, "").split("Further scores")[1]


def test_evaluations_are_found(runs, tmp_path):
    (tmp_path / "mopd").mkdir()
    (runs / "student").rename(tmp_path / "mopd" / "evaluation")
    write(tmp_path / "ocr", {"ocr": [0.1, 0.2]})
    write(tmp_path / "named", {"ocr": [0.3, 0.4]}, dataset="ocr")
    given = ("base", "student=mopd", "one=base/scene", "mopd/evaluation", "ocr", "named")
    models = read_models([f"{n}{e}{tmp_path}/{p}" for n, e, p in (g.rpartition("=") for g in given)])
    both = ["compose", "scene"]
    assert [(m.name, list(m.evaluations)) for m in models] == [
        ("base", both), ("student", both), ("one", ["scene"]), ("mopd", both), ("ocr", ["ocr"]), ("named", ["ocr"]),
    ]  # fmt: skip
    assert models[0].evaluations["compose"].scores["tiny_compose"] == Summary(0.6, pytest.approx(0.4), 2, 2)


def test_unequal_settings_are_named_once(tmp_path):
    for name, steps in (("a", 40), ("b", 10)):
        for data_set in ("x", "y"):
            other = {"num_inference_steps": steps, "guidance_scale": steps, "lora": name}
            write(tmp_path / name / data_set, {"ocr": [1.0]}, **other)
    write(tmp_path / "c" / "x", {"ocr": [1.0, 0.5]})
    write(tmp_path / "d" / "x", {"ocr": [1.0]}, prompt="another")
    a, b, c, d = read_models([f"{tmp_path}/{name}" for name in "abcd"])
    assert unequal_settings([a, b]) == ["num_inference_steps on x, y: 40 (a), 10 (b)"]
    assert unequal_settings([a, c]) == ["number of prompts on x: 1 (a), 2 (c)"]
    assert unequal_settings([a, d]) == ["prompts on x: not the same"]
    assert unequal_settings([*published_models(), model("e", ocr={"ocr": 1.0})]) == []


def test_page_has_the_same_prompts_of_all_models(runs):
    (runs / "student" / "scene" / "images" / "00001.jpg").unlink()
    comparison = compare(read_models([f"<b>={runs}/base", f"{runs}/student"]))
    html = render_comparison(comparison, "Two <models>", num_images=2)
    prompts = (("p", 0), ("p", 1), ("view", 0), ("view", 2))
    alts = [f'{name} for “{text} <{i}> & "q"”' for text, i in prompts for name in ("<b>", "student")]
    assert [image["alt"] for image in Page(html).images] == alts
    for words in ("Two <models>", "tiny_scene 0.800", "± 0.400", "guidance 4.5", "Further scores"):
        assert words in Page(html).text, words
    assert html.count("★") == 1 + 2 + 1 + 1  # the legend, two columns, one detail, the average
    for image in (runs / "base" / "compose" / "images").iterdir():
        image.unlink()
    assert "--save_images: <b>." in Page(render_comparison(comparison, "")).text
    assert Page(render_comparison(comparison, "", num_images=0)).images == []


def test_pictures_of_other_prompts_are_not_side_by_side_and_large_ones_are_shrunk(tmp_path):
    write(tmp_path / "a" / "x", {"ocr": [1.0]}, pictures=True)
    write(tmp_path / "b" / "x", {"ocr": [0.5]}, pictures=True, prompt="another")
    a, b = read_models([f"{tmp_path}/a", f"{tmp_path}/b"])
    assert Page(render_comparison(compare([a, b]), "")).images == []
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    file = tmp_path / "a" / "x" / "images" / "00000.jpg"
    Image.fromarray(noise).save(file)
    assert len(render_comparison(compare([a]), "")) < file.stat().st_size * 0.6


def test_command_writes_three_files_and_mistakes_end_in_one_line(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    output, nothing = runs / "out" / "here", runs / "none"
    main(["base", "student", "--pictures", "1", "--output", str(output)])
    assert sorted(path.name for path in output.iterdir()) == ["comparison.csv", "comparison.html", "comparison.txt"]
    assert (output / "comparison.txt").read_text().strip() in capsys.readouterr().out
    assert [line["model"] for line in csv.DictReader((output / "comparison.csv").open())] == ["base", "student"]
    for arguments in (["nothing"], ["base", "base=student"]):
        with pytest.raises(SystemExit, match=r"^error: [^\n]+$"):
            main([*arguments, "--output", str(nothing)])
    assert not nothing.exists()


def test_malformed_files_are_named(runs):
    scene = runs / "base" / "scene"
    for name, content, kind in (
        ("evaluation_settings.json", "[1]", ComparisonError),
        ("average_scores.json", '{"tiny_scene": NaN}', ComparisonError),
        ("average_scores.json", "[]", EvaluationError),
        ("average_scores.json", '{"tiny_scene": 0.', EvaluationError),
    ):
        (scene / name).write_text(content)
        with pytest.raises(kind, match=name):
            read_models([str(scene)])
    (scene / "average_scores.json").unlink()
    with pytest.raises(ComparisonError, match=r"base/scene.*--resume"):
        read_models([str(scene)])
    (runs / "empty").mkdir()
    with pytest.raises(ComparisonError, match="empty"):
        read_models([f"{runs}/empty"])


def test_averages_of_the_upstream_release_are_enough(tmp_path):
    for name, value in (("a", 0.5), ("b", 0.75)):
        (tmp_path / name / "ocr").mkdir(parents=True)
        (tmp_path / name / "ocr" / "average_scores.json").write_text(json.dumps({"ocr": value}))
    text = text_comparison(compare(read_models([f"{tmp_path}/a", f"{tmp_path}/b"])))
    assert "0.750*" in text and "± 0" not in text


def test_more_unreadable_answers_are_no_better_and_an_unfinished_evaluation_is_named(tmp_path):
    columns = compare(
        [model(n, x={"wise": v, "wise_unparsable": v, "hpsv3_sigma": v}) for n, v in (("a", 0.1), ("b", 0.2))]
    )
    text = text_comparison(columns)
    assert text.count("0.200 *") + text.count("0.200*") == 1
    write(tmp_path / "run" / "x", {"ocr": [1.0]})
    write(tmp_path / "run" / "y", {"ocr": [1.0]})
    (tmp_path / "run" / "y" / "average_scores.json").unlink()
    with pytest.warns(UserWarning, match="run/y is not finished"):
        assert read_models([str(tmp_path / "run")])[0].evaluations.keys() == {"x"}
