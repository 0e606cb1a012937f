"""What the quick start does, with stand-ins for the commands that it calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import ROOT

RECORD = 'echo "$(basename "$0") $CONFIG $*" >> calls\n'
STAND_INS = {
    "scripts/install.sh": 'echo "install.sh $1" >> calls\npython() { echo "python $*" >> calls; }\n',
    "scripts/single_node/mopd.sh": RECORD + 'exit "$(cat status 2>/dev/null || echo 0)"\n',
    "scripts/single_node/eval.sh": 'CONFIG=""; ' + RECORD,
}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository root with the real quickstart.sh and stand-ins for the rest."""
    for name, text in STAND_INS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("assets/tiny", "config", "diffusionopd"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file.txt").write_text(name)
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    return tmp_path


def quickstart(checkout: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The finished process and the commands that it called."""
    calls = checkout / "calls"
    calls.write_text("")
    command = ["bash", "scripts/quickstart.sh", *arguments]
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)
    return done, calls.read_text().splitlines()


def test_everything_in_order_also_in_the_short_form(checkout):
    done, calls = quickstart(checkout, "--config.seed=7")
    assert done.returncode == 0, done.stderr
    expected = (
        "install.sh tiny",
        "mopd.sh config/tiny.py:mopd_merged --config.save_dir=logs/quickstart/run --config.run_name=quickstart "
        "--config.resume_from=auto --config.seed=7",
        "eval.sh  --config logs/quickstart/run/config.json --base --teacher compose --teacher ocr --teacher scene "
        "--own_task --merge sum --merge_scale 0.6 --checkpoint_path logs/quickstart/run --dataset compose ocr scene ",
        "python -m tools.quickstart_report --run logs/quickstart/run",
    )
    for call, start in zip(calls, expected, strict=True):
        assert call.startswith(start)
    done, calls = quickstart(checkout, "--short", "--config.num_epochs=2")
    assert done.returncode == 0, done.stderr
    assert "--config.num_epochs=4" in calls[1] and calls[1].endswith("--config.num_epochs=2")
    assert all("logs/quickstart-short/" in call for call in calls[1:]) and calls[2].endswith("--limit 24")


def test_the_same_command_continues_and_another_keeps_the_earlier_run(checkout):
    for status in (1, 75):  # what failed or was stopped is not scored
        (checkout / "status").write_text(str(status))
        done, calls = quickstart(checkout)
        assert done.returncode == status and len(calls) == 2 and ("stopped" in done.stderr) == (status == 75)
    (checkout / "status").unlink()
    assert len(quickstart(checkout)[1]) == 4
    assert [call.split()[0] for call in quickstart(checkout)[1]] == ["install.sh", "eval.sh", "python"]
    assert os.listdir(checkout / "logs") == ["quickstart"]
    assert len(quickstart(checkout, "--config.seed=7")[1]) == 4
    assert len(quickstart(checkout, "--config.seed=7", "--fresh")[1]) == 4
    (checkout / "diffusionopd" / "file.txt").write_text("changed")
    assert len(quickstart(checkout, "--config.seed=7")[1]) == 4
    assert {*os.listdir(checkout / "logs")} == {"quickstart", "quickstart.1", "quickstart.2", "quickstart.3"}


def test_help_and_unknown_arguments(checkout):
    for argument, status, words in (("--help", 0, "quickstart.sh --short"), ("--shrt", 2, "--shrt")):
        done, calls = quickstart(checkout, argument)
        assert done.returncode == status and words in done.stderr and calls == []
