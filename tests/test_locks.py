"""One writer a folder: who holds it, who is gone, and two trainings or evaluations at once."""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from diffusionopd.algorithms.opd import Opd
from diffusionopd.evaluation.results import AVERAGES, RESULTS, SETTINGS, read_records
from diffusionopd.locks import LOCK, HeldError, Holder, hold, refuse_if_held
from diffusionopd.signals import end_at_once
from diffusionopd.training import train

from .conftest import ROOT
from .forked import Forked, Mark, fork, start
from .helpers import files_of, metrics
from .helpers_processes import linux, wait_for

pytestmark = linux


KEPT = []


def take(folder: Path) -> None:
    """Take the folder and never give it back."""
    KEPT.append(hold([folder], "folder", ""))
    KEPT[-1].__enter__()


def written(folder: Path, **changes: object) -> Path:
    """A lock that says it is this living process's, but for some changes; its file."""
    file = folder / LOCK / "abc.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(vars(replace(Holder.here(), **changes))))
    return file


def waiting(mark: Mark):
    """What a process does that is there until it is killed."""
    mark.value = 1
    while True:
        time.sleep(0.01)


# ---- who is gone -----------------------------------------------------------------------------------------------------


def test_a_folder_is_closed_while_its_holder_lives_and_open_at_once_when_it_was_killed(tmp_path):
    """Also while the holder is stopped, and as soon as it is a zombie, which nobody has collected yet."""
    folder, mark = tmp_path / "folder", Mark()

    def work(rank):
        take(folder)
        waiting(mark)

    with start(work, log=tmp_path / "log") as holder:
        wait_for(lambda: mark.value)
        for number in (signal.SIGCONT, signal.SIGSTOP):
            holder.send(0, number)
            for attempt in (lambda: take(folder), lambda: refuse_if_held(folder)):
                with pytest.raises(HeldError) as refused:
                    attempt()
                assert str(folder) in str(refused.value) and f"process {holder.pids[0]} " in str(refused.value)
        holder.send(0, signal.SIGKILL)
        wait_for(lambda: Path(f"/proc/{holder.pids[0]}/stat").read_text().split()[2] == "Z")
        refuse_if_held(folder)
        with hold([folder], "folder", ""):
            (found,) = (folder / LOCK).iterdir()
            assert json.loads(found.read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


FAR = {"host": "far", "boot": "another"}
CONTAINER = {"host": "box", "namespace": "another"}


@pytest.mark.parametrize(
    ("changes", "slurm", "gone"),
    [
        ({}, {}, False),
        ({"started": "1"}, {}, True),  # the number was given to another process
        ({"pid": 2**22 + 1}, {}, True),
        ({"boot": "earlier"}, {}, True),  # the machine was started anew: nobody has the file locked
        (CONTAINER, {}, True),  # nobody has the file locked
        (FAR, {}, False),
        (FAR | {"job": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        (FAR | {"job": "7", "restarts": 2}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, False),
        (FAR | {"job": "8"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        (FAR, {"SLURM_RESTART_COUNT": "1"}, False),
        ({"job": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),  # it lives, and will end
        (None, {}, False),  # the file cannot be read
    ],
)
def test_who_counts_as_gone(changes, slurm, gone, tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    file = written(tmp_path, **(changes or {}))
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    if changes is None:
        file.write_bytes(bytes(100))
    if gone:
        with hold([tmp_path], "folder", "") as (lock,):
            assert lock.file.exists() and not file.exists()
        assert list(tmp_path.iterdir()) == []
        return
    with pytest.raises(HeldError) as refused:
        take(tmp_path)
    said = str(refused.value)
    assert str(tmp_path) in said and [path.name for path in tmp_path.iterdir()] == [LOCK]
    if changes and "host" in changes:  # to be removed by hand
        assert "far" in said and str(os.getpid()) in said and str(file.parent) in said


@pytest.mark.parametrize("other", [{"namespace": "another"}, {"boot": "another"}], ids=["container", "same name"])
def test_a_holder_whose_process_is_not_seen_here_is_known_by_its_lock_of_the_file(other, tmp_path, monkeypatch):
    with hold([tmp_path], "folder", "") as (lock,):
        here = json.loads(lock.file.read_text())
        monkeypatch.setattr(Holder, "here", classmethod(lambda cls: cls(**here | other)))
        with pytest.raises(HeldError):
            take(tmp_path)


def test_a_process_that_the_system_hides_is_alive(tmp_path, monkeypatch):
    written(tmp_path, pid=1, started="5")
    monkeypatch.setattr(Path, "read_bytes", lambda path, real=Path.read_bytes: real(Path("/none")) if path.parent ==
                        Path("/proc/1") else real(path))  # fmt: skip
    with pytest.raises(HeldError):
        take(tmp_path)


# ---- taking, giving back ---------------------------------------------------------------------------------------------


def test_of_many_that_find_a_dead_holder_one_comes_in(tmp_path):
    """Every one gets the folder once, is killed in it or leaves, and never meets another one inside."""
    folder = tmp_path / "folder"

    def work(rank):
        rng = random.Random(rank)
        while True:
            with suppress(HeldError), hold([folder], "folder", ""):
                descriptor = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)  # FileExistsError: not alone
                time.sleep(rng.random() * 0.01)
                os.close(descriptor)
                os.unlink(folder / "inside")
                if rank % 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return
            time.sleep(rng.random() * 0.002)

    ends = fork(work, 12, check=False)
    assert [end.status for end in ends] == [-9 * (rank % 2) for rank in range(12)], [end.errors for end in ends]
    with hold([folder], "folder", ""):
        pass
    assert list(folder.iterdir()) == [], "nothing is left of those that were killed"


@pytest.mark.parametrize("ending", [lambda: 1 / 0, lambda: sys.exit(3), lambda: end_at_once(3), lambda: None])
def test_a_folder_is_given_back_however_a_process_ends(ending, tmp_path):
    def work(rank):
        with hold([tmp_path / "a", tmp_path / "b"], "folder", ""):
            (tmp_path / "b" / "mine").touch()
            if os.fork() == 0:
                end_at_once(0)  # of a fork, which holds nothing
            os.wait()
            assert (tmp_path / "a" / LOCK).exists()
            ending()

    fork(work, check=False)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.glob("[ab]/**"))] == ["b"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine"]


def test_of_several_folders_none_is_kept_when_one_is_held(tmp_path):
    written(tmp_path / "b")
    with pytest.raises(HeldError), hold([tmp_path / "a", tmp_path / "b"], "folder", ""):
        pass
    assert not (tmp_path / "a").exists()


def test_a_lock_that_was_removed_or_taken_over_is_noticed(tmp_path):
    with hold([tmp_path], "folder", "") as (lock,):
        lock.check()
        lock.file.unlink()
        with hold([tmp_path], "folder", "") as (next_lock,):
            with pytest.raises(HeldError) as lost:
                lock.check()
            assert str(tmp_path) in str(lost.value)
            next_lock.check()


def test_all_processes_of_a_run_have_the_verdict_of_the_first(tmp_path):
    def work(rank):
        dist.init_process_group("gloo")
        with hold([tmp_path / "free"], "folder", "") as (lock,):
            lock.check()
            assert (json.loads(lock.file.read_text())["pid"] == os.getpid()) == (rank == 0)
            dist.barrier()
        with pytest.raises(HeldError, match=str(os.getppid())):
            take(tmp_path / "held")
        dist.barrier()

    written(tmp_path / "held")
    fork(work, 2)


# ---- two at once -----------------------------------------------------------------------------------------------------


def test_a_second_training_is_told_whom_to_wait_for_and_goes_on_after_a_kill(tiny_config, tmp_path, capsys):
    """Held from the first round's work; `--dry_run` says so too. Nothing of the first is touched."""
    run, mark = tmp_path / "logs" / "run", Mark()

    def work(rank):
        real = Opd.round

        def round_(self, *args, **kwargs):
            if (run / "metrics.jsonl").exists() and len(metrics(run)) == 1:
                waiting(mark)
            return real(self, *args, **kwargs)

        Opd.round = round_  # type: ignore[method-assign]
        train(tiny_config(num_epochs=4, save_freq=1))

    with start(work, log=tmp_path / "log") as first:
        wait_for(lambda: mark.value)
        before = files_of(run)
        for options in ({"resume_from": "auto"}, {"resume_from": "auto", "train__learning_rate": 1e-5}):
            for dry_run in (False, True):
                with pytest.raises(HeldError) as refused:
                    train(tiny_config(num_epochs=4, **options), dry_run=dry_run)
                assert str(first.pids[0]) in str(refused.value) and str(run) in str(refused.value)
        assert files_of(run) == before and "dry run" not in capsys.readouterr().out
        first.send(0, signal.SIGKILL)
        wait_for(lambda: not first.running())
        train(tiny_config(num_epochs=4, resume_from="auto"), dry_run=True)
        assert files_of(run) == before
        train(tiny_config(num_epochs=4, resume_from="auto"))
    assert [row["round"] for row in metrics(run)] == [1, 2, 3, 4] and not (run / LOCK).exists()


def test_a_run_that_lost_its_folder_writes_nothing_more(tiny_config, tmp_path, monkeypatch):
    run, real = tmp_path / "logs" / "run", Opd.round

    def round_(self, *args, **kwargs):
        if (run / "metrics.jsonl").exists():
            for file in (run / LOCK).iterdir():
                file.unlink()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Opd, "round", round_)
    with pytest.raises(HeldError):
        train(tiny_config(num_epochs=3, save_freq=1))
    assert len(metrics(run)) <= 1 and not (run / "checkpoints" / "checkpoint-2").exists()


def begin(log: Path, *arguments: object) -> Forked:
    """One of the scripts in a process of its own, as on a command line."""

    def work(rank):
        os.chdir(ROOT)
        sys.argv = [str(argument) for argument in arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return start(work, log=log)


def two(log: Path, trial: int, first: list, second: list) -> list[int]:
    """Start both, the second at a random moment of the first, which every fourth time is killed then; their statuses.

    Who is refused is told for whose sake.
    """
    one = begin(log / "first", *first)
    time.sleep(random.Random(trial).random() ** 2 * 6)
    if trial % 4 == 3:
        one.kill()
    other = begin(log / "second", *second)
    ends = [process.wait(300)[0] for process in (one, other)]
    for end, of, its in zip(ends, (other, one), reversed(ends), strict=True):
        after_it = its.status == 0 and "lora_hash" in end.errors  # which model the finished results are of
        assert end.status <= 0 or f" {of.pids[0]} " in end.errors or after_it, (trial, ends)
    print(f"trial {trial}: statuses {[end.status for end in ends]}", flush=True)
    return [end.status for end in ends]


@pytest.mark.slow
def test_twenty_times_two_trainings_at_once(tmp_path):
    """No round is lost or mixed: what is there in the end is one run's, complete."""
    common = ["scripts/train_opd.py", "--config", "config/tiny.py:sopd_scene"]
    options = {
        "sample.num_steps": 2, "sample.train_batch_size": 1, "sample.num_batches_per_epoch": 1, "train.batch_size": 1,
        "train.gradient_accumulation_steps": 1, "eval_freq": 0, "monitor_freq": 0, "sample_freq": 0, "num_epochs": 8,
        "save_freq": 3, "cache_dir": tmp_path / "cache", "resume_from": "auto",
    }  # fmt: skip
    for trial in range(20):
        run = tmp_path / str(trial)
        flags = [f"--config.{name}={value}" for name, value in {**options, "save_dir": run}.items()]
        rates = [1e-3, 1e-3 if trial % 4 == 3 else 1e-5]
        commands = [[*common, *flags, f"--config.train.learning_rate={rate}"] for rate in rates]
        statuses = two(tmp_path / f"log-{trial}", trial, *commands)
        rows, finished = metrics(run), [rate for rate, status in zip(rates, statuses, strict=True) if status == 0]
        assert [row["round"] for row in rows] == list(range(1, 9)) and finished
        assert not (run / LOCK).exists()
        if 2 in statuses:
            assert {row["lr"] for row in rows} == set(finished)
            assert json.loads((run / "config.json").read_text())["train"]["learning_rate"] == finished[0]


@pytest.mark.slow
def test_twenty_times_two_evaluations_at_once(pipeline_folder, make_lora, tmp_path):
    """Every score is that of one model, whose settings are beside it."""
    data = tmp_path / "mine"
    data.mkdir()
    (data / "test.txt").write_text("".join(f"a photo of {i} hills\n" for i in range(40)))
    common = ["scripts/evaluate.py", "--model", pipeline_folder, "--dataset", data, "--resolution", 64, "--resume"]
    common += ["--num_inference_steps", 2, "--guidance_scale", 1.5, "--max_sequence_length", 14, "--batch_size", 2]
    common += ["--rewards", "jpeg_compressibility", "--cache_dir", tmp_path / "cache", "--output_dir"]
    models = [["--base"], ["--lora", make_lora(0, std=0.5)]]
    alone = []
    for i, model in enumerate(models):
        (end,) = begin(tmp_path / f"log-{i}", *common, tmp_path / f"alone-{i}", *model).wait(300)
        assert end.status == 0, end.errors
        alone.append(read_records(tmp_path / f"alone-{i}" / RESULTS))
    assert alone[0] != alone[1]
    for trial in range(20):
        out, which = tmp_path / f"out-{trial}", [0, 0 if trial % 4 == 3 else 1]
        statuses = two(tmp_path / f"log-{trial}", trial, *([*common, out, *models[i]] for i in which))
        finished = [i for i, status in zip(which, statuses, strict=True) if status == 0]
        assert finished and (len(finished) == 1 or which[0] == which[1])
        assert read_records(out / RESULTS) == alone[finished[0]] and not (out / LOCK).exists()
        for name in (AVERAGES, SETTINGS):
            assert (out / name).read_bytes() == (tmp_path / f"alone-{finished[0]}" / name).read_bytes()
