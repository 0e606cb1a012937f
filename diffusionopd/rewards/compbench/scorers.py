"""The four rewards of T2I-CompBench: attributes, spatial relations, other relations, and complex prompts (3-in-1)."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffusionopd.rewards.base import RewardError, Scores, UnfitPromptError, unfit
from diffusionopd.rewards.clip import CLIP_L, Clip
from diffusionopd.rewards.compbench import blip_vqa
from diffusionopd.rewards.compbench.blip_vqa import load_blip_vqa
from diffusionopd.rewards.compbench.phrases import (
    KINDS,
    load_parser,
    noun_phrases,
    relation_in,
    spatial,
    without_adjectives,
)
from diffusionopd.rewards.compbench.spatial import DETECTOR, Detector, load_detector, spatial_score
from diffusionopd.rewards.hpsv2 import to_transformers
from diffusionopd.rewards.images import Images, each_uint8
from diffusionopd.rewards.weights import Dtype, filled, load_official, load_tokenizer, scorer_dtype

CLIP_B = "reward_ckpts/clip_vit_b32_openai.safetensors"
"""OpenAI's ViT-B/32 in open_clip's names."""
CLIP_B_CONFIG = CLIPConfig(
    text_config={"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    vision_config={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    projection_dim=512,
)

Pairs = Sequence[tuple[np.ndarray, str, Mapping[str, Any]]]
"""Images, uint8 `[H, W, 3]`, with their prompts and metadata."""


@functools.cache
def load_clip_b(checkpoint: str, tokenizer: str, device: str, dtype: str) -> Clip:
    """CLIP ViT-B/32, once for all scorers in a process. Raises `RewardError` as `load_official`."""
    number = scorer_dtype(dtype)
    model = load_official(
        "compbench_nonspatial",
        checkpoint,
        lambda state: filled(lambda: CLIPModel(CLIP_B_CONFIG), to_transformers(state)),
    )
    return Clip(model.to(device, number), load_tokenizer(CLIPTokenizer, tokenizer))


def attributes(vqa: blip_vqa.BlipVqa, pairs: Pairs) -> np.ndarray:
    """Of each image the product, over the noun phrases, of how probable yes is as the answer to "PHRASE?"."""
    asked = [[f"{phrase}?" for phrase in noun_phrases(prompt)] for _, prompt, _ in pairs]
    answers = [vqa.yes(pixels, questions) for (pixels, _, _), questions in zip(pairs, asked, strict=True)]
    return np.array([round(math.prod(each), 4) for each in answers], dtype=np.float64)


def relations(detect: Detector, pairs: Pairs, is_complex: bool = False) -> np.ndarray:
    """Of each image the 2D-spatial score."""
    scores = []
    for pixels, prompt, _ in pairs:
        asked = spatial(prompt, is_complex)
        found = detect(pixels, [name for name in (asked.first, asked.second) if name])
        scores.append(spatial_score(asked, found))
    return np.array(scores, dtype=np.float64)


def _pairs(images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Pairs:
    return list(zip(each_uint8(images), prompts, metadata, strict=True))


def _need_parser(options: Mapping[str, Any]) -> None:
    load_parser()


def _can_parse() -> bool:
    try:
        load_parser()
    except RewardError:
        return False
    return True


def _need_relation(prompt: str, metadata: Mapping[str, Any]) -> None:
    if relation_in(prompt) is None:
        raise UnfitPromptError("names no spatial relation of T2I-CompBench's", prompt)


def _need_objects(prompt: str, metadata: Mapping[str, Any]) -> None:
    _need_relation(prompt, metadata)
    if spatial(prompt).first is None:
        raise UnfitPromptError("has no noun (names are none) that could be looked for", prompt)


def _kind(prompt: str, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    if metadata.get("kind") not in KINDS:
        raise UnfitPromptError(f"has no 'kind' of {', '.join(KINDS)}", prompt)
    return KINDS[metadata["kind"]]


class Attribute:
    """`compbench_attribute`: BLIP-VQA, 0 to 1, for prompts of colours, shapes and textures."""

    def __init__(
        self,
        device: str = "cpu",
        dtype: Dtype = "float32",
        checkpoint: str = blip_vqa.CHECKPOINT,
        tokenizer: str = blip_vqa.TOKENIZER,
    ):
        """Args: `checkpoint`, BLIP's file; `tokenizer`, BERT's. Raises `RewardError` as `load_blip_vqa`."""
        load_parser()
        self.vqa = load_blip_vqa(checkpoint, tokenizer, device, dtype)

    packages = staticmethod(_need_parser)

    @staticmethod
    def check(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """As `unfit`: prompts without a noun phrase, where there is what finds them."""
        return unfit(lambda prompt, data: noun_phrases(prompt), prompts, metadata) if _can_parse() else {}

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        return {"compbench_attribute": attributes(self.vqa, _pairs(images, prompts, metadata))}


class SpatialRelation:
    """`compbench_spatial`: two objects and where they stand, 0 to 1; by another detector than the official one."""

    def __init__(self, device: str = "cpu", dtype: Dtype = "float32", detector: str = DETECTOR):
        """Args: `detector`, an OWLv2, hub id or folder. Raises `RewardError` as `load_detector`."""
        load_parser()
        self.detect = load_detector(detector, device, dtype)

    packages = staticmethod(_need_parser)

    @staticmethod
    def check(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """As `unfit`: prompts without a relation or, where there is what finds it, without a noun."""
        return unfit(_need_objects if _can_parse() else _need_relation, prompts, metadata)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`. Raises `UnfitPromptError` for a prompt without relation or noun, first of all."""
        pairs = _pairs(images, prompts, metadata)
        for _, prompt, data in pairs:
            _need_objects(prompt, data)
        return {"compbench_spatial": relations(self.detect, pairs)}


