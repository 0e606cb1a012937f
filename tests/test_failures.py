"""What fails in one process ends all of them, and processes that differ do not begin: two gloo processes."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch

from diffusionopd.failures import OutOfMemoryError, ending_together, memory_advice
from diffusionopd.training import checkpoint
from diffusionopd.training.agreement import agree

from .ranks import run_ranks

BLOCKED = """
import sys
import torch
import torch.distributed as dist
from diffusionopd import failures

dist.init_process_group("gloo")
failed = {failed}
with failures.ending_together():
    pass  # a block that ends well leaves nothing behind for the next
with failures.ending_together():
    if dist.get_rank() in failed:
        raise ValueError("the cat is on the keyboard")
    dist.all_reduce(torch.zeros(1))
    print("not reached")
"""


@pytest.mark.parametrize("failed", [0, 1])
def test_a_process_that_waits_in_a_collective_ends_with_the_one_that_failed(tmp_path, failed):
    script = tmp_path / "script.py"
    script.write_text(BLOCKED.format(failed=[failed]))
    ends = run_ranks(script)
    own, other = ends[failed], ends[1 - failed]
    assert own.status == other.status == 1
    assert f"rank {failed} failed, all processes end: ValueError: the cat is on the keyboard" in own.errors
    assert own.errors.rstrip().endswith("ValueError: the cat is on the keyboard"), "its own error comes through"
    assert f"rank {1 - failed} ends because rank {failed} failed: ValueError: the cat" in other.errors
    assert "not reached" not in other.out


def test_processes_that_fail_alike_end_by_their_own_errors(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BLOCKED.format(failed=[0, 1]))
    for end in run_ranks(script):
        assert end.status == 1
        assert end.errors.rstrip().endswith("ValueError: the cat is on the keyboard")
        assert "ends because" not in end.errors


def test_one_process_is_not_watched():
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError), ending_together():
        raise ZeroDivisionError
    assert time.monotonic() - started < 1
    agree({"configuration": {"seed": 1}})


def test_a_full_memory_comes_with_advice():
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB"
    with pytest.raises(OutOfMemoryError, match=r"round 7: .*full \(CUDA out of memory\)\. Lower it\.") as caught:
        with memory_advice("round 7", "Lower it."):
            raise torch.OutOfMemoryError(text)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(RuntimeError, match="another"), memory_advice("round 7", "Lower it."):
        raise RuntimeError("another error is left alone")


RUN = """
import json, os
import torch
from ml_collections import ConfigDict
from diffusionopd.algorithms.opd import Distiller
from diffusionopd.training import run_command, run

rank, case = int(os.environ["RANK"]), os.environ["CASE"]
config = ConfigDict(json.load(open({config!r})))
run.load_config = run_command.__globals__["load_config"] = lambda *_: config

if case == "config" and rank == 1:
    config.sample.num_batches_per_epoch = config.train.gradient_accumulation_steps = 4
if case == "memory":
    original = Distiller.round
    def fails(self, batches, name, **options):
        if rank == 1 and name == "round 2":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return original(self, batches, name, **options)
    Distiller.round = fails

if case == "reward" and rank == 1:
    from diffusionopd.rewards.jpeg import JpegCompressibility
    def broken(self, *arguments):
        raise ConnectionError("the scorer's disk is gone")
    JpegCompressibility.score = broken

message = run_command([], "x.py:y", None)
raise SystemExit(message)
"""


@pytest.fixture
def run_case(tiny_config, tmp_path):
    """``run_case(case)``: the ends of both processes of a run of two rounds with that fault."""

    def run(case, **options):
        config = tiny_config(num_epochs=2, save_freq=1, **options)
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        script = tmp_path / "run.py"
        script.write_text(RUN.format(config=str(tmp_path / "config.json")))
        return run_ranks(script, environment={"CASE": case})

    return run


def test_a_full_memory_in_one_process_ends_the_run_and_keeps_the_checkpoint(run_case, tmp_path):
    ends = run_case("memory")
    assert [end.status for end in ends] == [1, 1]
    for end in ends:
        assert "round 2: the memory of the device is full (CUDA out of memory)" in end.errors
        assert "rank 1" in end.errors
        assert "train.batch_size" in end.errors and "activation_checkpointing" in end.errors
    assert "Traceback" not in ends[1].errors
    latest = checkpoint.find_latest(tmp_path / "logs" / "run" / "checkpoints")
    assert latest is not None and latest.name == "checkpoint-1"
    checkpoint.load_state(latest / "state")


def test_a_reward_that_fails_in_one_process_ends_the_run_on_each_with_its_name(run_case):
    for end in run_case("reward", train__algorithm="nft", sample__num_image_per_prompt=2):
        assert end.status == 1
        assert "Traceback" not in end.errors
        assert (
            "error: rank 1: the samples of task 'first' cannot be scored: reward 'jpeg_compressibility' failed: "
            'ConnectionError("the scorer\'s disk is gone")' in end.errors
        )


def test_processes_with_other_configurations_do_not_begin(run_case, tmp_path):
    """One of them would run more collectives than the other."""
    ends = run_case("config")
    for end in ends:
        assert end.status == 1
        assert "Traceback" not in end.errors
        assert re.search(
            r"the processes do not agree, nothing was trained: configuration sample.num_batches_per_epoch: 2 on rank "
            r"0, 4 on rank 1; configuration train.gradient_accumulation_steps: 2 on rank 0, 4 on rank 1\.",
            end.errors,
        )
    assert not (tmp_path / "logs").exists()


DIFFERENT = """
import dataclasses, json, os
from pathlib import Path
import torch
import torch.distributed as dist
from accelerate import Accelerator
from ml_collections import ConfigDict
from diffusionopd.config_schema import check
from diffusionopd.training import run, state, agreement
from diffusionopd.training.loop import Trainer

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
config = ConfigDict(json.load(open({config!r})))

