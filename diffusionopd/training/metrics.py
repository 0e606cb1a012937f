"""What a run tells about itself: `metrics.jsonl`, trackers, sample grids. Nothing here can change the training."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import textwrap
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_PADDING = 6  # pixels around a picture and its caption
_FONT_SIZE = 12  # pixels
_CAPTION_LINES = 4
_SMALLEST_CELL = 160  # pixels: narrower pictures are enlarged, or their captions could not be read


class MetricsWriter:
    """Collects values from anywhere in a round and writes one JSON object a round.

    Values reach the trackers of an `accelerate.Accelerator` too. A tracker that fails is reported once and dropped: the
    file is the record, trackers are a convenience. Lines that cannot be written are kept, and written when they can be.
    """

    def __init__(self, path: str | Path | None, log_with: Sequence[str] = (), accelerator: Any = None) -> None:
        """`path` None writes nothing (processes other than the first); `log_with` names the trackers in use."""
        self._path = None if path is None else Path(path)
        self._tracked = self._accelerator = accelerator if log_with else None  # the second only while nothing failed
        self._log_with = tuple(log_with)
        self._pending: dict[str, list[float | Tensor]] = {}
        self._unwritten: list[str] = []
        self._delayed = False
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def start_trackers(self, project: str, config: dict[str, Any], **options: Any) -> None:
        """`accelerator.init_trackers`, called by every process; a tracker that cannot start is reported and dropped."""
        if self._accelerator is not None:
            self._try_trackers("init_trackers", project, config=config, init_kwargs=options)

    def report(self, name: str, value: float | Tensor) -> None:
        """Add a value to this round's mean of `name`.

        A tensor of any shape counts as the mean of its elements. It is read at `write`, so reporting from a GPU does
        not wait for it.
        """
        value = value.detach().float().mean() if isinstance(value, Tensor) else float(value)
        self._pending.setdefault(name, []).append(value)

    def write(self, round_index: int, **values: Any) -> dict[str, Any]:
        """Write the means of what was reported, and `values`, as the line of a round; return it.

        A number that is not finite is written as null, which is what strict JSON has for it.
        """
        means = {name: math.fsum(parts) / len(parts) for name, parts in self._collected().items()}
        row = {"round": round_index, **means, **values}
        self._append(json.dumps(_strict(row), allow_nan=False))
        if self._accelerator is not None:
            numbers = {k: float(v) for k, v in row.items() if k != "round" and isinstance(v, int | float)}
            self._try_trackers("log", numbers, step=round_index)
        return row

    def sync(self) -> None:
        """Force the file to the disk; called at a checkpoint, so that a checkpoint never outlives its metrics."""
        if self._path is None:
            return
        try:
            self._write_lines()
            if self._path.exists():
                with self._path.open("rb") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            warnings.warn(f"cannot force {self._path} to the disk, training goes on: {error}", stacklevel=2)

    def close(self) -> None:
        """Write what is left and end the trackers; nothing of this can fail the run."""
        try:
            self._write_lines()
        except OSError as error:
            warnings.warn(
                f"cannot write to {self._path}: the metrics of {len(self._unwritten)} rounds are lost ({error})",
                stacklevel=2,
            )
        if self._tracked is not None:
            trackers, self._tracked.trackers = self._tracked.trackers, []  # `end_training` would end them again
            for tracker in trackers:
                self._try(tracker.finish)

    def truncate_after(self, round_index: int) -> None:
        """Drop the lines of later rounds, and a line that a crash cut short; called when resuming after that round."""
        if self._path is None or not self._path.exists():
            return
        kept = [line for line in self._path.read_text("utf-8", "replace").split("\n") if _round_of(line) <= round_index]
        _write_atomically(self._path, "".join(line + "\n" for line in kept).encode())

    def _append(self, line: str) -> None:
        """Add a line, or keep it for later when the disk is full."""
        if self._path is None:
            return
        self._unwritten.append(line)
        try:
            self._write_lines()
        except OSError as error:
            if not self._delayed:
                warnings.warn(
                    f"cannot write to {self._path}, training goes on and its metrics are kept in memory until this is "
                    f"possible again: {error}",
                    stacklevel=3,
                )
            self._delayed = True

    def _write_lines(self) -> None:
        """Write the lines that are due; OSError leaves the file as it was."""
        if self._path is None or not self._unwritten:
            return
        _end_broken_line(self._path)
        with self._path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            content = "".join(line + "\n" for line in self._unwritten).encode()
            try:
                if (written := file.write(content)) != len(content):
                    raise OSError(errno.ENOSPC, f"{written} of {len(content)} bytes written")
            except OSError:
                with suppress(OSError):
                    file.truncate(before)
                raise
        self._unwritten.clear()
        if self._delayed:
            warnings.warn(f"{self._path} is written again, no round is missing", stacklevel=4)
        self._delayed = False

    def _collected(self) -> dict[str, list[float]]:
        pending, self._pending = self._pending, {}
        return {name: [float(part) for part in parts] for name, parts in pending.items()}

    def _try_trackers(self, method: str, *args: Any, **kwargs: Any) -> None:
        self._try(partial(getattr(self._accelerator, method), *args, **kwargs))

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - trackers raise whatever their client library raises
            if self._accelerator is not None:
                self._accelerator = None
                names = ", ".join(self._log_with)
                warnings.warn(
                    f"tracker {names} failed and is off from here on ({error!r}); metrics.jsonl goes on", stacklevel=4
                )


def _strict(value: Any) -> Any:
    """The value with every number that is not finite as None, tensors and numpy values as plain Python."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return value


