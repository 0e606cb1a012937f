"""A signal ends a run well: the round is finished and saved, and what continues it ends as if nothing had happened."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diffusionopd.algorithms.nft import Nft
from diffusionopd.evaluation.sampling import ImageGenerator
from diffusionopd.signals import SAME, SIGNALS, STOPPED, SignalWatch, end_at_signals
from diffusionopd.training import Stopped, checkpoint, train

from . import forked
from .conftest import ROOT
from .helpers import assert_bitwise, assert_latest_loads, metrics, rows, state
from .helpers_processes import alive, kill, linux, start, wait_for, wait_for_first_round

# ---- signals themselves ----------------------------------------------------------------------------------------------


def test_the_first_signal_is_noted_and_handlers_come_back():
    before, inside = {n: signal.getsignal(n) for n in SIGNALS}, []
    for number in SIGNALS:
        seen = []
        with SignalWatch(seen.append) as watch:
            for _ in range(2):  # the same request, which came by two ways
                os.kill(os.getpid(), number)
        assert seen == [number] and watch.received == number

    def watched():
        with SignalWatch(print):
            inside.append(signal.getsignal(signal.SIGTERM))

    (thread := threading.Thread(target=watched)).start()
    thread.join()
    assert inside == [before[signal.SIGTERM]], "outside the main thread nothing is installed"
    assert {n: signal.getsignal(n) for n in SIGNALS} == before


def test_a_process_ends_at_once_at_the_second_signal_or_after_a_message():
    def twice(_):
        with SignalWatch(print):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(SAME + 0.2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)

    def told(_):
        with end_at_signals("what is scored is kept"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)

    (end,) = forked.fork(twice, check=False)
    assert (end.status, end.out) == (128 + signal.SIGINT, f"{signal.SIGTERM.value}\n")
    (end,) = forked.fork(told, check=False)
    assert (end.status, end.errors) == (128 + signal.SIGTERM, "\nSIGTERM: what is scored is kept\n")


# ---- the launcher ----------------------------------------------------------------------------------------------------

# Imports nothing, so that a process starts in no time. Each says its number, and what it got.
WORKER = """
import os, signal, sys, time
number, how = os.environ["RANK"], sys.argv[1]
def got(n, _):
    os.write(1, f"{number} got {n}\\n".encode())  # one write: lines of two processes do not mix
    if how != "deaf":
        sys.exit(75)
for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(n, got)
os.write(1, f"{number} is {os.getpid()}\\n".encode())
if how == "fails" and number == "1":
    sys.exit(3)
while True:
    time.sleep(0.05)
"""
SUPERVISE = """
import os, sys
import diffusionopd.launch as launch
launch.GRACE = launch.SAME = 0.5
worker = [sys.executable, "-c", os.environ["WORKER"], sys.argv[1]]
sys.exit(launch.supervise(worker, [os.environ | {"RANK": str(i)} for i in range(2)]))
"""


class Supervised(subprocess.Popen):
    """A launcher with two processes, in a session of its own as in a terminal."""

    def __init__(self, how: str) -> None:
        command = [sys.executable, "-c", SUPERVISE, how]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        super().__init__(command, cwd=ROOT, env=os.environ | {"WORKER": WORKER}, start_new_session=True, **pipes)
        self.workers = [int(pid) for _, _, pid in sorted(self.stdout.readline().split() for _ in range(2))]

    def end(self) -> tuple[int, list[str], str]:
        output, errors = self.communicate(timeout=20)
        wait_for(lambda: not any(alive(pid) for pid in self.workers), what="the end of the processes")
        return self.returncode, sorted(output.splitlines()), errors


@linux
def test_a_signal_reaches_every_process_once():
    for number, send in zip(SIGNALS, (os.kill, os.killpg, os.kill), strict=True):
        run = Supervised("ends")
        send(run.pid, number)
        assert run.end() == (STOPPED, [f"0 got {number.value}", f"1 got {number.value}"], "")


@linux
def test_a_process_that_fails_or_is_killed_ends_the_others_and_is_named():
    for how, expected, fact in (("fails", 3, "status 3"), ("deaf", 137, "SIGKILL")):
        run = Supervised(how)
        if how == "deaf":
            os.kill(run.workers[1], signal.SIGKILL)
        status, _, errors = run.end()
        assert status == expected and "rank 1" in errors and fact in errors


@linux
def test_nothing_outlives_a_second_signal_or_a_launcher_that_is_killed():
    run = Supervised("deaf")
    for _ in range(2):
        run.terminate()
        run.stdout.readline()
        time.sleep(0.7)  # more than signals that count as one are apart
    assert run.end()[0] == 137
    run = Supervised("deaf")
    run.kill()
    assert run.end()[0] == -signal.SIGKILL


# ---- a run in this process -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_signal_escapes():
    """A test that fails must not end the test session by a signal of its own."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped(config) -> Path:
    """The checkpoint of a run that a signal ends early."""
    with pytest.raises(Stopped) as caught:
        train(config)
    return caught.value.checkpoint


