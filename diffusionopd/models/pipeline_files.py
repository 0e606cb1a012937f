"""The files of a base model: where they are, and what is wrong with them, before any weights load.

Names, configurations and the headers of weight files tell what the libraries would fill with random numbers, leave out
or fail on. Nothing here knows a model family; what a part should hold is asked of its class, on the meta device.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_model
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from diffusers.quantizers import DiffusersAutoQuantizer
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers import AutoHfQuantizer

CONFIGS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of the small files of a pipeline, tokenizers' vocabularies and chat templates among them."""
_MOST = 6  # names in a message


# --- places ----------------------------------------------------------------------------------------------------------


def is_checkpoint(model: str) -> bool:
    """Whether ``model`` is a single file of weights, here or on the hub (``owner/name/file.safetensors``)."""
    return model.endswith(".safetensors") and not Path(model).is_dir()


def find_folder(model: str, revision: str | None = None, patterns: Sequence[str] | None = None) -> Path | None:
    """A folder, or the hub cache's folder for a hub id: after what ``patterns`` name was downloaded, if it was not.

    With ``patterns`` None nothing is downloaded, and None returned if nothing is here.
    """
    if Path(model).is_dir():
        return Path(model)
    if patterns is None:
        index = try_to_load_from_cache(model, "model_index.json", revision=revision)
        return Path(index).parent if isinstance(index, str) else None
    return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))


