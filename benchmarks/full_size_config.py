"""The published distillation on the random model that ``full_size.py`` wrote: what it costs, before any download.

``mopd`` is ``config/opd.py:mopd`` with the model, teachers and prompts of that folder; ``small_mopd`` the same, small.
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

_published = runpy.run_path(str(ROOT / "config" / "opd.py"))["get_config"]


def get_config(name: str) -> ConfigDict:
    """Return ``mopd`` or ``small_mopd``."""
    return globals()[name]()


def mopd() -> ConfigDict:
    """Three teachers, one student, at SD3.5-Medium's size; images are scored by the size of their file.

    Command:   python -m tools.profile_round --config benchmarks/full_size_config.py:mopd
    Hardware:  one GPU of 24 GB or more
    """
    return _distillation("sd35")


def small_mopd() -> ConfigDict:
    """The same on a model of a few layers and images of 64 pixels, in float32, on a CPU."""
    config = _distillation("small")
    config.resolution = 64
    config.mixed_precision = "no"
    return config


def _distillation(shape: str) -> ConfigDict:
    config = _published("mopd")
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
        for task, teacher in zip(TASKS, config.train.teachers, strict=True)
    ]
    return config