def signal_at(patch, owner: object, name: str, call: int, number: int = signal.SIGTERM) -> list:
    """Let this process get a signal in a call of a function, counted from 1; returns the list of its calls."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapped)
    return calls


def unevaluated(folder: Path) -> dict | None:
    return checkpoint.load_scalars(folder / "state")["unevaluated"]


def assert_same_end(a: Path, b: Path) -> None:
    """Same metrics but for the time, and bitwise the same student, average, optimizer and old policy."""
    assert rows(a.parent.parent) == rows(b.parent.parent)
    assert_bitwise(state(a), state(b))


def test_the_round_is_finished_and_saved_once(finished_runs, tiny_config, monkeypatch, capfd):
    """The signal comes in a round that is saved only because of it, while one is saved that is saved anyway, and in the
    last."""
    complete = finished_runs("nft")
    options = {"train__algorithm": "nft", "train__ema": True, "train__ema_interval": 2}
    for name, owner, freq, number in (
        ("round", Nft, 0, signal.SIGUSR1),
        ("save", checkpoint, 1, signal.SIGTERM),
    ):
        config = tiny_config(run_name=f"{name}{freq}", save_freq=freq, resume_from="auto", **options)
        with monkeypatch.context() as patch:
            rounds, saves = signal_at(patch, Nft, "round", 0), signal_at(patch, checkpoint, "save", 0)
            signal_at(patch, owner, name, 1, number)
            last = stopped(config)
        assert last.name == "checkpoint-1" and len(rounds) == 1 and [args[1] for args in saves] == [last.name]
        checkpoint.verify(last)
        assert rows(last.parent.parent) == rows(complete)[:1]
        output = capfd.readouterr()
        assert output.err.count(number.name) == 1 and "round 1" in output.err, "what it finishes is said once"
        assert number.name in output.out and str(last) in output.out and "resume_from=auto" in output.out
        if not freq:
            with monkeypatch.context() as patch:
                signal_at(patch, Nft, "round", 2, signal.SIGUSR1)  # the last one: the run is complete
                assert_same_end(complete / "checkpoints" / "checkpoint-3", train(config))


def test_an_evaluation_stops_between_batches_and_is_made_up_for(tiny_config, monkeypatch):
    """Two prompts of two tasks, one a batch: a signal in the second of four batches, at the start, after each round."""
    options = {"eval_freq": 1, "eval_num_prompts": 2, "sample__test_batch_size": 1, "monitor_freq": 1, "num_epochs": 2}
    options |= {"train__ema": True, "train__ema_interval": 1, "resume_from": "auto"}
    complete = train(tiny_config(run_name="complete", **options))
    config, run = tiny_config(run_name="cut", **options), complete.parent.parent
    assert {"eval/second/jpeg_compressibility", "monitor/second/jpeg_compressibility"} <= rows(run)[2].keys()
    for completed, made_up_for in ((0, 0), (1, 4), (2, 4)):
        with monkeypatch.context() as patch:
            batches = signal_at(patch, ImageGenerator, "__call__", made_up_for + 2)
            last = stopped(config)
        assert len(batches) == made_up_for + 2, "no further batch is begun"
        assert last.name == f"checkpoint-{completed}" and unevaluated(last)["round"] == completed
        assert rows(run)[:completed] == (rows(last.parent.parent) if completed else [])
    resumed = train(config)
    assert unevaluated(resumed) is None
    assert_same_end(complete, resumed)
    batches = signal_at(monkeypatch, ImageGenerator, "__call__", 0)
    train(config)
    assert batches == [], "what is made up for is not made again"
    assert_same_end(complete, resumed)


# ---- the programs ----------------------------------------------------------------------------------------------------


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_round(tiny_config, tmp_path):
    config, run = tiny_config(num_epochs=10000), tmp_path / "logs" / "run"

    def work(_):
        with pytest.raises(Stopped):
            train(config)

    with forked.start(work, 2, log=tmp_path / "output") as processes:
        wait_for(lambda: (run / "metrics.jsonl").exists() or len(processes.running()) < 2, 120, "the first round")
        processes.send(1, signal.SIGTERM)
        ends = processes.wait(60)
    assert [end.status for end in ends] == [0, 0], ends
    assert_latest_loads(run, f"checkpoint-{len(metrics(run))}")


@linux
@pytest.mark.slow
def test_a_signal_to_the_launchers_group_stops_the_run_well(tiny_config, tmp_path):
    process = start("single_node/mopd.sh", tiny_config(num_epochs=10000), tmp_path, NUM_PROCESSES="2")
    run = tmp_path / "logs" / "run"
    try:
        wait_for_first_round(run, process)
        os.killpg(process.pid, signal.SIGUSR1)
        assert process.wait(60) == STOPPED, (tmp_path / "output").read_text()
    finally:
        kill(process)
    assert_latest_loads(run, f"checkpoint-{len(metrics(run))}")
    assert str(checkpoint.find_latest(run / "checkpoints")) in (tmp_path / "output").read_text()


def test_an_evaluation_ends_with_a_word_about_going_on(pipeline_folder, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "test.txt").write_text("".join(f"a photo of {n} circles\n" for n in range(20000)))
    flags = ["--base", "--model", pipeline_folder, "--dataset", folder, "--rewards", "jpeg_compressibility"]
    flags += ["--resolution", 64, "--num_inference_steps", 1, "--guidance_scale", 1, "--max_sequence_length", 14]
    flags += ["--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--batch_size", 1]

    def work(_):
        sys.argv = ["evaluate.py", *map(str, flags)]
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")

    with forked.start(work, log=tmp_path) as processes:
        wait_for((tmp_path / "cache").exists, 120, "the first prompt")
        processes.send(0, signal.SIGTERM)
        (end,) = processes.wait(60)
    assert end.status == 128 + signal.SIGTERM and "--resume" in end.errors