class NonSpatial:
    """`compbench_nonspatial`: cosine of CLIP ViT-B/32, about 0.3, for prompts of who does what."""

    def __init__(
        self, device: str = "cpu", dtype: Dtype = "float32", checkpoint: str = CLIP_B, tokenizer: str = CLIP_L
    ):
        """Args: `checkpoint`, the file; `tokenizer`, CLIP's. Raises `RewardError` as `load_clip_b`."""
        self.clip = load_clip_b(checkpoint, tokenizer, device, dtype)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        return {"compbench_nonspatial": self.clip.cosine(images, prompts)}


class Complex:
    """`compbench_complex`: 3-in-1, the mean of the scores that apply by the `kind` of a prompt, about 0 to 1.

    `compbench_complex_attribute`, `_spatial` and `_action` are the three, the last the cosine with the prompt without
    its adjectives. The spatial one is by another detector than the official one.
    """

    def __init__(
        self,
        device: str = "cpu",
        dtype: Dtype = "float32",
        checkpoint: str = blip_vqa.CHECKPOINT,
        tokenizer: str = blip_vqa.TOKENIZER,
        clip: str = CLIP_B,
        clip_tokenizer: str = CLIP_L,
        detector: str = DETECTOR,
    ):
        """Args: as of the other three. Raises `RewardError` as they do."""
        load_parser()
        self.vqa = load_blip_vqa(checkpoint, tokenizer, device, dtype)
        self.clip = load_clip_b(clip, clip_tokenizer, device, dtype)
        self.detect = load_detector(detector, device, dtype)

    packages = staticmethod(_need_parser)

    @staticmethod
    def check(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """As `unfit`: prompts without a kind, and those of `Attribute.check`."""
        return Attribute.check(prompts, metadata) | unfit(_kind, prompts, metadata)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`. Raises `UnfitPromptError` for a prompt without a kind, first of all."""
        pairs = _pairs(images, prompts, metadata)
        kinds = [_kind(prompt, data) for _, prompt, data in pairs]
        bare = [without_adjectives(prompt) for prompt in prompts]
        parts = {
            "attribute": attributes(self.vqa, pairs),
            "spatial": relations(self.detect, pairs, is_complex=True),
            "action": self.clip.cosine(images, bare) if pairs else np.zeros(0),
        }
        mean = [np.mean([parts[name][i] for name in names]) for i, names in enumerate(kinds)]
        own = {f"compbench_complex_{name}": values for name, values in parts.items()}
        return {"compbench_complex": np.array(mean, dtype=np.float64), **own}