def _round_of(line: str) -> float:
    """The round of a line of metrics.jsonl; infinity if the line is no such object."""
    try:
        value = json.loads(line)["round"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return value if isinstance(value, int) else math.inf


def _end_broken_line(path: Path) -> None:
    """Start a new line if the last one was cut short, so that the next round is not glued to it."""
    if path.exists() and path.stat().st_size > 0:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def sample_grid(
    images: Tensor, captions: Sequence[str], path: str | Path, columns: int | None = None, title: str | None = None
) -> Path:
    """Write pictures [B, 3, H, W] (uint8, or float in [0, 1]) with a caption under each as one PNG; return its path.

    `columns` defaults to a nearly square grid. Raises ValueError if shapes or the number of captions do not fit.
    """
    pictures = _enlarged(_to_uint8(images))
    count, height, width = pictures.shape[:3]
    if len(captions) != count:
        raise ValueError(f"{count} pictures need as many captions, got {len(captions)}")
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    font = ImageFont.load_default(_FONT_SIZE)
    line_height = _FONT_SIZE + 3
    texts = [_wrapped(caption, width, font) for caption in captions]
    cell = (width + 2 * _PADDING, height + 3 * _PADDING + line_height * max(len(text) for text in texts))
    top = 0 if title is None else line_height + 2 * _PADDING
    grid = Image.new("RGB", (columns * cell[0], top + rows * cell[1]), "white")
    draw = ImageDraw.Draw(grid)
    if title is not None:
        draw.text((_PADDING, _PADDING), title, fill="black", font=font)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = i % columns * cell[0] + _PADDING, top + i // columns * cell[1] + _PADDING
        grid.paste(Image.fromarray(picture), (x, y))
        for n, line in enumerate(text):
            draw.text((x, y + height + _PADDING + n * line_height), line, fill="black", font=font)
    return _save_png(grid, Path(path))


def _to_uint8(images: Tensor) -> np.ndarray:
    """Pictures as uint8 [B, H, W, 3]; a value that is not a number becomes black."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"pictures must be [B, 3, H, W] with B at least 1, got {list(images.shape)}")
    images = images.detach().cpu()
    if images.dtype != torch.uint8:
        images = images.float().nan_to_num(0.0, posinf=1.0, neginf=0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def _enlarged(pictures: np.ndarray) -> np.ndarray:
    factor = max(1, math.ceil(_SMALLEST_CELL / pictures.shape[2]))
    return pictures.repeat(factor, axis=1).repeat(factor, axis=2)


def _wrapped(caption: str, width: int, font: Any) -> list[str]:
    """The caption as lines of about `width` pixels, by its own average letter, cut after a few of them."""
    letter = font.getlength(caption) / max(len(caption), 1)
    per_line = max(4, int(0.92 * width / max(letter, 1.0)))
    return textwrap.wrap(caption, per_line, max_lines=_CAPTION_LINES, placeholder="…") or [""]


def _save_png(picture: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, encoded = path.with_name(f".{path.name}.{uuid.uuid4().hex}"), io.BytesIO()
    picture.save(encoded, format="PNG")  # given a file, Pillow does not notice when a full disk takes a part only
    try:
        partial.write_bytes(encoded.getvalue())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
