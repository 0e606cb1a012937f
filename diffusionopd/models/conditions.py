"""What a prompt becomes before the transformer sees it.

Letters: B prompts, L tokens, D width of a token, P width of the pooled vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TextEmbeddings(NamedTuple):
    """Embeddings of B prompts: every text encoder's tokens, joined, and one pooled vector a prompt.

    tokens: [B, L, D] and pooled: [B, P], same device and dtype.
    """

    tokens: Tensor
    pooled: Tensor

    @property
    def batch(self) -> int:
        """Number of prompts B."""
        return self.tokens.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEmbeddings:
        """The same embeddings on another device, in another dtype, or both."""
        return TextEmbeddings(self.tokens.to(device=device, dtype=dtype), self.pooled.to(device=device, dtype=dtype))

    def expand(self, batch: int) -> TextEmbeddings:
        """One prompt seen as `batch` equal prompts, without a copy; B prompts stay as they are if B is `batch`."""
        if self.batch not in (1, batch):
            raise ValueError(f"cannot expand {self.batch} prompts to {batch}: only one prompt can be repeated")
        return TextEmbeddings(self.tokens.expand(batch, -1, -1), self.pooled.expand(batch, -1))

    def index(self, i: int | slice | Tensor) -> TextEmbeddings:  # type: ignore[override]
        """Rows `i` along B; one integer keeps the batch dimension, so the result is always [b, L, D] and [b, P]."""
        rows = [i] if isinstance(i, int) else i
        return TextEmbeddings(self.tokens[rows], self.pooled[rows])

    @staticmethod
    def cat(parts: list[TextEmbeddings]) -> TextEmbeddings:
        """Embeddings of several batches as one batch."""
        return TextEmbeddings(torch.cat([p.tokens for p in parts]), torch.cat([p.pooled for p in parts]))
