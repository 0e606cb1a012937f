"""What tests of several files share: reading a run, comparing states, batches and students to train on."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from peft import PeftModel

from diffusionopd.algorithms import ALGORITHMS
from diffusionopd.algorithms.base import Models
from diffusionopd.algorithms.opd import Opd, OpdSettings
from diffusionopd.algorithms.optim import OptimizerSettings, StudentOptimizer
from diffusionopd.algorithms.settings import SamplerSettings
from diffusionopd.data.batches import Batch, Row
from diffusionopd.data.noise import Stream, noise
from diffusionopd.data.prompts import Prompt
from diffusionopd.data.rounds import RoundShape
from diffusionopd.models.loading import load_backbone
from diffusionopd.models.lora import Adapters
from diffusionopd.models.policies import STUDENT, Policies
from diffusionopd.rewards.images import Images, each_uint8
from diffusionopd.training import checkpoint, setup, train

from .forked import Ended, fork


class Pattern:
    """A reward: pixels times a random pattern. No two images are near a tie, of which advantages would make
    differences of rounding; a file's size changes by steps."""

    signs = np.random.default_rng(0).choice([-1.0, 1.0], (64, 64, 3))

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Any]) -> dict[str, np.ndarray]:
        """As of any scorer; images of 64 pixels."""
        return {"pattern": np.array([(self.signs * pixels).sum() for pixels in each_uint8(images)])}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rows(run: Path) -> list[dict[str, Any]]:
    """The same without the time that rounds took."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in metrics(run)]


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_latest_loads(run: Path, name: str) -> None:
    """The newest checkpoint of a run is the one of this name, and can be resumed."""
    latest = checkpoint.find_latest(run / "checkpoints")
    assert latest is not None and latest.name == name
    checkpoint.load_state(latest / "state")


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """A real limit, as of a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def change_models(patch: pytest.MonkeyPatch, change: Callable[[Any, Any], object]) -> None:
    """Runs begin after ``change(backbone, adapters)``."""
    load = setup.load_models

    def changed(*arguments: Any, **options: Any) -> Any:
        models = load(*arguments, **options)
        with torch.no_grad():
            change(*models)
        return models

    patch.setattr(setup, "load_models", changed)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in a checkpoint's state."""
    return checkpoint.load_state(folder / "state")[0]


def student(folder: Path) -> dict[str, torch.Tensor]:
    """The student's among them."""
    return {name: tensor for name, tensor in state(folder).items() if name.startswith("student.")}


def assert_bitwise(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_near(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], rel: float, floor: float = 0.0) -> None:
    """Each tensor near its counterpart, by their norms."""
    for mine, other in zip(a, b, strict=True):
        assert (mine - other).norm() <= rel * other.norm() + floor


def assert_equal_rounds(a: Sequence[dict], b: Sequence[dict], rel: float = 2e-4) -> None:
    """Rows of `metrics.jsonl` of one run on different numbers of processes: equal but for the order of sums.

    A JPEG file has a whole number of bytes, and a colour on the other side of a rounding moves it by several: means of
    four files, in kB, were up to 0.002 apart; the mean of one process alone was 0.02 from that of all.
    """
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"seconds"}:
            jpeg = key.endswith("/jpeg_compressibility")
            expected = pytest.approx(two[key], rel=0, abs=0.008) if jpeg else pytest.approx(two[key], rel=rel, abs=1e-9)
            assert one[key] == expected, (one["round"], key)


def train_forked(config: ConfigDict, world: int = 2) -> list[Ended]:
    """Train in several processes, to their ends."""
    return fork(lambda rank: train(config), world)


def with_loras(backbone, make_lora, kind=Adapters) -> Adapters:
    """A student and two teachers of different rank on a backbone."""
    adapters = kind(backbone.transformer)
    adapters.add_student(STUDENT, rank=8, alpha=16, target_modules=backbone.LORA_TARGETS, seed=1)
    adapters.add_teacher("teacher_a", make_lora(1))
    adapters.add_teacher("teacher_b", make_lora(2, rank=6, alpha=3))
    return adapters


def perturb(adapters, name: str = STUDENT, std: float = 0.02, seed: int = 11) -> None:
    """Move an adapter, as if it had already learnt something, so that losses are of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapters.parameters(name):
            p.add_(torch.randn(p.shape, generator=generator) * std)


def gradients(adapters) -> list[torch.Tensor]:
    """Copies of the student's gradients."""
    return [p.grad.clone() for p in adapters.parameters(STUDENT) if p.grad is not None]


def velocity(backbone, text, sigma=0.7) -> torch.Tensor:
    """Of two samples that are always the same."""
    x = torch.randn(2, *backbone.latent_shape(64), generator=torch.Generator().manual_seed(5))
    return backbone.velocity(x, sigma, text(2))[0]


def peft_velocity(folder: Path, lora: Path, text) -> torch.Tensor:
    """The same with a LoRA applied by stock PEFT: the oracle."""
    backbone = load_backbone(str(folder))
    backbone.transformer = PeftModel.from_pretrained(backbone.transformer, lora).eval()
    return velocity(backbone, text)


