"""The shell scripts: they parse, and the launchers start what they should, with a stand-in for Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from diffusionopd import __main__

from .conftest import ROOT

SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.sbatch"), ROOT / ".ci" / "run"])

# Answers the launcher's question for GPUs, and otherwise says how it was called, and where.
FAKE_PYTHON = """
if [ "$2" = -c ]; then echo "$FAKE_GPUS"; exit; fi
echo "folder: $PWD"
echo "cpu: ${ACCELERATE_USE_CPU:-} threads: ${OMP_NUM_THREADS:-} path: ${PYTHONPATH%%:*}"
printf '%s\\n' "$@"
"""


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def launch(tmp_path):
    """Run a launcher from another folder; returns its completed process and the arguments it passed on."""
    python = program(tmp_path / "python", FAKE_PYTHON)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}

    def run(script: str, *arguments: str, gpus: int = 0, **variables: str):
        environment = kept | {"PYTHON": python, "FAKE_GPUS": str(gpus)} | variables
        command = ["bash", str(ROOT / "scripts" / "single_node" / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return done, done.stdout.splitlines()

    return run


def after(lines: list[str], *options: str) -> list[str]:
    """What follows each option."""
    return [lines[lines.index(f"--{option}") + 1] for option in options]


def test_scripts_parse_and_accelerate_reads_its_files():
    for name, processes in (("single_gpu", 1), ("multi_gpu", 8), ("cpu", 1)):
        config = load_config_from_file(str(ROOT / "scripts" / "accelerate" / f"{name}.yaml"))
        assert (config.num_processes, config.use_cpu) == (processes, name == "cpu")
    for script in SCRIPTS:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60)
        assert done.stderr == "", script


def test_processes_follow_what_is_there_and_what_is_asked_for(launch, tmp_path):
    """Also an engine's own configuration, of which accelerate takes one or --multi_gpu; `cpu: true` where it is set."""
    for gpus, variables, processes, config in (
        (16, {}, 8, "multi_gpu"),
        (2, {}, 2, "multi_gpu"),
        (1, {}, 1, "single_gpu"),
        (0, {}, 1, "cpu"),
        (0, {"NUM_PROCESSES": "2", "OMP_NUM_THREADS": "3"}, 2, "cpu"),
        (8, {"ACCELERATE_USE_CPU": "true"}, 1, "cpu"),
        (8, {"ENGINE": "fsdp2"}, 8, "fsdp2"),
        (0, {"ENGINE": "deepspeed_zero3", "NUM_PROCESSES": "2"}, 2, "deepspeed_zero3"),
    ):
        done, lines = launch("mopd.sh", gpus=gpus, **variables)
        assert done.returncode == 0, done.stderr
        assert lines[0] == f"folder: {tmp_path}", "relative paths are the caller's"
        assert lines[2:5] == ["-P", "-m", "diffusionopd.launch"]
        assert after(lines, "main_process_port") == ["0"] or processes == 1
        file = f"{ROOT}/scripts/accelerate/{config}.yaml"
        assert after(lines, "num_processes", "config_file") == [str(processes), file]
        assert ("--multi_gpu" in lines) == (processes > 1 and "ENGINE" not in variables)
        on_cpu = gpus == 0 or "ACCELERATE_USE_CPU" in variables
        threads = f"true threads: {variables.get('OMP_NUM_THREADS', 1)}" if on_cpu else " threads: "
        assert lines[1] == f"cpu: {threads} path: {ROOT}"


def test_mistakes_are_named(launch, tmp_path):
    for gpus, variables, facts in (
        (2, {"NUM_PROCESSES": "4"}, ("NUM_PROCESSES=4", "2 GPU(s)")),
        (1, {"ENGINE": "fsdp"}, ("ENGINE=fsdp", "deepspeed_zero3")),
        (1, {"ENGINE": "fsdp2"}, ("ENGINE=fsdp2", "NUM_PROCESSES")),
    ):
        done, _ = launch("mopd.sh", gpus=gpus, **variables)
        assert done.returncode == 2 and all(fact in done.stderr for fact in facts), done.stderr
    done, _ = launch("teacher.sh")
    assert done.returncode != 0 and "CONFIG" in done.stderr
    correct = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for wrong, facts in (
        ({}, ()),
        ({"NNODES": ""}, ("NNODES",)),
        ({"NODE_RANK": "2"}, ("NODE_RANK=2", "2 machines")),
        ({"NODE_RANK": "-1"}, ("NODE_RANK=-1",)),
        ({"MASTER_ADDR": ""}, ("MASTER_ADDR",)),
        ({"GPUS_PER_NODE": "3"}, ("GPUS_PER_NODE=3", "2 GPU(s)")),
    ):
        done, _ = launch("../multi_node/mopd.sh", gpus=2, **correct | wrong)
        assert (done.returncode == 0) == (not wrong) and all(fact in done.stderr for fact in facts), done.stderr
    for value in ("4(x2)", "0", "-1", "two", "08", "1.5", "1e1", "1 2", "9" * 20):
        for script, variable, more in (
            *((script, "NUM_PROCESSES", {"CONFIG": "a"}) for script in ("mopd.sh", "teacher.sh", "eval.sh")),
            *((f"../multi_node/{script}", "GPUS_PER_NODE", correct) for script in ("mopd.sh", "eval.sh")),
            ("../multi_node/mopd.sh", "NNODES", correct),
        ):
            done, lines = launch(script, **more | {variable: value})
            assert (done.returncode, lines) == (2, []) and f"{variable}={value} " in done.stderr, done.stderr
            assert done.stderr.count("\n") == 1
    broken = program(tmp_path / "broken", "echo no torch >&2; exit 3")
    assert launch("mopd.sh", PYTHON=broken)[0].returncode == 3


