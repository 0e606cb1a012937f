"""Faults during a run: it goes on and says so, or it stops, says why, and its last checkpoint can be resumed."""

from __future__ import annotations

import resource
import subprocess
import threading
import warnings
from pathlib import Path

import pytest
import torch

from diffusionopd.algorithms.optim import NonFiniteError
from diffusionopd.config_schema import ConfigError
from diffusionopd.files import FolderError, ensure_writable
from diffusionopd.models.text_cache import TextCacheError
from diffusionopd.rewards import RewardError
from diffusionopd.rewards.jpeg import JpegCompressibility
from diffusionopd.training import checkpoint, train
from diffusionopd.training import loop as trainer_run

from .helpers import metrics


def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "run" / "checkpoints"


def assert_latest_loads(tmp_path: Path, name: str) -> None:
    latest = checkpoint.find_latest(checkpoints(tmp_path))
    assert latest is not None and latest.name == name
    checkpoint.load_state(latest / "state")


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, 3 MiB large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_and_costs_one_save(tiny_config, small_disk):
    def go(rounds):
        options = {"save_dir": str(small_disk / "run"), "resume_from": "auto", "eval_freq": 0}
        return train(tiny_config(num_epochs=rounds, **options))

    first = go(1)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(4 * 2**20))
    with filler.open("rb+") as file:
        file.truncate(filler.stat().st_size - 100_000)
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"checkpoint-2: .*No space left.*[\d,]+ bytes are free.*num_checkpoint_limit",
    ):
        go(2)
    assert sorted(path.name for path in first.parent.iterdir()) == ["checkpoint-1", "latest"]
    checkpoint.verify(first)
    filler.unlink()
    assert go(2).name == "checkpoint-2"
    assert [row["round"] for row in metrics(small_disk / "run")] == [1, 2]


def test_a_full_disk_is_found_before_weights_load(tiny_config, small_disk, monkeypatch):
    monkeypatch.setattr("diffusionopd.training.setup.load_backbone", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(4 * 2**20))
    with pytest.raises(FolderError, match=rf"the run folder {small_disk}/run cannot be written: .*No space.*save_dir"):
        train(tiny_config(save_dir=str(small_disk / "run")))


