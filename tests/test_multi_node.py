"""Several machines, played by this one: they train what one process trains, stop together, and name who is missing."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys

import pytest

from diffusionopd.signals import STOPPED
from diffusionopd.training import train

from .conftest import ROOT
from .helpers import assert_equal_rounds, assert_latest_loads, metrics
from .helpers_processes import kill, linux, start, wait_for_first_round


@linux
@pytest.mark.slow
def test_two_machines_equal_one_process(tiny_config, tmp_path):
    """Two machines of one CPU process each."""
    common = {"num_epochs": 2, "sample__noise_level": 0.7, "monitor_freq": 1}
    train(tiny_config(run_name="one", sample__train_batch_size=4, train__batch_size=4, **common))
    config, machines = tiny_config(run_name="two", **common), []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        names = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    folders = [tmp_path / f"machine-{rank}" for rank in range(2)]
    try:
        for rank, own in enumerate(folders):
            own.mkdir()
            machines.append(start("multi_node/mopd.sh", config, own, **names, NODE_RANK=str(rank)))
        for own, machine in zip(folders, machines, strict=True):
            assert machine.wait(240) == 0, (own / "output").read_text()
    finally:
        kill(*machines)
    rows = [metrics(tmp_path / "logs" / name) for name in ("one", "two")]
    assert len(rows[0]) == 2
    assert_equal_rounds(*rows)


# ---- under Slurm -----------------------------------------------------------------------------------------------------

# Starts its command once a node, and passes SIGUSR1 on; at SIGTERM it kills, as the real one does.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
assert sys.argv[1] == "--kill-on-bad-exit=0", "75 is no failure"
tasks = [subprocess.Popen(sys.argv[3:], env=os.environ | {{"SLURM_NODEID": str(node)}}) for node in range(2)]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
    requeue) echo "queued again: $2" ;;
esac
"""


@linux
@pytest.mark.slow
def test_a_job_saves_before_its_time_limit_and_queues_again(tiny_config, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "4321", "SLURM_SUBMIT_DIR": str(ROOT)}
    variables |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    run = tmp_path / "logs" / "run"
    job = start("multi_node/slurm.sbatch", tiny_config(num_epochs=10000), tmp_path, "--config.seed=5", **variables)
    try:
        wait_for_first_round(run, job)
        job.send_signal(signal.SIGTERM)  # of a preemption: the tasks get their own
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) == STOPPED, (tmp_path / "output").read_text()
    finally:
        kill(job)
    name, output = f"checkpoint-{len(metrics(run))}", (tmp_path / "output").read_text()
    assert_latest_loads(run, name)
    assert str(run / "checkpoints" / name) in output and "queued again: 4321" in output


def test_the_job_asks_for_what_it_needs():
    text = (ROOT / "scripts" / "multi_node" / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.M))
    assert options["ntasks-per-node"] == "1", "the launcher starts a process a GPU"
    assert options["signal"] == "B:USR1@300" and "requeue" in options and options["open-mode"] == "append"
    assert text.index("#SBATCH --signal") < text.index("set -euo"), "Slurm reads no option after the first command"
    assert "--config.resume_from=auto" in text
