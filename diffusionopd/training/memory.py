"""A full memory of the device, said with what to set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ROUND_MEMORY = (
    "Lower train.tasks_per_pass, or train.batch_size (and raise train.gradient_accumulation_steps to match): the "
    "student that is trained is the same. Or set activation_checkpointing. Then go on with --config.resume_from=auto."
)


class OutOfMemoryError(ValueError):
    """Raised where the memory of the device is full; says doing what, and what to set."""


@contextmanager
def memory_advice(what: str, remedy: str) -> Iterator[None]:
    """Turn torch's error for a full memory inside the block into OutOfMemoryError: ``what`` needs it, ``remedy``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = " ".join(str(error).split(". ")[0].split())
        raise OutOfMemoryError(f"{what}: the memory of the device is full ({said}). {remedy}") from error
