"""What fails in one process ends all of them, and processes that differ do not begin: two gloo processes."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from diffusionopd.algorithms.opd import Distiller
from diffusionopd.failures import OutOfMemoryError, ending_together, memory_advice
from diffusionopd.rewards.jpeg import JpegCompressibility
from diffusionopd.training import agreement, checkpoint, command, loop
from diffusionopd.training.agreement import agree, data_facts, setup_facts
from diffusionopd.training.metrics import MetricsWriter
from diffusionopd.training.state import RunError

from .forked import Ended, fork


def blocked(failing: set[int]) -> list[Ended]:
    """Two processes, of which some fail while the others wait in a collective."""

    def work(rank):
        dist.init_process_group("gloo")
        with ending_together():
            pass  # a block that ends well leaves nothing behind for the next
        with ending_together():
            if rank in failing:
                raise ValueError("the cat is on the keyboard")
            dist.all_reduce(torch.zeros(1))
            print("not reached")

    return fork(work, 2, check=False)


def test_a_process_that_waits_in_a_collective_ends_with_the_one_that_failed():
    ends = blocked({0})  # which serves the store that both use
    assert [end.status for end in ends] == [1, 1]
    assert "rank 0 failed" in ends[0].errors
    assert ends[0].errors.rstrip().endswith("ValueError: the cat is on the keyboard"), "its own error comes through"
    assert "because rank 0 failed: ValueError: the cat is on the keyboard" in ends[1].errors
    assert "not reached" not in ends[1].out


def test_processes_that_fail_alike_end_by_their_own_errors():
    for end in blocked({0, 1}):
        assert end.status == 1
        assert end.errors.rstrip().endswith("ValueError: the cat is on the keyboard")
        assert "because" not in end.errors


def test_one_process_is_not_watched():
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError), ending_together():
        raise ZeroDivisionError
    assert time.monotonic() - started < 1
    agree({"seed": 1})


def test_a_full_memory_comes_with_advice():
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB"
    with pytest.raises(OutOfMemoryError, match=r"round 7: .*\(CUDA out of memory\)\. Lower it\.") as caught:
        with memory_advice("round 7", "Lower it."):
            raise torch.OutOfMemoryError(text)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(RuntimeError, match="another"), memory_advice("round 7", "Lower it."):
        raise RuntimeError("another error is left alone")


@pytest.fixture
def run_case(tiny_config):
    """``run_case(fault)``: the ends of two processes of a run of two rounds, after ``fault(rank, config)`` in each."""

    def run(fault, **options):
        config = tiny_config(num_epochs=2, save_freq=1, **options)

        def work(rank):
            fault(rank, config)
            command.load_config = lambda *_: config
            raise SystemExit(command.run_command([], "x.py:y", None))

        ends = fork(work, 2, environment={"ACCELERATE_USE_CPU": "true"}, check=False)
        assert [end.status for end in ends] == [1, 1], ends
        return ends

    return run


def test_a_full_memory_in_one_process_ends_the_run_and_keeps_the_checkpoint(run_case, tmp_path):
    def fault(rank, _):
        original, rounds = Distiller.round, []

        def fails(*arguments, **options):
            rounds.append(1)
            if rank == 1 and len(rounds) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return original(*arguments, **options)

        Distiller.round = fails

    ends = run_case(fault)
    for end in ends:
        assert "rank 1" in end.errors and "round 2: the memory of the device is full" in end.errors
        assert "train.batch_size" in end.errors and "activation_checkpointing" in end.errors
    assert "Traceback" not in ends[1].errors
    latest = checkpoint.find_latest(tmp_path / "logs" / "run" / "checkpoints")
    assert latest is not None and latest.name == "checkpoint-1"
    checkpoint.load_state(latest / "state")


def test_a_reward_that_fails_in_one_process_ends_the_run_on_each_with_its_name(run_case):
    def fault(rank, _):
        def broken(*arguments):
            raise ConnectionError("the scorer's disk is gone")

        if rank == 1:
            JpegCompressibility.score = broken

    for end in run_case(fault, train__algorithm="nft", sample__num_image_per_prompt=2):
        assert "Traceback" not in end.errors
        for fact in ("error: rank 1", "'first'", "'jpeg_compressibility'", "the scorer's disk is gone"):
            assert fact in end.errors


def test_a_process_that_hangs_is_named_and_ended(run_case):
    def fault(rank, _):
        if rank == 1:
            MetricsWriter.sync = lambda self: time.sleep(60)  # before a save

    ends = run_case(fault, collective_timeout=3.0)
    assert "Traceback" not in ends[0].errors
    assert "error: " in ends[0].errors and "'saving' within 3 s" in ends[0].errors and "Ranks 1 " in ends[0].errors
    assert "because rank 0 failed" in ends[1].errors


def test_processes_with_other_configurations_do_not_begin(run_case, tmp_path):
    """One of them would run more collectives than the other."""

    def fault(rank, config):
        if rank == 1:
            config.sample.num_batches_per_epoch = config.train.gradient_accumulation_steps = 4

    for end in run_case(fault):
        assert "Traceback" not in end.errors
        for key in ("sample.num_batches_per_epoch", "train.gradient_accumulation_steps"):
            assert f"{key} (rank 0: 2; rank 1: 4)" in end.errors
    assert not (tmp_path / "logs").exists()


def test_what_differs_between_processes_is_named_before_training(tiny_config, tmp_path):
    """Versions, prompts, checkpoint and weights; the facts that are alike are not named."""
    config = tiny_config(num_epochs=1)
    resumed = loop.train(config)

    def differences(facts) -> str:
        with pytest.raises(RunError) as caught:
            agree(facts)
        return str(caught.value)

    def work(rank):
        dist.init_process_group("gloo")
        agree(setup_facts(config.to_dict()))
        versions = agreement.versions()
        agreement.versions = lambda: versions | ({"torch": "2.0.0"} if rank else {})
        said = differences(setup_facts(config.to_dict()))
        assert "version of torch" in said and "rank 1: '2.0.0'" in said and "version of peft" not in said
        prompts = loop.read_prompts(config, loop.check(config, 2, loop.REGISTRY))
        train = prompts.train | ({"first": prompts.train["first"][::-1]} if rank else {})
        agree(data_facts(resumed, prompts.train, prompts.test))
        said = differences(data_facts(resumed, train, prompts.test))
        assert "prompts of first" in said and "second" not in said and "checkpoint" not in said
        said = differences(data_facts(None if rank else resumed, prompts.train, prompts.test))
        assert "checkpoint-1" in said and "rank 1: 'none'" in said and "prompts" not in said

    fork(work, 2)


@pytest.mark.parametrize("which", [None, "student", "teacher_second"])
def test_other_weights_on_one_process_are_named(tiny_config, which):
    config = tiny_config(num_epochs=1)

    def work(rank):
        load = loop.load_models

        def changed(*arguments, **options):
            backbone, adapters = load(*arguments, **options)
            with torch.no_grad():
                parameter = adapters.parameters(which)[3] if which else next(backbone.transformer.parameters())
                parameter.view(-1)[0] += 1e-3 * rank
            return backbone, adapters

        loop.load_models = changed
        with pytest.raises(RunError, match={None: "base model", "student": "student"}.get(which, "teacher of second")):
            loop.train(config)

    fork(work, 2, environment={"ACCELERATE_USE_CPU": "true"})
