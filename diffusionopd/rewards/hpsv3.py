"""HPSv3, the score of a vision-language model: Ma et al., arXiv 2508.03789; weights `MizzenAI/HPSv3` on the hub.

The steps are those of `hpsv3/inference.py` and `hpsv3/model/qwen2vl_trainer.py` of github.com/MizzenAI/HPSv3.
Letters: B images, L tokens, P patches of all images, D width of the language model.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel

from diffusionopd.rewards.base import (
    RewardError,
    Scores,
    UnfitPromptError,
    fetch_command,
    not_whole,
    official_file,
    unfit,
)
from diffusionopd.rewards.images import Images, each_uint8, levels, normalised
from diffusionopd.rewards.weights import Dtype, StateDict, filled, load_official, load_tokenizer, renamed, scorer_dtype

CHECKPOINT = "reward_ckpts/HPSv3.safetensors"
INSTRUCTION = "reward_ckpts/hpsv3_instruction.txt"
"""What the model is told, with `{text_prompt}` where the prompt goes and `<|Reward|>` where the score is read."""
TOKENIZER = "Qwen/Qwen2-VL-7B-Instruct"

REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
"""Qwen2-VL's chat template with one image and one text."""
PIXELS = 256 * 28 * 28
"""Of an image as the model sees it, about: officially both the least and the most."""

VISION = Qwen2VLVisionConfig(hidden_size=3584)
TEXT = Qwen2VLTextConfig(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
)
"""Qwen2-VL-7B's; what is left out is as in transformers' defaults. The checkpoint says how many tokens there are."""


class Hpsv3Model(nn.Module):
    """Qwen2-VL without its vocabulary, and a head on the hidden state of the reward token."""

    def __init__(self, vision: Qwen2VLVisionConfig, text: Qwen2VLTextConfig) -> None:
        super().__init__()
        self.visual = Qwen2VisionTransformerPretrainedModel(vision)
        self.language = Qwen2VLTextModel(text)
        self.head = nn.Sequential(
            nn.Linear(text.hidden_size, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(),
            nn.Linear(16, 2),
        )  # fmt: skip

    def forward(self, patches: Tensor, grids: Tensor, tokens: Tensor, image_token: int, reward_token: int) -> Tensor:
        """Patches `[P, 3 * 2 * 14 * 14]`, their grids `[B, 3]` and tokens `[B, L]` to `[B, 2]` float32.

        Rows of tokens are padded on the right, which the reward token does not see. Positions count tokens one by one,
        those of the image too: officially Qwen2-VL's positions in height and width are not computed.
        """
        embedded = self.language.embed_tokens(tokens)
        seen = self.visual(patches.to(self.visual.get_dtype()), grid_thw=grids).pooler_output
        embedded = embedded.masked_scatter((tokens == image_token)[..., None], seen.to(embedded.dtype))
        states = self.language(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return self.head(states[tokens == reward_token].float())


# Names of the checkpoint, in transformers' layouts before and since 4.52 -> those of Hpsv3Model
_NAMES = {
    r"^model\.visual\.": "visual.",
    r"^model\.(language_model\.)?": "language.",
    r"^rm_head\.": "head.",
}


def _build_model(state: StateDict) -> Hpsv3Model:
    mapped = renamed({name: value for name, value in state.items() if name != "lm_head.weight"}, _NAMES)
    text = Qwen2VLTextConfig(**TEXT.to_dict() | {"vocab_size": len(mapped["language.embed_tokens.weight"])})
    return filled(lambda: Hpsv3Model(VISION, text), mapped)


def load_instruction(path: str) -> str:
    """The instruction of a file, to the last line break. Raises `RewardError` if it is missing or is no such text."""
    place = official_file("hpsv3", path)
    try:
        text = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"{path} cannot be read: {error}. To fetch it again: {fetch_command('hpsv3')}") from error
    if text.count("{text_prompt}") != 1 or text.count(REWARD_TOKEN) != 1:
        raise RewardError(f"{path} is not what HPSv3 is told. Remove it and fetch it again: {fetch_command('hpsv3')}")
    return text


def fitting_size(width: int, height: int, unit: int, pixels: int = PIXELS) -> tuple[int, int]:
    """Width and height in multiples of `unit` with at most, or if that was too few at least, so many pixels.

    `smart_resize` of Qwen's `qwen-vl-utils`, with the least and the most the same.
    """
    width_to, height_to = (max(unit, round(side / unit) * unit) for side in (width, height))
    if width_to * height_to > pixels:
        scale = math.sqrt(width * height / pixels)
        width_to, height_to = (max(unit, math.floor(side / scale / unit) * unit) for side in (width, height))
    elif width_to * height_to < pixels:
        scale = math.sqrt(pixels / (width * height))
        width_to, height_to = (math.ceil(side * scale / unit) * unit for side in (width, height))
    return width_to, height_to


def to_patches(pixels: np.ndarray, vision: Qwen2VLVisionConfig) -> tuple[Tensor, list[int]]:
    """A uint8 `[H, W, 3]` image as Qwen2-VL takes it: `[P, 3 * 2 * 14 * 14]` float32, and its grid (1, rows, columns).

    Patches come in blocks of those that the model merges; each holds the image twice, as two frames.
    """
    patch, merge, frames = int(vision.patch_size), vision.spatial_merge_size, int(vision.temporal_patch_size)
    size = fitting_size(pixels.shape[1], pixels.shape[0], patch * merge)
    values = normalised(levels(Image.fromarray(pixels).resize(size)))  # PIL's default is bicubic
    rows, columns = size[1] // patch, size[0] // patch
    blocks = values.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
    ordered = blocks.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :]  # block row and column, row, column, colour, y, x
    twice = ordered.expand(*ordered.shape[:5], frames, patch, patch)
    return twice.reshape(rows * columns, -1), [1, rows, columns]


