"""CLIP as the scorers use it, and the two rewards that are a CLIP similarity.

PickScore: Kirstain et al., arXiv 2305.01569. CLIPScore here is the plain cosine of CLIP-L/14, as tables quote it.
Letters: B images, S side of the square that the model sees, P width of CLIP's common space.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from diffusionopd.rewards.base import Scores
from diffusionopd.rewards.images import Images, each_uint8, resize_and_crop
from diffusionopd.rewards.weights import Dtype, load_pretrained, load_tokenizer, scorer_dtype

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"


class Clip:
    """A frozen CLIP with its preprocessing: embeddings of unit length, and the logit scale."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        prepare: Callable[[np.ndarray, int], Tensor] = resize_and_crop,
        clean: Callable[[str], str] = str,
    ):
        """Take a model that is on its device.

        Args:
            prepare: uint8 `[H, W, 3]` and S to `[3, S, S]`. By default CLIP's own transform, and not by transformers'
                image processor: its crop of an image that is not square may be a pixel off OpenAI's.
            clean: what is done to a prompt first.
        """
        self.model, self.tokenizer, self._prepare, self._clean = model, tokenizer, prepare, clean

    @torch.no_grad()
    def image_embeddings(self, images: Sequence[np.ndarray]) -> Tensor:
        """`[B, P]` float32, unit length, of B uint8 `[H, W, 3]` arrays, which may differ in size."""
        side = self.model.config.vision_config.image_size
        pixels = torch.stack([self._prepare(image, side) for image in images])
        return _unit(self.model.get_image_features(pixels.to(self.model.device, self.model.dtype)).pooler_output)

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """`[B, P]` float32, unit length; prompts longer than CLIP's context are cut, with the end token kept."""
        length = self.model.config.text_config.max_position_embeddings
        texts = [self._clean(prompt) for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return _unit(self.model.get_text_features(**tokens.to(self.model.device)).pooler_output)

    @property
    def logit_scale(self) -> float:
        """What CLIP multiplies cosines by: exp of the learnt parameter, about 100."""
        return float(self.model.logit_scale.detach().float().exp())

    def cosine(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """Cosine of each image and its own prompt: float64 `[B]`."""
        products = self.image_embeddings(each_uint8(images)) * self.text_embeddings(prompts)
        return products.sum(dim=-1).double().cpu().numpy()


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


@functools.cache
def load_clip(model: str, processor: str, device: str, dtype: str) -> Clip:
    """The CLIP of a hub id or folder with the tokenizer of `processor`, once for all rewards that use the same weights.

    Raises:
        RewardError: as `load_pretrained` and `load_tokenizer`; no such dtype.
    """
    number = scorer_dtype(dtype)
    loaded = load_pretrained(CLIPModel, "CLIP model", model, processor)
    return Clip(loaded.to(device, number), load_tokenizer(CLIPTokenizer, processor))


class PickScore:
    """`pickscore`: logit scale times the cosine of PickScore's CLIP-H, about 20 to 24.

    Reinforcement-learning code divides by 26 when it trains on it; tables quote this number.
    """

    def __init__(
        self, device: str = "cpu", dtype: Dtype = "float32", model: str = PICKSCORE, processor: str = CLIP_H_PROCESSOR
    ):
        """Args: `model` and `processor`, hub ids or local folders. Raises as `load_clip`."""
        self.clip = load_clip(model, processor, device, dtype)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        return {"pickscore": self.clip.logit_scale * self.clip.cosine(images, prompts)}


class ClipScore:
    """`clipscore`: CLIP-L/14's logit of image and prompt divided by 100, about 0.24 to 0.30."""

    def __init__(self, device: str = "cpu", dtype: Dtype = "float32", model: str = CLIP_L):
        """Args: `model`, hub id or local folder. Raises as `load_clip`."""
        self.clip = load_clip(model, model, device, dtype)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        return {"clipscore": self.clip.logit_scale / 100 * self.clip.cosine(images, prompts)}