def test_configuration_and_arguments_pass_through(launch):
    extra = ["--config.train.learning_rate=1e-4", "--config.run_name=two words", "--dry_run"]
    opd, teacher = ([f"{ROOT}/scripts/train_{what}.py", "--config"] for what in ("opd", "teacher"))
    named = [f"{ROOT}/scripts/evaluate.py", "--checkpoint_path"]
    for script, variables, arguments, expected in (
        ("mopd.sh", {}, [], [*opd, "config/opd.py:mopd"]),
        ("mopd.sh", {"CONFIG": "config/tiny.py:mopd"}, extra, [*opd, "config/tiny.py:mopd"]),
        ("sopd.sh", {}, ["--dry_run"], [*opd, "config/opd.py:sopd_pickscore"]),
        ("sopd.sh", {"CONFIG": "config/opd.py:sopd_ocr"}, [], [*opd, "config/opd.py:sopd_ocr"]),
        ("teacher.sh", {"CONFIG": "config/teacher.py:a"}, ["--dry_run"], [*teacher, "config/teacher.py:a"]),
        ("eval.sh", {}, ["--lora_hf_path", "owner/name"], [f"{ROOT}/scripts/evaluate.py"]),
        ("eval.sh", {"CHECKPOINT": "a b", "DATASET": "ocr"}, ["--save_images"], [*named, "a b", "--dataset", "ocr"]),
    ):
        lines = launch(script, *arguments, **variables)[1]
        expected = [*expected, *arguments]
        assert lines[-len(expected) :] == expected


def test_several_machines(launch):
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    _, lines = launch("../multi_node/sopd.sh", "--dry_run", gpus=4, **variables, NUM_PROCESSES="3")
    options = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
    assert after(lines, *options) == ["8", "2", "1", "10.0.0.1", "29501"]
    assert lines[-4:] == [f"{ROOT}/scripts/train_opd.py", "--config", "config/opd.py:sopd_pickscore", "--dry_run"]
    _, lines = launch("mopd.sh", gpus=4, **variables)  # what a cluster sets means nothing to one machine
    assert after(lines, "num_processes") == ["4"] and "--num_machines" not in lines
    _, lines = launch("../multi_node/eval.sh", gpus=2, **variables, DATASET="ocr", GPUS_PER_NODE="1")
    assert after(lines, "num_processes") == ["2"] and lines[-3:] == [f"{ROOT}/scripts/evaluate.py", "--dataset", "ocr"]


def test_the_command_becomes_the_scripts(monkeypatch, capsys):
    called: list[tuple] = []
    monkeypatch.setattr(os, "execve", lambda program, command, environment: called.append((command, environment)))
    __main__.main(["--help"])
    usage = capsys.readouterr().out
    for name, (script, what) in __main__.COMMANDS.items():
        __main__.main([name, "--flag", "two words"])
        command, environment = called.pop()
        assert command == [sys.executable, str(ROOT / script), "--flag", "two words"] and (ROOT / script).is_file()
        assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
        assert re.search(rf"^  {name} +{what}$", usage, re.M)
    for arguments, project, fact in ((["trian"], ROOT, "'trian'"), (["train"], None, "pip install -e")):
        monkeypatch.setattr(__main__, "PROJECT", project)
        with pytest.raises(SystemExit, match=fact):
            __main__.main(arguments)
    module, function = re.search(r"diffusionopd = ([\w.]+):(\w+)", (ROOT / "setup.py").read_text()).groups()
    assert (module, function) == (__main__.__name__, __main__.main.__name__) and not called


