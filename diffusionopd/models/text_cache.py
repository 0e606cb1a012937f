"""Prompt conditions, computed once and kept on disk, so that text encoders need not stay in memory or load again.

One safetensors file per prompt, named by the hash of everything that its conditions depend on, in 256 subfolders. Files
are written atomically, so several processes and several runs can share a folder. A damaged file is removed, and its
prompt encoded again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from diffusionopd.distributed import LONGEST_TIMEOUT, together
from diffusionopd.files import write_atomically, writing
from diffusionopd.models.conditions import Conditions, Row, TextEncoder
from diffusionopd.models.loading import encoder_place, load_text_encoder, text_key
from diffusionopd.models.token_limits import describe_cut

_FORMAT = 2
_CHECKSUM = "crc32"  # its name among the tensors of a file
_REMEDY = "What is encoded is kept: free some space, or move the cache (cache_dir), and run again."


class TextCacheError(ValueError):
    """Raised where the conditions of a prompt cannot be read, computed or stored; names the prompt or the folder."""


class TextCache:
    """The conditions of prompts under one folder, for one text model, token length and dtype."""

    def __init__(
        self,
        folder: str | Path,
        model_key: str,
        max_sequence_length: int,
        dtype: torch.dtype,
        memory_bytes: int = 2**27,
    ) -> None:
        """``model_key`` names the encoders' weights. The prompts that were read last stay in RAM, as many as fit into
        ``memory_bytes``: 80 of SD3.5, 8 of FLUX.2-dev."""
        self.folder = Path(folder)
        self.model_key = model_key
        self.max_sequence_length = max_sequence_length
        self.dtype = dtype
        self._load = _Recent(self._read, memory_bytes)

    def path(self, prompt: str) -> Path:
        """Where the file of a prompt is or will be."""
        key = json.dumps([_FORMAT, self.model_key, prompt, self.max_sequence_length, str(self.dtype)])
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Distinct prompts without a complete file, in the order of their first appearance.

        Reads headers only: a truncated file is found and removed here, a changed byte is found by :meth:`get`.
        """
        return [prompt for prompt in dict.fromkeys(prompts) if not self._is_complete(self.path(prompt))]

    def fill(
        self,
        prompts: Iterable[str],
        load_encoder: Callable[[], TextEncoder],
        batch_size: int = 16,
        rank: int = 0,
        world: int = 1,
    ) -> int:
        """Encode what is missing; return how many prompts this process encoded. The caller then waits for the others.

        Process ``rank`` of ``world`` takes every ``world``-th distinct prompt. The shares are cut before looking at the
        disk: what is missing changes while the other processes write, the list of prompts does not. ``load_encoder`` is
        called only if this share misses something, and its result is dropped before returning. Prompts that are longer
        than the encoders read (the encoder's ``cut``, if it has one) are warned about.
        Raises TextCacheError if the disk is too small or a row is not finite, FolderError if a write fails.
        """
        missing = self.missing(list(dict.fromkeys(prompts))[rank::world])
        if not missing:
            return 0
        encoder = load_encoder()
        try:
            bar = tqdm(total=len(missing), desc="encoding prompts", unit="prompt", disable=rank > 0)
            with writing(self.folder, "text cache", _REMEDY), bar as progress:
                for start in range(0, len(missing), batch_size):
                    batch = missing[start : start + batch_size]
                    files = self._encoded(encoder, batch)
                    if start == 0:
                        each, count = sum(map(len, files)) // len(files), len(missing) * world
                        self._check_space(each, count)
                        progress.set_description(f"encoding prompts, {each * count / 1e6:,.0f} MB in all")
                    for prompt, content in zip(batch, files, strict=True):
                        # No fsync: losing a file to a power cut costs one encoding, and the checksum tells.
                        write_atomically(self.path(prompt), content)
                    progress.update(len(batch))
            if cut := getattr(encoder, "cut", None):
                warnings.warn(describe_cut(cut), stacklevel=2)
        finally:
            del encoder
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return len(missing)

    def get(
        self, prompts: Sequence[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Conditions:
        """The conditions of B prompts that :meth:`fill` has seen; ``dtype`` defaults to the stored one.

        Raises TextCacheError naming the first prompt that is absent or damaged (a damaged file is removed first).
        """
        return Conditions.of([self._load(prompt) for prompt in prompts]).to(device, dtype)

    def _encoded(self, encoder: TextEncoder, prompts: list[str]) -> list[bytes]:
        """The files of a batch; TextCacheError unless the encoder gives one finite row per prompt."""
        files = []
        for prompt, row in zip(prompts, encoder(prompts), strict=True):
            # clone(): rows of a batch share its storage, which safetensors refuses.
            stored = {
                name: part.detach().to("cpu", self.dtype if part.is_floating_point() else None).contiguous().clone()
                for name, part in row.items()
            }
            if not all(part.isfinite().all() for part in stored.values()):
                raise TextCacheError(
                    f"the conditions of prompt {prompt!r} are not finite in {self.dtype}: encode in float32 or bfloat16"
                )
            metadata = {"prompt": json.dumps(prompt)}
            files.append(safetensors.torch.save(stored | {_CHECKSUM: _checksum(stored)}, metadata))
        return files

    def _check_space(self, each: int, count: int) -> None:
        """Stop before the first write if the job cannot fit: so many prompts over all processes, ``each`` in bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if each * count > free:
            raise TextCacheError(
                f"the text cache {self.folder} needs about {each * count:,} bytes more, its disk has {free:,} free. "
                f"Move it (cache_dir), free some space, or use shorter prompt files: {count} prompts are to be "
                f"encoded, {free // each} fit, at {each:,} bytes each."
            )

    def _is_complete(self, path: Path) -> bool:
        try:
            with safetensors.safe_open(path, "pt") as file:
                return _CHECKSUM in file.keys()  # noqa: SIM118
        except OSError:  # none there, or none that this process may read: it is written again
            return False
        except safetensors.SafetensorError as error:
            _discard(path, error)
            return False

    def _read(self, prompt: str) -> Row:
        path = self.path(prompt)
        try:
            row = safetensors.torch.load(path.read_bytes())
            if not torch.equal(row.pop(_CHECKSUM), _checksum(row)):
                raise ValueError("its checksum does not match")
        except OSError as error:
            raise TextCacheError(f"prompt {prompt!r} is not in the text cache, fill it first: {error}") from None
        except (safetensors.SafetensorError, LookupError, ValueError) as error:
            _discard(path, error)
            raise TextCacheError(
                f"the file of prompt {prompt!r} was damaged and is removed, run again: {error}"
            ) from None
        return row


class _Recent:
    """Rows that were read last, up to ``limit`` bytes of them; for several threads."""

    def __init__(self, read: Callable[[str], Row], limit: int) -> None:
        self._read, self._limit, self._lock = read, limit, Lock()
        self._rows: dict[str, Row] = {}  # the newest at the end
        self._bytes = 0

    def __call__(self, prompt: str) -> Row:
        with self._lock:
            if prompt in self._rows:
                row = self._rows[prompt] = self._rows.pop(prompt)
                return row
        row = self._read(prompt)
        with self._lock:
            if prompt not in self._rows:
                self._rows[prompt] = row
                self._bytes += _size(row)
            while self._bytes > self._limit:
                self._bytes -= _size(self._rows.pop(next(iter(self._rows))))
        return row


def _size(row: Row) -> int:
    return sum(part.nbytes for part in row.values())


def _discard(path: Path, problem: Exception) -> None:
    warnings.warn(f"removed the damaged text cache file {path}: {problem}", stacklevel=4)
    path.unlink(missing_ok=True)


def _checksum(row: Row) -> Tensor:
    """CRC-32 of names, shapes and bytes: bit rot is what it must catch, and it is faster than reading the file."""
    crc = 0
    for name, part in sorted(row.items()):
        crc = zlib.crc32(f"{name} {list(part.shape)} {part.dtype}".encode(), crc)
        crc = zlib.crc32(part.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return torch.tensor([crc])


def filled(
    source: Mapping[str, Any],
    texts: Sequence[str],
    folder: str | Path,
    max_sequence_length: int,
    *,
    encode_on: str | None,
    device: torch.device,
    dtype: torch.dtype,
    rank: int = 0,
    world: int = 1,
) -> TextCache:
    """The cache of a base model, with what it has not seen of ``texts`` encoded, each process a share.

    ``source``: the base, as of `loading`. ``encode_on``: the device of the encoders, None for ``device``; they are
    loaded for what is not there alone, and gone from memory afterwards. BackboneError, TextCacheError.
    """
    place, precision = encoder_place(encode_on, device, dtype)
    load = partial(load_text_encoder, **source, dtype=precision, device=place, max_sequence_length=max_sequence_length)
    cache = TextCache(folder, text_key(**source), max_sequence_length, dtype)
    together(lambda: cache.fill(texts, load, rank=rank, world=world), "encoding the prompts", LONGEST_TIMEOUT)
    return cache
