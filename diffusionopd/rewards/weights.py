"""Checkpoints of the reward models, as their authors publish them: read, and loaded with every tensor accounted for."""

import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusionopd.rewards.base import RewardError, fetch_command, official_file

StateDict = Mapping[str, Tensor]
Dtype = Literal["float32", "bfloat16", "float16"]
Built = TypeVar("Built")
Module = TypeVar("Module", bound=nn.Module)
Pretrained = TypeVar("Pretrained", bound=PreTrainedModel)
Tokenizer = TypeVar("Tokenizer", bound=PreTrainedTokenizerBase)


def scorer_dtype(name: str) -> torch.dtype:
    """The floating-point dtype of a name such as "float32". Raises `RewardError` for any other name."""
    if name not in get_args(Dtype):
        raise RewardError(f"'{name}' is no dtype of a scorer: use one of {', '.join(get_args(Dtype))}")
    return getattr(torch, name)


def load_official(reward: str, path: str, build: Callable[[Any], Built]) -> Built:
    """What `build` makes of a published checkpoint.

    Args:
        reward: name of the reward, as `tools/download.py` knows it.
        path: the file, read by `torch.load(weights_only=True)`, or as safetensors where it is called so.
        build: from the file's content to a model.

    Raises:
        RewardError: the file is missing (with the command that fetches it), cannot be read, or `build` fails on what it
            holds.
    """
    place = official_file(reward, path)
    try:
        if place.suffix == ".safetensors":
            return build(load_file(place))
        return build(torch.load(place, map_location="cpu", weights_only=True))
    except (OSError, MemoryError) as error:
        raise RewardError(f"{place}, which reward '{reward}' needs, cannot be read: {error!r}") from error
    except Exception as error:  # torch and the key maps raise whatever they meet in a file of another kind
        # torch's own words advise to run the code in it
        said = "it holds more than weights, which is not run" if isinstance(error, pickle.UnpicklingError) else error
        raise RewardError(
            f"{place} is not the checkpoint of reward '{reward}': {said}. Remove it and fetch it again: "
            f"{fetch_command(reward)}"
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
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


@contextmanager
def from_hub(what: str, name: str, *more: str) -> Iterator[None]:
    """What cannot be loaded inside is a `RewardError`, with what fetches it and `more` of its repositories."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        fetch = " && ".join(f"hf download {each}" for each in dict.fromkeys((name, *more)))
        raise RewardError(f"the {what} '{name}' cannot be loaded: {error}. To fetch it: {fetch}") from error


def load_pretrained(
    kind: type[Pretrained], what: str, name: str, *more: str, unused: Collection[str] = ()
) -> Pretrained:
    """A model of this class from the hub or a local folder, as it is stored; frozen and in evaluation mode.

    Args:
        what: the model is called so in messages; `more`: as of `from_hub`.
        unused: entries of the model that no output depends on, which a file need not have.

    Raises:
        RewardError: it cannot be had, with the command that fetches it; or its files lack tensors, in whose place
            transformers puts random ones.
    """
    with from_hub(what, name, *more):
        model, told = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True)
        if missing := sorted(set(told["missing_keys"]).difference(unused)):
            raise ValueError(f"its files lack {missing[0]} ({len(missing)} tensors in all)")
    return model.requires_grad_(False).eval()


def load_tokenizer(reader: type[Tokenizer], name: str) -> Tokenizer:
    """A tokenizer of this class from the hub or a local folder.

    Raises:
        RewardError: it cannot be had, with the command that fetches it. transformers 5 does not say so: it returns one
            with nothing but special tokens.
    """
    with from_hub("tokenizer", name):
        tokenizer = reader.from_pretrained(name, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is not there")
        return tokenizer


def renamed(state: StateDict, rules: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under other names.

    Args:
        rules: `{pattern: replacement}` as of `re.sub`, applied one after the other. A new name with `{}` in it takes a
            stacked projection apart: the three thirds of the tensor become those of `q`, `k` and `v`.
    """
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in rules.items():
            key = re.sub(pattern, replacement, key)
        parts = value.chunk(3) if "{}" in key else [value]
        result |= {key.format(letter): part for letter, part in zip("qkv", parts, strict=False)}
    return result
