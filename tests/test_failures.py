"""What fails in one process ends all of them, and processes that differ do not begin: two gloo processes."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from diffusionopd.algorithms.opd import Opd
from diffusionopd.data.prompts import load_prompts
from diffusionopd.data.tasks import Task
from diffusionopd.failures import ending_together
from diffusionopd.rewards import RewardError
from diffusionopd.rewards.jpeg import JpegCompressibility
from diffusionopd.training import agreement, check, setup, train
from diffusionopd.training.agreement import agree, data_facts, setup_facts
from diffusionopd.training.command import plain_errors
from diffusionopd.training.memory import OutOfMemoryError, memory_advice
from diffusionopd.training.metrics import MetricsWriter
from diffusionopd.training.resume import RunError, find_start
from diffusionopd.training.settings import WatchSettings

from .forked import Ended, fork
from .helpers import assert_latest_loads, change_models


def test_a_process_that_waits_in_a_collective_ends_with_the_one_that_failed():
    """Rank 0, which serves the store that both use, or both alike, which then end by their own errors."""
    for failing in ({0}, {0, 1}):

        def work(rank, failing=failing):
            dist.init_process_group("gloo")
            with ending_together():
                pass  # a block that ends well leaves nothing behind for the next
            with ending_together():
                if rank in failing:
                    raise ValueError("the cat is on the keyboard")
                dist.all_reduce(torch.zeros(1))
                print("not reached")

        for rank, end in enumerate(fork(work, 2, check=False)):
            assert end.status == 1 and not end.out
            last = end.errors.rstrip().splitlines()[-1]
            if rank in failing:
                assert last == "ValueError: the cat is on the keyboard" and "because" not in end.errors
            else:
                assert last.endswith("because rank 0 failed: ValueError: the cat is on the keyboard")


def test_a_scorer_that_one_process_lacks_is_left_out_by_all(monkeypatch):
    def build(name, *_):
        if name == "ocr" and dist.get_rank() == 1:
            raise RewardError("its weights are on machine 0")
        return JpegCompressibility()

    def work(rank):
        dist.init_process_group("gloo")
        tasks = [Task("one", proxy_reward={"ocr": 1.0, "tiny_ocr": 1.0}), Task("two", proxy_reward={"ocr": 1.0})]
        plan = SimpleNamespace(tasks=tasks, watch=WatchSettings(eval_freq=1))
        with ExitStack() as closing:
            found = setup._build_scorers(plan, SimpleNamespace(device="cpu", is_main_process=rank == 0), closing)
        print({task: list(own) for task, own in found.items()})

    monkeypatch.setattr(setup, "build_scorer", build)
    ends = fork(work, 2)
    assert [end.out for end in ends] == ["{'one': ['tiny_ocr']}\n"] * 2
    assert [end.errors.count("rank 1: its weights are on machine 0") for end in ends] == [2, 0]


def test_one_process_is_not_watched_and_a_full_memory_comes_with_advice():
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError), ending_together():
        raise ZeroDivisionError
    assert time.monotonic() - started < 1
    agree({"seed": 1})
    with pytest.raises(OutOfMemoryError) as caught, memory_advice("round 7", "Lower it."):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 80 GiB")
    assert all(fact in str(caught.value) for fact in ("round 7", "(CUDA out of memory)", "Lower it."))
    with pytest.raises(RuntimeError, match="another"), memory_advice("round 7", "Lower it."):
        raise RuntimeError("another error is left alone")


@pytest.fixture
def run_case(tiny_config):
    """``run_case(fault)``: the ends of a run of two rounds in two processes, after ``fault(rank, config)`` in each."""

    def run(fault, status=1, **options) -> list[Ended]:
        config = tiny_config(num_epochs=2, save_freq=1, **options)

        def work(rank):
            fault(rank, config)
            with plain_errors():
                train(config)

        ends = fork(work, 2, check=False)
        assert [end.status for end in ends] == [status, status], ends
        return ends

    return run


def test_a_full_memory_in_one_process_ends_the_run_and_keeps_the_checkpoint(run_case, tmp_path):
    def fault(rank, _):
        original, rounds = Opd.round, []

        def fails(*arguments, **options):
            rounds.append(1)
            if rank == 1 and len(rounds) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return original(*arguments, **options)

        Opd.round = fails

    facts = ("rank 1", "round 2", "train.batch_size", "activation_checkpointing")
    ends = run_case(fault)
    assert all(fact in end.errors for fact in facts for end in ends) and "Traceback" not in ends[1].errors
    assert_latest_loads(tmp_path / "logs" / "run", "checkpoint-1")


def test_a_reward_that_fails_in_one_process_ends_the_run_with_its_name(run_case):
    def broken(*arguments):
        raise ConnectionError("the scorer's disk is gone")

    def fault(rank, _):
        if rank == 1:
            JpegCompressibility.score = broken

    ends = run_case(fault, train__algorithm="nft")
    for fact in ("error: rank 1", "'first'", "'jpeg_compressibility'", "the scorer's disk is gone"):
        assert fact in ends[0].errors
    assert "Traceback" not in ends[0].errors + ends[1].errors


def test_a_process_that_hangs_is_named_and_ended(run_case):
    def fault(rank, _):
        if rank == 1:
            MetricsWriter.sync = lambda self: time.sleep(60)  # before a save

    waited, hung = run_case(fault, collective_timeout=3.0)
    assert "'saving'" in waited.errors and "3 s" in waited.errors and "Ranks 1 " in waited.errors
    assert "because rank 0 failed" in hung.errors, hung


def test_processes_with_other_configurations_do_not_begin(run_case, tmp_path):
    """One of them would run more collectives than the other."""

    def fault(rank, config):
        if rank == 1:
            config.sample.num_batches_per_epoch = config.train.gradient_accumulation_steps = 4

    first, second = run_case(fault, status=2)
    for key in ("sample.num_batches_per_epoch", "train.gradient_accumulation_steps"):
        assert f"{key} (rank 0: 2; rank 1: 4)" in first.errors
    assert "error:" not in second.errors, "said once"
    assert not (tmp_path / "logs").exists()


def test_what_differs_between_processes_is_named_before_training(finished):
    """Versions, prompts and checkpoint; the facts that are alike are not named."""
    _, config = finished("opd")

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
        resume, fresh = find_start(config, 1), find_start(config.copy_and_resolve_references(), 1)
        fresh.folder = None
        prompts = {task.name: load_prompts(task.dataset, task.prompt_fn, "train") for task in check(config, 2).tasks}
        agree(data_facts(resume, prompts, {}))
        other = prompts | ({"first": prompts["first"][::-1]} if rank else {})
        said = differences(data_facts(resume, other, {}))
        assert "prompts of first" in said and "second" not in said and "checkpoint" not in said
        said = differences(data_facts(fresh if rank else resume, prompts, {}))
        assert "checkpoint-3" in said and "rank 1: 'none'" in said and "prompts" not in said

    fork(work, 2)


def test_other_weights_on_one_process_are_named(tiny_config):
    config = tiny_config(num_epochs=1)
    for which, named in ((None, "base model"), ("student", "student"), ("teacher_second", "teacher of second")):

        def work(rank, which=which, named=named):
            def change(backbone, adapters):
                parameter = adapters.parameters(which)[3] if which else next(backbone.transformer.parameters())
                parameter.view(-1)[0] += 1e-3 * rank

            change_models(pytest.MonkeyPatch(), change)
            with pytest.raises(RunError, match=named):
                train(config)

        fork(work, 2)
