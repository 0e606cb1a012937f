"""Randomness keyed by counters, and what the collectives promise, with one process and with three."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from diffusionopd import distributed
from diffusionopd.data.noise import Stream, generator, noise
from diffusionopd.distributed import OtherProcessError

from .forked import fork


def test_noise_is_normal_and_depends_on_all_of_its_key_alone():
    keys = [(Stream.LATENT, 1, 0, 0, i) for i in range(6)]
    together = noise((4, 3, 3), keys)
    assert together.shape == (6, 4, 3, 3) and together.dtype == torch.float32
    torch.manual_seed(123)
    for i in reversed(range(6)):
        assert torch.equal(noise((4, 3, 3), [keys[i]])[0], together[i])
    keys = [(s, a, b) for s in range(3) for a in range(10) for b in range(10)]
    values = noise((1000,), keys)
    assert len({tuple(row[:3].tolist()) for row in values}) == len(keys)
    assert abs(values.mean().item()) < 5 / values.numel() ** 0.5
    assert values.std().item() == pytest.approx(1.0, abs=0.01)
    assert (torch.corrcoef(values[:50]) - torch.eye(50)).abs().max() < 0.2
    assert not torch.equal(noise((5,), [(1, 2)]), noise((5,), [(1, 2, 0)]))
    with pytest.raises(ValueError, match="non-negative"):
        generator(1, -1)


def test_a_parameter_without_gradient_keeps_none(monkeypatch):
    """Two processes imitated by a sum that doubles: the mean is the gradient itself; no gradient stays no gradient."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda value: 2 * value)
    reached, unreached = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))
    (reached * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    distributed.average_gradients([unreached, reached])
    assert unreached.grad is None
    assert torch.equal(reached.grad, torch.tensor([1.0, 2.0, 3.0]))


def test_in_a_single_process_nothing_is_exchanged():
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        distributed.together(fail, "saving")
    assert distributed.together(lambda: 1, "saving") == 1
    distributed.barrier("saving")
    assert distributed.any_process(3) == 3
    assert distributed.gather_over_processes([1, 2]) == [1, 2]
    assert torch.equal(distributed.mean_over_processes(torch.ones(2)), torch.ones(2))
    assert distributed.by_rank(["", "", ""]) == ""
    assert distributed.by_rank(["a", "", "b", "a"]) == "ranks 0, 3: a; rank 2: b"


def told(story) -> list[list[str]]:
    """The lines of each of three gloo processes; the last one says, as JSON, what ``story(rank)`` came to."""

    def live(rank):
        dist.init_process_group("gloo")
        distributed.barrier("the start")
        try:
            said = story(rank)
        except (ValueError, OSError) as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps(said), flush=True)

    return [end.out.splitlines() for end in fork(live, 3, check=False)]


def test_processes_sum_and_gather_and_fail_together():
    def story(rank):
        own = torch.tensor(float(rank))
        total, mean = distributed.sum_over_processes(own), distributed.mean_over_processes(own)
        gathered = distributed.gather_over_processes(["abc"[rank]] * rank)
        print(json.dumps([distributed.any_process(10 + rank), total.item(), mean.item(), gathered]))

        def work():
            if rank:
                raise OSError(f"disk {rank} is full")

        distributed.together(work, "saving")

    ends = told(story)
    assert [json.loads(first) for first, _ in ends] == [[12, 3.0, 1.0, ["b", "c", "c"]]] * 3
    failures = [json.loads(last) for _, last in ends]
    assert failures[1:] == ["OSError: disk 1 is full", "OSError: disk 2 is full"], "its own error"
    assert failures[0].startswith("OtherProcessError") and "rank 1: disk 1 is full; rank 2: disk 2" in failures[0]


def test_a_process_that_does_not_come_is_named():
    """One that sleeps, and one that is gone, for which nobody waits."""
    for dies in (False, True):

        def story(rank, dies=dies):
            if rank == 1:
                if dies:
                    os._exit(9)
                time.sleep(2.5)
            began = time.monotonic()
            try:
                distributed.barrier("saving", 60 if dies else 1)
            except OtherProcessError as error:
                return [str(error), time.monotonic() - began]

        ends = told(story)
        for rank in (0, 2):
            message, seconds = json.loads(ends[rank][-1])
            assert "'saving'" in message and seconds < 5
        assert "Ranks 1 " in json.loads(ends[0][-1])[0]


@pytest.mark.skipif(sys.platform != "linux", reason="threads by name are Linux's")
def test_no_thread_of_a_group_outlives_it():
    """One that lets go of a tensor while the interpreter ends aborts the process: status -6 after a good run."""

    def story(rank):
        def gloo():
            names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
            return sum("gloo" in name for name in names)

        distributed.any_process(1)
        before = gloo()
        dist.destroy_process_group()
        return [before > 0, gloo()]

    assert told(story) == [["[true, 0]"]] * 3
