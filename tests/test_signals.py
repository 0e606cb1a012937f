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

from diffusionopd.evaluation.sampling import ImageGenerator
from diffusionopd.signals import SAME, SIGNALS, STOPPED, SignalWatch, end_at_signals
from diffusionopd.training import Trainer, checkpoint, train
from diffusionopd.training.stop import Stopped, read_pending

from . import forked
from .conftest import ROOT
from .helpers import assert_bitwise, metrics
from .helpers_processes import alive, kill, linux, start, wait_for, wait_for_first_round

# ---- signals themselves ----------------------------------------------------------------------------------------------


def test_the_first_signal_is_noted_and_handlers_come_back():
    before = {n: signal.getsignal(n) for n in SIGNALS}
    for number in SIGNALS:
        seen = []
        with SignalWatch(seen.append) as watch:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # the same request, which came by two ways
            time.sleep(0)
        assert seen == [number] and watch.received == number
    assert {n: signal.getsignal(n) for n in SIGNALS} == before


def test_outside_the_main_thread_nothing_is_installed():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def watch():
        with SignalWatch(print):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert inside == [before]


def test_a_second_signal_ends_a_process_at_once():
    def work(_):
        with SignalWatch(print):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(SAME + 0.2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)

    (end,) = forked.fork(work, check=False)
    assert (end.status, end.out) == (128 + signal.SIGINT, f"{signal.SIGTERM.value}\n")


def test_a_message_comes_before_the_end():
    def work(_):
        with end_at_signals("what is scored is kept"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)

    (end,) = forked.fork(work, check=False)
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


class Supervised:
    """A launcher with two processes, in a session of its own as in a terminal."""

    def __init__(self, how: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISE, how],
            cwd=ROOT,
            env=os.environ | {"WORKER": WORKER},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        words = [self.process.stdout.readline().split() for _ in range(2)]
        self.workers = [int(pid) for _, _, pid in sorted(words)]

    def end(self) -> tuple[int, list[str], str]:
        output, errors = self.process.communicate(timeout=20)
        wait_for(lambda: not any(alive(pid) for pid in self.workers), what="the end of the processes")
        return self.process.returncode, sorted(output.splitlines()), errors


@linux
def test_a_signal_reaches_every_process_once():
    for number, send in zip(SIGNALS, (os.kill, os.killpg, os.kill), strict=True):
        run = Supervised("ends")
        send(run.process.pid, number)
        assert run.end() == (STOPPED, [f"0 got {number.value}", f"1 got {number.value}"], "")


@linux
def test_a_failure_ends_the_others_and_is_returned():
    status, _, errors = Supervised("fails").end()
    assert status == 3 and "rank 1 ended with exit status 3" in errors


@linux
def test_a_process_that_is_killed_is_named():
    run = Supervised("deaf")
    os.kill(run.workers[1], signal.SIGKILL)
    status, _, errors = run.end()
    assert status == 137 and "rank 1 ended by SIGKILL" in errors


@linux
def test_after_a_second_signal_the_deaf_are_killed():
    run = Supervised("deaf")
    for _ in range(2):
        run.process.terminate()
        run.process.stdout.readline()
        time.sleep(0.7)  # more than signals that count as one are apart
    assert run.end()[0] == 137


@linux
def test_nothing_outlives_a_launcher_that_is_killed():
    run = Supervised("deaf")
    run.process.kill()
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


