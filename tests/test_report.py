"""The report: what is read, the numbers, and a page that needs nothing outside itself."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from diffusionopd.evaluation.results import Record, ResultFolder, Summary
from tools.report import ReportError, Task, collect, render, summary, text_table
from tools.report.collect import duration, read_metrics
from tools.report.plots import loss_curves, running_mean, score_curve

LEVELS = {  # task -> (base, teacher, student)
    "compose": (0.25, 0.75, 0.75),
    "ocr": (0.5, 1.0, 0.875),
    "scene": (0.25, 0.75, 0.625),
}


def write_run(run: Path) -> None:
    teachers = [
        {"name": task, "proxy_reward": {f"tiny_{task}": 1.0}, "guidance_scale": 1.5, "dataset": f"data/{task}"}
        for task in LEVELS
    ]
    config = {
        "pretrained": {"model": "assets/tiny/model"},
        "sample": {"num_steps": 10, "eval_num_steps": 10, "guidance_scale": 1.0, "teacher_guidance_scale": 4.5},
        "train": {"teachers": teachers, "lora_rank": 32, "learning_rate": 1e-3, "cfg": False},
    }
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config))
    rows = []
    for n in range(1, 121):
        row = {"round": n, "loss": 0.01 / n, "grad_norm": 0.1, "lr": 1e-3, "seconds": 4.0}
        for i, (task, (base, _, student)) in enumerate(LEVELS.items()):
            row[f"loss/{task}"] = (0.03 + 0.02 * i) * math.exp(-n / 40) + 0.004
            if n % 5 == 0 or n == 1:
                level = student - (student - base) * math.exp(-n / 25)
                row[f"monitor/{task}/tiny_{task}"] = float(np.clip(level + 0.12 * math.sin(7.0 * n), 0, 1))
        rows.append(json.dumps(row))
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n" + '{"round": 121, "lo')  # killed while writing


def picture(level: int) -> np.ndarray:
    ramp = np.broadcast_to(np.arange(0, 256, 4), (64, 64))
    return np.stack([ramp, np.full((64, 64), 40 * level), ramp.T], axis=-1).astype(np.uint8)


def write_evaluations(root: Path, count: int = 8) -> None:
    for m, model in enumerate(("base", "teacher-compose", "teacher-ocr", "teacher-scene", "student")):
        for task, (base, teacher, student) in LEVELS.items():
            level = teacher if model == f"teacher-{task}" else student if model == "student" else base
            files = ResultFolder(root / model / task)
            files.open({}, [], resume=False, need_images=False)
            for i in range(count):
                score = float(i < round(level * count))
                files.append([Record(i, f'a <sign> "{i}" & {task}', {}, {f"tiny_{task}": score})])
                files.save_image(i, picture(m))
            files.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("report")
    write_run(root / "run")
    write_evaluations(root / "evaluation")
    return root / "run", root / "evaluation"


@pytest.fixture(scope="module")
def page(folders) -> str:
    return render(collect(*folders, title="Three <teachers> & one student"))


class Elements(HTMLParser):
    """Start tags with their attributes, and whether tags are closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


def test_summary_has_every_score_rounds_and_seconds(folders):
    numbers = summary(collect(*folders, title=""))
    assert numbers["base"] == {"tiny_compose": 0.25, "tiny_ocr": 0.5, "tiny_scene": 0.25}
    assert numbers["teachers"]["ocr"] == {"tiny_compose": 0.25, "tiny_ocr": 1.0, "tiny_scene": 0.25}
    assert list(numbers["teachers"]) == ["compose", "ocr", "scene"]
    assert numbers["student"] == {"tiny_compose": 0.75, "tiny_ocr": 0.875, "tiny_scene": 0.625}
    assert (numbers["rounds"], numbers["seconds"]) == (120, 480.0)


def test_wall_clock_time_counts_where_it_is_more(folders):
    assert collect(*folders, title="", seconds=500.0).seconds == 500.0
    assert collect(*folders, title="", seconds=5.0).seconds == 480.0


