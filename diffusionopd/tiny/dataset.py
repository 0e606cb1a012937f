"""Stage `dataset`: the prompt files, in the two forms that runs read. A pure function of the grammar."""

from __future__ import annotations

import json
from pathlib import Path

from diffusionopd.tiny.grammar import TASKS, file_captions

SPLITS = ("train", "test")
#: `prompt_fn` of each task: how its prompt files are read.
PROMPT_FN = {"compose": "geneval", "ocr": "general_ocr", "scene": "general_ocr"}


def files() -> dict[str, str]:
    """Path below the dataset folder -> content."""
    return {_path(task, split): _content(task, split) for task in TASKS for split in SPLITS}


def _path(task: str, split: str) -> str:
    return f"{task}/{split}_metadata.jsonl" if PROMPT_FN[task] == "geneval" else f"{task}/{split}.txt"


def _content(task: str, split: str) -> str:
    lines = file_captions(task, split)
    if PROMPT_FN[task] == "geneval":
        return "".join(json.dumps(caption.metadata) + "\n" for caption in lines)
    return "".join(caption.text + "\n" for caption in lines)


def write(folder: Path) -> None:
    """Writes every prompt file below `folder`."""
    for name, content in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
