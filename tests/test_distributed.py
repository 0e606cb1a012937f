"""Randomness keyed by counters, and what the collectives promise, with one process and with three."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from diffusionopd import distributed
from diffusionopd.data.noise import Stream, generator, noise

from .conftest import ROOT


def test_noise_of_a_sample_depends_on_its_key_alone():
    keys = [(Stream.LATENT, 1, 0, 0, i) for i in range(6)]
    together = noise((4, 3, 3), keys)
    assert together.shape == (6, 4, 3, 3)
    assert together.dtype == torch.float32
    torch.manual_seed(123)
    for i in reversed(range(6)):
        assert torch.equal(noise((4, 3, 3), [keys[i]])[0], together[i])


def test_every_part_of_the_key_matters_and_the_numbers_are_normal():
    keys = [(s, a, b) for s in range(3) for a in range(10) for b in range(10)]
    values = noise((1000,), keys)
    assert len({tuple(row[:3].tolist()) for row in values}) == len(keys)
    assert abs(values.mean().item()) < 5 / values.numel() ** 0.5
    assert values.std().item() == pytest.approx(1.0, abs=0.01)
    correlation = torch.corrcoef(values[:50])
    assert (correlation - torch.eye(50)).abs().max() < 0.2
    assert not torch.equal(noise((5,), [(1, 2)]), noise((5,), [(1, 2, 0)]))


def test_negative_keys_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        generator(1, -1)


def test_a_parameter_without_gradient_keeps_none(monkeypatch):
    """Two processes imitated by a sum that doubles: the mean is the gradient itself; no gradient stays no gradient."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda value, *_: 2 * value)
    reached, unreached = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))
    (reached * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    distributed.average_gradients([unreached, reached])
    assert unreached.grad is None
    assert torch.equal(reached.grad, torch.tensor([1.0, 2.0, 3.0]))


def test_together_raises_on_every_process(monkeypatch):
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        distributed.together(fail, "saving")
    done = []
    distributed.together(lambda: done.append(1), "saving")
    assert done == [1]
    monkeypatch.setattr(distributed, "meet", lambda what, word, timeout: [word, 1])  # another process failed
    monkeypatch.setattr(distributed, "gather_over_processes", lambda texts, what: [*texts, "disk full"])
    with pytest.raises(distributed.OtherProcessError, match="saving failed on rank 1: disk full$"):
        distributed.together(lambda: done.append(2), "saving")


def test_texts_are_grouped_by_rank():
    assert distributed.by_rank(["", "", ""]) == ""
    assert distributed.by_rank(["a", "", "b", "a"]) == "ranks 0, 3: a; rank 2: b"


# ---- real processes --------------------------------------------------------------------------------------------------

# Imports torch once and forks three processes for each story; says what each of them came to, as JSON.
STORIES = """
import json, os, signal, sys, time
import torch
import torch.distributed as dist
from diffusionopd import distributed
from diffusionopd.distributed import OtherProcessError

def arrive(rank):
    words = distributed.meet("starting", 10 + rank)
    total = distributed.sum_over_processes(torch.tensor(float(rank)), "summing").item()
    return [words, total, distributed.gather_over_processes(["abc"[rank]] * rank, "gathering")]

def sleep(rank):
    if rank == 1:
        time.sleep(9)
    return distributed.sum_over_processes(torch.ones(1), "averaging the gradient")

def stopped(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    distributed.meet("saving", timeout=2)

def dies(rank):
    distributed.meet("starting")
    if rank == 2:
        os._exit(1)
    distributed.meet("saving", timeout=20)

def differs(rank):
    distributed.meet("saving" if rank == 1 else "evaluating")

def fails(rank):
    def work():
        if rank:
            raise OSError(f"disk {rank} is full")
    distributed.together(work, "saving")

def leaves(rank):
    def gloo():
        names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
        return sum("gloo" in name for name in names)
    distributed.sum_over_processes(torch.ones(1), "summing")
    before = gloo()
    dist.destroy_process_group()
    return [before > 0, gloo()]

def live(story, rank, folder):
    store = dist.FileStore(f"{folder}/{story.__name__}", 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    distributed.set_timeout(2 if story is sleep else 20)
    distributed.meet("beginning", timeout=20)
    try:
        said = story(rank)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    if dist.is_initialized():
        dist.destroy_process_group()  # at once, whoever is gone, or what is said below never is
    os.write(1, json.dumps([story.__name__, rank, said]).encode() + b"\\n")
    os._exit(0)

for story in (arrive, sleep, stopped, dies, differs, fails, leaves):
    children = []
    for rank in range(3):
        if not (pid := os.fork()):
            live(story, rank, sys.argv[1])
        children.append(pid)
    for index in ([0, 2, 1] if story in (sleep, stopped) else [0, 1, 2]):
        if index == 1 and story in (sleep, stopped):
            os.kill(children[1], signal.SIGKILL)
        os.waitpid(children[index], 0)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, dict[int, object]]:
    """story -> rank -> what it came to."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STORIES, str(tmp_path_factory.mktemp("stores"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    stories: dict[str, dict[int, object]] = {}
    for line in done.stdout.splitlines():
        story, rank, said = json.loads(line)
        stories.setdefault(story, {})[rank] = said
    return stories


def test_processes_meet_sum_and_gather(told):
    assert told["arrive"] == {rank: [[10, 11, 12], 3.0, ["b", "c", "c"]] for rank in range(3)}


@pytest.mark.parametrize(
    ("story", "what"), [("sleep", "averaging the gradient"), ("stopped", "saving")], ids=["sleeps", "is stopped"]
)
def test_a_process_that_does_not_come_is_named_by_each_that_waits(told, story, what):
    assert sorted(told[story]) == [0, 2]
    for rank, said in told[story].items():
        assert said == (
            f"OtherProcessError: rank 1 did not arrive at '{what}' within 2 s; its own messages say why "
            f"(this is rank {rank})"
        )


def test_a_process_that_is_gone_is_named_at_once(told):
    for rank in (0, 1):
        assert told["dies"][rank] == (
            f"OtherProcessError: rank 2 ended before 'saving'; its own messages say why (this is rank {rank})"
        )


def test_processes_that_do_different_things_are_told(told):
    others = "OtherProcessError: rank 1 came to 'saving' while rank {} came to 'evaluating': the processes do not run"
    assert all(told["differs"][rank].startswith(others.format(rank)) for rank in (0, 2))
    own = "OtherProcessError: ranks 0, 2 came to 'evaluating' while rank 1 came to 'saving'"
    assert told["differs"][1].startswith(own)


@pytest.mark.skipif(sys.platform != "linux", reason="threads by name are Linux's")
def test_no_thread_of_a_group_outlives_it(told):
    """One that lets go of a tensor while the interpreter ends aborts the process: status -6 after a good run."""
    assert told["leaves"] == dict.fromkeys(range(3), [True, 0])


def test_a_failure_on_some_processes_is_one_on_all(told):
    assert told["fails"] == {
        0: "OtherProcessError: saving failed on rank 1: disk 1 is full; rank 2: disk 2 is full",
        1: "OSError: disk 1 is full",
        2: "OSError: disk 2 is full",
    }
