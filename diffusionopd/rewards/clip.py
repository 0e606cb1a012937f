"""CLIP as the scorers use it, and the two rewards that are a CLIP similarity.

PickScore: Kirstain et al., arXiv 2305.01569. CLIPScore here is the plain cosine of CLIP-L/14, as tables quote it.
Letters: B pictures, P width of CLIP's common space.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from diffusionopd.rewards.base import RewardError, Scores
from diffusionopd.rewards.images import Images, to_pil
from diffusionopd.rewards.transforms import resize_and_crop
from diffusionopd.rewards.weights import load_tokenizer, scorer_dtype

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"


class Clip:
    """A frozen CLIP with its own preprocessing: embeddings of unit length, and the logit scale."""

    def __init__(self, model: str, processor: str, device: str, dtype: torch.dtype):
        """Load model and tokenizer (of `processor`) from the hub or local folders.

        Raises:
            RewardError: one is missing, with the command that fetches it.
        """
        try:
            self.model = CLIPModel.from_pretrained(model, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            fetch = " && ".join(f"hf download {name}" for name in dict.fromkeys((model, processor)))
            raise RewardError(f"the CLIP model '{model}' cannot be loaded: {error}. To fetch it: {fetch}") from error
        self.tokenizer = load_tokenizer(CLIPTokenizer, processor)
        self.model.to(device).requires_grad_(False).eval()
        self.device = device

    @torch.no_grad()
    def image_embeddings(self, images: Images) -> Tensor:
        """`[B, P]` float32, unit length. CLIP's own transform: shorter side, bicubic, centre crop, normalise.

        Not by transformers' image processor: its crop of a picture that is not square may be a pixel off OpenAI's.
        """
        side = self.model.config.vision_config.image_size
        pixels = torch.stack([resize_and_crop(picture, side) for picture in to_pil(images)])
        return _unit(self.model.get_image_features(pixels.to(self.device, self.model.dtype)).pooler_output)

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """`[B, P]` float32, unit length; prompts longer than CLIP's context are cut."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        features = self.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return _unit(features.pooler_output)

    @property
    def logit_scale(self) -> float:
        """What CLIP multiplies cosines by: exp of the learnt parameter, about 100."""
        return float(self.model.logit_scale.detach().float().exp())

    def cosine(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """Cosine of each picture and its own prompt: float64 `[B]`."""
        products = self.image_embeddings(images) * self.text_embeddings(prompts)
        return products.sum(dim=-1).double().cpu().numpy()


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


@functools.cache
def load_clip(model: str, processor: str, device: str, dtype: str) -> Clip:
    """A `Clip`, one for all rewards that use the same weights; `dtype` is a name such as "float32".

    Raises:
        RewardError: weights that cannot be had, with the command that fetches them; no such dtype.
    """
    return Clip(model, processor, device, scorer_dtype(dtype))


class PickScore:
    """`pickscore`: logit scale times the cosine of PickScore's CLIP-H, about 20 to 24.

    Reinforcement-learning code divides by 26 when it trains on it; tables quote this number.
    """

    def __init__(
        self, device: str = "cpu", dtype: str = "float32", model: str = PICKSCORE, processor: str = CLIP_H_PROCESSOR
    ):
        """Args: `model` and `processor`, hub ids or local folders. Raises as `load_clip`."""
        self.clip = load_clip(model, processor, device, dtype)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        return {"pickscore": self.clip.logit_scale * self.clip.cosine(images, prompts)}


class ClipScore:
    """`clipscore`: CLIP-L/14's logit of picture and prompt divided by 100, about 0.24 to 0.30."""

    def __init__(self, device: str = "cpu", dtype: str = "float32", model: str = CLIP_L):
        """Args: `model`, hub id or local folder. Raises as `load_clip`."""
        self.clip = load_clip(model, model, device, dtype)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        return {"clipscore": self.clip.logit_scale / 100 * self.clip.cosine(images, prompts)}
