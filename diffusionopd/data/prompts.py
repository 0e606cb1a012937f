"""Prompt files: what is accepted, what is refused and how.

Two file formats, named as upstream names them: "general_ocr" is one prompt a line (`{train,test}.txt`); "geneval" is
one JSON object a line with a "prompt" key (`{train,test}_metadata.jsonl`), and the whole object goes to the scorer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class PromptError(ValueError):
    """A prompt file or a request for one is unusable; the message says where, what and how to repair it."""


@dataclass(frozen=True)
class Prompt:
    """A caption, and what its scorer must know beyond it ({} for plain text files)."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)


def load_prompts(dataset: str | Path, prompt_fn: str, split: str) -> list[Prompt]:
    """Prompts of a data set in file order; `prompt_fn` ("general_ocr" or "geneval") says which file and format.

    Blank lines are skipped, a byte order mark is ignored. Raises PromptError for an unknown format or split, and for a
    file that is missing, unreadable, not UTF-8, without prompts, or has a malformed line (file and line are named).
    """
    if prompt_fn not in FORMATS:
        raise PromptError(f"unknown prompt_fn {prompt_fn!r}: use one of {', '.join(sorted(FORMATS))}")
    if split not in ("train", "test"):
        raise PromptError(f"unknown split {split!r}: use 'train' or 'test'")
    return read_prompts(Path(dataset) / FORMATS[prompt_fn][0].format(split=split), prompt_fn)


def read_prompts(path: Path, prompt_fn: str) -> list[Prompt]:
    """Prompts of one file in the format of `prompt_fn`. Raises as `load_prompts`."""
    parse = FORMATS[prompt_fn][1]
    lines = _read_text(path, prompt_fn).split("\n")  # not splitlines(): it also cuts at U+2028, which JSON may contain
    prompts = [parse(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise PromptError(f"{path} holds no prompt: it is empty or has blank lines only")
    return prompts


def _read_text(path: Path, prompt_fn: str) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise PromptError(
            f"prompt file {path} does not exist; prompt_fn {prompt_fn!r} reads it: check the path, or fetch the "
            "published prompts: python -m tools.download datasets"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise PromptError(f"prompt file {path} cannot be read: {error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _parse_plain(line: str, where: str) -> Prompt:
    return Prompt(line.strip())


def _parse_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not a JSON object: {error}") from None
    if not isinstance(record, dict):
        raise PromptError(f"{where}: expected a JSON object with a 'prompt', found {type(record).__name__}")
    if "prompt" not in record:
        raise PromptError(f"{where}: the object has no key 'prompt' (keys: {', '.join(map(repr, record)) or 'none'})")
    text = record["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{where}: 'prompt' must be a text that is not blank, found {text!r}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError(f"{where}: 'prompt' holds half of a surrogate pair, which no tokenizer can read")
    try:  # as results are written
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: holds a value that cannot be written again ({error})") from None
    return Prompt(text, record)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


FORMATS: dict[str, tuple[str, Callable[[str, str], Prompt]]] = {
    "general_ocr": ("{split}.txt", _parse_plain),
    "geneval": ("{split}_metadata.jsonl", _parse_json),
}
"""``prompt_fn`` -> the name of its files, and what makes a prompt of a line (and of where the line stands)."""


def write_lines(path: Path, lines: Iterable[str], overwrite: bool = False) -> None:
    """Write a prompt file, whole or not at all. Raises PromptError where there is one already, or it cannot be."""
    if path.exists() and not overwrite:
        raise PromptError(f"{path} exists already; choose another --output, or replace it with --force")
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PromptError(f"{path} cannot be written: {error.strerror}") from error