def test_gap_closed():
    def task(base, teacher, student):
        levels = {"base": base, "teacher-x": teacher, "student": student}
        return Task("x", "r", {model: Summary(mean, 0.0, 1) for model, mean in levels.items()})

    assert task(0.2, 0.6, 0.5).gap_closed == pytest.approx(0.75)
    assert task(0.2, 0.6, 0.1).gap_closed == pytest.approx(-0.25)
    assert task(0.4, 0.4, 0.5).gap_closed is None


def test_text_table_lists_models_and_gaps(folders):
    lines = text_table(collect(*folders, title="")).splitlines()
    assert [line.split("  ")[0].strip() for line in lines][1:] == [
        "base", "teacher compose", "teacher ocr", "teacher scene", "student", "gap closed",
    ]  # fmt: skip
    assert lines[-1].split()[-3:] == ["100%", "75%", "75%"]


def test_page_is_one_file_with_named_pictures(page):
    elements = Elements(page)
    assert elements.open == []
    images = [attrs for tag, attrs in elements.tags if tag == "img"]
    assert len(images) == 4 + 3 * 6 * 3
    assert all(attrs["alt"] and attrs["src"].startswith("data:image/") for attrs in images)
    tags = {tag for tag, _ in elements.tags}
    assert not tags & {"script", "link", "iframe"}
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import""", page)


def test_page_says_what_was_measured(page):
    text = Elements(page).text
    assert "83%" in text  # mean of 100%, 75%, 75%
    for words in ("Three <teachers> & one student", 'a <sign> "0" & ocr', "8 min 0 s", "120 rounds", "gap closed",
                  "assets/tiny/model", "guidance 1.5", "torch", "CPU cores"):  # fmt: skip
        assert words in text, words
    assert page.count('class="own"') == 3


def test_a_page_without_monitoring_or_an_image(folders, tmp_path):
    run, evaluations = tmp_path / "run", tmp_path / "evaluation"
    write_run(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:3]]
    rows = [{k: v for k, v in row.items() if not k.startswith(("monitor", "loss/"))} for row in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_evaluations(evaluations, count=2)
    elements = Elements(render(collect(run, evaluations, title="bare")))
    assert len([tag for tag, _ in elements.tags if tag == "img"]) == 3 + 3 * 2 * 3
    image = evaluations / "student" / "ocr" / "images" / "00001.jpg"
    image.unlink()
    with pytest.raises(ReportError, match=f"{image} is missing.*--save_images"):
        collect(run, evaluations, title="")


def test_what_is_missing_is_named(folders, tmp_path):
    run, evaluations = folders
    with pytest.raises(ReportError, match=r"config\.json"):
        collect(tmp_path, evaluations, title="")
    with pytest.raises(ReportError, match=r"base/compose/average_scores.json"):
        collect(run, tmp_path, title="")
    with pytest.raises(ReportError, match="has the run been trained"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"rou')
    with pytest.raises(ReportError, match="no finished round"):
        read_metrics(tmp_path)


def test_repeated_rounds_count_once(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 2, "loss": 1}\n{"round": 1}\n{"round": 2, "loss": 3}\n')
    assert read_metrics(tmp_path) == [{"round": 1}, {"round": 2, "loss": 3}]
    (tmp_path / "metrics.jsonl").write_text('{"round": 0, "eval/ocr/ocr": 1}\n')  # of the start, and no round yet
    with pytest.raises(ReportError):
        read_metrics(tmp_path)


def test_plots_are_the_same_for_the_same_numbers():
    arguments = ([(1, 0.2), (5, 0.4)], [(5, 0.5)], 0.1, 0.9, (10, 0.8, 0.02))
    assert score_curve(*arguments) == score_curve(*arguments)
    assert score_curve([], [], 0.1, 0.9).startswith("<?xml")
    assert "<svg" in loss_curves({"a": [(1, 0.1), (2, 0.0)], "b": []})


def test_running_mean_and_durations():
    assert running_mean([(1, 0.0), (2, 3.0), (3, 6.0)], window=3) == [(1, 1.5), (2, 3.0), (3, 4.5)]
    assert [duration(s) for s in (44.6, 552, 11100)] == ["45 s", "9 min 12 s", "3 h 5 min"]
