"""metrics.jsonl is one strict JSON object per round whatever happens; trackers cannot stop a run; grids are images."""

from __future__ import annotations

import json
import math
import resource
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from diffusionopd.training.grids import sample_grid
from diffusionopd.training.metrics import MetricsWriter


def rows(path):
    def refuse(name):
        raise AssertionError(f"{name} is not strict JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@contextmanager
def no_file_longer_than(size):
    """A real limit, as of a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- the file --------------------------------------------------------------------------------------------------------


def test_rows_are_strict_json_and_in_the_file_when_write_returns(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"round": 1, "loss": math.nan, "ratio": -math.inf, "lr": 3e-4, "steps": 2, "grad_norm": None})
    first = {"round": 1, "loss": None, "ratio": None, "lr": 3e-4, "steps": 2, "grad_norm": None}
    assert rows(path) == [first]
    writer.write({"round": 2, "loss": 5.0, "text": "日本"})
    assert rows(path) == [first, {"round": 2, "loss": 5.0, "text": "日本"}]
    writer.sync()


def test_processes_without_a_file_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = MetricsWriter(None)
    writer.write({"round": 1, "loss": 1.0})
    writer.truncate_after(0)
    writer.sync()
    writer.close()
    assert list(tmp_path.iterdir()) == []


# --- resuming --------------------------------------------------------------------------------------------------------


def test_resuming_drops_later_rounds_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for tail in ("", '{"round": 5, "lo', '{"round": 9}', "\x00\x00", '[1]\n{"loss": 1}\n', "\n\n"):
        path.unlink(missing_ok=True)
        writer = MetricsWriter(path)
        for n in range(1, 5):
            writer.write({"round": n, "loss": 1.0 / n})
        kept = rows(path)[:2]
        path.write_text(path.read_text() + tail)
        resumed = MetricsWriter(path)
        resumed.truncate_after(2)
        assert rows(path) == kept
        resumed.write({"round": 3, "loss": 0.0})
        assert rows(path) == [*kept, {"round": 3, "loss": 0.0}]
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_by_a_crash_is_not_glued_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.truncate_after(10)
    writer.write({"round": 1})
    path.write_text(path.read_text() + '{"round": 2, "lo')
    MetricsWriter(path).write({"round": 3})
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"round": 1} and json.loads(lines[2]) == {"round": 3}
    writer.truncate_after(0)
    assert path.read_text() == ""


def test_a_full_disk_while_truncating_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for n in range(1, 5):
        writer.write({"round": n})
    before = path.read_text()

    def full(*_):
        raise OSError(28, "full")

    for moment in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(moment, full)
            writer.truncate_after(2)
        assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_delays_lines_is_said_once_and_leaves_no_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"round": 1})
    with no_file_longer_than(path.stat().st_size + 5):
        with pytest.warns(UserWarning, match=f"{path}.*File too large") as said:
            writer.write({"round": 2, "loss": 0.5})
            writer.write({"round": 3})
        assert len(said) == 1
        assert rows(path) == [{"round": 1}] and path.read_text().endswith("\n")
    with pytest.warns(UserWarning, match=str(path)):
        writer.sync()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.write({"round": 4})
    assert [row["round"] for row in rows(path)] == [1, 2, 3, 4]


def test_what_never_could_be_written_is_said_at_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")  # a device on which every write finds the disk full
    writer = MetricsWriter(path)
    with pytest.warns(UserWarning, match="No space left"):
        writer.write({"round": 1})
    writer.sync()
    writer.write({"round": 2})
    with pytest.warns(UserWarning, match="2 rounds"):
        writer.close()


# --- trackers --------------------------------------------------------------------------------------------------------


class Accelerator:
    """Records what reaches the trackers; fails on request."""

    def __init__(self, failing=""):
        self.failing, self.calls, self.trackers = failing, [], [self]

    def _called(self, method, what=None):
        self.calls.append((method, what))
        if method == self.failing:
            raise ConnectionError("tracker offline")

    def init_trackers(self, project, config=None):
        self._called("init_trackers", project)

    def log(self, values, step=None):
        self._called("log", (step, values))

    def finish(self):
        self._called("finish")


def test_trackers_get_the_numbers_of_a_round(tmp_path):
    accelerator = Accelerator()
    for trackers, calls in (
        ((), []),
        (("tensorboard",), [("init_trackers", "project"), ("log", (7, {"loss": 2.0, "steps": 3.0}))]),
    ):
        writer = MetricsWriter(tmp_path / "m.jsonl", trackers, accelerator)
        writer.start_trackers("project", {"seed": 1})
        writer.write({"round": 7, "loss": 2.0, "note": "text stays in the file", "steps": 3})
        assert accelerator.calls == calls


def test_a_failing_tracker_is_reported_once_and_the_file_goes_on(tmp_path):
    for failing in ("init_trackers", "log", "finish"):
        path = tmp_path / f"{failing}.jsonl"
        accelerator = Accelerator(failing)
        writer = MetricsWriter(path, ("wandb",), accelerator)
        with pytest.warns(UserWarning, match="wandb.*tracker offline") as said:
            writer.start_trackers("project", {})
            for n in (1, 2, 3):
                writer.write({"round": n})
            writer.close()
        assert len(said) == 1
        assert [row["round"] for row in rows(path)] == [1, 2, 3]
        assert [method for method, _ in accelerator.calls].count(failing) == 1
        assert accelerator.trackers == [], "accelerate would end it again"


# --- grids -----------------------------------------------------------------------------------------------------------


def test_grid_shows_the_images_where_they_belong(tmp_path):
    images = np.zeros((5, 64, 64, 3), np.uint8)
    for i in range(5):
        images[i, :, :, i % 3] = 51 * (i + 1)
    path = sample_grid(images, [f"image {i}" for i in range(5)], tmp_path / "new" / "round-000010.png", columns=3)
    grid = np.asarray(Image.open(path))
    width, height = grid.shape[1] // 3, grid.shape[0] // 2
    for i in range(5):
        cell = grid[i // 3 * height : (i // 3 + 1) * height, i % 3 * width : (i % 3 + 1) * width]
        assert (cell[60] == images[i, 0, 0]).all(axis=-1).sum() > 100  # a row through the image
        below = cell[-30:]
        assert (below < 100).all(axis=-1).any()  # the caption is dark text on white
    assert (grid[-height:, 2 * width :] == 255).all()  # the sixth cell is empty
    assert [p.name for p in path.parent.iterdir()] == ["round-000010.png"]


def test_any_caption_can_be_drawn(tmp_path):
    for caption in ("", "x" * 500, "many words " * 60, "日本語 \n\t \x00 ünïcode", "WWW " * 30):
        path = sample_grid(np.zeros((4, 16, 16, 3), np.uint8), [caption] * 4, tmp_path / "grid.png", title="round 3")
        assert Image.open(path).size[0] < 2 * 200


def test_a_grid_that_does_not_fit_on_the_disk_leaves_the_old_one(tmp_path):
    path = sample_grid(np.zeros((1, 8, 8, 3), np.uint8), ["a"], tmp_path / "grid.png")
    before, noise = path.read_bytes(), np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    with no_file_longer_than(500), pytest.raises(OSError, match="File too large"):
        sample_grid(noise, ["a", "b"], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
