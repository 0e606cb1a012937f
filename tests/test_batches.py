"""Batches: the same whatever makes them and however they are cut; a failure in the thread is the round's own."""

from __future__ import annotations

import dataclasses
import itertools
import threading

import pytest
import torch

from diffusionopd.data.batches import BatchError, Batches, NoiseSettings
from diffusionopd.data.noise import Stream, noise
from diffusionopd.data.prompts import Prompt
from diffusionopd.data.rounds import RoundShape
from diffusionopd.data.sampler import PromptSampler
from diffusionopd.data.tasks import Task
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.text_cache import TextCache
from diffusionopd.training import train

PROMPTS = [Prompt(f"prompt {n}") for n in range(5)]
CPU = torch.device("cpu")


class Text:
    """Embeddings that are the prompts' numbers; notes the thread, and fails at its n-th batch if asked to."""

    def __init__(self, fails_at=None):
        self.threads, self.fails_at = [], fails_at

    def get(self, texts, device=None, dtype=None):
        self.threads.append(threading.current_thread().name)
        if len(self.threads) == self.fails_at:
            raise OSError("the disk is gone")
        return Conditions({"pooled": torch.tensor([[float(text.split()[1])] for text in texts])})


def make(text=None, rank=0, processes=1, batch=4, backward=2, ahead=False, rounds=3, seed=42, same_latent=False):
    """A task of 8 images per round, two per prompt."""
    shape = RoundShape(rounds, processes, 1, batch, backward, 8 // batch // processes, 2, 1)
    return Batches(
        shape,
        [Task("t")],
        NoiseSettings(seed=seed, prefetch=ahead, same_latent=same_latent),
        prompts={"t": PROMPTS},
        samplers={"t": PromptSampler(PROMPTS, seed, 0, 4)},
        text=text or Text(),
        latent_shape=(2, 2, 2),
        steps=lambda index, task: (0, 1),
        wants_images=lambda index: index == 2,
        device=CPU,
        dtype=torch.float32,
        rank=rank,
    )


def samples_of(batches, index):
    """Sample -> everything that it is, in a round."""
    found = {}
    for batch in batches.round(index):
        noises = batch.noise, batch.step_noise(1), batch.forward_noise(1), batch.text["pooled"]
        for i, row in enumerate(batch.rows):
            assert batch.text["pooled"][i].item() == float(row.prompt.text.split()[1])
            found[row.sample] = (row.prompt, *(part[i] for part in noises))
    return found


def test_a_samples_prompt_and_noise_are_a_function_of_its_counters():
    """Whatever the number of processes, the batch, the backward batch, the thread and the order of rounds; and written
    out by hand."""
    shapes = ((1, 8, 8, True), (2, 4, 1, False), (4, 2, 2, True), (2, 2, 2, False))
    runs = [
        [make(None, r, processes, batch, backward, ahead, rounds=9) for r in range(processes)]
        for processes, batch, backward, ahead in shapes
    ]
    for index in (4, 5, 0, 1):
        reference = samples_of(make(rounds=9), index)
        assert sorted(reference) == list(range(8))
        for ranks in runs:
            found = {k: v for batches in ranks for k, v in samples_of(batches, index).items()}
            assert found.keys() == reference.keys()
            for sample, (prompt, *tensors) in found.items():
                assert prompt == reference[sample][0]
                assert all(map(torch.equal, tensors, reference[sample][1:]))
        prompt, latent, step, forward, _ = reference[3]
        shape, key = (2, 2, 2), (42, index, 0, 3)
        assert prompt == PROMPTS[PromptSampler(PROMPTS, 42, 0, 4).index(index, 3 // 2)]
        assert torch.equal(latent, noise(shape, [(Stream.LATENT, *key)])[0])
        assert torch.equal(step, noise(shape, [(Stream.STEP, *key, 1)])[0])
        assert torch.equal(forward, noise(shape, [(Stream.FORWARD, *key, 1)])[0])
    for batches in itertools.chain(*runs):
        batches.close()


def make_tasks(weights, accumulation=1):
    """Tasks a, b, ... of four backward batches each."""
    tasks = [Task(name, weight=weight) for name, weight in zip("abc", weights, strict=False)]
    sampler = PromptSampler(PROMPTS, 42, 0, 4)
    known = {"prompts": dict.fromkeys("abc", PROMPTS), "samplers": dict.fromkeys("abc", sampler)}
    return dataclasses.replace(
        make(), tasks=tasks, shape=RoundShape(3, 1, len(tasks), 4, 2, 2, 2, accumulation), **known
    )


def test_rows_have_their_tasks_share_of_the_loss():
    for given, expected in (((0.1, 0.1, 0.1), [1.0] * 3), ((3.0, 1.0, 2.0), [1.5, 0.5, 1.0])):
        found = {row.task: row.weight for batch in make_tasks(given).round(0) for row in batch.rows}
        assert list(found.values()) == expected, "exactly 1 where all are equal"


def test_every_optimizer_step_has_each_tasks_share():
    """Where that divides: else, and where a round has one step, a task comes after the other."""
    for accumulation, expected in (
        (8, "aaaabbbb"), (16, "aaaabbbb"), (4, "aabbaabb"), (2, "abababab"), (1, "aaaabbbb")
    ):  # fmt: skip
        made = make_tasks([1.0, 1.0], accumulation).round(0)
        assert "".join(task for batch in made for task in batch.slices) == expected
        for task in "ab":
            assert [r.sample for b in made for r in b.rows if r.task == task] == list(range(8))


def test_streams_seeds_and_rounds_never_share_noise():
    drawn = [tensor for index in (0, 1) for seed in (1, 2) for part in samples_of(make(seed=seed), index).values()
             for tensor in part[1:4]]  # fmt: skip
    assert len({tuple(tensor.flatten().tolist()) for tensor in drawn}) == len(drawn) == 2 * 2 * 8 * 3


def test_images_of_a_prompt_may_start_alike():
    found = samples_of(make(same_latent=True), 0)
    for sample in range(8):
        for other in range(8):
            assert torch.equal(found[sample][1], found[other][1]) == (sample // 2 == other // 2)
            assert torch.equal(found[sample][2], found[other][2]) == (sample == other)


def test_the_next_round_is_made_in_a_thread_and_the_last_has_no_next():
    text = Text()
    batches = make(text, ahead=True)
    for index in range(3):
        made = batches.round(index)
        assert [batch.wants_images for batch in made] == [index == 2] * 2 + [False] * 2, "those of the first batch"
    batches.close()
    assert [name.startswith("batches") for name in text.threads] == [False] * 4 + [True] * 8


def test_a_failure_names_its_round_and_comes_no_sooner():
    for ahead in (True, False):
        batches = make(Text(fails_at=5), ahead=ahead)
        batches.round(0)
        with pytest.raises(BatchError) as caught:
            batches.round(1)
        assert "round 2" in str(caught.value) and "the disk is gone" in str(caught.value)
        batches.close()


def test_a_batch_moves_with_all_it_has():
    moved = make().round(0)[0].to(torch.device("meta"))
    assert moved.noise.is_meta and moved.text["pooled"].is_meta


def test_a_cache_file_lost_during_a_run_stops_it_with_the_round_saved(tiny_config, tmp_path, monkeypatch):
    get = TextCache.get

    def gone(self, prompts, *args, **options):
        if threading.current_thread().name.startswith("batches") and "first" in prompts[0]:
            self.path(prompts[0]).unlink()
            self._load._rows.clear()
        return get(self, prompts, *args, **options)

    monkeypatch.setattr(TextCache, "get", gone)
    with pytest.raises(BatchError) as caught:
        train(tiny_config(save_freq=1, cache_dir=str(tmp_path / "cache")))
    assert "round 2" in str(caught.value) and "'a photo of" in str(caught.value)
    assert (tmp_path / "logs" / "run" / "checkpoints" / "checkpoint-1").is_dir()
