"""Prompt files: what is accepted, what is refused and how.

Two file formats, named as upstream names them: "general_ocr" is one prompt a line (`{train,test}.txt`); "geneval" is
one JSON object a line with a "prompt" key (`{train,test}_metadata.jsonl`), and the whole object goes to the scorer. Its
"reference_image" is the path of the image that an editing model edits, from the file's folder.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffusionopd.models.conditions import Reference

REFERENCE = "reference_image"


class PromptError(ValueError):
    """A prompt file or a request for one is unusable; the message says where, what and how to repair it."""


@dataclass(frozen=True)
class Prompt:
    """A caption, what its scorer must know beyond it ({} for plain text files), and its place, "FILE, line N"."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    source: str = field(default="", compare=False)
    reference: Reference | None = None  # the image beside it

    @property
    def key(self) -> str:
        """What its conditions are encoded and looked up by: its text, with its image if it has one."""
        return self.reference.beside(self.text) if self.reference else self.text

    @property
    def image(self) -> str:
        """SHA-256 of the image beside it, whatever its path; "" if it has none."""
        return self.reference.digest if self.reference else ""


def load_prompts(dataset: str | Path, prompt_fn: str, split: str) -> list[Prompt]:
    """Prompts of a data set in file order; `prompt_fn` ("general_ocr" or "geneval") says which file and format.

    Lines end with a line feed, a carriage return, or both; blank ones are skipped, a byte order mark is ignored. Raises
    PromptError for an unknown format, for test prompts of a data set that is one file, and for a file that is missing,
    unreadable, not UTF-8, without prompts, or has malformed lines (all are named with file and line), or lines of
    another format.
    """
    if prompt_fn not in FORMATS:
        raise PromptError(f"unknown prompt_fn {prompt_fn!r}: use one of {', '.join(sorted(FORMATS))}")
    if split != "train" and Path(dataset).is_file():
        name = FORMATS[prompt_fn][0].format(split=split)
        raise PromptError(f"{dataset} is one file, of training prompts alone: name a folder with {name}")
    return read_prompts(prompt_file(dataset, prompt_fn, split), prompt_fn)


def prompt_file(dataset: str | Path, prompt_fn: str, split: str) -> Path:
    """The file of a split: in a folder by the format's name; a data set that is a file is its training prompts."""
    path = Path(dataset)
    return path if split == "train" and path.is_file() else path / FORMATS[prompt_fn][0].format(split=split)


def with_trigger(prompts: Iterable[Prompt], trigger: str) -> list[Prompt]:
    """The prompts with the word that calls a LoRA: in the place of ``{trigger}``, or in front, "TRIGGER, a red fox".

    A trigger with ``{prompt}`` is put around each prompt instead: "{prompt}, in the style of TRIGGER". Raises
    PromptError for a prompt that has a place for a trigger where there is none, or one that goes around it.
    """
    made = list(prompts)
    for index, prompt in enumerate(made):
        if "{trigger}" in prompt.text and (not trigger or "{prompt}" in trigger):
            wrong = f"the trigger goes around prompts, {trigger!r}" if trigger else "the task has no trigger"
            raise PromptError(f"{prompt.source} has {{trigger}}, but {wrong}: {prompt.text[:80]!r}")
        if "{trigger}" in prompt.text:
            text = prompt.text.replace("{trigger}", trigger)
        elif "{prompt}" in trigger:
            text = trigger.replace("{prompt}", prompt.text)
        else:
            text = f"{trigger}, {prompt.text}" if trigger else prompt.text
        made[index] = replace(prompt, text=text)
    return made


def load_folders(
    folders: Iterable[str | Path], prompt_fn: str, split: str, most: int | None = None, trigger: str = ""
) -> tuple[list[Prompt], dict[str, range]]:
    """The prompts of several data sets one after another, the first `most` of each, and the places of each one's.

    Places are by the names of the folders. ``trigger`` as of `with_trigger`. Raises as `load_prompts`.
    """
    prompts: list[Prompt] = []
    places = {}
    for folder in folders:
        own = with_trigger(load_prompts(folder, prompt_fn, split)[:most], trigger)
        places[Path(folder).name] = range(len(prompts), len(prompts) + len(own))
        prompts += own
    _refuse_mixed(prompts)
    return prompts, places


