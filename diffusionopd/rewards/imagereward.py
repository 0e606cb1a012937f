"""ImageReward v1.0: Xu et al., arXiv 2304.05977; weights `THUDM/ImageReward` on the hub.

Letters: B images, S side of the square that the model sees, L tokens of a prompt, D width of the text encoder.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from diffusionopd.rewards.aesthetic import AestheticHead
from diffusionopd.rewards.base import Scores
from diffusionopd.rewards.images import Images, each_uint8, resize_and_crop
from diffusionopd.rewards.weights import Dtype, StateDict, filled, load_official, load_tokenizer, renamed, scorer_dtype

CHECKPOINT = "reward_ckpts/ImageReward.pt"
TOKENIZER = "bert-base-uncased"
MAX_TOKENS = 35

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output on the authors' data (`ImageReward.py` of the official repository)."""


_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION = BlipVisionConfig(**_LARGE, image_size=224, layer_norm_eps=1e-6)  # timm's; transformers' default is 1e-5
TEXT = BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)
"""BLIP's `vit="large"` and `med_config.json`; what is left out is as in transformers' defaults."""


class ImageRewardModel(nn.Module):
    """BLIP's text encoder, which attends to the image's patches, and a head on its first token."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = BlipVisionModel(VISION)
        self.text = BlipTextModel(TEXT, add_pooling_layer=False)
        self.head = AestheticHead(TEXT.hidden_size)

    def forward(self, pixels: Tensor, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, 3, S, S]`, `[B, L]` and `[B, L]` to `[B]` float32, of mean 0 and deviation 1 on the authors' data."""
        patches = self.vision(pixels.to(self.vision.dtype)).last_hidden_state
        states = self.text(tokens, attention_mask=attention_mask, encoder_hidden_states=patches).last_hidden_state
        return (self.head(states[:, 0].float()) - MEAN) / STD


BLIP_VISION_NAMES = {
    r"^vision\.cls_token$": "vision.embeddings.class_embedding",
    r"^vision\.pos_embed$": "vision.embeddings.position_embedding",
    r"^vision\.patch_embed\.proj\.": "vision.embeddings.patch_embedding.",
    r"^vision\.norm\.": "vision.post_layernorm.",
    r"^vision\.blocks\.": "vision.encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}
"""BLIP's names (`VisionTransformer`, as it is in THUDM/ImageReward) behind `vision.` -> those of `BlipVisionModel`."""

# BLIP's names -> those of ImageRewardModel; the text encoder's (`BertModel` of `med.py`) are the same in transformers
_NAMES = {
    r"^mlp\.": "head.",
    r"^blip\.text_encoder\.": "text.",
    r"^blip\.visual_encoder\.": "vision.",
    **BLIP_VISION_NAMES,
}
_UNUSED = re.compile(r"blip\.(vision|text)_proj\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
"""Projections of BLIP's contrastive loss, and a constant; the score reads neither."""


def _build_model(state: StateDict) -> ImageRewardModel:
    used = {name: value for name, value in state.items() if not _UNUSED.fullmatch(name)}
    return filled(ImageRewardModel, renamed(used, _NAMES))


@functools.cache
def load_imagereward(
    checkpoint: str, tokenizer: str, device: str, dtype: str
) -> tuple[ImageRewardModel, BertTokenizer]:
    """Model and tokenizer, once for all scorers in a process; the head stays in float32, as officially.

    Raises:
        RewardError: as `load_official`; a tokenizer that is missing; a dtype that is none.
    """
    number = scorer_dtype(dtype)
    model = load_official("imagereward", checkpoint, _build_model).to(device)
    model.vision.to(number)
    model.text.to(number)
    return model, load_tokenizer(BertTokenizer, tokenizer)


class ImageReward:
    """`imagereward`: preference for the image given its prompt, about -2.3 to 2.

    The official repository's four example images should score 0.58, 0.27, -1.41 and -2.03 (its README; not run here).
    Prompts are cut to 35 tokens. Every image is scored with its own prompt only.
    """

    def __init__(
        self, device: str = "cpu", dtype: Dtype = "float32", checkpoint: str = CHECKPOINT, tokenizer: str = TOKENIZER
    ):
        """Args: `checkpoint`, the official file; `tokenizer`, hub id or folder. Raises as `load_imagereward`."""
        self.model, self.tokenizer = load_imagereward(checkpoint, tokenizer, device, dtype)

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        device, side = self.model.vision.device, self.model.vision.config.image_size
        pixels = torch.stack([resize_and_crop(image, side) for image in each_uint8(images)])
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(device)
        scores = self.model(pixels.to(device), tokens["input_ids"], tokens["attention_mask"])
        return {"imagereward": scores.double().cpu().numpy()}
