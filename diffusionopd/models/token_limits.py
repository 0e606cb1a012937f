"""Prompts that are longer than text encoders read: which, and by how much. diffusers says so in whole batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusionopd.models.conditions import NEGATIVE, Row, TextEncoder, split_reference


def cut_tokens(tokenizers: Mapping[str, Any], texts: Sequence[str], limits: Sequence[int]) -> dict[str, str]:
    """Texts that are cut -> how many tokens each tokenizer loses. CLIP's limit is its own, others' are given."""
    losses: dict[str, dict[str, list[str]]] = {}
    for name, tokenizer in tokenizers.items():
        own = [tokenizer.model_max_length] * len(texts) if "CLIP" in type(tokenizer).__name__ else limits
        every = tokenizer(list(texts), verbose=False).input_ids if texts else ()
        for text, limit, ids in zip(texts, own, every, strict=True):
            if len(ids) > limit:
                lost = f"{len(ids) - limit} of {len(ids)} tokens beyond the {limit}"
                losses.setdefault(text, {}).setdefault(lost, []).append(name)
    return {
        text: ", ".join(f"{lost} of {' and '.join(names)}" for lost, names in own.items())
        for text, own in losses.items()
    }


class MeasuringEncoder:
    """A text encoder that notes in `cut` which of its prompts are cut, as `cut_tokens` has them.

    ``limit``: how many tokens of its prompt a row has room for.
    """

    def __init__(self, encode: TextEncoder, tokenizers: Mapping[str, Any], limit: Callable[[Row], int]):
        self._encode, self._tokenizers, self._limit = encode, tokenizers, limit
        self.cut: dict[str, str] = {}

    def __call__(self, prompts: Sequence[str]) -> list[Row]:
        """As `TextEncoder`."""
        rows = self._encode(prompts)
        own = [(split_reference(p)[0], self._limit(r)) for p, r in zip(prompts, rows, strict=True) if p != NEGATIVE]
        self.cut |= cut_tokens(self._tokenizers, [text for text, _ in own], [limit for _, limit in own])
        return rows


def describe_cut(cut: Mapping[str, str], most: int = 3) -> str:
    """One line about all that is cut: the first few by their beginnings, with what they lose."""
    shown = [f"{text if len(text) <= 60 else text[:57] + '...'!r} loses {lost}" for text, lost in [*cut.items()][:most]]
    more = f"; and {len(cut) - most} more" if len(cut) > most else ""
    count = "1 prompt is" if len(cut) == 1 else f"{len(cut)} prompts are"
    return f"{count} longer than the text encoders read: {'; '.join(shown)}{more}"


@contextmanager
def quiet_pipeline(pipeline: Any) -> Iterator[None]:
    """Without the pipeline's own warnings of what it cuts: it decodes the padding of the whole batch."""
    loggers = [logging.getLogger(name) for name in (type(pipeline).__module__, "transformers.tokenization_utils_base")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