def attempt(name, work):
    try:
        work()
        message = "nothing"
    except ValueError as error:
        message = f"{{type(error).__name__}}: {{error}}"
    print(json.dumps([name, message]), flush=True)

attempt("same", lambda: agreement.agree(agreement.setup_facts(config.to_dict())))
versions = state.versions
if rank == 1:
    agreement.versions = lambda: versions() | {{"torch": "2.0.0"}}
attempt("version", lambda: agreement.agree(agreement.setup_facts(config.to_dict())))
agreement.versions = versions

def build(**patches):
    originals = {{name: getattr(run, name) for name in patches}}
    if rank == 1:
        for name, change in patches.items():
            setattr(run, name, change(originals[name]))
    try:
        return Trainer(config, check(config, 2), accelerator)
    finally:
        for name, original in originals.items():
            setattr(run, name, original)

def other_prompts(read):
    def changed(*arguments):
        sets = read(*arguments)
        first = next(iter(sets.train))
        return dataclasses.replace(sets, train={{**sets.train, first: list(sets.train[first])[::-1]}})
    return changed

def other_weights(which):
    def change(load):
        def changed(*arguments, **options):
            backbone, adapters = load(*arguments, **options)
            with torch.no_grad():
                parameter = adapters.parameters(which)[3] if which else next(backbone.transformer.parameters())
                parameter.view(-1)[0] += 1e-3
            return backbone, adapters
        return changed
    return change

attempt("prompts", lambda: build(read_prompts=other_prompts))
for which in (None, "student", "teacher_second"):
    attempt(f"weights {{which}}", lambda: build(load_models=other_weights(which)))
trainer = build()
trainer.run()
config.resume_from = "auto"
if rank == 1:
    run.open_resume = lambda *arguments: None
attempt("checkpoint", build)
dist.destroy_process_group()
names = [Path(f"/proc/self/task/{{task}}/comm").read_text() for task in os.listdir("/proc/self/task")]
print(json.dumps(["threads", f"{{sum('gloo' in name for name in names)}} are left"]))
"""


def test_what_differs_between_processes_is_named_before_training(tiny_config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(num_epochs=1).to_dict()))
    script = tmp_path / "script.py"
    script.write_text(DIFFERENT.format(config=str(tmp_path / "config.json")))
    ends = run_ranks(script)
    said = []
    for end in ends:
        assert end.status == 0, end.errors
        said.append(dict(json.loads(line) for line in end.out.splitlines() if line.startswith("[")))
    assert said[0] == said[1], "the same on every rank"
    agrees = "RunError: the processes do not agree, nothing was trained: "
    hashes = r"'\w+\.\.\. on rank 0, '\w+\.\.\. on rank 1\. Start every process with the same"
    expected = {
        "same": "nothing$",
        "version": rf"{agrees}version torch: '[\d.]+\S*' on rank 0, '2\.0\.0' on rank 1\. Start",
        "prompts": rf"{agrees}training the prompts of first: {hashes}",
        "weights None": rf"{agrees}weights the base model \(torch\.float32\): {hashes}",
        "weights student": rf"{agrees}weights the student: {hashes}",
        "weights teacher_second": rf"{agrees}weights the teacher of second: {hashes}",
        "threads": "0 are left$",  # one that ends with the interpreter may abort it
        "checkpoint": rf"{agrees}checkpoint to resume from: 'checkpoint-1 \(\w{{12}}\)' on rank 0, 'none' on rank 1\.",
    }
    assert said[0].keys() == expected.keys()
    for name, pattern in expected.items():
        assert re.match(pattern, said[0][name]), (name, said[0][name])