@pytest.fixture
def project(tmp_path):
    """`project(script, command)`: runs it in a copy of the project's scripts; what the stand-in for Python was told."""
    folder, environment, log = tmp_path / "project", tmp_path / "environment", tmp_path / "log"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/install.sh", "scripts/test.sh", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    environment.mkdir()
    for name in ("python", "ruff", "mypy"):
        program(environment / name, f'if [ "$1" = -c ]; then echo {environment}; else echo {name} "$@" >>{log}; fi')

    def run(command: str) -> list[str]:
        log.unlink(missing_ok=True)
        variables = {"PATH": f"{environment}:{os.environ['PATH']}", "VIRTUAL_ENV": str(environment)}
        subprocess.run(["bash", "-euc", command], cwd=folder, env=variables, check=True, timeout=60)
        return log.read_text().splitlines() if log.exists() else []

    return folder, run


def test_install_is_skipped_when_nothing_changed(project):
    """In an active environment pip runs once for each set of extras and each change of the requirements, also back."""
    folder, run = project
    (pip,) = run("source scripts/install.sh tiny")
    assert f"{folder}[tiny]" in pip
    assert run("source scripts/install.sh tiny") == []
    assert len(run("source scripts/install.sh dev")) == 1
    assert run("source scripts/install.sh tiny") == []
    before = (folder / "constraints.txt").read_text()
    for constraints in ("torch==2.13.0\n", before):
        (folder / "constraints.txt").write_text(constraints)
        assert len(run("source scripts/install.sh tiny")) == 1


def test_a_reproduction_asks_for_its_scorers_before_it_trains(tmp_path):
    (tmp_path / "scripts" / "single_node").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "reproduce.sh", tmp_path / "scripts")
    for name, status in (("mopd.sh", 0), ("eval.sh", 3)):
        program(tmp_path / "scripts" / "single_node" / name, f'echo {name} "$@" >>calls; exit {status}')
    variables = os.environ | {"DOWNLOAD": "false", "EVAL_ARGS": "--without unifiedreward"}
    command = ["bash", "scripts/reproduce.sh"]
    assert subprocess.run(command, cwd=tmp_path, env=variables, timeout=60).returncode == 3
    trained, scored = (tmp_path / "calls").read_text().splitlines()
    assert all("--dry_run" in call for call in (trained, scored)) and "--without unifiedreward" in scored


def test_the_tests_short_and_all(project):
    root, run = project
    (root / "scripts" / "environments").mkdir()
    program(root / "scripts" / "environments" / "environment.sh", "")
    for arguments, expected in (
        ("", "-n 2"),
        ("tests/test_a.py -k 'one or two'", "-n 2 tests/test_a.py -k one or two"),
        ("--all", "-n 2 -m slow or not slow"),
        ("-x --all tests/test_a.py", "-n 2 -m slow or not slow -x tests/test_a.py"),
    ):
        *style, pytest_line = run(f"bash scripts/test.sh {arguments}")[-4:]
        assert pytest_line == f"python -m pytest {expected}"
        assert [line.split()[0] for line in style] == ["ruff", "ruff", "mypy"]


FAKE_UV = """
echo "uv $*" >>"$UV_CALLS"
while [ $# -gt 0 ]; do [ "$1" = -c ] && cat "$2" >"$UV_CALLS.constraints.$$"; shift; done
"""


def test_environments_name_their_python_and_take_the_other_versions_from_the_constraints(tmp_path):
    calls = tmp_path / "calls"
    program(tmp_path / "uv", FAKE_UV)
    script = str(ROOT / "scripts" / "environments" / "environment.sh")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "UV_CALLS": str(calls)}
    run = lambda *given: subprocess.run(["bash", script, *given], env=environment, check=True, timeout=60)  # noqa: E731
    run("resolve", "paddle")
    first, *extras = calls.read_text().splitlines()
    assert "--python-version 3.11" in first and first.endswith("scripts/environments/paddle.txt")
    assert [re.search(r"--python-version (\S+)", line)[1] for line in extras] == ["3.11", "3.12", "3.13"]
    given = min((path.read_text() for path in tmp_path.glob("calls.constraints.*")), key=len)
    freed = set((ROOT / "constraints.txt").read_text().splitlines()) - set(given.splitlines())
    assert {line.split("==")[0].lower() for line in freed} == {"numpy", "pyyaml"}
    calls.unlink()
    run("make", "mmdet", str(tmp_path / "venv"))
    made, installed = calls.read_text().splitlines()
    assert made == f"uv venv --python 3.11 {tmp_path / 'venv'}" and installed.endswith("environments/mmdet.txt")
    extras = (ROOT / "setup.py").read_text()
    files = sorted((ROOT / "scripts" / "environments").glob("*.txt"))
    for path in files:
        text = path.read_text()
        assert re.search(r"^# python: 3\.1[123]$", text, re.MULTILINE) and "# unconstrained:" in text
        (extra,) = re.findall(r"^-e .\[(\w+)\]$", text, re.MULTILINE)
        assert f'"{extra}": [' in extras or f'"{extra}": SCIPY' in extras
    assert len(files) == 5
