"""Batches made ahead are the batches; a failure in the thread is the round's own."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from diffusionopd.data.batches import Batch
from diffusionopd.models.conditions import Conditions
from diffusionopd.training import train
from diffusionopd.training.prefetch import BatchError, Rounds


class Maker:
    """Batches that say which round and which thread they come from; fails at one round."""

    device = torch.device("cpu")

    def __init__(self, fails_at=None):
        self.made: list[tuple[int, str]] = []
        self.fails_at = fails_at

    def round(self, index, *, watched):
        self.made.append((index, threading.current_thread().name))
        if index == self.fails_at:
            raise OSError("the disk is gone")
        x = torch.full((1, 4, 2, 2), float(index))
        yield Batch("t", "teacher_t", 1.0, x, Conditions({"tokens": x}), lambda step: x, wants_picture=watched)


def test_the_next_round_is_made_in_a_thread_and_the_last_has_no_next():
    maker = Maker()
    rounds = Rounds(maker, watched=lambda index: index == 2, end=3, ahead=True)
    for index in range(3):
        (batch,) = rounds.batches(index)
        assert (batch.x == index).all()
        assert batch.wants_picture == (index == 2)
    rounds.close()
    assert [index for index, _ in maker.made] == [0, 1, 2]
    assert [name.startswith("batches") for _, name in maker.made] == [False, True, True]


@pytest.mark.parametrize("ahead", [True, False])
def test_rounds_in_any_order_and_without_a_thread(ahead):
    maker = Maker()
    rounds = Rounds(maker, watched=lambda index: False, end=10, ahead=ahead)
    assert [int(rounds.batches(index)[0].x.mean()) for index in (4, 7, 8, 2)] == [4, 7, 8, 2]
    rounds.close()
    assert ahead or [index for index, _ in maker.made] == [4, 7, 8, 2]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_failure_names_its_round_and_comes_no_sooner(ahead):
    rounds = Rounds(Maker(fails_at=1), watched=lambda index: False, end=3, ahead=ahead)
    rounds.batches(0)
    with pytest.raises(BatchError, match="round 2: its batches cannot be made: the disk is gone"):
        rounds.batches(1)
    rounds.close()


def test_a_cache_file_lost_during_a_run_stops_it_with_the_round_saved(tiny_config, tmp_path, monkeypatch):
    from diffusionopd.models.text_cache import TextCache

    load = TextCache._load

    def gone(self, prompt):
        if threading.current_thread().name.startswith("batches") and "first" in prompt:
            self.path(prompt).unlink()
            self._memory.clear()
        return load(self, prompt)

    monkeypatch.setattr(TextCache, "_load", gone)
    with pytest.raises(BatchError, match="round 2: its batches cannot be made: no embedding of prompt 'a photo of"):
        train(tiny_config(save_freq=1))
    assert (tmp_path / "logs" / "run" / "checkpoints" / "checkpoint-1").is_dir()


def test_a_batch_moves_as_a_whole():
    x = torch.zeros(1, 4, 2, 2)
    batch = Batch("t", "teacher_t", 1.0, x, Conditions({"tokens": x}), lambda step: x)
    moved = batch.to(torch.device("meta"))
    assert moved.x.is_meta and moved.text["tokens"].is_meta
    assert dataclasses.replace(moved, x=x, text=batch.text) == batch
