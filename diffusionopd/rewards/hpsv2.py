"""HPSv2.1, the Human Preference Score: Wu et al., arXiv 2306.09341; weights `xswu/HPSv2` on the hub."""

import functools
import html
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffusionopd.rewards.base import RewardError, Scores, find_packages, importing
from diffusionopd.rewards.clip import CLIP_H_PROCESSOR, Clip
from diffusionopd.rewards.images import Images, each_uint8, fit_and_pad
from diffusionopd.rewards.weights import Dtype, StateDict, filled, load_official, load_tokenizer, renamed, scorer_dtype

CHECKPOINT = "reward_ckpts/HPS_v2.1_compressed.pt"
OPEN_CLIP = (
    "reward 'hpsv2' with engine 'open_clip'",
    "It brings torchvision, and so has an environment of its own: "
    "bash scripts/environments/environment.sh make open_clip venv/open_clip",
)

_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_HUGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
CONFIG = CLIPConfig(
    text_config=_LARGE | {"hidden_act": "gelu"},
    vision_config=_HUGE | {"patch_size": 14, "hidden_act": "gelu"},
    projection_dim=1024,
)
"""ViT-H-14 of open_clip's `model_configs`; what is left out is as in transformers' defaults."""

# open_clip's names (`VisionTransformer` and `CLIP`, as they are in tgxs002/HPSv2) -> transformers'
_NAMES = {
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"\.attn\.in_proj_": ".self_attn.{}_proj.",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",  # sic
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
}


def to_transformers(state: StateDict) -> StateDict:
    """open_clip's tensors under the names of `CLIPModel`; one that open_clip's CLIP does not have keeps its own."""
    plain = {name: value for name, value in state.items() if name != "attn_mask"}  # a constant of old versions
    for name in ("visual.proj", "text_projection"):  # multiplied from the right, without a linear layer
        plain[name] = plain[name].T.contiguous()
    return renamed(plain, _NAMES)


def clean_prompt(prompt: str) -> str:
    """open_clip's cleaning: repair broken characters, undo HTML entities, twice, one space for any, lower case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


@functools.cache
def load_hps_clip(checkpoint: str, tokenizer: str, device: str, dtype: str) -> Clip:
    """The CLIP of the official file with HPSv2's preprocessing, once for all scorers in a process.

    Raises:
        RewardError: as `load_official`; a tokenizer that is missing, or that does not end texts with the token at which
            the model pools them; a dtype that is none.
    """
    number = scorer_dtype(dtype)
    model = load_official(
        "hpsv2", checkpoint, lambda file: filled(lambda: CLIPModel(CONFIG), to_transformers(file["state_dict"]))
    )
    words, expected = load_tokenizer(CLIPTokenizer, tokenizer), CONFIG.text_config.eos_token_id
    if words.eos_token_id != expected:
        raise RewardError(
            f"the tokenizer '{tokenizer}' ends a text with token {words.eos_token_id}, the model of reward 'hpsv2' "
            f"with {expected}: use {CLIP_H_PROCESSOR}"
        )
    return Clip(model.to(device, number), words, prepare=fit_and_pad, clean=clean_prompt)


class OpenClip:
    """CLIP in open_clip itself, for those who want the engine of the official code."""

    def __init__(self, model: Any, tokenize: Any, side: int):
        self.model, self._tokenize, self._side = model, tokenize, side

    @torch.no_grad()
    def cosine(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """As `Clip.cosine`; open_clip's tokenizer cleans the prompts itself."""
        weight = self.model.visual.conv1.weight
        pixels = torch.stack([fit_and_pad(image, self._side) for image in each_uint8(images)])
        seen = self.model.encode_image(pixels.to(weight.device, weight.dtype)).float()
        read = self.model.encode_text(self._tokenize(list(prompts)).to(weight.device)).float()
        return torch.nn.functional.cosine_similarity(seen, read, dim=-1).double().cpu().numpy()


@functools.cache
def load_open_clip(checkpoint: str, device: str, dtype: str) -> OpenClip:
    """The official file in open_clip's ViT-H-14, once for all scorers in a process.

    Raises:
        RewardError: as `load_official`; open_clip is not installed, with what installs it; a dtype that is none.
    """
    number = scorer_dtype(dtype)
    with importing(*OPEN_CLIP):
        import open_clip

    def build(file: Mapping[str, StateDict]) -> Any:
        model = open_clip.create_model("ViT-H-14", pretrained=None)
        state = {name: value for name, value in file["state_dict"].items() if name != "attn_mask"}
        buffers = {name: value for name, value in model.state_dict().items() if name == "attn_mask"}
        model.load_state_dict(state | buffers)
        return model

    model = load_official("hpsv2", checkpoint, build).to(device, number).requires_grad_(False).eval()
    return OpenClip(model, open_clip.get_tokenizer("ViT-H-14"), CONFIG.vision_config.image_size)


class Hpsv2:
    """`hpsv2`: HPSv2.1's cosine of image and prompt, without logit scale, about 0.2 to 0.35; tables quote it x100.

    The official repository's `assets/demo_image.jpg` with "cat with horn" should score 0.288 (not run here).
    """

    def __init__(
        self,
        device: str = "cpu",
        dtype: Dtype = "float32",
        checkpoint: str = CHECKPOINT,
        tokenizer: str = CLIP_H_PROCESSOR,
        engine: Literal["transformers", "open_clip"] = "transformers",
    ):
        """Load the model.

        Args:
            checkpoint: the official file.
            tokenizer: CLIP's, hub id or folder; open_clip has its own.
            engine: "transformers", or "open_clip", which the official code runs on.

        Raises:
            RewardError: as `load_hps_clip` and `load_open_clip`.
        """
        self.clip: Clip | OpenClip
        if engine == "open_clip":
            self.clip = load_open_clip(checkpoint, device, dtype)
            return
        import ftfy  # noqa: F401  (missing: said now, not with the first prompt)

        self.clip = load_hps_clip(checkpoint, tokenizer, device, dtype)

    @staticmethod
    def packages(options: Mapping[str, Any]) -> None:
        """Raises as the constructor where a package is missing; loads none."""
        if options.get("engine") == "open_clip":
            with importing(*OPEN_CLIP):
                find_packages("open_clip")
        else:
            find_packages("ftfy")

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        return {"hpsv2": self.clip.cosine(images, prompts)}
