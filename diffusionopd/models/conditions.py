"""What a transformer is given beside latents and time: named tensors, whose names and shapes the model family knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusionopd.files import sha256
from diffusionopd.rows import take

NEGATIVE = "\0negative"
"""Stands for the base model's own negative prompt among prompts: not always the empty one, nor encoded like others."""

_REFERENCE = "\0reference"


@dataclass(frozen=True)
class Reference:
    """An image file beside a prompt, as it was when the prompt was read."""

    path: str
    size: int  # in bytes
    modified: int  # in nanoseconds

    @staticmethod
    def to(file: Path) -> Reference:
        """To a file that is there."""
        status = file.stat()
        return Reference(str(file.resolve()), status.st_size, status.st_mtime_ns)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its content."""
        return sha256(self.path)

    def beside(self, text: str) -> str:
        """What stands for a prompt with this image among prompts."""
        return _REFERENCE + json.dumps([text, *astuple(self)])


def split_reference(prompt: str) -> tuple[str, Path | None]:
    """Text and image of what stands for a prompt; None without an image."""
    if not prompt.startswith(_REFERENCE):
        return prompt, None
    text, path, *_ = json.loads(prompt.removeprefix(_REFERENCE))
    return text, Path(path)


Row = Mapping[str, Tensor]
"""The conditions of one prompt, as they are cached: tensors without batch dimension and without padding.

Those whose name begins with ``tokens`` are sequences ``[L, ...]``, all of one length; others have no length.
"""

TextEncoder = Callable[[Sequence[str]], list[Row]]
"""B prompts to B rows, in order; :data:`NEGATIVE` stands for the model's negative prompt, what :class:`Reference` makes
for a prompt with an image."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of B samples: tensors ``[B, ...]`` by name, on one device.

    Where the sequences of the samples differ in length, they are padded with zeros at the end and ``lengths`` has each
    one's own; it stays on the host, so that building a mask or a slice never waits for the device.
    """

    parts: Mapping[str, Tensor]
    lengths: tuple[int, ...] | None = None

    @staticmethod
    def of(rows: Sequence[Row]) -> Conditions:
        """One batch of ``rows``; error as of :meth:`cat`."""
        return Conditions.cat([Conditions({name: part[None] for name, part in row.items()}) for row in rows])

    @staticmethod
    def cat(batches: Sequence[Conditions]) -> Conditions:
        """Several batches as one, padded to the longest. ValueError for different names."""
        names = batches[0].parts.keys()
        if any(batch.parts.keys() != names for batch in batches):
            raise ValueError("rows of different text encoders cannot be one batch")
        lengths = tuple(length for batch in batches for length in batch.each_length())
        longest = max(batch.padded_length for batch in batches)
        parts = {name: torch.cat([_padded(name, batch.parts[name], longest) for batch in batches]) for name in names}
        return Conditions(parts, lengths if min(lengths) < longest else None)

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]

    @property
    def padded_length(self) -> int:
        """Length of the sequences with padding; 0 without any."""
        return next((part.shape[1] for name, part in self.parts.items() if _is_sequence(name)), 0)

    def each_length(self) -> tuple[int, ...]:
        """Each sample's own length of its sequences."""
        return self.lengths or (self.padded_length,) * len(self)

    def mask(self) -> Tensor | None:
        """Which positions of the sequences are a sample's own, bool ``[B, L]``; None if all are."""
        if self.lengths is None:
            return None
        device = next(iter(self.parts.values())).device
        ends = torch.tensor(self.lengths).to(device, non_blocking=True)
        return torch.arange(self.padded_length, device=device) < ends[:, None]

    def index(self, rows: int | Sequence[int]) -> Conditions:
        """Some of the samples; one integer keeps the batch dimension."""
        rows = [rows] if isinstance(rows, int) else rows
        lengths = self.lengths and tuple(self.lengths[i] for i in rows)
        return Conditions({name: take(part, rows) for name, part in self.parts.items()}, lengths)

    def each(self) -> list[Conditions]:
        """The samples one by one, without padding."""
        rows = [self.index(i) for i in range(len(self))]
        if self.lengths is None:
            return rows
        return [
            Conditions({name: part[:, :length] if _is_sequence(name) else part for name, part in row.parts.items()})
            for row, length in zip(rows, self.lengths, strict=True)
        ]

    def expand(self, batch: int) -> Conditions:
        """One sample seen as ``batch`` equal ones, without a copy; ``batch`` samples stay as they are."""
        if len(self) not in (1, batch):
            raise ValueError(f"cannot expand {len(self)} samples to {batch}: only one can be repeated")
        lengths = self.lengths if self.lengths is None or len(self) == batch else self.lengths * batch
        return Conditions({n: part.expand(batch, *part.shape[1:]) for n, part in self.parts.items()}, lengths)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> Conditions:
        """On another device, or with floating-point parts in another dtype, or both."""
        return self._map(lambda part: part.to(device, dtype if part.is_floating_point() else None, non_blocking))

    def pin_memory(self) -> Conditions:
        """In pinned memory of the host."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        return Conditions({name: change(part) for name, part in self.parts.items()}, self.lengths)


def _is_sequence(name: str) -> bool:
    return name.startswith("tokens")


def _padded(name: str, part: Tensor, length: int) -> Tensor:
    """``part`` ``[B, L, ...]`` with zeros behind its sequences, if it is of sequences."""
    missing = length - part.shape[1] if _is_sequence(name) else 0
    return pad(part, [0, 0] * (part.ndim - 2) + [0, missing]) if missing else part
