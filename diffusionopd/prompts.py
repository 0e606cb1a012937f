"""Prompt files, and which prompt each group of a round gets.

Two file formats, named as upstream names them: "general_ocr" is one prompt a line (`{train,test}.txt`); "geneval" is
one JSON object a line with a "prompt" key (`{train,test}_metadata.jsonl`), and the whole object goes to the scorer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusionopd.distributed import Stream, generator


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
    if prompt_fn not in _FORMATS:
        raise PromptError(f"unknown prompt_fn {prompt_fn!r}: use one of {', '.join(sorted(_FORMATS))}")
    if split not in ("train", "test"):
        raise PromptError(f"unknown split {split!r}: use 'train' or 'test'")
    file_name, parse = _FORMATS[prompt_fn]
    path = Path(dataset) / file_name.format(split=split)
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
            f"prompt file {path} does not exist; prompt_fn {prompt_fn!r} reads it: check the path or get the data"
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
    return Prompt(text, record)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


_FORMATS: dict[str, tuple[str, Callable[[str, str], Prompt]]] = {
    "general_ocr": ("{split}.txt", _parse_plain),
    "geneval": ("{split}_metadata.jsonl", _parse_json),
}


class PromptSampler:
    """The prompt of every group of every round, as a pure function of (seed, task, position).

    A group is one prompt with its `num_image_per_prompt` pictures; a round has `groups_per_round` of them over all
    processes. Positions `round * groups_per_round + group` walk through one fresh permutation of the prompts after
    another, so each prompt comes once before any comes twice, whatever the number of processes or restarts.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, task_index: int, groups_per_round: int) -> None:
        """Raises ValueError without prompts or with fewer than one group a round."""
        if len(prompts) == 0:
            raise ValueError("a sampler needs at least one prompt")
        if groups_per_round < 1:
            raise ValueError(f"groups_per_round must be at least 1, got {groups_per_round}")
        self._count = len(prompts)
        self._key = (Stream.PROMPT, seed, task_index)
        self._groups_per_round = groups_per_round
        self._cached: tuple[int, list[int]] = (-1, [])  # the permutation last used: (epoch, its order)

    def index(self, round_index: int, group_index: int) -> int:
        """Index of the prompt for a group (0 <= group_index < groups_per_round) of a round (counted from 0)."""
        if round_index < 0:
            raise ValueError(f"rounds count from 0, got {round_index}")
        if not 0 <= group_index < self._groups_per_round:
            raise ValueError(f"group {group_index} is outside the round's {self._groups_per_round} groups")
        epoch, offset = divmod(round_index * self._groups_per_round + group_index, self._count)
        return self._permutation(epoch)[offset]

    def used_by(self, rounds: range) -> list[int]:
        """Sorted indices of the prompts that these rounds use, each once: what the text cache must hold for them."""
        used: set[int] = set()
        for round_index in rounds:
            used.update(self.index(round_index, group) for group in range(self._groups_per_round))
            if len(used) == self._count:
                break
        return sorted(used)

    def _permutation(self, epoch: int) -> list[int]:
        if self._cached[0] != epoch:
            order = torch.randperm(self._count, generator=generator(*self._key, epoch)).tolist()
            self._cached = (epoch, order)
        return self._cached[1]