def signal_at(monkeypatch, owner: object, name: str, call: int, number: int = signal.SIGTERM) -> list:
    """Let this process get a signal in a call of a function, counted from 1; returns the list of its calls."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


@pytest.fixture
def config(tiny_config):
    """`config(run_name, ...)`: two rounds of two tasks, monitored, with a moving average."""

    def make(run_name, **changes):
        common = {"train__ema": True, "train__ema_interval": 1, "monitor_freq": 1, "sample__num_image_per_prompt": 2}
        return tiny_config(run_name=run_name, **{"num_epochs": 2} | common | changes)

    return make


def lines(run: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in metrics(run)]


def assert_same_end(a: Path, b: Path) -> None:
    """Same metrics but for the time, and bitwise the same student, average, optimizer and old policy."""
    assert lines(a.parent.parent) == lines(b.parent.parent)
    assert_bitwise(*(checkpoint.load_state(path / "state")[0] for path in (a, b)))


@pytest.mark.parametrize(("algorithm", "number"), [("opd", signal.SIGTERM), ("nft", signal.SIGUSR1)])
def test_the_round_is_finished_and_saved(config, monkeypatch, capfd, algorithm, number):
    options = {"train__algorithm": algorithm}
    whole = train(config("whole", **options))
    capfd.readouterr()
    with monkeypatch.context() as patch:
        rounds = signal_at(patch, Trainer, "round", 1, number)
        last = stopped(config("cut", **options))
    assert last.name == "checkpoint-1" and len(rounds) == 1
    output, name = capfd.readouterr(), signal.Signals(number).name
    assert output.err.count(f"{name}: finishing round 1, saving, then ending; a second signal ends at once") == 1
    assert f"{name}: stopped after round 1; saved {last}. The same command with --config.resume" in output.out
    checkpoint.verify(last)
    assert lines(last.parent.parent) == lines(whole.parent.parent)[:1]
    assert_same_end(whole, train(config("cut", resume_from="auto", **options)))


def test_an_evaluation_stops_between_batches_and_is_made_up_for(config, monkeypatch):
    """Two prompts of two tasks, one a batch: a signal in the second of four batches, after each of two rounds."""
    options = {"eval_freq": 1, "eval_num_prompts": 2, "sample__test_batch_size": 1}
    whole = train(config("whole", **options))
    assert "eval/second/jpeg_compressibility" in lines(whole.parent.parent)[1]
    for completed, made_up_for in ((1, 0), (2, 4)):
        with monkeypatch.context() as patch:
            batches = signal_at(patch, ImageGenerator, "__call__", made_up_for + 2)
            last = stopped(config("cut", resume_from="auto", **options))
        assert len(batches) == made_up_for + 2, "no further batch is begun"
        assert last.name == f"checkpoint-{completed}"
        assert read_pending(last)["round"] == completed
        if completed > 1:
            assert [row["round"] for row in lines(last.parent.parent)] == list(range(1, completed))
    resumed = train(config("cut", resume_from="auto", **options))
    assert read_pending(resumed) is None
    assert_same_end(whole, resumed)
    batches = signal_at(monkeypatch, ImageGenerator, "__call__", 0)
    train(config("cut", resume_from="auto", **options))
    assert batches == [], "what is made up for is not made again"
    assert_same_end(whole, resumed)


@pytest.mark.parametrize(("owner", "name"), [(Trainer, "round"), (checkpoint, "save")])
def test_a_round_is_saved_once(config, monkeypatch, owner, name):
    """When it was to be saved anyway, also when the signal comes while it is."""
    signal_at(monkeypatch, owner, name, 1)
    saves = signal_at(monkeypatch, checkpoint, "save", 0)
    assert stopped(config("cut", save_freq=1)).name == "checkpoint-1"
    assert [args[1] for args in saves] == ["checkpoint-1"]


# ---- runs from the launchers -----------------------------------------------------------------------------------------


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
    latest = checkpoint.find_latest(run / "checkpoints")
    assert latest is not None and latest.name == f"checkpoint-{len(metrics(run))}"
    assert f"saved {latest}" in (tmp_path / "output").read_text()


def test_an_evaluation_ends_with_a_word_about_going_on(pipeline_folder, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "test.txt").write_text("".join(f"a photo of {n} circles\n" for n in range(20000)))
    flags = ["--base", "--model", pipeline_folder, "--dataset", folder, "--rewards", "jpeg_compressibility"]
    flags += ["--resolution", 64, "--num_inference_steps", 1, "--guidance_scale", 1, "--max_sequence_length", 14]
    flags += ["--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--batch_size", 1]

    def work(_):
        os.chdir(ROOT)
        sys.argv = ["evaluate.py", *map(str, flags)]
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")

    with forked.start(work, log=tmp_path, environment={"ACCELERATE_USE_CPU": "true"}) as processes:
        wait_for((tmp_path / "cache").exists, 120, "the first prompt")
        processes.send(0, signal.SIGTERM)
        (end,) = processes.wait(60)
    assert end.status == 128 + signal.SIGTERM
    assert "--resume" in end.errors
