"""Where a round's time goes: each stage's own time, and the command that shows it."""

from __future__ import annotations

import gzip
import json
import threading

import pytest

from diffusionopd import stages
from diffusionopd.stages import stage, timed_stages
from diffusionopd.training.profiling import OTHER, profile


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""
    now = [0.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    return spend


def test_a_stage_gets_its_own_time_without_that_of_the_stages_inside(clock):
    with timed_stages("cpu") as seconds:
        for _ in range(2):
            with stage("outer"):
                clock(1.0)
                with stage("inner"):
                    clock(10.0)
                    with stage("innermost"):
                        clock(100.0)
                clock(2.0)
        with pytest.raises(KeyError), stage("outer"), stage("broken"):
            clock(3.0)
            raise KeyError
        clock(1000.0)
    with stage("outer"):  # outside of the timing
        clock(50.0)
    assert seconds == {"outer": 6.0, "inner": 20.0, "innermost": 200.0, "broken": 3.0}


def test_stages_of_other_threads_are_left_out(clock):
    def work() -> None:
        with stage("elsewhere"):
            clock(5.0)

    with timed_stages("cpu") as seconds:
        with stage("here"):
            clock(1.0)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seconds == {"here": 1.0}


@pytest.mark.slow
def test_a_profile_accounts_for_all_of_a_round_and_leaves_no_run(tiny_config, tmp_path):
    config = tiny_config(monitor_freq=0)
    found = profile(config, tmp_path / "profile", rounds=1)
    assert found is not None
    shares = found["stage_seconds"]
    assert {"forward, student", "forward, teacher_first", "backward", "optimizer step", OTHER} <= shares.keys()
    assert all(seconds >= 0 for seconds in shares.values())
    assert found["round_seconds"] > 0
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert shares["forward, student"] > shares["prompts and noise"]
    saved = json.loads((tmp_path / "profile" / "summary.json").read_text())
    assert saved == found
    assert "forward, student" in (tmp_path / "profile" / "summary.txt").read_text()
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"forward, student", "backward"} <= names
    assert not (tmp_path / "logs").exists(), "the configuration's own run folder is left alone"
    assert not list((tmp_path / "profile").rglob("checkpoint-*"))
