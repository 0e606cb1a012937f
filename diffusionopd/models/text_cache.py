"""Prompt embeddings, computed once and kept on disk, so that text encoders need not stay in memory or load again.

One safetensors file a prompt, named by the hash of everything the embedding depends on, in 256 subfolders. Files are
written beside and renamed into place, so several processes and several runs can share a folder. A file that a crash
left damaged is recognised by its own header and checksum, removed, and encoded again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import struct
import threading
import time
import uuid
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from diffusionopd.models.conditions import TextEmbeddings

_FORMAT = 1
_STALE_SECONDS = 3600.0  # a partial file older than this belongs to a process that died


class TextCacheError(ValueError):
    """An embedding cannot be read, computed or stored; the message names the prompt or the folder."""


class TextEncoder(Protocol):
    """Turns B prompts into embeddings on the CPU."""

    def __call__(self, prompts: list[str]) -> TextEmbeddings:
        """Embeddings `[B, ...]` in the order of the prompts."""
        ...


class TextCache:
    """Embeddings of prompts under one folder, for one text model, token length and dtype."""

    def __init__(
        self, folder: str | Path, model_key: str, max_sequence_length: int, dtype: torch.dtype, memory_items: int = 64
    ) -> None:
        """`model_key` names the encoders' weights; `memory_items` prompts (about 1.7 MB each for SD3.5) stay in RAM."""
        self.folder = Path(folder)
        self.model_key = model_key
        self.max_sequence_length = max_sequence_length
        self.dtype = dtype
        self._memory: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._memory_items = memory_items
        self._lock = threading.Lock()  # batches are made in a thread beside evaluations

    def path(self, prompt: str) -> Path:
        """Where the embedding of a prompt is or will be."""
        key = json.dumps([_FORMAT, self.model_key, prompt, self.max_sequence_length, str(self.dtype)])
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Distinct prompts without a whole file, in the order of their first appearance.

        Reads headers only: a truncated file is found and removed here, a changed byte is found by `get`.
        """
        return [prompt for prompt in dict.fromkeys(prompts) if not self._is_whole(self.path(prompt))]

    def fill(
        self,
        prompts: Iterable[str],
        load_encoder: Callable[[], TextEncoder],
        batch_size: int = 16,
        rank: int = 0,
        world: int = 1,
    ) -> int:
        """Encode what is missing; return how many prompts this process encoded. The caller then waits for the others.

        Process `rank` of `world` takes every `world`-th distinct prompt. The shares are cut before looking at the disk:
        what is missing changes while the other processes write, the list of prompts does not. `load_encoder` is called
        only if this share misses something, and its result is dropped before returning.
        Raises TextCacheError if the disk is too small, a write fails or an embedding is not finite.
        """
        distinct = list(dict.fromkeys(prompts))
        missing = self.missing(distinct[rank::world])
        if not missing:
            return 0
        if rank == 0:
            self._remove_stale()
        encoder = load_encoder()
        try:
            self._encode(encoder, missing, batch_size, show_progress=rank == 0, sharers=world)
        finally:
            del encoder
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return len(missing)

    def get(
        self, prompts: Sequence[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> TextEmbeddings:
        """Embeddings [B, L, D] and [B, P] of B prompts that `fill` has seen; `dtype` defaults to the stored one.

        Raises TextCacheError naming the first prompt that is absent or damaged (a damaged file is removed first).
        """
        if not prompts:
            raise TextCacheError("no prompts given: an empty batch has no embeddings")
        with self._lock:
            rows = [self._load(prompt) for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if [part.shape for part in row] != [part.shape for part in rows[0]]:
                raise TextCacheError(
                    f"the embeddings of prompts {prompts[0]!r} and {prompt!r} in {self.folder} have different shapes: "
                    "remove the folder, and they are made anew"
                )
        batch = TextEmbeddings(torch.stack([tokens for tokens, _ in rows]), torch.stack([pooled for _, pooled in rows]))
        return batch.to(device, dtype)

    def _encode(
        self, encoder: TextEncoder, prompts: list[str], batch_size: int, show_progress: bool, sharers: int
    ) -> None:
        """Encode in batches and write each at once, so that memory holds one batch whatever the number of prompts."""
        with tqdm(total=len(prompts), desc="encoding prompts", unit="prompt", disable=not show_progress) as progress:
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                embeddings = self._checked(encoder(batch), batch)
                files = [
                    _serialize(embeddings.tokens[i], embeddings.pooled[i], prompt, self.model_key)
                    for i, prompt in enumerate(batch)
                ]
                if start == 0:
                    self._check_space(len(files[0]) * len(prompts) * sharers)
                for prompt, content in zip(batch, files, strict=True):
                    self._write(self.path(prompt), content)
                progress.update(len(batch))

    def _checked(self, embeddings: TextEmbeddings, prompts: list[str]) -> TextEmbeddings:
        """The encoder's output in the stored dtype, or TextCacheError if it is not one finite embedding a prompt."""
        if len(embeddings.tokens) != len(prompts) or len(embeddings.pooled) != len(prompts):
            raise TextCacheError(
                f"the text encoder returned {len(embeddings.tokens)} token and {len(embeddings.pooled)} pooled "
                f"embeddings for {len(prompts)} prompts"
            )
        embeddings = TextEmbeddings(*(part.detach() for part in embeddings)).to("cpu", self.dtype)
        for i, prompt in enumerate(prompts):
            if not all(bool(part[i].isfinite().all()) for part in embeddings):
                raise TextCacheError(
                    f"the embedding of prompt {prompt!r} is not finite in {self.dtype}: encode in float32 or bfloat16"
                )
        return embeddings

    def _check_space(self, needed: int) -> None:
        """Stop before the first write if the whole job cannot fit; `needed` bytes over all processes that share it."""
        self._make_folder(self.folder)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise TextCacheError(
                f"the text cache {self.folder} needs about {needed:,} bytes more, its disk has {free:,} free: "
                "free some space, move the cache, or use fewer prompts"
            )

    def _write(self, path: Path, content: bytes) -> None:
        # No fsync: losing a file to a power cut costs one encoding, and the checksum tells.
        partial = self.folder / "partial" / f"{os.getpid()}-{uuid.uuid4().hex}"
        self._make_folder(partial.parent)
        self._make_folder(path.parent)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError as error:
            raise TextCacheError(
                f"cannot write {len(content):,} bytes to the text cache {path}: {error}. What is encoded is kept: free "
                "some space, or move the cache (cache_dir), and run again"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def _make_folder(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TextCacheError(f"cannot make the text cache folder {folder}: {error}") from error

    def _remove_stale(self) -> None:
        for partial in (self.folder / "partial").glob("*"):
            try:
                if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                    partial.unlink()
            except FileNotFoundError:  # its process was alive after all, and renamed it
                continue

    def _is_whole(self, path: Path) -> bool:
        try:
            problem = _header_problem(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise TextCacheError(f"cannot read the text cache file {path}: {error}") from error
        if problem is not None:
            self._discard(path, problem)
        return problem is None

    def _load(self, prompt: str) -> tuple[Tensor, Tensor]:
        if prompt in self._memory:
            self._memory.move_to_end(prompt)
            return self._memory[prompt]
        path = self.path(prompt)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise TextCacheError(
                f"no embedding of prompt {prompt!r} in the text cache {self.folder}: fill it first"
            ) from None
        except OSError as error:
            raise TextCacheError(f"cannot read the text cache file {path} of prompt {prompt!r}: {error}") from error
        try:
            row = _deserialize(content, self.dtype)
        except ValueError as error:
            self._discard(path, str(error))
            raise TextCacheError(
                f"the stored embedding of prompt {prompt!r} was damaged ({error}) and is removed: run again"
            ) from None
        self._memory[prompt] = row
        if len(self._memory) > self._memory_items:
            self._memory.popitem(last=False)
        return row

    @staticmethod
    def _discard(path: Path, problem: str) -> None:
        warnings.warn(f"removed the damaged text cache file {path}: {problem}", stacklevel=3)
        path.unlink(missing_ok=True)


def _checksum(tokens: Tensor, pooled: Tensor) -> str:
    """CRC-32 of both tensors' bytes: bit rot is what it must catch, and it is faster than reading the file."""
    crc = 0
    for part in (tokens, pooled):
        crc = zlib.crc32(part.contiguous().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _serialize(tokens: Tensor, pooled: Tensor, prompt: str, model_key: str) -> bytes:
    # clone(): rows of a batch share its storage, which safetensors refuses.
    tensors = {"tokens": tokens.contiguous().clone(), "pooled": pooled.contiguous().clone()}
    metadata = {"prompt": json.dumps(prompt), "model": json.dumps(model_key), "crc32": _checksum(tokens, pooled)}
    return safetensors.torch.save(tensors, metadata)


def _header_problem(path: Path) -> str | None:
    """Why a safetensors file cannot be whole, by its size and header alone; None if it looks whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return f"{size} bytes are no safetensors file"
        length = struct.unpack("<Q", prefix)[0]
        if length > size - 8:
            return "truncated within its header"
        header = file.read(length)
    try:
        entries = json.loads(header)
        expected = 8 + length + max(int(entries[name]["data_offsets"][1]) for name in ("tokens", "pooled"))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        return f"unreadable header ({error!r})"
    return None if size == expected else f"{size} bytes instead of {expected}"


def _deserialize(content: bytes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tensors (tokens [L, D], pooled [P]) of a file's bytes; ValueError says what is wrong with them."""
    try:
        tensors = safetensors.torch.load(content)
        length = struct.unpack("<Q", content[:8])[0]
        expected = json.loads(content[8 : 8 + length])["__metadata__"]["crc32"]
        tokens, pooled = tensors["tokens"], tensors["pooled"]
    except Exception as error:  # safetensors raises its own class, which derives from Exception alone
        raise ValueError(f"unreadable: {error}") from error
    if _checksum(tokens, pooled) != expected:
        raise ValueError("its checksum does not match")
    if tokens.ndim != 2 or pooled.ndim != 1 or not tokens.dtype == pooled.dtype == dtype:
        raise ValueError("its shapes or types are others")  # the header is not in the checksum
    return tokens, pooled