def find_checkpoint(model: str, revision: str | None, download: bool) -> Path | None:
    """A single file, downloaded if need be and allowed; None if it is not here."""
    if Path(model).is_file() or model.count("/") < 2:
        return Path(model)
    owner, name, file = model.split("/", 2)
    if download:
        return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision))
    found = try_to_load_from_cache(f"{owner}/{name}", file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def hub_remedy() -> str:
    """What to do about a download that failed."""
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return f"The hub's cache {cache} cannot be written: set HF_HOME to a folder that can."
    offline = ", or unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else ""
    return (
        f"Check the name and the connection{offline}, accept the model's licence on the hub, and log in (hf auth "
        "login). What is downloaded goes to HF_HOME."
    )


# --- headers ---------------------------------------------------------------------------------------------------------


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, without storage. ValueError for a file that is none."""
    with file.open("rb") as handle:
        if handle.read(23) == b"version https://git-lfs":
            raise ValueError(f"{file} is a pointer of git-lfs, not the file: run git lfs pull")
    try:
        with safe_open(file, "pt") as content:
            shapes = {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): download or save it again") from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _weight_names(folder: Path, stem: str, variant: str | None) -> list[str]:
    """The files of a part's weights, as its index names them or as they are called without one."""
    dot = f".{variant}" if variant else ""
    for index in (f"{stem}.safetensors.index{dot}.json", f"{stem}{dot}.safetensors.index.json"):
        if (folder / index).is_file():
            return sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [f"{stem}{dot}.safetensors"]


@dataclass(frozen=True)
class Part:
    """A model of the pipeline: transformer, VAE or text encoder.

    ``prefix`` and ``made`` are of text encoders in a single file: what their tensors' names begin with there, and the
    tensors that diffusers makes itself.
    """

    name: str
    kind: Any  # the class
    folder: Path  # has the configuration, and the weights unless they are in the checkpoint
    checkpoint: Path | None = None
    prefix: str = ""
    made: Collection[str] = ()

    @property
    def of_diffusers(self) -> bool:
        """Whether its class is one of diffusers, not of transformers."""
        return issubclass(self.kind, diffusers.ModelMixin)

    def config(self) -> dict[str, Any]:
        """Its config.json. ValueError for one that is damaged, or that of another class."""
        file = self.folder / "config.json"
        try:
            config = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{file} cannot be read ({error})") from error
        if self.of_diffusers and (found := config.get("_class_name", self.kind.__name__)) != self.kind.__name__:
            raise ValueError(f"{file} is that of {found}, model_index.json asks for {self.kind.__name__}")
        return config

    # --- the files of its folder

    @property
    def stem(self) -> str:
        """What its weight files are called, before variant and number."""
        return "diffusion_pytorch_model" if self.of_diffusers else "model"

    def files(self, variant: str | None) -> list[str]:
        """The names of its weight files: of the variant if it has that, as diffusers does, else the plain ones."""
        named = _weight_names(self.folder, self.stem, variant)
        return named if any(self._is_here(name) for name in named) else _weight_names(self.folder, self.stem, None)

    def _is_here(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def variants(self, listing: Collection[str] = ()) -> set[str]:
        """The variants of its weights in the folder, or in the ``listing`` of its repository."""
        pattern = re.compile(rf"{self.name}/{self.stem}(?:-\d+-of-\d+)?\.(\w+)(?:-\d+-of-\d+)?\.safetensors")
        here = [f"{self.name}/{path.name}" for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return {match[1] for name in listing or here if (match := pattern.fullmatch(name))}

    def absent(self, variant: str | None) -> list[str]:
        """Which of its weight files are not in the folder."""
        return [name for name in self.files(variant) if not self._is_here(name)]

    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of change of all that it is read from."""
        files = sorted([*self.folder.iterdir(), *([self.checkpoint] if self.checkpoint else [])])
        stats = {str(file): file.stat() for file in files if file.is_file()}
        return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())

    # --- its tensors

    def tensors(self, variant: str | None) -> dict[str, Tensor]:
        """What its files hold, without storage, by the names of its class. ValueError for unreadable files.

        Of a single file: what is left after diffusers' own conversion; empty if that has none of this part.
        """
        if self.checkpoint is None:
            files = [self.folder / name for name in self.files(variant)]
            return {name: tensor for file in files for name, tensor in read_header(file).items()}
        found = read_header(self.checkpoint)
        if not self.of_diffusers:
            return {n.removeprefix(self.prefix): t for n, t in found.items() if n.startswith(self.prefix)}
        expected = self.empty().state_dict()
        if found.keys() == expected.keys():
            return found
        name = single_file_model._get_single_file_loadable_mapping_class(self.kind)
        if name is None:
            raise ValueError(f"diffusers cannot take {self.name} ({self.kind.__name__}) from a single file")
        convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
        try:
            converted = convert(checkpoint=found, config=self.config())
        except (LookupError, ValueError, RuntimeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{self.checkpoint} is no complete checkpoint of {self.kind.__name__}: {what}") from error
        return converted if converted.keys() & expected.keys() else {}

    def empty(self) -> Any:
        """The model of its configuration, on the meta device."""
        with torch.device("meta"):
            return self.kind.from_config(self.config())

    def misfits(self, tensors: dict[str, Tensor]) -> str:
        """What is wrong with its tensors, empty for nothing: what would be random, lost or of another shape."""
        if self.of_diffusers:
            model = self.empty()
            model._fix_state_dict_keys_on_load(tensors)  # attention layers under the names of earlier releases
            expected = model.state_dict()
            missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
            shapes = [n for n in tensors.keys() & expected.keys() if tensors[n].shape != expected[n].shape]
        else:
            config = self.kind.config_class.from_pretrained(self.folder)
            with _quiet():  # its own account of the same; here its rules are known for tied and renamed tensors
                model, told = self.kind.from_pretrained(
                    None, config=config, state_dict=dict(tensors), device_map="meta", use_safetensors=True,
                    output_loading_info=True, ignore_mismatched_sizes=True,
                )  # fmt: skip
            missing, unexpected = set(told["missing_keys"]), set(told["unexpected_keys"])
            shapes = [name for name, *_ in told["mismatched_keys"]]
        missing -= set(self.made)
        weights = {name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")}
        beside = [name for name in unexpected if name.rpartition(".")[0] in weights]
        if any(".base_layer." in name for name in unexpected):
            return (
                f"{self.name} was saved with a LoRA on it ({some(n for n in unexpected if '.base_layer.' in n)}), "
                "and whether its effect is in these weights (fuse_lora) or was beside them no file says. In "
                "diffusers, fuse_lora(), then unload_lora_weights(), then save_pretrained()"
            )
        if missing and (prefix := _prefix(missing, unexpected)):
            what = f"the tensors of {self.name} have the prefix {prefix!r} before their names"
        elif missing:
            what = f"{self.name} lacks {some(missing)}"
        elif shapes:
            what = f"tensors of {self.name} do not have the shapes of its config.json: {some(shapes)}"
        elif beside:
            what = f"{self.name} has tensors beside its weights (scales?) that would be left out: {some(beside)}"
        else:
            return ""
        return f"{what}. Download or save it again in the form of {self.kind.__name__}.save_pretrained"

    def unpackaged(self) -> str:
        """Why its quantised weights cannot be read here; empty if they can, or are plain."""
        config = self.config().get("quantization_config")
        if not config:
            return ""
        try:
            quantizer = DiffusersAutoQuantizer if self.of_diffusers else AutoHfQuantizer
            quantizer.from_config(config, pre_quantized=True).validate_environment()
        except ImportError as error:
            method = config.get("quant_method", "quantised")
            return (
                f"{self.name} is quantised ({method}), and what reads it is not here: {' '.join(str(error).split())}. "
                "Install that package, or save the model with its weights in full (dequantize())"
            )
        except Exception:  # noqa: S110 (a GPU that is not here may be where the run is; loading tells)
            pass
        return ""

    def load(self, variant: str | None, dtype: torch.dtype) -> nn.Module:
        """The model with its weights, on the CPU; quantised ones are unpacked. ValueError for tensors that it lacks."""
        if self.checkpoint is not None:
            options = {"config": str(self.folder.parent), "subfolder": self.name, "dtype": dtype}
            model, missing = self.kind.from_single_file(str(self.checkpoint), **options), ()
        else:
            variant = variant if variant and self.files(variant) != self.files(None) else None
            model, told = self.kind.from_pretrained(
                self.folder, dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True
            )
            missing = told["missing_keys"]
        if getattr(model, "hf_quantizer", None) is not None:
            model = model.dequantize().to(dtype)
        check_loaded(self.name, model, missing)
        return model


def check_loaded(name: str, model: nn.Module, missing: Collection[str] = ()) -> None:
    """ValueError for a model with tensors that no file had: without storage, or named ``missing`` by its loader."""
    empty = [n for n, tensor in model.state_dict().items() if tensor.is_meta]
    if lacking := {*missing, *empty}:
        raise ValueError(f"{name} lacks {some(lacking)}")


def _prefix(missing: Collection[str], unexpected: Collection[str]) -> str:
    """What stands before all ``missing`` names among the ``unexpected``; empty if nothing does."""
    first = next(iter(missing))
    candidates = [name.removesuffix(first) for name in unexpected if name.endswith(first)]
    return next((p for p in candidates if all(f"{p}{name}" in unexpected for name in missing)), "")


def some(names: Collection[str] | Iterator[str]) -> str:
    """The first few of names, in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _MOST} more" if len(ordered) > _MOST else ""
    return ", ".join(ordered[:_MOST]) + more


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the messages and progress bars of transformers."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


# --- a whole pipeline ------------------------------------------------------------------------------------------------


def default_config(checkpoint: Path) -> str:
    """The hub id whose configurations a single file is made for, as diffusers infers it."""
    return str(fetch_diffusers_config(read_header(checkpoint))["pretrained_model_name_or_path"])


def rows_digest(digest: Any, checkpoint: Path, prefixes: Sequence[str] = ("",)) -> None:
    """Add name, shape and the first row of every tensor under ``prefixes`` in a .safetensors file to a hash."""
    with safe_open(checkpoint, "pt") as file:
        for name in sorted(name for name in file.keys() if name.startswith(tuple(prefixes))):  # noqa: SIM118
            part = file.get_slice(name)
            shape = part.get_shape()
            digest.update(f"{name}{shape}{part.get_dtype()}".encode())
            row = part[:1] if len(shape) > 1 else file.get_tensor(name)
            digest.update(row.reshape(-1).view(torch.uint8).numpy().tobytes())


def part_digest(digest: Any, name: str, file: Path) -> None:
    """Add a file to a hash: name, size, the first and last MiB, and of weights what `rows_digest` reads, which changes
    with a LoRA that is fused into them."""
    size = file.stat().st_size
    digest.update(f"{name}:{size}".encode())
    if file.suffix == ".safetensors":
        with suppress(SafetensorError):  # such as a pointer of Git LFS, of a part that nothing loads
            rows_digest(digest, file)
    with file.open("rb") as handle:
        digest.update(handle.read(2**20))
        handle.seek(max(0, size - 2**20))
        digest.update(handle.read())


def from_checkpoint(part: Part, checkpoint: Path, prefix: str, made: Collection[str]) -> Part:
    """The part as the single file has it, else as its folder has it. ValueError as of :meth:`Part.tensors`, and for a
    file without a transformer."""
    inside = replace(part, checkpoint=checkpoint, prefix=prefix, made=made)
    if (part.of_diffusers or prefix) and inside.tensors(None):
        return inside
    if part.name == "transformer":
        raise ValueError(f"{checkpoint} has no {part.kind.__name__}")
    return part


def weight_problems(parts: Collection[Part], variant: str | None, listing: Collection[str] | None = ()) -> list[str]:
    """What is wrong with the weights of parts, as far as names, configurations and headers tell.

    ``listing``: the names of the files on the hub, if more are there than here; None: what is not here is no fault.
    """
    problems, others = [], {}
    folders = [part for part in parts if part.checkpoint is None]
    if variant and folders and listing is not None:
        there = {name for part in folders for name in part.variants(listing)}
        if variant not in there:
            have = f"those there: {', '.join(sorted(there))}" if there else "there are none: leave it out"
            problems.append(f"no part has weights of the variant {variant!r} (pretrained.variant); {have}")
    for part in parts:
        try:
            absent = [] if part.checkpoint else part.absent(variant)
            if absent:
                if listing is None:
                    continue
                if found := part.variants(listing):
                    others[part.name] = found
                else:
                    problems.append(_absent(part, absent))
            elif part.config().get("quantization_config"):
                problems += filter(None, [part.unpackaged()])
            else:
                problems += filter(None, [_misfits(part, variant, part.stamps())])
        except (ValueError, LookupError, TypeError, OSError) as error:
            problems.append(f"{part.name}: {error}")
    if others:
        names = sorted(set.intersection(*others.values()) or set.union(*others.values()))
        remedy = f"Set pretrained.variant to {' or '.join(map(repr, names))}"
        problems.append(f"{', '.join(others)}: only weights of the variant {', '.join(names)} are there. {remedy}")
    return problems


@cache
def _misfits(part: Part, variant: str | None, stamps: tuple) -> str:
    """:meth:`Part.misfits` of files as they were; a start asks three times, before and after it has taken its folder
    and as it loads, and each answer builds the model on the meta device."""
    return part.misfits(part.tensors(variant))


def _absent(part: Part, names: Sequence[str]) -> str:
    pickled = part.folder.is_dir() and any(path.suffix == ".bin" for path in part.folder.iterdir())
    reason = ": a .bin may hold code and is not read. Save it again with save_pretrained" if pickled else ""
    return f"{part.folder} has no {some(names)}{reason or '. Download or save it again'}"


def fetch_weights(model: str, root: Path, parts: Collection[Part], variant: str | None) -> Collection[str]:
    """Download the weights of parts to the hub cache's folder ``root``: of the variant, else the plain ones.

    Returns the names of all files of the repository if some of them are not there either.
    """
    for kind in dict.fromkeys((variant, None)):
        lacking = [part for part in parts if part.checkpoint is None and part.absent(variant)]
        names = [f"{part.name}/{name}" for part in lacking for name in _weight_names(part.folder, part.stem, kind)]
        if not lacking:
            return ()
        snapshot_download(model, revision=root.name, allow_patterns=names)
    if constants.HF_HUB_OFFLINE or not any(part.absent(variant) for part in lacking):
        return ()
    return HfApi().list_repo_files(model, revision=root.name)
