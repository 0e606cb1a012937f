"""Fixtures: an untrained SD3 of the tiny world's size, in the very folder format that the hub uses, and LoRAs for
it."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # what is bitwise on a CPU need not be on a GPU; see the mark "gpu"

import copy
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ml_collections import ConfigDict
from peft import LoraConfig, get_peft_model

from diffusionopd import rewards
from diffusionopd.models.backbone import Backbone
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.loading import load_backbone
from diffusionopd.models.lora import Adapters
from diffusionopd.models.sd3 import StableDiffusion3
from diffusionopd.tiny import models
from diffusionopd.training import load_config, train

from . import forked  # noqa: F401 (makes this process one that can be forked, before anything starts threads)
from .helpers import Pattern, with_loras
from .loopback import CONTENT, Server, loopback

ROOT = Path(__file__).resolve().parent.parent
TARGETS = list(StableDiffusion3.LORA_TARGETS)
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `gpu` is skipped without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete, untrained `StableDiffusion3Pipeline` folder."""
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    models.pipeline(models.autoencoder(0), 0).save_pretrained(folder)
    return folder


@pytest.fixture
def backbone(pipeline_folder: Path) -> Backbone:
    """A fresh backbone: adapters injected by one test are not seen by the next."""
    return load_backbone(str(pipeline_folder))


@pytest.fixture
def text() -> Callable[[int, int], Conditions]:
    """`text(batch, seed)`: random conditions of the tiny model's shape."""

    def make(batch: int, seed: int = 0) -> Conditions:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(batch, 2 * models.CONTEXT, 128, generator=generator)
        return Conditions({"tokens": tokens, "pooled": torch.randn(batch, 128, generator=generator)})

    return make


