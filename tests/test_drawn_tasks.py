"""Rounds that visit a drawn share of the tasks."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from diffusionopd.config_schema import ConfigError
from diffusionopd.data.rounds import BatchSettings, round_shape
from diffusionopd.training import check, load_config, train

from .helpers import metrics

LITE = {"sample.num_steps": 2, "sample.train_batch_size": 1, "train.batch_size": 1, "train.timestep_fraction": 1.0}
LITE |= {"sample.num_batches_per_epoch": 2, "train.gradient_accumulation_steps": 2, "monitor_freq": 0, "sample_freq": 0}


def lite(folder, **changes):
    values = LITE | {"save_dir": folder / "run", "cache_dir": folder / "text", "train.tasks_per_round": 2, **changes}
    return load_config("config/tiny.py:mopd", [(name, str(value)) for name, value in values.items()])


def test_all_subsets_are_as_likely_and_depend_on_seed_and_round_alone():
    settings = BatchSettings(num_batches_per_epoch=2, tasks_per_round=2)
    shape = round_shape(settings, 4, 1, 1200, seed=3)
    drawn = [tuple(shape.tasks_of(index)) for index in range(1200)]
    assert drawn == [tuple(round_shape(settings, 4, 8, 5, seed=3).tasks_of(index)) for index in range(1200)]
    counts = Counter(drawn)
    assert set(counts) == set(itertools.combinations(range(4), 2))
    assert all(140 < count < 260 for count in counts.values()), "six subsets, 200 times each on average"
    assert drawn != [tuple(round_shape(settings, 4, 1, 1200, seed=4).tasks_of(index)) for index in range(1200)]
    assert [list(shape.rounds_of(task, 9)) for task in range(4)] == [
        [index for index in range(9, 1200) if task in drawn[index]] for task in range(4)
    ]
    assert (shape.tasks_per_round, shape.batches_per_task) == (2, 1)


def test_a_run_visits_the_drawn_tasks_and_resumes_bitwise(tmp_path):
    """Each task's share of the rounds is drawn, and one that is resumed is the one that was not."""
    folders = [tmp_path / name for name in ("whole", "parts")]
    train(lite(folders[0], num_epochs=4))
    for rounds in (2, 4):
        train(lite(folders[1], num_epochs=rounds, resume_from="auto"))
    rows = [metrics(folder / "run") for folder in folders]
    shape = check(lite(tmp_path, num_epochs=4), 1).shape
    for index, row in enumerate(rows[0]):
        visited = {key.removeprefix("loss/") for key in row if key.startswith("loss/")}
        assert visited == {("compose", "ocr", "scene")[task] for task in shape.tasks_of(index)}
    saved = [f / "run" / "checkpoints" / "checkpoint-4" / "lora" / "adapter_model.safetensors" for f in folders]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def test_more_than_there_are_and_other_orders_are_refused(tmp_path):
    for changes in ({"train.tasks_per_round": 4}, {"train.task_order": "alternate"}):
        with pytest.raises(ConfigError, match=r"train\.tasks_per_round"):
            check(lite(tmp_path, **changes), 1)