@functools.cache
def load_hpsv3(checkpoint: str, tokenizer: str, device: str, dtype: str) -> tuple[Hpsv3Model, Qwen2Tokenizer]:
    """Model and tokenizer, once for all scorers in a process; the head stays in float32, as officially.

    Raises:
        RewardError: as `load_official`; a tokenizer that is missing, or has another number of tokens; no such dtype.
    """
    number = scorer_dtype(dtype)
    model = load_official("hpsv3", checkpoint, _build_model)
    # With the frequencies of the positions, as officially: it was trained with what bfloat16 leaves of them.
    model.to(device, number).head.float()
    words = load_tokenizer(Qwen2Tokenizer, tokenizer)
    words.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
    if len(words) != (rows := model.language.embed_tokens.num_embeddings):
        raise RewardError(
            f"the tokenizer '{tokenizer}' has {len(words)} tokens with {REWARD_TOKEN}, the model of reward 'hpsv3' "
            f"{rows}: use {TOKENIZER}"
        )
    return model, words


def _refuse_tokens(prompt: str, metadata: Mapping[str, Any]) -> None:
    if found := re.search(r"<\|\w+\|>", prompt):
        raise UnfitPromptError(f"holds {found[0]}, which is a token of the model", prompt)


class Hpsv3:
    """`hpsv3`: the mean of the preference that the model expects, without bounds; `hpsv3_sigma`: its deviation."""

    def __init__(
        self,
        device: str = "cpu",
        dtype: Dtype = "bfloat16",
        checkpoint: str = CHECKPOINT,
        tokenizer: str = TOKENIZER,
        instruction: str = INSTRUCTION,
        batch_size: int = 8,
    ):
        """Args: official `checkpoint`; `tokenizer`, hub id or folder; images at once. Raises as `load_hpsv3`."""
        self.instruction, self.batch_size = load_instruction(instruction), batch_size
        self.model, self.tokenizer = load_hpsv3(checkpoint, tokenizer, device, dtype)

    check = staticmethod(functools.partial(unfit, _refuse_tokens))
    problems = staticmethod(functools.partial(not_whole, {"batch_size": 1}))

    @staticmethod
    def files(options: Mapping[str, Any]) -> list[str]:
        """The files that the scores depend on, beside the weights."""
        return [options.get("instruction", INSTRUCTION)]

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        pairs = list(zip(each_uint8(images), prompts, strict=True))
        parts = [self._outputs(pairs[at : at + self.batch_size]) for at in range(0, len(pairs), self.batch_size)]
        mu, log_sigma = torch.cat(parts).double().cpu().numpy().T if parts else np.zeros((2, 0))
        return {"hpsv3": mu, "hpsv3_sigma": np.exp(log_sigma)}

    @torch.no_grad()
    def _outputs(self, pairs: Sequence[tuple[np.ndarray, str]]) -> Tensor:
        """`[B, 2]`: mean and logarithm of the deviation."""
        vision, device = self.model.visual.config, self.model.language.device
        rows, patches, grids = [], [], []
        for pixels, prompt in pairs:
            _refuse_tokens(prompt, {})
            own, grid = to_patches(pixels, vision)
            patches.append(own)
            grids.append(grid)
            image = IMAGE_TOKEN * (len(own) // vision.spatial_merge_size**2)
            text = self.instruction.replace("{text_prompt}", prompt)
            rows.append(torch.tensor(self.tokenizer(TEMPLATE.format(image=image, text=text))["input_ids"]))
        return self.model(
            torch.cat(patches).to(device),
            torch.tensor(grids, device=device),
            pad_sequence(rows, batch_first=True, padding_value=0).to(device),
            *self.tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, REWARD_TOKEN]),
        )
