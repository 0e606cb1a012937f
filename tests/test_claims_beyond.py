"""What draws for the report on strengths, and the figures of its images."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusionopd.data.noise import Stream, noise
from diffusionopd.data.prompts import Prompt
from diffusionopd.evaluation.job import Job, Model, load_policies
from diffusionopd.evaluation.testsets import Benchmark
from diffusionopd.models.lora_files import load_lora
from diffusionopd.tiny.models import CONTEXT
from experiments.claims.beyond import MODEL, Painter, Source, figures, sources
from experiments.claims.results import ClaimsError
from experiments.claims.runs import Runner
from experiments.claims.worlds import TINY

from .conftest import ROOT

COMPOSE = ROOT / "assets" / "tiny" / "teachers" / "compose" / "lora"
PROMPTS = [Prompt("a photo of a red circle"), Prompt("a photo of a blue square left of a red circle")]


def test_a_target_draws_along_the_extrapolated_velocity(tmp_path):
    """Beside a loop of Euler steps from the two models' own velocities; at strength 1 it is the teacher."""
    lora = load_lora(COMPOSE)
    benchmark = Benchmark("compose", PROMPTS, ("tiny_compose",), 10, 1.0)
    models = [Model("base"), Model("teacher", lora)]
    job = Job(str(MODEL), models, [benchmark], tmp_path, 64, max_sequence_length=CONTEXT, cache_dir=str(tmp_path))
    cache, policies = load_policies(job, torch.float32, torch.device("cpu"))
    painter, backbone = Painter(policies, cache, seed=3, images=2), policies.backbone
    sigmas = [*backbone.sigmas(10, 64).tolist()]
    conditions = cache.get([prompt.text for prompt in PROMPTS for _ in range(2)], backbone.device)
    start = noise(backbone.latent_shape(64), [(Stream.EVALUATION, 3, i, n) for i in range(2) for n in range(2)])
    drawn = {}
    for strength in (1.0, 2.0):
        x = start
        with torch.no_grad():
            for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
                v = {name: policies.use(name).backbone.velocity(x, now, conditions)[0] for name in ("base", "teacher")}
                x = x + (then - now) * (v["base"] + strength * (v["teacher"] - v["base"]))
        expected = (backbone.decode(x).permute(0, 2, 3, 1).numpy() * 255).round()
        source = Source("target", 60, strength, COMPOSE, "compose", drawn=strength)
        drawn[strength] = painter.pictures(source, "teacher", PROMPTS).astype(float)
        assert np.abs(drawn[strength] - expected).max() <= 1
    base = painter.pictures(Source("base", 0, 1.0, None), "base", PROMPTS).astype(float)
    distances = [np.abs(images - base).mean() for images in drawn.values()]
    assert distances[1] > distances[0] > 5


def test_figures_are_the_slow_loops():
    rng = np.random.default_rng(0)
    images, base = rng.integers(0, 256, (2, 4, 64, 64, 3), dtype=np.uint8)
    task, lines = TINY.tasks[0], [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]

    class Half:
        def score(self, images, prompts, metadata):
            assert len(images) == len(prompts) == len(metadata)
            return {task.reward: np.array([1.0, 0.0, 1.0, 0.5])}

    found = figures(Source("opd", 24, 1.5, None), task, lines, images, base, Half())

    def small(image):
        return image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)) / 255

    def distance(a, b):
        return np.sqrt(((small(a.astype(float)) - small(b.astype(float))) ** 2).mean())

    pairs = [(i, j) for i, j in combinations(range(4), 2) if lines[i] == lines[j]]
    assert (found.kind, found.rounds, found.strength, found.task) == ("opd", 24, 1.5, task.name)
    assert found.score == 0.625
    assert found.spread == pytest.approx(np.mean([distance(images[i], images[j]) for i, j in pairs]), abs=1e-4)
    assert found.from_base == pytest.approx(np.mean([*map(distance, images, base)]), abs=1e-4)


def test_every_strength_of_both_losses_and_ages_draws(tmp_path):
    runner = Runner(tmp_path, ROOT / "experiments" / "claims" / "results")
    with pytest.raises(ClaimsError, match="first: python") as error:
        sources(TINY, 2, runner)
    missing = str(error.value).removeprefix("no LoRA in ").partition(";")[0].split(", ")
    for folder in missing:
        Path(folder).mkdir(parents=True, exist_ok=True)
    found = sources(TINY, 2, runner)
    assert found[0] == Source("base", 0, 1.0, None)
    names = [(source.kind, source.rounds, source.strength, source.task) for source in found]
    assert len(set(names)) == len(names)
    strengths = (0.75, 1.0, 1.25, 1.5, 2.0)
    for rounds in (24, 60):
        for task in TINY.names:
            teacher = tmp_path / "tiny" / f"teacher_{task}-seed2" / "checkpoints" / f"checkpoint-{rounds}" / "lora"
            own = {source for source in found if source.lora == teacher}
            assert {(s.strength, s.drawn, s.kind) for s in own} == {
                (s, s, "target" if s != 1 else "teacher") for s in strengths
            }
        for loss in ("opd", "paper"):
            students = {s.strength: s for s in found if (s.kind, s.rounds) == (loss, rounds)}
            assert sorted(students) == list(strengths) and {s.drawn for s in students.values()} == {1.0}
            assert students[2.0].lora.parts[-4] == f"strength_{loss}_{rounds}_2-seed2"
    chosen = next(s for s in found if (s.kind, s.rounds, s.strength) == ("opd", 60, 1.0))
    assert chosen.lora.parts[-4].startswith("opd_") and chosen.lora.parts[-2] == "checkpoint-80"
    with pytest.raises(ClaimsError, match="which rate"):
        sources(TINY, 2, Runner(tmp_path, tmp_path / "nothing"))
