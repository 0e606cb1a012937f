"""What the project trains on the random model that ``full_size.py`` wrote: what it costs, before any download.

``mopd`` is ``config/opd.py:mopd`` with the model, teachers and prompts of that folder, ``merge`` is
``config/merge.py:sd35`` of ten LoRAs, ``nft`` and ``guard`` are ``config/teacher.py:nft_geneval`` and ``guard_ocr``;
images are scored by the size of their file. With ``small_`` before its name each is the same, small. Other families are
called like their shapes (``z_image``, ``small_z_image``), and with ``_merge`` after it (``flux1_merge``).
The environment variable FULL_SIZE names another folder than ``logs/full_size``, for both files.
"""

import os
import runpy
from pathlib import Path

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("FULL_SIZE") or ROOT / "logs" / "full_size").resolve()
TASKS = ("pickscore", "ocr", "geneval")  # in the order of the published teachers
PROMPTS = tuple(f"a photo of a red circle left of a blue square {n}" for n in range(64))

SHAPES = {
    "flux1": ("black-forest-labs/FLUX.1-dev", "flux1.py:mopd"),
    "flux2_klein": ("black-forest-labs/FLUX.2-klein-base-4B", "flux2.py:klein_base"),
    "flux2_klein_9b": ("black-forest-labs/FLUX.2-klein-base-9B", "flux2.py:klein_base"),
    "flux2_dev": ("black-forest-labs/FLUX.2-dev", "flux2.py:dev"),
    "z_image": ("Tongyi-MAI/Z-Image", "z_image.py:mopd"),
    "z_image_turbo": ("Tongyi-MAI/Z-Image-Turbo", "z_image.py:turbo"),
    "qwen_image": ("Qwen/Qwen-Image", "qwen_image.py:mopd"),
}
"""Name -> the published model, and the configuration that distils it."""

REWARD = {"jpeg_compressibility": 1.0}


def get_config(name: str) -> ConfigDict:
    """Return the configuration called ``name``.

    Command:   python -m tools.profile_round --config benchmarks/full_size_config.py:mopd
    Hardware:  one GPU of 24 GB or more (merge: 16 GB)
    """
    prefix = "small_" if name.startswith("small_") else ""
    plain = name.removeprefix(prefix)
    if plain in SHAPES:
        config = _on(name, _preset(*SHAPES[plain][1].split(":")))
    elif plain.endswith("_merge"):
        config = merge(name.removesuffix("_merge"))
    else:
        config = globals()[plain]("small" if prefix else "sd35")
    if prefix:  # a few layers and images of 64 pixels, in float32, on a CPU
        config.resolution, config.mixed_precision = 64, "no"
    return config


def mopd(shape: str) -> ConfigDict:
    """Three teachers, one student."""
    return _on(shape, _preset("opd.py", "mopd"))


def merge(shape: str) -> ConfigDict:
    """Ten LoRAs into one."""
    config = _preset("merge.py", "sd35")
    config.run_name = f"full_size_merge_{shape}"
    config.pretrained.model = str(FOLDER / shape / "model")
    places = [str(FOLDER / shape / "teachers" / task / "lora") for task in TASKS]
    config.loras = [{"name": f"lora_{n}", "lora": places[n % len(places)], "trigger": f"style {n}"} for n in range(10)]
    return config


def nft(shape: str) -> ConfigDict:
    """A teacher by DiffusionNFT."""
    return _rewarded(shape, "nft_geneval")


def guard(shape: str) -> ConfigDict:
    """A teacher by GRPO-Guard."""
    return _rewarded(shape, "guard_ocr")


def _preset(file: str, name: str) -> ConfigDict:
    return runpy.run_path(str(ROOT / "config" / file))["get_config"](name)


def _rewarded(shape: str, preset: str) -> ConfigDict:
    config = _preset("teacher.py", preset)
    config.run_name = f"full_size_{preset}_{shape}"
    config.pretrained.model = str(FOLDER / shape / "model")
    config.dataset = str(FOLDER / shape / "dataset" / TASKS[0])
    config.prompt_fn, config.reward_fn = "general_ocr", REWARD
    return config


def _on(shape: str, config: ConfigDict) -> ConfigDict:
    """A distillation with the model, teachers and prompts of a shape's folder."""
    config.run_name = f"full_size_{shape}"
    config.pretrained.model = str(FOLDER / shape / "model")
    config.train.teachers = [
        dict(teacher)
        | {
            "lora_path": str(FOLDER / shape / "teachers" / task / "lora"),
            "dataset": str(FOLDER / shape / "dataset" / task),
            "prompt_fn": "general_ocr",
            "proxy_reward": REWARD,
        }
        for task, teacher in zip(TASKS, config.train.teachers, strict=False)
    ]
    return config
