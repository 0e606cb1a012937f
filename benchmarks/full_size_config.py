"""The published distillation on the random model that ``full_size.py`` wrote: what it costs, before any download.

``mopd`` is ``config/opd.py:mopd`` with the model, teachers and prompts of that folder, ``merge`` is
``config/merge.py:sd35`` of ten LoRAs; ``small_mopd`` and ``small_merge`` are the same, small.
Those of other families are called like their shapes (``z_image``, ``small_z_image``).
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

_published = runpy.run_path(str(ROOT / "config" / "opd.py"))["get_config"]
_merge = runpy.run_path(str(ROOT / "config" / "merge.py"))["get_config"]


def get_config(name: str) -> ConfigDict:
    """Return ``mopd``, ``merge``, ``small_mopd``, ``small_merge``, or that of another family's shape."""
    if (shape := name.removeprefix("small_")) not in SHAPES:
        return globals()[name]()
    file, _, preset = SHAPES[shape][1].partition(":")
    config = runpy.run_path(str(ROOT / "config" / file))["get_config"](preset)
    return _small(_on(name, config)) if name != shape else _on(name, config)


def mopd() -> ConfigDict:
    """Three teachers, one student, at SD3.5-Medium's size; images are scored by the size of their file.

    Command:   python -m tools.profile_round --config benchmarks/full_size_config.py:mopd
    Hardware:  one GPU of 24 GB or more
    """
    return _on("sd35", _published("mopd"))


def small_mopd() -> ConfigDict:
    """The same on a model of a few layers and images of 64 pixels, in float32, on a CPU."""
    return _small(_on("small", _published("mopd")))


def merge() -> ConfigDict:
    """Ten LoRAs into one, at SD3.5-Medium's size.

    Command:   python -m tools.profile_round --config benchmarks/full_size_config.py:merge
    Hardware:  one GPU of 16 GB or more
    """
    return _merged("sd35")


def small_merge() -> ConfigDict:
    """The same on the model of ``small_mopd``."""
    return _small(_merged("small"))


def _merged(shape: str) -> ConfigDict:
    config = _merge("sd35")
    config.run_name = f"full_size_merge_{shape}"
    config.pretrained.model = str(FOLDER / shape / "model")
    places = [str(FOLDER / shape / "teachers" / task / "lora") for task in TASKS]
    config.loras = [{"name": f"lora_{n}", "lora": places[n % len(places)], "trigger": f"style {n}"} for n in range(10)]
    return config


def _small(config: ConfigDict) -> ConfigDict:
    config.resolution = 64
    config.mixed_precision = "no"
    return config


def _on(shape: str, config: ConfigDict) -> ConfigDict:
    """A configuration with the model, teachers and prompts of a shape's folder."""
    config.run_name = f"full_size_{shape}"
    config.pretrained.model = str(FOLDER / shape / "model")
    config.train.teachers = [
        dict(teacher)
        | {
            "lora_path": str(FOLDER / shape / "teachers" / task / "lora"),
            "dataset": str(FOLDER / shape / "dataset" / task),
            "prompt_fn": "general_ocr",
            "proxy_reward": {"jpeg_compressibility": 1.0},
        }
        for task, teacher in zip(TASKS, config.train.teachers, strict=False)
    ]
    return config
