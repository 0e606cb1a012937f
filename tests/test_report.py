"""The report: what is read, the numbers, and a page that needs nothing outside itself."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffusionopd.evaluation.results import Record, ResultFolder, Summary
from tools.report import ReportError, Task, collect, render, summary, text_table
from tools.report.collect import duration, read_metrics
from tools.report.plots import loss_curves, running_mean, score_curve

from .pages import Page

LEVELS = {"compose": (0.25, 0.75, 0.75), "ocr": (0.5, 1.0, 0.875), "scene": (0.25, 0.75, 0.625)}
"""Task -> scores of base, teacher and student."""


def write_run(run: Path, rounds: int = 120) -> None:
    teachers = [{"name": t, "proxy_reward": {f"tiny_{t}": 1.0}, "guidance_scale": 1.5} for t in LEVELS]
    teachers[0]["guidance_scale"] = None  # the common one, 4.5
    config = {
        "pretrained": {"model": "assets/tiny/model"},
        "sample": {"num_steps": 10, "eval_num_steps": 10, "guidance_scale": 1.0, "teacher_guidance_scale": 4.5},
        "train": {"teachers": teachers, "lora_rank": 32, "learning_rate": 1e-3, "cfg": False},
    }
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config))
    rows = []
    for n in range(1, rounds + 1):
        row = {"round": n, "loss": 0.01 / n, "seconds": 4.0}
        for task, (base, _, student) in LEVELS.items() if rounds > 3 else ():
            row[f"loss/{task}"] = 0.03 * math.exp(-n / 40) + 0.004
            if n % 5 == 0 or n == 1:
                row[f"monitor/{task}/tiny_{task}"] = student - (student - base) * math.exp(-n / 25)
        rows.append(json.dumps(row) + "\n")
    (run / "metrics.jsonl").write_text("".join(rows) + '{"round": 121, "lo')  # killed while writing


def write_evaluations(root: Path, count: int = 8) -> None:
    ramp = np.broadcast_to(np.arange(0, 256, 4), (64, 64))
    for m, model in enumerate(("base", *(f"teacher-{task}" for task in LEVELS), "student")):
        image = np.stack([ramp, np.full((64, 64), 40 * m), ramp.T], axis=-1).astype(np.uint8)
        for task, (base, teacher, student) in LEVELS.items():
            level = teacher if model == f"teacher-{task}" else student if model == "student" else base
            files, wanted = ResultFolder(root / model / task), round(level * count)
            files.open({}, [])
            for i in range(count):
                files.append([Record(i, f'a <sign> "{i}" & {task}', {}, {f"tiny_{task}": float(i < wanted)})])
                files.save_image(i, image)
            files.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("report")
    write_run(root / "run")
    write_evaluations(root / "evaluation")
    return root / "run", root / "evaluation"


def test_summary_and_table_have_every_score(folders):
    report = collect(*folders, title="")
    numbers = summary(report)
    assert numbers["base"] == {"tiny_compose": 0.25, "tiny_ocr": 0.5, "tiny_scene": 0.25}
    assert list(numbers["teachers"]) == ["compose", "ocr", "scene"]
    assert numbers["teachers"]["ocr"] == {"tiny_compose": 0.25, "tiny_ocr": 1.0, "tiny_scene": 0.25}
    assert numbers["student"] == {"tiny_compose": 0.75, "tiny_ocr": 0.875, "tiny_scene": 0.625}
    assert (numbers["rounds"], numbers["seconds"]) == (120, 480.0)
    assert [collect(*folders, title="", seconds=s).seconds for s in (500.0, 5.0)] == [500.0, 480.0]
    lines = text_table(report).splitlines()
    names = ["base", "teacher compose", "teacher ocr", "teacher scene", "student", "gap closed"]
    assert [line.split("  ")[0].strip() for line in lines][1:] == names
    assert lines[-1].split()[-3:] == ["100%", "75%", "75%"]
    for levels, gap in (((0.2, 0.6, 0.5), 0.75), ((0.2, 0.6, 0.1), -0.25), ((0.4, 0.4, 0.5), None)):
        scores = dict(zip(("base", "teacher-x", "student"), (Summary(m, 0.0, 1) for m in levels), strict=True))
        assert Task("x", "r", scores).gap_closed == (gap and pytest.approx(gap))


def test_merges_are_rows_and_pictures_and_teachers_may_be_scored_on_their_own_task_alone(folders, tmp_path):
    run, evaluations = folders
    shutil.copytree(evaluations, tmp_path / "all")
    shutil.copytree(evaluations / "base", tmp_path / "all" / "merge-ties-0.4")
    for name in LEVELS:
        for other in LEVELS.keys() - {name}:
            shutil.rmtree(tmp_path / "all" / f"teacher-{name}" / other)
    report = collect(run, tmp_path / "all", title="")
    assert report.models == ["base", "teacher-compose", "teacher-ocr", "teacher-scene", "merge-ties-0.4", "student"]
    cells = {line.split("  ")[0]: line.split()[-3:] for line in text_table(report).splitlines()}
    assert cells["merge by ties x 0.4"] == ["0.250", "0.500", "0.250"]
    assert cells["teacher ocr"] == ["–", "1.000", "–"]
    assert len(Page(render(report)).images) == 4 + 3 * 6 * 4
    assert summary(report)["teachers"]["ocr"] == {"tiny_ocr": 1.0}
    assert summary(report)["merges"]["merge-ties-0.4"]["tiny_ocr"] == 0.5


def test_page_shows_what_was_measured(folders):
    html = render(collect(*folders, title="Three <teachers> & one student"))
    page = Page(html)
    assert len(page.images) == 4 + 3 * 6 * 3
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.images)
    for words in ("Three <teachers> & one student", 'a <sign> "0" & ocr', "8 min 0 s", "120 rounds", "83%",
                  "assets/tiny/model", "guidance 1.5", "torch", "CPU cores"):  # fmt: skip
        assert words in page.text, words
    assert html.count('class="own"') == 3


def test_a_page_without_monitoring_or_an_image(tmp_path):
    run, evaluations = tmp_path / "run", tmp_path / "evaluation"
    write_run(run, rounds=3)
    write_evaluations(evaluations, count=2)
    assert len(Page(render(collect(run, evaluations, title="bare"))).images) == 3 + 3 * 2 * 3
    image = evaluations / "student" / "ocr" / "images" / "00001.jpg"
    image.unlink()
    with pytest.raises(ReportError, match=f"{image}.*--save_images"):
        collect(run, evaluations, title="")


def test_what_is_missing_is_named_and_repeated_rounds_count_once(folders, tmp_path):
    for run, evaluations, name in ((tmp_path, folders[1], r"config\.json"), (folders[0], tmp_path, "base/compose")):
        with pytest.raises(ReportError, match=name):
            collect(run, evaluations, title="")
    file = tmp_path / "metrics.jsonl"
    for content in ("", '{"rou'):
        file.write_text(content)
        with pytest.raises(ReportError, match=str(file)):
            read_metrics(tmp_path)
    file.write_text('{"round": 2, "loss": 1}\n{"round": 1}\n{"round": 2, "loss": 3}\n')
    assert read_metrics(tmp_path) == [{"round": 1}, {"round": 2, "loss": 3}]
    (tmp_path / "metrics.jsonl").write_text('{"round": 0, "eval/ocr/ocr": 1}\n')  # of the start, and no round yet
    with pytest.raises(ReportError):
        read_metrics(tmp_path)


def test_plots_are_the_same_for_the_same_numbers_and_durations_fit():
    arguments = ([(1, 0.2), (5, 0.4)], [(5, 0.5)], 0.1, 0.9, (10, 0.8, 0.02))
    assert score_curve(*arguments) == score_curve(*arguments)
    assert score_curve([], [], *arguments[2:]).startswith("<?xml")
    assert "<svg" in loss_curves({"a": [(1, 0.1), (2, 0.0)], "b": []})
    assert [duration(s) for s in (44.6, 552, 11100)] == ["45 s", "9 min 12 s", "3 h 5 min"]


@pytest.mark.parametrize(("count", "window", "width"), [(7, 9, 0), (8, 9, 3), (12, 3, 3), (20, 9, 5), (100, 9, 9)])
def test_the_running_mean_suits_the_length_of_the_run(count, window, width):
    values = np.random.default_rng(0).random(count)
    found = running_mean(list(enumerate(values)), window)
    assert [x for x, _ in found] == list(range(count if width else 0))
    near = [values[max(0, i - width // 2) : i + width // 2 + 1].mean() for i in range(len(found))]
    assert [y for _, y in found] == pytest.approx(near)
