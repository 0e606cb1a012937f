"""`tests/forked.py`: functions in forked processes."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch.distributed as dist

from diffusionopd.training import train

from .forked import Mark, fork, start


def test_ends_and_outputs_are_told_by_rank(tmp_path):
    def work(rank):
        print(f"out of {rank}", *(os.environ[name] for name in ("RANK", "WORLD_SIZE", "CASE")))
        logging.getLogger("work").warning("logged")
        warnings.warn("warned", stacklevel=1)
        subprocess.run([sys.executable, "-c", "print('from a program')"], check=True)
        if rank == 1:
            raise ValueError("broken")
        sys.exit({2: 7, 3: "a sentence"}.get(rank))

    ends = fork(work, 4, log=tmp_path / "log", environment={"CASE": "x"}, check=False)
    assert [end.status for end in ends] == [0, 1, 7, 1]
    for rank, end in enumerate(ends):
        assert end.out == f"out of {rank} {rank} 4 x\nfrom a program\n"
        assert "logged" in end.errors and "warned" in end.errors
    assert "ValueError: broken" in ends[1].errors and "a sentence" in ends[3].errors
    assert "CASE" not in os.environ and "RANK" not in os.environ
    again = fork(lambda rank: print("more"), log=tmp_path / "log")
    assert again[0].out == "more\n" and (tmp_path / "log" / "rank-0.out").read_text().endswith("program\nmore\n")
    with pytest.raises(AssertionError, match="rank 1.*\n(.*\n)*.*broken"):
        fork(work, 2, environment={"CASE": "x"})


def test_who_hangs_is_killed_with_what_it_started(tmp_path):
    def work(rank):
        if rank == 1:
            child = subprocess.Popen(["sleep", "60"])
            print(child.pid, flush=True)
            child.wait()

    with pytest.raises(TimeoutError, match=r"\[1\]") as error:
        fork(work, 2, timeout=1)
    pid = int(str(error.value).split()[-1])
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and "\nState:\tZ" not in open(f"/proc/{pid}/status").read():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_signals_and_marks(tmp_path):
    mark = Mark(1)

    def work(rank):
        if rank == 0:
            mark.value = 7
        while True:
            time.sleep(0.01)

    with start(work, 3, log=tmp_path) as processes:
        while mark.value != 7:
            time.sleep(0.001)
        processes.send(1, signal.SIGTERM)
        while processes.running() != [0, 2]:
            time.sleep(0.001)
    assert processes.statuses == [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGKILL] and not processes.running()


@pytest.mark.slow
def test_whole_trainings_after_one_in_the_parent(tiny_config, tmp_path):
    """A child trains as its parent did before, bit for bit; so do two processes, over gloo, both times alike."""

    def losses(name, world=0):
        config = tiny_config(num_epochs=2, run_name=name)
        if world:
            ends = fork(lambda rank: train(config), world)
            assert re.search(rf"\nprocesses +{world},", ends[0].out)
        else:
            train(config)
        lines = (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()
        return [(row["round"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]

    assert len(losses("parent")) == 2
    assert losses("child", 1) == losses("parent again")
    assert losses("two", 2) == losses("two again", 2)


def test_the_parent_may_not_have_a_process_group(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="process group"):
            fork(print)
    finally:
        dist.destroy_process_group()
