"""HPSv2.1, the Human Preference Score: Wu et al., arXiv 2306.09341; weights `xswu/HPSv2` on the hub.

Letters: B pictures, S side of the square that the model sees, P width of CLIP's common space.
"""

import functools
import html
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer

from diffusionopd.rewards.base import RewardError, Scores
from diffusionopd.rewards.clip import CLIP_H_PROCESSOR
from diffusionopd.rewards.images import Images, to_pil
from diffusionopd.rewards.open_clip_keys import read_config, to_transformers
from diffusionopd.rewards.transforms import fit_and_pad
from diffusionopd.rewards.weights import filled, load_official, load_tokenizer, scorer_dtype

CHECKPOINT = "reward_ckpts/HPS_v2.1_compressed.pt"


def clean_prompt(prompt: str) -> str:
    """open_clip's cleaning: repair broken characters, undo HTML entities, twice, one space for any, lower case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


def _build_model(file: Any) -> CLIPModel:
    state = file["state_dict"]
    config = read_config(state)
    return filled(lambda: CLIPModel(config), to_transformers(state))


def _check_tokenizer(name: str, ends_with: int, expected: int) -> None:
    """Raises `RewardError` for a tokenizer that does not end texts with the token at which the model pools them."""
    if ends_with != expected:
        raise RewardError(
            f"the tokenizer '{name}' ends a text with token {ends_with}, the model of reward 'hpsv2' with {expected}: "
            f"use {CLIP_H_PROCESSOR}"
        )


class HpsClip:
    """A frozen CLIP of HPSv2's weights with HPSv2's preprocessing: embeddings of unit length."""

    def __init__(self, checkpoint: str, tokenizer: str, device: str, dtype: torch.dtype):
        """Raises `RewardError` as `load_official`, and for a tokenizer that is missing or another model's."""
        self.model = load_official("hpsv2", checkpoint, _build_model).to(device, dtype)
        self.tokenizer = load_tokenizer(CLIPTokenizer, tokenizer)
        _check_tokenizer(tokenizer, self.tokenizer.eos_token_id, self.model.config.text_config.eos_token_id)

    @torch.no_grad()
    def image_embeddings(self, images: Images) -> Tensor:
        """`[B, P]` float32, unit length."""
        side = self.model.config.vision_config.image_size
        pixels = torch.stack([fit_and_pad(picture, side) for picture in to_pil(images)])
        features = self.model.get_image_features(pixels.to(self.model.device, self.model.dtype)).pooler_output
        return normalize(features.float(), dim=-1)

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """`[B, P]` float32, unit length; prompts longer than the context are cut, with EOT kept at the end."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding=True, truncation=True, max_length=length, return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        features = self.model.get_text_features(**tokens).pooler_output
        return normalize(features.float(), dim=-1)


@functools.cache
def load_hps_clip(checkpoint: str, tokenizer: str, device: str, dtype: str) -> HpsClip:
    """An `HpsClip`, one for all scorers in a process. Raises as `HpsClip`, and for a dtype that is none."""
    return HpsClip(checkpoint, tokenizer, device, scorer_dtype(dtype))


class Hpsv2:
    """`hpsv2`: HPSv2.1's cosine of picture and prompt, without logit scale, about 0.2 to 0.35; tables quote it x100.

    The official repository's `assets/demo_image.jpg` with "cat with horn" should score 0.288 (not run here).
    """

    def __init__(
        self,
        device: str = "cpu",
        dtype: str = "float32",
        checkpoint: str = CHECKPOINT,
        tokenizer: str = CLIP_H_PROCESSOR,
    ):
        """Args: `checkpoint`, the official file; `tokenizer`, CLIP's, hub id or folder. Raises as `load_hps_clip`."""
        import ftfy  # noqa: F401  (missing: said now, not with the first prompt)

        self.clip = load_hps_clip(checkpoint, tokenizer, device, dtype)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        products = self.clip.image_embeddings(images) * self.clip.text_embeddings(prompts)
        return {"hpsv2": products.sum(dim=-1).double().cpu().numpy()}
