"""Pictures and tables in the form that each of accelerate's trackers takes, with stand-ins of what is not installed."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator, PartialState, tracking
from PIL import Image

from diffusionopd.training import train
from diffusionopd.training.grids import sample_grid
from diffusionopd.training.metrics import MetricsWriter
from diffusionopd.training.trackers import TRACKERS, as_markdown, evaluation_table

ROW = {
    "round": 2,
    "loss": 0.5,
    "loss/ocr": 0.25,
    "monitor/ocr/ocr": 0.5,
    "eval/ocr/ocr": 0.75,
    "eval/ocr@fast/ocr": 0.5,
}
TEXT = "| task | ocr |\n| --- | --- |\n| ocr | 0.7500 |\n| ocr@fast | 0.5000 |"


@pytest.fixture
def grid(tmp_path):
    return sample_grid(np.full((1, 200, 200, 3), 90, np.uint8), ["a"], tmp_path / "round-000002.png")


def test_a_table_has_a_row_for_each_task_and_a_column_for_each_score():
    assert evaluation_table({"round": 1, "loss": 1.0, "monitor/a/b": 2.0}) is None
    assert as_markdown(evaluation_table(ROW)) == TEXT


def events_of(folder):
    """What TensorBoard shows of a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_gets_scalars_the_grid_and_the_table(tmp_path, grid):
    pytest.importorskip("tensorboard")
    PartialState()
    tracker = tracking.TensorBoardTracker("run", tmp_path)
    tracker.start()
    writer = MetricsWriter(tmp_path / "metrics.jsonl", ["tensorboard"], SimpleNamespace(trackers=[tracker]))
    writer.write(ROW, grid)
    writer.close()
    events = events_of(tmp_path / "run")
    tags = events.Tags()
    assert set(tags["scalars"]) == set(ROW) - {"round"} and tags["images"] == ["samples"]
    (shown,) = events.Images("samples")
    assert (shown.step, (shown.width, shown.height)) == (2, Image.open(grid).size)
    (text,) = events.Tensors("evaluation/text_summary")
    assert text.step == 2 and text.tensor_proto.string_val[0].decode() == TEXT


class Recorder:
    """Stands in for a run of a client library."""

    def __init__(self):
        self.calls = []

    def log(self, values, step=None, **more):
        self.calls.append((values, step))


def stand_in(monkeypatch, name: str, **attributes) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def written(name: str, tracker, tmp_path, grid) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *given, **more: pytest.fail(f"{name}: {given}"))
        MetricsWriter(tmp_path / "m.jsonl", [name], SimpleNamespace(trackers=[tracker])).write(ROW, grid)


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_wandb_and_swanlab_get_numbers_images_and_the_table(monkeypatch, tmp_path, grid, name):
    table = lambda **given: ("table", given["columns"], given["data"])  # noqa: E731
    stand_in(
        monkeypatch, name, Image=lambda image: ("image", image.size), Table=table, Text=lambda text: ("text", text)
    )
    PartialState()
    tracker = {"wandb": tracking.WandBTracker, "swanlab": tracking.SwanLabTracker}[name]("project")
    tracker.run = Recorder()
    written(name, tracker, tmp_path, grid)
    numbers, of_table, images = tracker.run.calls
    fast = "eval/ocr@fast/ocr" if name == "wandb" else "eval/ocr_fast/ocr"
    assert numbers[0][fast] == 0.5 and len(numbers[0]) == len(ROW) - 1
    rows = ("table", ["task", "ocr"], [["ocr", 0.75], ["ocr@fast", 0.5]])
    assert of_table[0] == {"evaluation": rows if name == "wandb" else ("text", TEXT)}
    assert images[0] == {"samples": [("image", Image.open(grid).size)]}
    assert {step for _, step in tracker.run.calls} == {2}


def test_mlflow_gets_numbers_and_files(monkeypatch, tmp_path, grid):
    calls = []
    functions = ("log_metrics", "log_artifact", "log_text")
    record = {f: lambda *given, f=f, **more: calls.append((f, given, more)) for f in functions}
    stand_in(monkeypatch, "mlflow", **record)
    PartialState()
    written("mlflow", tracking.MLflowTracker("experiment"), tmp_path, grid)
    (metrics, (values,), step), (text, content, _), (artifact, _, where) = calls
    assert (metrics, text, artifact) == functions[:1] + functions[:0:-1]
    assert values["eval/ocr_fast/ocr"] == 0.5 and step == {"step": 2}
    assert content == (TEXT, "evaluation/round-000002.md")
    assert where == {"local_path": str(grid), "artifact_path": "samples"}


def test_a_run_has_its_name(monkeypatch):
    """In the words of each, as accelerate's own code hands them on."""
    given = {}
    calls = {"wandb": ("init", "name"), "swanlab": ("init", "experiment_name"), "mlflow": ("start_run", "run_name")}
    for tracker, (start, _) in calls.items():
        record = {start: lambda _tracker=tracker, **words: given.update({_tracker: words})}
        others = {"search_experiments": lambda **_: [], "create_experiment": lambda **_: 1, "config": {}}
        stand_in(monkeypatch, tracker, **others, **record)
    PartialState()
    accelerator = SimpleNamespace(log_with=list(calls), trackers=[])
    accelerator.init_trackers = partial(Accelerator.init_trackers, accelerator)
    MetricsWriter(None, list(calls), accelerator).start_trackers("project", "mine", None)
    assert {tracker: given[tracker][word] for tracker, (_, word) in calls.items()} == dict.fromkeys(calls, "mine")


def test_every_tracker_is_one_of_accelerates():
    assert set(TRACKERS) <= {each.value for each in tracking.LoggerType}


@pytest.mark.parametrize("log_images", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_training_shows_its_grids_and_evaluations(tiny_config, tmp_path, log_images):
    pytest.importorskip("tensorboard")
    watched = {"sample_freq": 2, "eval_freq": 2, "eval_num_prompts": 1, "monitor_freq": 0}
    train(tiny_config(num_epochs=2, run_name="shown", log_with="tensorboard", log_images=log_images, **watched))
    events = events_of(tmp_path / "logs" / "shown" / "trackers" / "diffusionopd")
    grids = [image.step for image in events.Images("samples")] if log_images else []
    assert (grids, events.Tags()["images"]) == (([1, 2], ["samples"]) if log_images else ([], []))
    assert {table.step for table in events.Tensors("evaluation/text_summary")} == {0, 2}
    assert any(tag.startswith("loss/") for tag in events.Tags()["scalars"])
