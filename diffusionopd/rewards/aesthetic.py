"""The LAION aesthetic predictor (improved-aesthetic-predictor, "sac+logos+ava1-l14-linearMSE")."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffusionopd.rewards.base import Scores
from diffusionopd.rewards.clip import CLIP_L, load_clip
from diffusionopd.rewards.images import Images, each_uint8
from diffusionopd.rewards.weights import Dtype, filled, load_official

HEAD = "reward_ckpts/sac+logos+ava1-l14-linearMSE.pth"
WIDTHS = (1024, 128, 64, 16, 1)


class AestheticHead(nn.Module):
    """Five linear layers without activations, with the original's dropouts as gaps in their numbers."""

    def __init__(self, width: int = 768):
        """Args: `width` of the image embedding."""
        super().__init__()
        sizes = zip(("0", "2", "4", "6", "7"), (width, *WIDTHS), WIDTHS, strict=False)
        self.layers = nn.ModuleDict({number: nn.Linear(inputs, outputs) for number, inputs, outputs in sizes})

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """`[B, width]` unit length to `[B]`."""
        for layer in self.layers.values():
            embedding = layer(embedding)
        return embedding.squeeze(-1)


def load_head(path: str, width: int) -> AestheticHead:
    """The head from its published file. Raises `RewardError` as `load_official`."""
    return load_official("aesthetic", path, lambda state: filled(lambda: AestheticHead(width), state))


class Aesthetic:
    """`aesthetic`: what people would rate the image, about 1 to 10, whatever the prompt."""

    def __init__(self, device: str = "cpu", dtype: Dtype = "float32", model: str = CLIP_L, head: str = HEAD):
        """Args: `model`, CLIP as hub id or folder; `head`, the predictor's file. Raises as `load_clip`, `load_head`."""
        self.clip = load_clip(model, model, device, dtype)
        self.head = load_head(head, self.clip.model.config.projection_dim).to(device)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        with torch.no_grad():
            embeddings = self.clip.image_embeddings(each_uint8(images))
            return {"aesthetic": self.head(embeddings).double().cpu().numpy()}