def read_prompts(path: Path, prompt_fn: str) -> list[Prompt]:
    """Prompts of one file in the format of `prompt_fn`. Raises as `load_prompts`."""
    try:
        content = path.read_bytes().removeprefix(BOM_UTF8)
    except FileNotFoundError:
        name = f" {path.parent.name}" if path.parent.parent.name == "dataset" else ""
        raise PromptError(
            f"prompt file {path} does not exist; prompt_fn {prompt_fn!r} reads it: check the path, or fetch the "
            f"published prompts: python -m tools.download datasets{name}"
        ) from None
    except OSError as error:
        raise PromptError(f"prompt file {path} cannot be read: {error}") from error
    prompts, bad = [], []
    for number, line in enumerate(content.splitlines(), 1):  # bytes: at line feeds and carriage returns alone
        source = f"{path}, line {number}"
        try:
            if text := line.decode().strip():
                prompts.append(_with_reference(FORMATS[prompt_fn][1](text, source), path.parent))
        except (ValueError, RecursionError) as error:
            bad.append(f"{source}: no prompt as {prompt_fn!r} has them, in UTF-8: {error}")
    if bad:
        raise PromptError(bad[0] if len(bad) == 1 else f"{path} has {len(bad)} bad lines:\n{listed(bad)}")
    _refuse_mixed(prompts)
    if not prompts:
        raise PromptError(f"{path} holds no prompt: it is empty or has blank lines only")
    if all("\t" in prompt.text for prompt in prompts) and prompt_fn == "general_ocr":
        raise PromptError(
            f"{path} is a table: each of its lines has a tab, such as {prompts[0].text[:80]!r}. Keep the column of the "
            "prompts alone"
        )
    return prompts


def listed(lines: Sequence[str], most: int = 10) -> str:
    """The lines below each other, indented, those beyond the first few as a number."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"    {line}" for line in [*lines[:most], *more])


def _with_reference(prompt: Prompt, folder: Path) -> Prompt:
    """A prompt with the image that its metadata name. ValueError unless that is there, and square as what is drawn."""
    if (name := prompt.metadata.get(REFERENCE)) is None:
        return prompt
    try:
        with Image.open(folder / name) as image:
            width, height = image.size
        reference = Reference.to(folder / name)
    except (OSError, TypeError) as error:
        raise ValueError(f"its {REFERENCE} {name!r} cannot be read: {error}") from error
    if width != height:
        raise ValueError(f"its {REFERENCE} {folder / name} has {width} x {height} pixels: crop it to a square")
    return replace(prompt, reference=reference)


def _refuse_mixed(prompts: Sequence[Prompt]) -> None:
    """Prompts of a task are batched, and those with an image do not fit beside others."""
    kinds = {prompt.reference is None: prompt for prompt in prompts}
    if len(kinds) > 1:
        places = f"{kinds[False].source} has a {REFERENCE}, {kinds[True].source} has none"
        raise PromptError(f"{places}: make a data set and a task of each kind")


def _parse_text(line: str, source: str) -> Prompt:
    record = None
    if line.startswith("{"):
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
    if isinstance(record, dict):
        raise PromptError("it is a JSON object, which prompt_fn 'geneval' reads from <split>_metadata.jsonl")
    return Prompt(line, source=source)


def _parse_json(line: str, source: str) -> Prompt:
    record = json.loads(line)
    text = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected a JSON object with a 'prompt' that is not blank, found {line[:80]}")
    json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # as results are written
    return Prompt(text, record, source)


FORMATS: dict[str, tuple[str, Callable[[str, str], Prompt]]] = {
    "general_ocr": ("{split}.txt", _parse_text),
    "geneval": ("{split}_metadata.jsonl", _parse_json),
}
"""``prompt_fn`` -> the name of its files, and what makes a prompt of a line and its place."""
