"""The shell scripts: they parse, and the launchers start what they should, with a stand-in for Python."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"])

# Answers the launcher's question for GPUs, and otherwise says how it was called, and where.
FAKE_PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "$FAKE_GPUS"; exit; fi
echo "folder: $PWD"
echo "cpu: ${ACCELERATE_USE_CPU:-} threads: ${OMP_NUM_THREADS:-} path: ${PYTHONPATH%%:*}"
printf '%s\\n' "$@"
"""


@pytest.fixture
def launch(tmp_path):
    """Run a launcher from another folder; returns its completed process and the arguments it passed on."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}

    def run(script: str, *arguments: str, gpus: int = 0, **variables: str):
        environment = kept | {"PYTHON": str(python), "FAKE_GPUS": str(gpus)} | variables
        command = ["bash", str(ROOT / "scripts" / "single_node" / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return done, done.stdout.splitlines()

    return run


def test_scripts_parse():
    for script in SCRIPTS:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60)
        assert done.stderr == "", script


def _after(lines: list[str], option: str) -> str:
    return lines[lines.index(option) + 1]


def test_mopd_on_eight_gpus(launch):
    done, lines = launch("mopd.sh", gpus=8)
    assert done.returncode == 0, done.stderr
    assert lines[0] == f"folder: {ROOT}"
    assert lines[1] == f"cpu:  threads:  path: {ROOT}"
    assert lines[2:4] == ["-m", "diffusionopd.launch"]
    assert _after(lines, "--config_file") == "scripts/accelerate/multi_gpu.yaml"
    assert _after(lines, "--num_processes") == "8"
    assert _after(lines, "--main_process_port") == "0"
    assert "--multi_gpu" in lines
    assert lines[-3:] == ["scripts/train_opd.py", "--config", "config/opd.py:mopd"]


def test_processes_follow_the_gpus_present(launch):
    for gpus, processes, config in [(16, "8", "multi_gpu"), (2, "2", "multi_gpu"), (1, "1", "single_gpu")]:
        _, lines = launch("mopd.sh", gpus=gpus)
        assert _after(lines, "--num_processes") == processes
        assert _after(lines, "--config_file") == f"scripts/accelerate/{config}.yaml"
        assert ("--multi_gpu" in lines) == (processes != "1")


def test_more_processes_than_gpus_is_an_error(launch):
    done, _ = launch("mopd.sh", gpus=2, NUM_PROCESSES="4")
    assert done.returncode == 2
    assert "NUM_PROCESSES=4" in done.stderr and "2 GPU(s)" in done.stderr


def test_a_cpu_gets_one_process_with_one_thread(launch):
    _, lines = launch("mopd.sh")
    assert lines[1].startswith("cpu: true threads: 1")
    assert _after(lines, "--num_processes") == "1"
    assert _after(lines, "--config_file") == "scripts/accelerate/cpu.yaml"
    assert "--multi_gpu" not in lines


def test_two_processes_on_a_cpu(launch):
    _, lines = launch("mopd.sh", NUM_PROCESSES="2", OMP_NUM_THREADS="3")
    assert lines[1].startswith("cpu: true threads: 3")
    assert _after(lines, "--num_processes") == "2"
    assert "--multi_gpu" in lines


def test_an_engine_brings_its_configuration(launch):
    _, lines = launch("mopd.sh", gpus=8, ENGINE="fsdp2")
    assert _after(lines, "--config_file") == "scripts/accelerate/fsdp2.yaml"
    assert "--multi_gpu" not in lines  # accelerate takes one of the two
    _, lines = launch("eval.sh", ENGINE="deepspeed_zero3", NUM_PROCESSES="2")
    assert _after(lines, "--config_file") == "scripts/accelerate/deepspeed_zero3.yaml"
    assert _after(lines, "--main_process_port") == "0"


def test_an_engine_that_cannot_be_is_an_error(launch):
    for engine, fact in (("fsdp", "deepspeed_zero3"), ("fsdp2", "NUM_PROCESSES")):
        done, _ = launch("mopd.sh", gpus=1, ENGINE=engine)
        assert done.returncode == 2
        assert f"ENGINE={engine}" in done.stderr and fact in done.stderr


def test_gpus_can_be_left_alone(launch):
    _, lines = launch("mopd.sh", gpus=8, ACCELERATE_USE_CPU="true")
    assert _after(lines, "--config_file") == "scripts/accelerate/cpu.yaml"


def test_configuration_and_arguments_pass_through(launch):
    extra = ["--config.train.learning_rate=1e-4", "--config.run_name=two words", "--dry_run"]
    _, lines = launch("mopd.sh", *extra, CONFIG="config/tiny.py:mopd")
    assert lines[-6:] == ["scripts/train_opd.py", "--config", "config/tiny.py:mopd", *extra]


def test_sopd_has_its_own_default(launch):
    _, lines = launch("sopd.sh", "--dry_run")
    assert lines[-4:] == ["scripts/train_opd.py", "--config", "config/opd.py:sopd_pickscore", "--dry_run"]
    _, lines = launch("sopd.sh", CONFIG="config/opd.py:sopd_ocr")
    assert lines[-1] == "config/opd.py:sopd_ocr"


def test_a_teacher_is_named(launch):
    _, lines = launch("teacher.sh", "--dry_run", CONFIG="config/teacher.py:tiny_scene")
    assert lines[-4:] == ["scripts/train_teacher.py", "--config", "config/teacher.py:tiny_scene", "--dry_run"]
    done, _ = launch("teacher.sh")
    assert done.returncode != 0 and "CONFIG" in done.stderr


def test_several_machines(launch):
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    _, lines = launch("../multi_node/sopd.sh", "--dry_run", gpus=4, **variables, NUM_PROCESSES="3")
    options = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
    assert [_after(lines, f"--{option}") for option in options] == ["8", "2", "1", "10.0.0.1", "29501"]
    assert lines[-4:] == ["scripts/train_opd.py", "--config", "config/opd.py:sopd_pickscore", "--dry_run"]
    _, lines = launch("mopd.sh", gpus=4, **variables)  # what a cluster sets means nothing to one machine
    assert _after(lines, "--num_processes") == "4" and "--num_machines" not in lines
    _, lines = launch("../multi_node/eval.sh", gpus=2, **variables, DATASET="ocr", GPUS_PER_NODE="1")
    assert _after(lines, "--num_processes") == "2" and lines[-3:] == ["scripts/evaluate.py", "--dataset", "ocr"]


def test_eval_takes_variables_and_arguments(launch):
    _, lines = launch("eval.sh", "--save_images", CHECKPOINT="a folder", DATASET="ocr")
    assert lines[-6:] == ["scripts/evaluate.py", "--checkpoint_path", "a folder", "--dataset", "ocr", "--save_images"]
    _, lines = launch("eval.sh", "--lora_hf_path", "owner/name")
    assert lines[-3:] == ["scripts/evaluate.py", "--lora_hf_path", "owner/name"]


def test_a_failure_is_passed_on(launch, tmp_path):
    (tmp_path / "broken").write_text("#!/usr/bin/env bash\necho no torch >&2; exit 3\n")
    (tmp_path / "broken").chmod(0o755)
    done, _ = launch("mopd.sh", PYTHON=str(tmp_path / "broken"))
    assert done.returncode == 3


def test_accelerate_reads_the_files():
    for name, processes in (("single_gpu", 1), ("multi_gpu", 8), ("cpu", 1)):
        config = load_config_from_file(str(ROOT / "scripts" / "accelerate" / f"{name}.yaml"))
        assert config.num_processes == processes
        assert config.use_cpu == (name == "cpu")


def test_install_is_skipped_when_nothing_changed(tmp_path):
    """With an active environment, pip runs once for each set of extras and each state of the requirements."""
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    (project / "scripts" / "install.sh").write_text((ROOT / "scripts" / "install.sh").read_text())
    (project / "setup.py").write_text("")
    (project / "constraints.txt").write_text("")
    environment = tmp_path / "environment"
    environment.mkdir()
    log = tmp_path / "log"
    python = environment / "python"
    python.write_text(f'#!/usr/bin/env bash\nif [ "$1" = -c ]; then echo {environment}; else echo "$@" >>{log}; fi\n')
    python.chmod(0o755)

    def install(extras: str) -> list[str]:
        variables = {"PATH": f"{environment}:{os.environ['PATH']}", "VIRTUAL_ENV": str(environment)}
        command = ["bash", "-euc", f"source scripts/install.sh {extras}"]
        subprocess.run(command, cwd=project, env=variables, check=True, timeout=60)
        return log.read_text().splitlines()

    assert len(install("tiny")) == 1
    assert f"{project}[tiny]" in install("tiny")[0]
    assert len(install("tiny")) == 1
    assert len(install("dev")) == 2
    assert len(install("tiny")) == 2
    (project / "constraints.txt").write_text("torch==2.13.0\n")
    assert len(install("tiny")) == 3
