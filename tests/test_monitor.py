"""Monitoring happens beside the training: nothing waits for it, and nothing of it is lost."""

from __future__ import annotations

import itertools
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionopd.data.prompts import Prompt
from diffusionopd.rewards.jpeg import JpegCompressibility
from diffusionopd.training.collapse import Signs, diversities, thumbnails
from diffusionopd.training.monitor import Monitor, MonitoredBatch

REWARDS = {"a": {"jpeg_compressibility": 1.0}, "b": {}}
TIMEOUT = 20.0  # seconds until a test that hangs fails


def make_images(tasks="ab"):
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt("a circle", {}), Prompt("a square", {})]
    return [MonitoredBatch(task, torch.rand(2, 3, 16, 16, generator=generator), prompts) for task in tasks]


@pytest.fixture
def monitor(tmp_path):
    made = []

    def make(decode=lambda latents: latents):
        made.append(Monitor(decode, REWARDS, tmp_path, "cpu"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_scores_and_grid_are_those_of_the_images(monitor, tmp_path):
    look = monitor()
    look.watch(make_images(), score=True, grid="grid.png")
    expected = JpegCompressibility().score(make_images()[0].latents, ["", ""], [{}, {}])["jpeg_compressibility"]
    found = look.collect()
    assert found.pop("monitor/a/jpeg_compressibility") == pytest.approx(np.mean(expected))
    assert found.keys() == {"diversity/a", "diversity/b"}
    assert (tmp_path / "grid.png").is_file()
    assert look.collect() == {}
    (tmp_path / "file").write_text("")
    look.watch(make_images(), score=True, grid="file/grid.png")
    with pytest.warns(UserWarning, match="grid"):  # a grid that cannot be written is said by the training thread
        assert "monitor/a/jpeg_compressibility" in look.collect()


def test_diversity_is_the_mean_distance_of_pairs(monitor):
    """Of one task's images over all its batches, against Pillow's own shrinking and a loop over pairs."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (5, 96, 96, 3), np.uint8)
    small = [np.asarray(Image.fromarray(image).reduce(3), np.float64) / 255 for image in images]
    prompts = [Prompt(text) for text in ("one", "two", "one", "three", "two")]
    sums = {"diversity/a": [], "prompt_diversity/a": []}
    for i, j in itertools.combinations(range(5), 2):
        alike = prompts[i] == prompts[j]
        sums["prompt_diversity/a" if alike else "diversity/a"].append(np.sqrt(np.square(small[i] - small[j]).mean()))
    latents = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    look = monitor()
    parts = [MonitoredBatch("a", latents[rows], prompts[rows]) for rows in (slice(0, 2), slice(2, 5))]
    look.watch(parts, score=False)
    assert look.collect() == {name: pytest.approx(np.mean(found), abs=2e-3) for name, found in sums.items()}
    look.watch([MonitoredBatch("a", latents[:1], prompts[:1])], score=False)
    assert look.collect() == {}, "one image has no pair"
    extremes = np.stack([np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)])
    assert diversities(thumbnails(extremes), ["black", "white"]) == {"diversity": 1.0}


def test_signs_of_a_collapse_are_said_once_until_they_are_gone():
    signs = Signs({})
    told = []
    for value in (0.3, 0.2, 0.05, 0.04, None, 0.03, 0.2, 0.05):
        row = {"round": 1, "lora_norm": 0.3, "loss": 0.0}
        told.append(len(signs.of(row if value is None else row | {"diversity/a": value, "prompt_diversity/a": 0.0})))
    assert told == [0, 0, 1, 0, 0, 0, 0, 1] and signs.first == {"diversity/a": 0.3, "prompt_diversity/a": 0.0}
    (said,) = Signs(signs.first).of({"diversity/a": 0.05})  # after a restart
    assert all(fact in said for fact in ("diversity/a", "0.05", "0.3"))
    assert [len(signs.of({"lora_norm": value})) for value in (0.9, 1.1, 1.2, 0.9, 1.1)] == [0, 1, 0, 0, 1]


@pytest.mark.parametrize("failing", ["decoding", "monitoring"])
def test_what_fails_is_said_once_and_so_is_that_it_works_again(monitor, monkeypatch, failing):
    """A decoder or a scorer; all that follows is seen."""
    failures, score = [RuntimeError("out of memory")] * 2, JpegCompressibility.score

    def fail(what):
        if what == failing and failures:
            raise failures.pop()

    monkeypatch.setattr(JpegCompressibility, "score", lambda *given: fail("monitoring") or score(*given))
    look, key = monitor(lambda latents: fail("decoding") or latents), "monitor/a/jpeg_compressibility"
    for facts, seen in (((failing, "memory"), False), ((), False), ((failing, "works again"), True), ((), True)):
        look.watch(make_images(), score=True)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert (key in look.collect()) == seen
        assert len(said) == bool(facts) and all(fact in str(warning.message) for warning in said for fact in facts)


def test_neither_watching_nor_closing_waits_for_images(monitor):
    started, free, decoders = threading.Event(), threading.Event(), []

    def decode(latents):
        started.set()
        assert free.wait(TIMEOUT)
        decoders.append(threading.current_thread())
        return latents

    look = monitor(decode)
    look.watch(make_images(), score=True)  # returns although nothing is decoded
    look.watch(make_images(), score=True)
    assert started.wait(TIMEOUT)
    begun = time.monotonic()
    look.close()
    assert time.monotonic() - begun < TIMEOUT / 2
    free.set()
    look._thread.shutdown(wait=True)
    assert len(decoders) == 1, "the image in work was the last one"
    assert threading.main_thread() not in decoders


@pytest.mark.gpu
def test_images_are_decoded_after_what_computes_them_and_beside_what_follows(monitor, tmp_path):
    streams = []

    def decode(latents):
        streams.append(torch.cuda.current_stream())
        return latents

    look = monitor(decode)
    expected = make_images("a")[0]
    slow = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        slow = (slow @ slow).clamp(-1, 1)  # the latents below wait for it
    latents = expected.latents.cuda() + 0 * slow[0, 0]
    look.watch([MonitoredBatch("a", latents, expected.prompts)], score=True)
    scores = JpegCompressibility().score(expected.latents, ["", ""], [{}, {}])["jpeg_compressibility"]
    assert look.collect()["monitor/a/jpeg_compressibility"] == pytest.approx(np.mean(scores))
    assert streams[0] != torch.cuda.default_stream()
