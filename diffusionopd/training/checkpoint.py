"""Atomic checkpoints: write to a temporary folder, fsync, hash, rename.

A checkpoint is a folder `checkpoint-<n>` with a `manifest.json`: the size and sha256 of every file, and a sequence
number that grows with every save. Reading trusts the manifest alone, so a crash, a full disk or a flipped bit at any
moment costs at most the save it hit. `latest` names the newest checkpoint for people and other tools.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from diffusionopd.files import force_to_disk, looked_in, sha256, write_atomically, write_json

FORMAT = 1  # of the manifest and what it lists
MANIFEST = "manifest.json"
LATEST = "latest"
_TENSORS, _SCALARS = "tensors.safetensors", "scalars.json"
_LORA = ("adapter_config.json", "pytorch_lora_weights.safetensors")
_REPLACED = "-replaced"  # ends the name of a checkpoint whose successor of the same number is being put in place
_NAME = re.compile(rf"checkpoint-(\d+)(?:{_REPLACED})?")
_LEFTOVER = re.compile(r"\.partial-(.+)-(\d+)-[0-9a-f]{8}")  # host and process
_STALE = 86400.0  # seconds after which what another machine left unfinished is removed


class CheckpointError(ValueError):
    """Raised where a checkpoint cannot be written or must not be trusted; names the file and what is wrong with it."""


class NewerFormatError(CheckpointError):
    """Raised for a checkpoint that a later version of this program wrote; it is not damaged."""


def save(
    root: str | Path, name: str, write: Callable[[Path], None], limit: int | None = None, protect: Iterable[Path] = ()
) -> Path:
    """Let `write(folder)` fill a new checkpoint, publish it as `<root>/<name>`, prune older ones; return its path.

    limit: how many valid checkpoints to keep, 0 or None for all. Never removed: the new one, those in `protect` (such
    as the one a run was resumed from), and folders that this function did not write. One of the same name is replaced.
    One process calls this. Raises CheckpointError if the disk is full or a file cannot be written; whatever fails, also
    inside `write`, the checkpoints that were there stay.
    """
    root = Path(root)
    partial = _hidden(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        partial.mkdir()
        write(partial)
        _finalize(partial, 1 + _last_sequence(root))
        _publish(partial, root / name)
        write_atomically(root / LATEST, name + "\n", fsync=True)
    except (OSError, SafetensorError) as error:  # the second where a library lets Rust write
        raise CheckpointError(
            f"cannot write {root / name}: {error}. Earlier checkpoints are untouched; free some space, or keep fewer "
            "with --config.num_checkpoint_limit."
        ) from error
    finally:
        _discard(partial)
    _prune(root, limit or 0, {(root / name).resolve(), *(path.resolve() for path in protect)})
    return root / name


def verify(folder: str | Path, hashes: bool = True) -> None:
    """Raise CheckpointError naming file and problem unless the folder is as it was saved.

    `hashes` False compares presence and sizes only. Files that the manifest does not know are ignored.
    """
    for name, (size, digest) in _read_manifest(Path(folder))[1].items():
        path = Path(folder) / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {size}")
        if hashes and sha256(path) != digest:
            raise CheckpointError(f"{path} does not match its sha256: its content has changed since it was saved")


def make_newest(folder: Path) -> None:
    """Let a checkpoint be the newest of its run, which goes on from it: what was saved later is another branch's."""
    sequence, files = _read_manifest(folder)
    if sequence < (last := _last_sequence(folder.parent)):
        _write_manifest(folder, last + 1, files)
    write_atomically(folder.parent / LATEST, folder.name + "\n", fsync=True)


def find_latest(root: str | Path) -> Path | None:
    """The valid checkpoint saved last, or None if there is none; warns about each newer one that is damaged.

    NewerFormatError for one that a later version wrote: going on from an older one would in time overwrite it.
    """
    for folder in folders(root):
        try:
            verify(folder)
            return folder
        except NewerFormatError:
            raise
        except (CheckpointError, OSError) as error:
            warnings.warn(f"checkpoint {folder} is damaged and skipped: {error}", stacklevel=2)
    return None


def locate(path: str | Path) -> Path:
    """The folder that ``path`` stands for: of a run, its ``checkpoints/`` or their ``latest``, one checkpoint.

    It is the one that ``latest`` names; the newest valid one, with a warning, where that is not there. CheckpointError
    for a run without any. Every other path is returned as it is, whatever is there.
    """
    path = Path(path)
    if any((path / name).is_file() for name in _LORA):  # beside checkpoints of the trainer that wrote it
        return path
    run = path.parent if path.name == LATEST and not path.is_dir() else path
    root = next((root for root in (run / "checkpoints", run) if (root / LATEST).is_file() or folders(root)), None)
    if root is None:
        return path
    pointer = root / LATEST
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    if _NAME.fullmatch(name) and (root / name).is_dir():
        return root / name
    found = find_latest(root)
    if found is None:
        raise CheckpointError(f"{root} has no valid checkpoint")
    what = f"names {name!r}, which is no checkpoint there" if name else "is missing or empty"
    warnings.warn(f"{pointer} {what}: taking {found.name}, the newest valid checkpoint", stacklevel=1)
    return found


