"""`tests/forked.py`: functions in forked processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch.distributed as dist

from .forked import fork


def test_ends_and_outputs_are_told_by_rank():
    def work(rank):
        print(f"out of {rank}", *(os.environ[name] for name in ("RANK", "WORLD_SIZE")))
        logging.getLogger("work").warning("logged")
        warnings.warn("warned", stacklevel=1)
        subprocess.run([sys.executable, "-c", "print('from a program')"], check=True)
        if rank == 1:
            raise ValueError("broken")
        sys.exit({2: 7, 3: "a sentence"}.get(rank))

    ends = fork(work, 4, check=False)
    assert [end.status for end in ends] == [0, 1, 7, 1]
    for rank, end in enumerate(ends):
        assert end.out == f"out of {rank} {rank} 4\nfrom a program\n"
        assert "logged" in end.errors and "warned" in end.errors
    assert "ValueError: broken" in ends[1].errors and "a sentence" in ends[3].errors
    assert "RANK" not in os.environ
    with pytest.raises(AssertionError, match="rank 1.*\n(.*\n)*.*broken"):
        fork(work, 2)


def test_who_hangs_is_killed_with_what_it_started():
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


def test_the_parent_may_not_have_a_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="process group"):
            fork(print)
    finally:
        dist.destroy_process_group()