@pytest.fixture
def longest_file():
    """`longest_file(size)`: from now on no file can become longer than so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_embeddings_that_cannot_be_stored_end_the_run_at_its_start(tiny_config, tmp_path, longest_file):
    longest_file(8000)
    with pytest.raises(TextCacheError, match=r"text cache.*File too large.*What is encoded is kept.*cache_dir"):
        train(tiny_config(cache_dir=str(tmp_path / "cache")))
    assert not checkpoints(tmp_path).exists()


@pytest.mark.parametrize(("key", "what"), [("logdir", "run folder"), ("cache_dir", "text cache")])
def test_a_folder_that_cannot_be_written_is_found_before_weights_load(tiny_config, tmp_path, monkeypatch, key, what):
    monkeypatch.setattr("diffusionopd.training.setup.load_backbone", lambda *a, **k: pytest.fail("weights were loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"{key} needs the folder .*file.*, but .*file is a file. Name another"):
        train(tiny_config(**{key: str(tmp_path / "file")}))
    monkeypatch.setattr("os.access", lambda *arguments: True)  # permissions alone do not tell
    remedy = {"logdir": "save_dir", "cache_dir": "cache_dir"}[key]
    with pytest.raises(FolderError, match=f"the {what} /proc/none.* cannot be written: .*Choose another .*{remedy}"):
        train(tiny_config(**{key: "/proc/none"}))


def test_a_folder_that_can_be_written_is_left_empty(tmp_path):
    ensure_writable(tmp_path / "a" / "b", "run folder", "")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="the run folder .*file cannot be written: .*exists.*Move it"):
        ensure_writable(tmp_path / "file", "run folder", "Move it.")


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("poisoned", "named", "remedy"),
    [
        ("teacher_second", "teacher for task 'second'", "Check that task's LoRA"),
        ("student", "student for task 'first'", "lower learning rate"),
        (None, "teacher and the student for task 'first'", "Check the base model"),
    ],
)
def test_what_is_not_finite_is_named(tiny_config, tmp_path, monkeypatch, poisoned, named, remedy):
    train(tiny_config(num_epochs=1))
    load, models = trainer_run.load_state, []

    def poison(folder, learner, ema):
        load(folder, learner, ema)
        own = learner.adapters.parameters(poisoned) if poisoned else [learner.backbone.transformer.proj_out.weight]
        with torch.no_grad():
            own[-1].fill_(float("inf"))
        models.append((learner, [p.detach().clone() for p in learner.optimizer.parameters]))

    monkeypatch.setattr(trainer_run, "load_state", poison)
    expected = (
        r"round 2: the loss is nan for task '\w+' at step 0 \(sigma 1\.0000\)\. The student has not been changed by "
        rf"it\. rank 0: the velocity of the {named} is not finite at step 0 \(sigma 1\.0000\)\. .*{remedy}"
    )
    with pytest.raises(NonFiniteError, match=expected) as caught:
        train(tiny_config(num_epochs=2, resume_from="auto"))
    assert isinstance(caught.value, ValueError), "told in one line, without a traceback"
    ((learner, before),) = models
    assert all(torch.equal(a, b) for a, b in zip(learner.optimizer.parameters, before, strict=True))
    assert_latest_loads(tmp_path, "checkpoint-1")


# ---- rewards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hanging(monkeypatch):
    """Scoring hangs until this is set."""
    free = threading.Event()
    score = JpegCompressibility.score

    def hang(self, *arguments):
        free.wait(60)
        return score(self, *arguments)

    monkeypatch.setattr(JpegCompressibility, "score", hang)
    yield free
    free.set()


def said(records, text: str) -> int:
    return sum(text in str(record.message) for record in records)


def test_a_reward_that_hangs_in_monitoring_and_evaluation_is_left_out(tiny_config, tmp_path, hanging, monkeypatch):
    monkeypatch.setattr("diffusionopd.rewards.worker.SHUTDOWN_GRACE", 0.1)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        train(tiny_config(num_epochs=3, monitor_freq=1, eval_freq=3, eval_num_prompts=2, reward_timeout=0.2))
    for task in ("first", "second"):
        assert said(records, f"monitoring of task '{task}' failed, training goes on without it") == 1
        assert said(records, f"training goes on without this evaluation on task '{task}'") == 1
    assert said(records, "'jpeg_compressibility' has been scoring one batch for more than 0.2 seconds") == 4
    rows = metrics(tmp_path / "logs" / "run")
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert not any(key.startswith(("monitor/", "eval/")) for row in rows for key in row)
    assert_latest_loads(tmp_path, "checkpoint-3")


def test_monitoring_that_works_again_is_said(tiny_config, tmp_path, monkeypatch):
    score, calls = JpegCompressibility.score, []

    def fails_at_first(self, *arguments):
        calls.append(1)
        if len(calls) <= 2:
            raise ConnectionError("gone")
        return score(self, *arguments)

    monkeypatch.setattr(JpegCompressibility, "score", fails_at_first)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        train(tiny_config(num_epochs=3, monitor_freq=1))
    assert said(records, "reward 'jpeg_compressibility' failed: ConnectionError('gone')") == 2, "once a task"
    assert said(records, "works again") == 2
    assert ["monitor/first/jpeg_compressibility" in row for row in metrics(tmp_path / "logs" / "run")] == [
        False,
        True,
        True,
    ]


def rewarded(tiny_config, **changes):
    options = {"train__algorithm": "nft", "sample__num_image_per_prompt": 2}
    return tiny_config(**options, **changes)


def test_a_reward_that_is_trained_on_and_hangs_ends_the_run(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusionopd.rewards.worker.SHUTDOWN_GRACE", 0.1)
    score, calls = JpegCompressibility.score, []

    def hangs_in_round_2(self, *arguments):
        calls.append(1)
        if len(calls) > 2:
            threading.Event().wait(60)
        return score(self, *arguments)

    monkeypatch.setattr(JpegCompressibility, "score", hangs_in_round_2)
    with pytest.raises(
        RewardError,
        match=r"rank 0: the samples of task 'first' cannot be scored: reward 'jpeg_compressibility' has been scoring "
        r"one batch for more than 0\.3 seconds.*reward_timeout.*resume_from=auto",
    ):
        train(rewarded(tiny_config, num_epochs=2, save_freq=1, reward_timeout=0.3))
    assert_latest_loads(tmp_path, "checkpoint-1")


def test_samples_that_are_not_finite_are_named_before_they_are_scored(tiny_config, monkeypatch):
    load = trainer_run.load_models

    def poisoned(*arguments, **options):
        backbone, adapters = load(*arguments, **options)
        with torch.no_grad():
            backbone.transformer.proj_out.weight.fill_(float("inf"))
        return backbone, adapters

    monkeypatch.setattr(trainer_run, "load_models", poisoned)
    with pytest.raises(
        NonFiniteError, match=r"round 1, sampling\. .*velocity of the old policy for task 'first'.*step 0"
    ):
        train(rewarded(tiny_config, num_epochs=1))


# ---- trackers --------------------------------------------------------------------------------------------------------


def test_a_tracker_that_cannot_write_is_said_once(tiny_config, tmp_path):
    (tmp_path / "logs" / "run").mkdir(parents=True)
    (tmp_path / "logs" / "run" / "trackers").write_text("a file where the tracker's folder should be")
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        train(tiny_config(num_epochs=2, log_with="tensorboard"))
    assert said(records, "tracker tensorboard failed and is off from here on") == 1
    assert [row["round"] for row in metrics(tmp_path / "logs" / "run")] == [1, 2]
