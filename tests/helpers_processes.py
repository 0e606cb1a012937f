"""Runs that the real launchers start, seen from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from .conftest import ROOT

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def wait_for(condition, seconds: float = 60.0, what: str = "the condition"):
    """Poll until ``condition()`` is true; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come true in {seconds} s"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start(script: str, config, folder: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """A launcher of ``scripts/`` on a configuration, in a session of its own; its output goes to ``folder/output``."""
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "mine.py").write_text(
        "import json, pathlib\n\n\ndef run():\n"
        "    return json.loads((pathlib.Path(__file__).parent / 'config.json').read_text())\n"
    )
    environment = os.environ | {"PYTHON": sys.executable, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts" / script), *arguments],
            cwd=folder,
            env=environment | {"CONFIG": f"{folder}/mine.py:run"} | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_first_round(run: Path, *processes: subprocess.Popen) -> None:
    """Wait until a run has written metrics; a failure if one of its processes ends before."""
    wait_for(
        lambda: (run / "metrics.jsonl").exists() or any(process.poll() is not None for process in processes),
        seconds=240,
        what="the first round",
    )
    assert all(process.poll() is None for process in processes), "the run ended before its first round"


def kill(*processes: subprocess.Popen) -> None:
    """End launchers with their groups; what has a session of its own dies with its launcher."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
