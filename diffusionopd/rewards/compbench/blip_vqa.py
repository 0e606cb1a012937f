"""BLIP-VQA as T2I-CompBench uses it: how probable "yes" is, beside "no", as the answer to a noun phrase.

The steps are those of `BLIPvqa_eval` of github.com/Karine-Huang/T2I-CompBench; the weights are BLIP's
`model_base_vqa_capfilt_large.pth`. Letters: B images, S side of the square that the model sees, L tokens of a question.
"""

import functools
import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from diffusionopd.rewards.imagereward import BLIP_VISION_NAMES
from diffusionopd.rewards.images import levels, normalised
from diffusionopd.rewards.weights import StateDict, filled, load_official, load_tokenizer, renamed, scorer_dtype

CHECKPOINT = "reward_ckpts/model_base_vqa_capfilt_large.pth"
TOKENIZER = "bert-base-uncased"
MAX_TOKENS, MAX_WORDS = 35, 50

_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VISION = BlipVisionConfig(**_BASE, image_size=480, patch_size=16, layer_norm_eps=1e-6)
TEXT = BlipTextConfig(**_BASE, encoder_hidden_size=768)
"""BLIP's `vit="base"` and `med_config.json`; what is left out is as in transformers' defaults."""


class BlipVqaModel(nn.Module):
    """BLIP's encoder of a question, which attends to the image, and its decoder of answers."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = BlipVisionModel(VISION)
        self.question = BlipTextModel(TEXT, add_pooling_layer=False)
        self.answer = BlipTextLMHeadModel(TEXT)

    def forward(self, pixels: Tensor, tokens: Tensor, attention_mask: Tensor, yes: int, no: int) -> Tensor:
        """`[B, 3, S, S]`, `[B, L]` and `[B, L]` to `[B]` float32: p(yes) / (p(yes) + p(no)) of the first token."""
        patches = self.vision(pixels.to(self.vision.dtype)).last_hidden_state
        begun = torch.cat([torch.full_like(tokens[:, :1], TEXT.vocab_size - 1), tokens[:, 1:]], dim=1)  # [ENC]
        states = self.question(begun, attention_mask=attention_mask, encoder_hidden_states=patches).last_hidden_state
        start = torch.full_like(tokens[:, :1], TEXT.vocab_size - 2)  # [DEC]
        logits = self.answer(start, encoder_hidden_states=states, encoder_attention_mask=attention_mask).logits[:, 0]
        return logits[:, [yes, no]].float().softmax(dim=-1)[:, 0]


_NAMES = {
    r"^visual_encoder\.": "vision.",
    **BLIP_VISION_NAMES,
    r"^text_encoder\.": "question.",
    r"^text_decoder\.": "answer.",
}
_UNUSED = re.compile(r"text_(encoder|decoder\.bert)\.embeddings\.position_ids")


def _build_model(file: StateDict) -> BlipVqaModel:
    state = file.get("model", file)
    return filled(BlipVqaModel, renamed({k: v for k, v in state.items() if not _UNUSED.fullmatch(k)}, _NAMES))  # type: ignore[union-attr]


@functools.cache
def load_blip_vqa(checkpoint: str, tokenizer: str, device: str, dtype: str) -> "BlipVqa":
    """BLIP-VQA, once for all scorers in a process. Raises `RewardError` as `load_official` and `load_tokenizer`."""
    number = scorer_dtype(dtype)
    model = load_official("compbench_attribute", checkpoint, _build_model).to(device, number)
    return BlipVqa(model, load_tokenizer(BertTokenizer, tokenizer))


class BlipVqa:
    """A frozen BLIP-VQA with its preprocessing."""

    def __init__(self, model: BlipVqaModel, tokenizer: BertTokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._yes, self._no = tokenizer.convert_tokens_to_ids(["yes", "no"])

    @torch.no_grad()
    def yes(self, pixels: np.ndarray, questions: Sequence[str]) -> list[float]:
        """How probable yes is as the answer to each question about a uint8 `[H, W, 3]` image, to four decimals."""
        device, side = self.model.vision.device, VISION.image_size
        values = normalised(levels(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)))
        texts = [clean_question(question) for question in questions]
        tokens = self.tokenizer(texts, padding="longest", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        batch = values.expand(len(texts), -1, -1, -1).to(device)
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        return [round(p, 4) for p in self.model(batch, ids, mask, self._yes, self._no).double().tolist()]


def clean_question(question: str) -> str:
    """BLIP's `pre_question`: lower case, without some marks, at most fifty words."""
    text = re.sub(r"[.!\"()*#:;~]", "", question.lower()).rstrip(" ")
    return " ".join(text.split(" ")[:MAX_WORDS])
