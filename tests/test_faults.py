"""Faults during a run: it goes on and says so, or it stops, says why, and its last checkpoint can be resumed."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

from diffusionopd.algorithms.finite import VelocityChecks
from diffusionopd.algorithms.optim import NonFiniteError
from diffusionopd.config_schema import ConfigError
from diffusionopd.data.batches import Row
from diffusionopd.data.prompts import Prompt
from diffusionopd.evaluation.sampling import ImageGenerator
from diffusionopd.files import FolderError, ensure_writable
from diffusionopd.rewards import RewardError
from diffusionopd.rewards.jpeg import JpegCompressibility
from diffusionopd.training import checkpoint, setup, train

from .helpers import assert_latest_loads, change_models, metrics, no_file_longer_than


def fails_with(error: type[Exception], facts: tuple[str, ...], config) -> None:
    """Training ends with an error that names the facts, in its text or in what was noted on its way."""
    with pytest.raises(error) as caught:
        train(config)
    assert isinstance(caught.value, ValueError), "told in one line, without a traceback"
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    for fact in facts:
        assert fact in text, fact


# ---- disks; capsys keeps in memory what pytest would write to a file -------------------------------------------------


def test_a_full_disk_ends_the_run_and_costs_one_save(tiny_config, tmp_path, capsys):
    def config(rounds):
        return tiny_config(num_epochs=rounds, resume_from="auto")

    first = train(config(1))
    with no_file_longer_than(20_000):  # a LoRA has more
        fails_with(checkpoint.CheckpointError, ("checkpoint-2", "File too large", "num_checkpoint_limit"), config(2))
    assert sorted(path.name for path in first.parent.iterdir()) == ["checkpoint-1", "latest"]
    checkpoint.verify(first)
    assert train(config(2)).name == "checkpoint-2"
    assert [row["round"] for row in metrics(tmp_path / "logs" / "run")] == [1, 2]


def test_a_full_disk_is_found_before_weights_load(tiny_config, tmp_path, no_weights, capsys):
    run = str(tmp_path / "run")
    with no_file_longer_than(1000):
        fails_with(FolderError, (run, "File too large", "save_dir"), tiny_config(save_dir=run))


def test_embeddings_that_cannot_be_stored_end_the_run_at_its_start(tiny_config, tmp_path, capsys):
    cache = str(tmp_path / "cache")
    with no_file_longer_than(8000):
        fails_with(FolderError, (cache, "File too large", "cache_dir"), tiny_config(cache_dir=cache))
    assert not (tmp_path / "logs" / "run" / "checkpoints").exists()


def test_a_folder_that_cannot_be_written_is_found_before_weights_load(make_config, tmp_path, monkeypatch, no_weights):
    file = tmp_path / "file"
    file.write_text("")
    for key in ("logdir", "cache_dir"):
        fails_with(ConfigError, (key, str(file)), make_config(**{"logdir": tmp_path / "logs", key: str(file)}))
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *arguments: True)  # permissions alone do not tell
        for key, remedy in (("logdir", "save_dir"), ("cache_dir", "cache_dir")):
            config = make_config(**{"logdir": tmp_path / "logs", key: "/proc/none"})
            fails_with(FolderError, ("/proc/none", f"--config.{remedy}"), config)
    ensure_writable(tmp_path / "a" / "b", "run folder", "")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(FolderError, match=f"run folder {file}.*exists.*Move it"):
        ensure_writable(file, "run folder", "Move it.")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_named(finished, monkeypatch):
    """A teacher, the student, or the base, which shows in both: task, step, policy and what to do."""
    folder, config = finished("opd", num_epochs=4)
    restore, models = setup.restore, []
    for poisoned, facts in (
        ("teacher_second", ("teacher for task 'second'", "lora_path")),
        ("student", ("student for task 'first'", "learning rate")),
        (None, ("teacher and the student for task 'first'", "pretrained.model")),
    ):

        def poison(resume, optimizer, ema, algorithm, poisoned=poisoned):
            restore(resume, optimizer, ema, algorithm)
            policies = algorithm.policies
            own = [policies.backbone.transformer.proj_out.weight]
            with torch.no_grad():
                (policies.adapters.parameters(poisoned) if poisoned else own)[-1].fill_(float("inf"))
            models.append((optimizer.parameters, [p.detach().clone() for p in optimizer.parameters]))

        monkeypatch.setattr(setup, "restore", poison)
        fails_with(NonFiniteError, (*facts, "step 0", "sigma 1.0000", "rank 0", "round 4"), config)
        after, before = models.pop()
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert_latest_loads(folder, "checkpoint-3")


def test_a_reference_that_is_not_finite_is_named():
    for reference, policy, facts in (
        ("reference_a", "reference_a", ("reference for task 'a'", "reference in train.teachers")),
        (None, None, ("base model for task 'a'", "pretrained.model")),
    ):
        checks = VelocityChecks()
        checks.note(
            policy, [Row("a", 0, Prompt(""), "teacher_a", 1.0, 1.5, reference)], 1.0, torch.full((1, 4), torch.inf)
        )
        assert all(fact in checks.describe(()) for fact in facts)


def test_samples_that_are_not_finite_are_named_before_they_are_scored(tiny_config, monkeypatch):
    change_models(monkeypatch, lambda backbone, _: backbone.transformer.proj_out.weight.fill_(float("inf")))
    config = tiny_config(train__algorithm="nft", num_epochs=1)
    fails_with(NonFiniteError, ("sampling", "'first'", "step 0"), config)


# ---- rewards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_score(monkeypatch):
    """`broken_score(breaks)`: each call of a scorer, counted from 1, hangs if `breaks(call)`, which may also raise."""
    monkeypatch.setattr("diffusionopd.rewards.worker.SHUTDOWN_GRACE", 0.1)
    free, score = threading.Event(), JpegCompressibility.score

    def set_to(breaks) -> None:
        calls: list[int] = []

        def broken(self, *arguments):
            calls.append(1)
            if breaks(len(calls)):
                free.wait(60)
            return score(self, *arguments)

        monkeypatch.setattr(JpegCompressibility, "score", broken)

    yield set_to
    free.set()


def warned(config, *expected: tuple[int, tuple[str, ...]]) -> None:
    """Train; each of the expected facts come together in so many warnings."""
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        train(config)
    texts = [str(record.message) for record in records]
    for count, facts in expected:
        assert sum(all(fact in text for fact in facts) for text in texts) == count, (facts, texts)


def test_a_reward_that_hangs_in_monitoring_and_evaluation_is_left_out(tiny_config, tmp_path, broken_score):
    broken_score(lambda call: True)
    config = tiny_config(monitor_freq=1, eval_freq=3, eval_num_prompts=2, reward_timeout=0.2)
    counts = {"monitoring": 1, "evaluation": 2}  # said until it works again, and each time
    tasks = [(count, (f"'{task}'", what)) for task in ("first", "second") for what, count in counts.items()]
    warned(config, *tasks, (6, ("'jpeg_compressibility'", "0.2 seconds")))
    rows = metrics(tmp_path / "logs" / "run")
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert not any(key.startswith(("monitor/", "eval/")) for row in rows for key in row)
    assert_latest_loads(tmp_path / "logs" / "run", "checkpoint-3")


def test_an_evaluation_with_an_image_that_is_not_finite_is_left_out(tiny_config, tmp_path, monkeypatch):
    draw = ImageGenerator.__call__
    monkeypatch.setattr(ImageGenerator, "__call__", lambda self, *samples: draw(self, *samples) * float("nan"))
    config = tiny_config(num_epochs=1, eval_freq=1, eval_num_prompts=2)
    tasks = [(2, (f"evaluation on task '{task}'", "not finite", "mixed_precision")) for task in ("first", "second")]
    warned(config, *tasks)  # before the round and after it
    assert not any(key.startswith("eval/") for row in metrics(tmp_path / "logs" / "run") for key in row)
    assert_latest_loads(tmp_path / "logs" / "run", "checkpoint-1")


def test_a_reward_that_is_trained_on_and_hangs_ends_the_run(tiny_config, tmp_path, broken_score):
    broken_score(lambda call: call > 4)  # in round 2
    config = tiny_config(train__algorithm="nft", num_epochs=2, save_freq=1, reward_timeout=1.0)
    facts = ("rank 0", "'first'", "'jpeg_compressibility'", "1 seconds", "reward_timeout", "resume_from=auto")
    fails_with(RewardError, facts, config)
    assert_latest_loads(tmp_path / "logs" / "run", "checkpoint-1")


# ---- trackers --------------------------------------------------------------------------------------------------------


def test_a_tracker_that_cannot_write_is_said_once(tiny_config, tmp_path):
    run = tmp_path / "logs" / "run"
    run.mkdir(parents=True)
    (run / "trackers").write_text("a file where the tracker's folder should be")
    warned(tiny_config(num_epochs=2, log_with="tensorboard"), (1, ("tracker", "tensorboard")))
    assert [row["round"] for row in metrics(run)] == [1, 2]
