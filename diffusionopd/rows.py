"""Rows of tensors, taken and put back by ranges: an index would be a copy to the device, which the host waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def runs(rows: Sequence[int]) -> list[slice]:
    """Row numbers as ranges of consecutive ones, in their order."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    return [slice(rows[i], rows[i] + end - i) for i, end in zip(starts, [*starts[1:], len(rows)], strict=True)]


def take(x: Tensor, rows: Sequence[int]) -> Tensor:
    """``x[rows]``; a view where they are a range."""
    parts = [x[run] for run in runs(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def put(parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """The tensor of which :func:`take` gives these parts; their rows, each increasing, are all of it."""
    if len(parts) == 1:
        return parts[0][1]
    pieces = []
    for rows, part in parts:
        start = 0
        for run in runs(rows):
            pieces.append((run.start, part[start : start + run.stop - run.start]))
            start += run.stop - run.start
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda placed: placed[0])])