def find_lora(path: str | Path) -> Path:
    """The checkpoint, or the folder of a LoRA alone, at a path as of `locate` or at a checkpoint's `lora/`.

    CheckpointError: nothing of the kind is there.
    """
    folder = locate(path)
    if folder.name == "lora" and (folder.parent / "config.json").is_file():
        folder = folder.parent
    if not any((folder / name).is_file() for name in ("lora/adapter_config.json", *_LORA)):
        raise CheckpointError(
            f"no checkpoint at {folder}{looked_in(folder)}: expected a run folder, "
            "<run>/checkpoints/checkpoint-<n>, its lora/ folder, or <run>/checkpoints/latest"
        )
    return folder


def folders(root: str | Path) -> list[Path]:
    """Every checkpoint of a run, valid or damaged, the one saved last first; unreadable manifests precede it."""
    root = Path(root)
    names = [_NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    found = [(_sequence(root / name[0]), int(name[1]), root / name[0]) for name in names if name]
    return [folder for *_, folder in sorted(found, reverse=True)]


def save_state(folder: str | Path, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Write named tensors (any device, dtype and shape, bit for bit) and JSON values into a folder, made if needed.

    Nothing is pickled; TypeError for a value that JSON cannot hold.
    """
    folder = Path(folder)
    write_json(folder / _SCALARS, scalars)
    # copy: tied or sliced tensors share storage, which the format refuses.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    (folder / _TENSORS).write_bytes(safetensors.torch.save(plain))


def load_state(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote, tensors on the CPU; CheckpointError if either file is missing or damaged."""
    return _read(Path(folder) / _TENSORS, safetensors.torch.load), load_scalars(folder)


def load_scalars(folder: str | Path) -> dict[str, Any]:
    """The JSON values alone of what `save_state` wrote; CheckpointError if the file is missing or damaged."""
    return _read(Path(folder) / _SCALARS, lambda content: dict(json.loads(content)))


def _read(path: Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: its folder is incomplete, or not of this program") from None
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged and cannot be read: {error}") from error


# --- writing ---------------------------------------------------------------------------------------------------------


def _finalize(folder: Path, sequence: int) -> None:
    """Force every file and folder to the disk and write the manifest, which comes last and covers itself."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        force_to_disk(path)
        files[path.relative_to(folder).as_posix()] = path.stat().st_size, sha256(path)
    _write_manifest(folder, sequence, files)
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        force_to_disk(path)


def _write_manifest(folder: Path, sequence: int, files: Mapping[str, tuple[int, str]]) -> None:
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    manifest = {"format": FORMAT, "sequence": sequence, "files": listed}
    write_json(folder / MANIFEST, manifest | {"digest": _digest(manifest)}, fsync=True)


def _publish(partial: Path, target: Path) -> None:
    """Rename into place; one of the same name moves aside, where it still is a checkpoint, until that is done."""
    aside = target.with_name(target.name + _REPLACED)
    if target.exists():
        _remove(aside)
        os.rename(target, aside)
    os.rename(partial, target)
    force_to_disk(target.parent)
    _remove(aside)


def _prune(root: Path, limit: int, protected: set[Path]) -> None:
    """Remove what is older than the `limit` newest valid checkpoints."""
    kept = 0
    for folder in folders(root) if limit > 0 else ():
        if kept >= limit and folder.resolve() not in protected and (folder / MANIFEST).exists():
            _remove(folder)
        else:
            with suppress(CheckpointError, OSError):
                verify(folder, hashes=False)
                kept += 1


def _remove(folder: Path) -> None:
    """Rename out of the way, then delete, so that an interrupted deletion leaves no damaged checkpoint behind."""
    aside = _hidden(folder.parent)
    try:
        if folder.exists():
            os.rename(folder, aside)
    except OSError as error:
        warnings.warn(f"cannot remove the old checkpoint {folder}: {error}", stacklevel=4)
    _discard(aside)


def _hidden(root: Path) -> Path:
    return root / f".partial-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _clean(root: Path) -> None:
    """Remove what interrupted saves left behind, except the work of another process that still lives."""
    for path in root.glob(".*"):
        if owner := _LEFTOVER.fullmatch(path.name):
            here, pid = owner[1] == socket.gethostname(), int(owner[2])
            living = here and pid != os.getpid() and psutil.pid_exists(pid)
            recent = not here and time.time() - path.stat().st_mtime < _STALE
            if living or recent:
                continue
        elif not path.name.startswith(f".{LATEST}."):
            continue
        _discard(path)


def _discard(path: Path) -> None:
    """Delete a hidden file or folder; what cannot be deleted now is tried again at the next save."""
    with suppress(OSError):
        path.unlink() if path.is_file() else shutil.rmtree(path)


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """Its sequence number, and size and sha256 of each file."""
    manifest = _read(folder / MANIFEST, json.loads)
    try:
        if manifest.pop("digest") != _digest(manifest):
            raise ValueError("it does not match its own digest")
        if manifest["format"] > FORMAT:
            raise NewerFormatError(f"{folder} was written by a later version of this program; update to resume from it")
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        return int(manifest["sequence"]), files
    except NewerFormatError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error!r}") from error


def _sequence(folder: Path) -> float:
    """The folder's place in the order of saves; infinity, so that it is looked at first, if that cannot be read."""
    try:
        return _read_manifest(folder)[0]
    except (CheckpointError, OSError):
        return float("inf")


def _last_sequence(root: Path) -> int:
    """That of the newest checkpoint whose manifest can be read; 0 without any."""
    return max((int(place) for place in map(_sequence, folders(root)) if place < float("inf")), default=0)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
