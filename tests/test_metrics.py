"""metrics.jsonl is one strict JSON object per round whatever happens; trackers cannot stop a run; grids are images."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from PIL import Image

from diffusionopd.training.grids import sample_grid
from diffusionopd.training.metrics import MetricsWriter

from .helpers import no_file_longer_than


def rows(path):
    def refuse(name):
        raise AssertionError(f"{name} is not strict JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "metrics.jsonl"


def test_rows_are_strict_json_and_in_the_file_when_write_returns(path, tmp_path):
    other = MetricsWriter(None)  # of a process that writes no file
    other.write({"round": 1, "loss": 1.0})
    other.truncate_after(0)
    other.sync()
    other.close()
    assert list(tmp_path.iterdir()) == []
    writer = MetricsWriter(path)
    writer.write({"round": 1, "loss": math.nan, "ratio": -math.inf, "lr": 3e-4, "steps": 2, "grad_norm": None})
    first = {"round": 1, "loss": None, "ratio": None, "lr": 3e-4, "steps": 2, "grad_norm": None}
    assert rows(path) == [first]
    writer.write({"round": 2, "loss": 5.0, "text": "日本"})
    assert rows(path) == [first, {"round": 2, "loss": 5.0, "text": "日本"}]


def test_resuming_drops_later_rounds_and_broken_lines(path):
    for tail in ("", '{"round": 5, "lo', '{"round": 9}', "\x00\x00", '[1]\n{"loss": 1}\n', "\n\n"):
        path.unlink(missing_ok=True)
        writer = MetricsWriter(path)
        writer.truncate_after(10)
        for n in range(1, 5):
            writer.write({"round": n, "loss": 1.0 / n})
        kept = rows(path)[:2]
        path.write_text(path.read_text() + tail)
        resumed = MetricsWriter(path)
        resumed.truncate_after(2)
        assert rows(path) == kept
        resumed.write({"round": 3, "loss": 0.0})
        assert rows(path) == [*kept, {"round": 3, "loss": 0.0}]
        assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_delays_lines_is_said_once_and_leaves_no_half_line(path, monkeypatch):
    writer = MetricsWriter(path)
    writer.write({"round": 1})
    with no_file_longer_than(path.stat().st_size + 5):
        with pytest.warns(UserWarning, match=str(path)) as said:
            writer.write({"round": 2, "loss": 0.5})
            writer.write({"round": 3})
        assert len(said) == 1
        assert rows(path) == [{"round": 1}] and path.read_text().endswith("\n")
    with pytest.warns(UserWarning, match=str(path)):
        writer.sync()
    writer.write({"round": 4})
    assert [row["round"] for row in rows(path)] == [1, 2, 3, 4]

    def full(*_):
        raise OSError(28, "full")

    before = path.read_text()
    for moment in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(moment, full)
            writer.truncate_after(2)
        assert path.read_text() == before and list(path.parent.iterdir()) == [path]


def test_what_never_could_be_written_is_said_at_the_end(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")  # a device on which every write finds the disk full
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    with pytest.warns(UserWarning, match="No space left"):
        writer.write({"round": 1})
    writer.sync()
    writer.write({"round": 2})
    with pytest.warns(UserWarning, match="2 rounds"):
        writer.close()


class Accelerator:
    """Records what reaches the trackers; fails on request."""

    name = "wandb"

    def __init__(self, failing=""):
        self.failing, self.calls, self.trackers = failing, [], [self]

    def _called(self, method, what=None):
        self.calls.append((method, what))
        if method == self.failing:
            raise ConnectionError("tracker offline")

    def init_trackers(self, project, config=None, init_kwargs=None):
        self._called("init_trackers", project)

    def log(self, values, step=None):
        self._called("log", (step, values))

    def log_images(self, values, step=None):
        self._called("log_images", step)

    def log_table(self, name, columns, data, step=None):
        self._called("log_table", (name, columns, data, step))

    def finish(self):
        self._called("finish")


def test_trackers_get_the_numbers_and_a_failing_one_is_reported_once(tmp_path):
    calls = [("init_trackers", "project"), ("log", (7, {"loss": 2.0, "steps": 3.0})), ("finish", None)]
    for trackers, failing in (((), ""), (("wandb",), ""), *((("wandb",), method) for method, _ in calls)):
        accelerator, path = Accelerator(failing), tmp_path / f"{len(trackers)}{failing}.jsonl"
        writer = MetricsWriter(path, trackers, accelerator)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            writer.start_trackers("project", "run", {"seed": 1})
            writer.write({"round": 7, "loss": 2.0, "note": "text stays in the file", "steps": 3})
            writer.write({"round": 8})
            writer.close()
        assert len(said) == bool(failing) and all("tracker offline" in str(warning.message) for warning in said)
        assert [row["round"] for row in rows(path)] == [7, 8]
        if not failing:
            assert [call for call in accelerator.calls if call != ("log", (8, {}))] == (calls if trackers else [])
        assert [method for method, _ in accelerator.calls].count(failing) == bool(failing)
        assert accelerator.trackers == [] or not trackers, "accelerate would end it again"


def test_trackers_are_shown_grids_and_evaluations_and_may_fail_at_these_alone(tmp_path):
    grid = sample_grid(np.zeros((2, 16, 16, 3), np.uint8), ["a", "b"], tmp_path / "grid.png")
    row = {"round": 3, "loss": 1.0, "eval/ocr/ocr": 0.5, "eval/ocr@fast/ocr": math.nan, "eval/scene/a/b": 1.0}
    table = ("evaluation", ["task", "ocr", "a/b"], [["ocr", 0.5, None], ["scene", None, 1.0]], 3)
    for failing in ("", "log_images", "log_table"):
        accelerator = Accelerator(failing)
        writer = MetricsWriter(tmp_path / f"{failing}.jsonl", ["wandb"], accelerator)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            writer.write(row, grid)
            writer.write({"round": 4, "loss": 1.0}, tmp_path / "not there.png")
            writer.write({"round": 5, "loss": 1.0}, grid)
        methods = [method for method, _ in accelerator.calls]
        assert methods.count("log") == 3 and len(said) == bool(failing), "numbers go on without pictures"
        assert methods.count("log_images") == {"": 2, "log_images": 1, "log_table": 0}[failing]
        assert ("log_table", table) in accelerator.calls
    other = Accelerator()
    MetricsWriter(None, ["wandb"], other).write(row, grid)
    assert [method for method, _ in other.calls] == ["log"], "pictures are the first process's alone"


def test_a_grid_shows_the_images_where_they_belong(tmp_path):
    images = np.zeros((5, 64, 64, 3), np.uint8)
    for i in range(5):
        images[i, :, :, i % 3] = 51 * (i + 1)
    path = sample_grid(images, [f"image {i}" for i in range(5)], tmp_path / "new" / "round-000010.png", columns=3)
    grid = np.asarray(Image.open(path))
    width, height = grid.shape[1] // 3, grid.shape[0] // 2
    for i in range(5):
        cell = grid[i // 3 * height : (i // 3 + 1) * height, i % 3 * width : (i % 3 + 1) * width]
        assert (cell[60] == images[i, 0, 0]).all(axis=-1).sum() > 100  # a row through the image
        assert (cell[-75:] < 100).all(axis=-1).any()  # the caption is dark text on white
    assert (grid[-height:, 2 * width :] == 255).all()  # the sixth cell is empty
    before, noise = path.read_bytes(), np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    with no_file_longer_than(500), pytest.raises(OSError, match="File too large"):
        sample_grid(noise, ["a", "b"], path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    for caption in ("", "x" * 500, "many words " * 60, "日本語 \n\t \x00 ünïcode", "WWW " * 30):
        path = sample_grid(np.zeros((4, 16, 16, 3), np.uint8), [caption] * 4, tmp_path / "grid.png", title="round 3")
        assert Image.open(path).size[0] < 2 * 200
