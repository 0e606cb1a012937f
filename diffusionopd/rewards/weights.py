"""Checkpoints of the reward models, as their authors publish them: read, and loaded with every tensor accounted for."""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diffusionopd.rewards.base import RewardError

StateDict = Mapping[str, Tensor]
Built = TypeVar("Built")
Module = TypeVar("Module", bound=nn.Module)
Tokenizer = TypeVar("Tokenizer", bound=PreTrainedTokenizerBase)

_UNREADABLE = (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, AttributeError, TypeError, ValueError)
"""What torch and the key maps raise for a file that holds something else."""


def scorer_dtype(name: str) -> torch.dtype:
    """The floating-point dtype of a name such as "float32". Raises `RewardError` for any other name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise RewardError(f"'{name}' is no dtype of a scorer: use float32, bfloat16 or float16")
    return dtype


def load_official(reward: str, path: str, build: Callable[[Any], Built]) -> Built:
    """What `build` makes of a published checkpoint.

    Args:
        reward: name of the reward, as `tools/download.py` knows it.
        path: the file, read by `torch.load(weights_only=True)`.
        build: from the file's content to a model.

    Raises:
        RewardError: the file is missing (with the command that fetches it), or `build` fails on what it holds.
    """
    fetch = f"python -m tools.download rewards {reward}"
    if not Path(path).is_file():
        raise RewardError(f"reward '{reward}' needs {path}. To fetch it: {fetch}")
    try:
        return build(torch.load(path, map_location="cpu", weights_only=True))
    except _UNREADABLE as error:
        problem = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to run the code in it
            problem = "it holds more than weights, which is not run"
        raise RewardError(
            f"{path} is not the checkpoint of reward '{reward}': {problem}. Remove it and fetch it again: {fetch}"
        ) from error


def filled(factory: Callable[[], Module], state: StateDict) -> Module:
    """The module that `factory` makes, holding exactly these tensors; frozen and in evaluation mode.

    Its parameters are never allocated beside the checkpoint's: those of HPSv2.1 alone are 3.9 GB.

    Raises:
        RuntimeError: a tensor too many, too few, or of another shape.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        module = factory()
    module.load_state_dict(dict(state), assign=True)
    return module.requires_grad_(False).eval()


def load_tokenizer(kind: type[Tokenizer], name: str) -> Tokenizer:
    """A tokenizer of this class from the hub or a local folder.

    Raises:
        RewardError: it cannot be had, with the command that fetches it. transformers 5 does not say so: it returns one
            with nothing but special tokens.
    """
    problem = "its vocabulary is not there"
    try:
        tokenizer = kind.from_pretrained(name, trust_remote_code=False)
        if len(tokenizer) > len(tokenizer.all_special_tokens):
            return tokenizer
    except (OSError, ValueError) as error:
        problem = str(error)
    raise RewardError(f"the tokenizer '{name}' cannot be loaded: {problem}. To fetch it: hf download {name}")


def renamed(key: str, rules: Mapping[str, Any]) -> str:
    """The name of a tensor after replacements, `{pattern: replacement}` as of `re.sub`, one after the other."""
    for pattern, replacement in rules.items():
        key = re.sub(pattern, replacement, key)
    return key


def count_blocks(state: StateDict, prefix: str) -> int:
    """Number of the transformer blocks `prefix0.`, `prefix1.`, ... in a state dict."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def patch_grid(positions: int, patch: int) -> int:
    """Side in pixels of the square image that a vision transformer of this many positions (one is CLS) sees."""
    return round((positions - 1) ** 0.5) * patch


def count_heads(width: int, head_width: int) -> int:
    """Number of attention heads of this width; their number is in no tensor's shape, their width is customary."""
    heads, rest = divmod(width, head_width)
    if rest or not heads:
        raise ValueError(f"a width of {width} is no multiple of a head's {head_width}")
    return heads
