"""HPSv2.1, the Human Preference Score: Wu et al., arXiv 2306.09341; weights `xswu/HPSv2` on the hub."""

import functools
import html
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CLIPModel, CLIPTokenizer

from diffusionopd.rewards.base import RewardError, Scores
from diffusionopd.rewards.clip import CLIP_H_PROCESSOR, Clip
from diffusionopd.rewards.images import Images, fit_and_pad
from diffusionopd.rewards.open_clip_keys import read_config, to_transformers
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


@functools.cache
def load_hps_clip(checkpoint: str, tokenizer: str, device: str, dtype: str) -> Clip:
    """The CLIP of the official file with HPSv2's preprocessing, once for all scorers in a process.

    Raises:
        RewardError: as `load_official`; a tokenizer that is missing, or that does not end texts with the token at which
            the model pools them; a dtype that is none.
    """
    number = scorer_dtype(dtype)
    model = load_official("hpsv2", checkpoint, _build_model).to(device, number)
    words, expected = load_tokenizer(CLIPTokenizer, tokenizer), model.config.text_config.eos_token_id
    if words.eos_token_id != expected:
        raise RewardError(
            f"the tokenizer '{tokenizer}' ends a text with token {words.eos_token_id}, the model of reward 'hpsv2' "
            f"with {expected}: use {CLIP_H_PROCESSOR}"
        )
    return Clip(model, words, prepare=fit_and_pad, clean=clean_prompt)


class Hpsv2:
    """`hpsv2`: HPSv2.1's cosine of image and prompt, without logit scale, about 0.2 to 0.35; tables quote it x100.

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
        return {"hpsv2": self.clip.cosine(images, prompts)}