def velocities(backbone, adapters, text, names) -> list[torch.Tensor]:
    """The velocity under each adapter, `[2, ...]` each, and then the student's gradients that are not zero."""
    x = torch.randn(2, *backbone.latent_shape(64), generator=torch.Generator().manual_seed(5)).to(backbone.device)
    found = []
    for name in names:
        with torch.set_grad_enabled(name == STUDENT):
            adapters.use(name)
            found.append(backbone.velocity(x, 0.7, text(2).to(backbone.device))[0])
    torch.stack([v for v in found if v.requires_grad]).square().mean().backward()
    found = [v.detach() for v in found] + [g for g in gradients(adapters) if g.any()]
    adapters.transformer.zero_grad()
    return found


def make_batches(
    backbone, text, guidances=(1.0, 1.0), size=2, watched=False, tasks="ab", steps=(0, 1, 2, 3)
) -> list[Batch]:
    """A batch for each letter of `tasks`, whose teacher is `teacher_<task>`; `steps` are trained."""
    shape = backbone.latent_shape(64)

    def batch(i: int, task: str, guidance: float) -> Batch:
        def draw(stream: Stream, step: int) -> torch.Tensor:
            return noise(shape, [(i, s, step, stream) for s in range(size)])

        first = tasks[:i].count(task) * size
        return Batch(
            rows=tuple(
                Row(task, first + s, Prompt("a prompt"), f"teacher_{task}", guidance, steps=tuple(steps))
                for s in range(size)
            ),
            noise=noise(shape, [(i, s) for s in range(size)]),
            text=text(size, i),
            draw=draw,
            wants_images=watched,
        )

    guidances = [*guidances, *[1.0] * len(tasks)]
    return [batch(i, task, guidances[i]) for i, task in enumerate(tasks)]


def make_opd(backbone, adapters, text, solver="dpm1", noise_level=0.0, guidance=1.0, inner=1, scale=1.0, **settings):
    """On-policy distillation at 4 of 5 steps."""
    backbone.negative = text(1, 99)
    optimizer = StudentOptimizer(
        adapters.parameters(STUDENT), OptimizerSettings(learning_rate=1e-3, loss_scale=scale, adam_weight_decay=0.0)
    )
    sampler = SamplerSettings(
        num_steps=5, guidance_scale=guidance, solver=solver, noise_level=noise_level, timestep_fraction=0.99,
        num_inner_epochs=inner,
    )  # fmt: skip
    shape = RoundShape(1, 1, 2, 2, 2, 1, 1, 2)
    models = Models(Policies(backbone, adapters), optimizer)
    return Opd(models, OpdSettings(**settings), sampler, backbone.sigmas(5, 64), shape)


def with_rows(batches: Sequence[Batch], **values) -> list[Batch]:
    """Batches whose rows have other values."""
    return [replace(b, rows=tuple(replace(row, **values) for row in b.rows)) for b in batches]


class Darkness:
    """A reward of the latents themselves, in the place of a scoring thread: minus the mean of the first channel."""

    def __init__(self, score=lambda latents: -latents[:, 0].mean(dim=(1, 2)).double().numpy()) -> None:
        self.score = score

    def submit(self, latents, prompts, metadata) -> Future:
        future: Future = Future()
        future.set_result({"dark": self.score(latents), "avg": self.score(latents)})
        return future


def make_learner(kind, backbone, adapters, text, reward=None, lr=1e-3, inner=1, accumulation=99, batches=1, **settings):
    """NFT, GRPO, GRPO-Guard or SFT at 3 of 4 steps, on batches of four, two images per prompt."""
    backbone.negative, backbone.decode = text(1, 99), lambda latents: latents
    optimizer = StudentOptimizer(
        adapters.parameters(STUDENT), OptimizerSettings(learning_rate=lr, loss_scale=1e4, adam_weight_decay=0.0)
    )
    noisy = {"solver": "flow", "noise_level": 0.7} if "grpo" in kind else {"solver": "dpm1"}
    sampler = SamplerSettings(num_steps=4, timestep_fraction=0.99, num_inner_epochs=inner, cfg=False, **noisy)
    models = Models(Policies(backbone, adapters), optimizer, dict.fromkeys("ab", reward or Darkness()))
    shape = RoundShape(100, 1, 2, 4, 4, batches, 2, accumulation)
    own = {
        "nft": {"nft_beta": 0.5, "old_policy_decay": (0, 0.1, 0.5)},
        "grpo": {"clip_range": 1e-3},
        "grpo_guard": {"clip_range_lt": 1e-3, "clip_range_gt": 2e-3},
        "sft": {},
    }[kind]
    cls = ALGORITHMS[kind]
    return cls(models, cls.groups[0](**(own | settings)), sampler, backbone.sigmas(4, 64), shape)


def loss_table(result) -> torch.Tensor:
    """The mean losses of a round, `[tasks, trained steps]`."""
    means = result.losses.sums / result.losses.counts
    return means[:, ~means.isnan().any(0)]


def kept_gradients(learner, batches, monkeypatch):
    """The result and the gradients of a round whose optimizer step is left out."""
    with monkeypatch.context() as patch:
        patch.setattr(learner.optimizer, "step", lambda: 0.0)
        result = learner.round(batches)
    found = gradients(learner.policies.adapters)
    learner.optimizer.discard()
    return result, found
