"""Where a round's time goes: each stage's own time, and the command that shows it."""

from __future__ import annotations

import gzip
import json
import threading

import pytest

from diffusionopd import stages
from diffusionopd.stages import stage, timed_stages
from diffusionopd.training.profiling import OTHER, profile


def test_a_stage_gets_its_own_time_without_stages_inside_or_in_other_threads(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    def elsewhere() -> None:
        with stage("elsewhere"):
            spend(5000.0)

    with timed_stages("cpu") as seconds:
        for _ in range(2):
            with stage("outer"):
                spend(1.0)
                with stage("inner"):
                    spend(10.0)
                    with stage("innermost"):
                        spend(100.0)
                spend(2.0)
        with pytest.raises(KeyError), stage("outer"), stage("broken"):
            spend(3.0)
            raise KeyError
        spend(1000.0)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    with stage("outer"):  # outside of the timing
        spend(50.0)
    assert seconds == {"outer": 6.0, "inner": 20.0, "innermost": 200.0, "broken": 3.0}


def test_a_profile_accounts_for_all_of_a_round_and_leaves_no_run(tiny_config, tmp_path):
    folder = tmp_path / "profile"
    found = profile(tiny_config(monitor_freq=0), folder, rounds=1)
    assert found is not None and found == json.loads((folder / "summary.json").read_text())
    shares = found["stage_seconds"]
    assert {"forward, student", "forward, frozen policies", "backward", "optimizer step", OTHER} <= shares.keys()
    assert list(shares.values()) == sorted(shares.values(), reverse=True) and min(shares.values()) >= 0
    assert found["round_seconds"] > 0 and shares["forward, student"] > shares["prompts and noise"]
    assert "forward, student" in (folder / "summary.txt").read_text()
    with gzip.open(folder / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"forward, student", "backward"} <= names
    assert not (tmp_path / "logs").exists(), "the configuration's own run folder is left alone"
    assert not list(folder.rglob("checkpoint-*"))