@pytest.fixture(scope="session")
def make_lora(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_lora(seed, rank, alpha, targets)`: a PEFT folder with random A and B, written by PEFT itself; each is
    written once, and nobody changes it."""

    @functools.cache
    def write(seed: int, rank: int, alpha: float, targets: tuple[str, ...], std: float) -> Path:
        transformer = load_backbone(str(pipeline_folder)).transformer
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
        model = get_peft_model(transformer, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        folder = tmp_path_factory.mktemp("lora") / "lora"
        model.save_pretrained(folder)
        return folder

    def make(
        seed: int = 0, rank: int = 4, alpha: float = 8, targets: list[str] | None = None, std: float = 0.05
    ) -> Path:
        return write(seed, rank, alpha, tuple(targets or TARGETS), std)

    return make


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A file server on the loopback interface; see `loopback`."""
    with loopback(monkeypatch, {"/file.bin": CONTENT}) as server:
        yield server


@pytest.fixture
def adapters(backbone: Backbone, make_lora: Callable[..., Path]) -> Adapters:
    """See :func:`with_loras`."""
    return with_loras(backbone, make_lora)


@pytest.fixture(scope="session")
def shared(make_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """Two tasks with prompts and teachers, and a text cache: tests read them and change none."""
    root = tmp_path_factory.mktemp("shared")
    tasks = []
    for i, name in enumerate(("first", "second")):
        folder = root / "dataset" / name
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text("".join(f"a photo of {n} {name} circles\n" for n in range(7)))
        (folder / "test.txt").write_text("a red circle\na blue square\na green triangle\n")
        tasks.append(
            {
                "name": name,
                "dataset": str(folder),
                "lora_path": str(make_lora(20 + i, rank=4 + i)),
                "proxy_reward": {"jpeg_compressibility": 1.0},
                "prompt_fn": "general_ocr",
                "guidance_scale": 1.0 + i,
            }
        )
    return tasks, root / "cache"


@pytest.fixture(scope="session")
def make_config(pipeline_folder: Path, shared: tuple[list[dict], Path]) -> Callable[..., ConfigDict]:
    """`make_config(logdir, key=value, ...)`: a run of two tasks on the untrained model; keys as `train__loss`."""
    tasks, cache = shared
    base = {
        "pretrained__model": str(pipeline_folder), "run_name": "run", "cache_dir": str(cache), "num_epochs": 3,
        "save_freq": 0, "monitor_freq": 0, "sample_freq": 0, "sample__num_steps": 4, "sample__num_batches_per_epoch": 2,
        "sample__train_batch_size": 2, "sample__eval_num_steps": 2, "train__batch_size": 2,
        "train__gradient_accumulation_steps": 2, "train__lora_rank": 4, "train__lora_alpha": 8,
        "train__learning_rate": 1e-3,
    }  # fmt: skip
    from_rewards = {"sample__num_image_per_prompt": 2, "sample__num_batches_per_epoch": 4}
    noisy = from_rewards | {"sample__noise_level": 0.7}
    more = {"sft": from_rewards, "nft": from_rewards, "grpo": noisy, "grpo_guard": noisy}

    def make(logdir: Path, **changes: Any) -> ConfigDict:
        config = load_config(str(ROOT / "config" / "tiny.py") + ":mopd")
        values = {**base, **more.get(changes.get("train__algorithm", ""), {}), "logdir": str(logdir), **changes}
        for key, value in {"train__teachers": copy.deepcopy(tasks), **values}.items():
            section, _, leaf = key.rpartition("__")
            (config[section] if section else config)[leaf] = value
        return config

    return make


@pytest.fixture
def tiny_config(make_config: Callable[..., ConfigDict], tmp_path: Path) -> Callable[..., ConfigDict]:
    """`tiny_config(key=value, ...)`: :func:`make_config` with the logs in this test's folder."""
    return lambda **changes: make_config(tmp_path / "logs", **changes)


@pytest.fixture
def pattern(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the reward :class:`tests.helpers.Pattern`."""
    monkeypatch.setitem(rewards.REGISTRY, "pattern", f"{Pattern.__module__}:{Pattern.__name__}")
    return "pattern"


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """A training sets for its process whether a GPU multiplies in TF32; scorers' tests compare with a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test fails that loads a transformer."""
    place = "diffusionopd.training.loading.load_backbone"
    monkeypatch.setattr(place, lambda *a, **k: pytest.fail("weights were loaded"))


@pytest.fixture
def prompt_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This test's folder, now the current one, with the prompt files of the SD3.5 configurations: 96 and 4 lines."""
    monkeypatch.chdir(tmp_path)
    geneval = '{"prompt": "a dog", "tag": "single_object", "include": [{"class": "dog", "count": 1}]}\n'
    for split, lines in (("train", 96), ("test", 4)):
        for name, line in (("pickscore", 'a sign "HI"\n'), ("ocr", 'a sign "HI"\n'), ("geneval", geneval)):
            path = tmp_path / "dataset" / name / f"{split}{'_metadata.jsonl' if name == 'geneval' else '.txt'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(line * lines + "\n")
    return tmp_path


@pytest.fixture(scope="session")
def finished_runs(make_config: Callable[..., ConfigDict], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`finished_runs(algorithm)`: the folder of a run of three rounds, a checkpoint after each; nobody changes it."""

    @functools.cache
    def run(algorithm: str) -> Path:
        options = {"train__algorithm": algorithm, "save_freq": 1, "train__ema": True, "train__ema_interval": 2}
        config = make_config(tmp_path_factory.mktemp(algorithm), **options)
        train(config)
        return Path(config.logdir, "run")

    return run


@pytest.fixture
def finished(finished_runs: Callable, tiny_config: Callable[..., ConfigDict], tmp_path: Path) -> Callable:
    """`finished(algorithm, key=value, ...)`: a copy of the finished run in this test's folder (to resume, read or
    damage), as its folder and the configuration to go on with."""

    def copied(algorithm: str = "opd", rounds: int = 3, **changes: Any) -> tuple[Path, ConfigDict]:
        folder = tmp_path / "logs" / "run"
        shutil.copytree(finished_runs(algorithm), folder)
        for n in range(rounds + 1, 4):
            shutil.rmtree(folder / "checkpoints" / f"checkpoint-{n}")
        options = {"train__algorithm": algorithm, "save_freq": 1, "train__ema": True, "train__ema_interval": 2}
        return folder, tiny_config(**{"resume_from": "auto", **options, **changes})

    return copied
