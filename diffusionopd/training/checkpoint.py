"""Checkpoints that are whole or not there: written beside, hashed, forced to the disk, renamed into place.

A checkpoint is a folder `checkpoint-<n>` with a `manifest.json`: the size and sha256 of every file, and a sequence
number that grows with every save. Reading trusts the manifest alone, so a crash, a full disk or a flipped bit at any
moment costs at most the save it hit. `latest` names the newest checkpoint for people and other tools.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

FORMAT = 1  # of the manifest and what it lists
MANIFEST = "manifest.json"
LATEST = "latest"
_TENSORS, _SCALARS = "tensors.safetensors", "scalars.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(partial|removed|replaced)-.+\.(?P<pid>\d+)\.(?P<host>[^.]*)\.[0-9a-f]{8}")
_FOREIGN_STALE_SECONDS = 86400.0  # a process of another machine cannot be asked whether it lives


class CheckpointError(ValueError):
    """A checkpoint cannot be written or must not be trusted; the message names the file and what is wrong with it."""


class NewerFormatError(CheckpointError):
    """A checkpoint that is whole, but written by a later version of this program."""


def save(
    root: str | Path,
    name: str,
    write: Callable[[Path], None],
    limit: int | None = None,
    protect: Iterable[str | Path] = (),
) -> Path:
    """Let `write(folder)` fill a new checkpoint, publish it as `<root>/<name>`, prune older ones; return its path.

    limit: how many checkpoints to keep, 0 or None for all. Never removed: the new one, those in `protect` (names, or
    paths such as the checkpoint a run was resumed from), and folders that this function did not write.
    One process calls this. Raises CheckpointError if the disk is full or a file cannot be written; whatever fails, also
    inside `write`, the checkpoints that were there stay as they are.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"a checkpoint is named 'checkpoint-<number>', got {name!r}")
    root = Path(root)
    partial = _hidden(root, "partial", name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        partial.mkdir()
        write(partial)
        _seal(partial, _next_sequence(root))
        _publish(partial, root / name)
    except BaseException as error:
        used = _tree_bytes(partial)
        _discard(partial)
        if _is_disk_problem(error):
            raise CheckpointError(_write_failure(root, name, used, error)) from error
        raise
    _point_latest(root, name)
    _prune(root, name, limit or 0, {_located(root, Path(path)) for path in protect})
    return root / name


def verify(folder: str | Path, hashes: bool = True) -> None:
    """Raise CheckpointError naming file and problem unless the folder is as it was saved.

    `hashes` False compares presence and sizes only. Files that the manifest does not know are ignored.
    """
    folder = Path(folder)
    for file_name, entry in _read_manifest(folder)["files"].items():
        path = folder / file_name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{path} has {size:,} bytes instead of {entry['bytes']:,}: it is truncated or was changed"
            )
        if hashes and _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} does not match its sha256: its content has changed since it was saved")


def find_latest(root: str | Path) -> Path | None:
    """The checkpoint saved last that is whole, or None if there is none; warns about each newer one that is damaged.

    NewerFormatError for one that a later version wrote: it is not damaged, and going on from an older one would in time
    overwrite it.
    """
    for folder in folders(root):
        try:
            verify(folder)
        except NewerFormatError:
            raise
        except (CheckpointError, OSError) as error:
            warnings.warn(f"checkpoint {folder} is damaged and skipped: {error}", stacklevel=2)
        else:
            return folder
    return None


def folders(root: str | Path) -> list[Path]:
    """Every checkpoint of a run, whole or damaged, the one saved last first."""
    _restore_replaced(Path(root))
    return _newest_first(Path(root))


def save_state(folder: str | Path, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Write named tensors (any device, dtype and shape, bit for bit) and JSON values into a folder, made if needed.

    Raises CheckpointError for a value that JSON cannot hold. Nothing is pickled.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps(scalars, indent=1, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state for {folder} holds a value that JSON cannot: {error}") from error
    # clone(): tied or sliced tensors share storage, which the format refuses; bytes and write_bytes(): a full disk is
    # then Python's OSError.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    (folder / _TENSORS).write_bytes(safetensors.torch.save(plain))
    (folder / _SCALARS).write_text(text + "\n", encoding="utf-8")


def load_state(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote, tensors on the CPU; CheckpointError if either file is missing or damaged."""
    folder = Path(folder)
    with _reading(folder):
        tensors = safetensors.torch.load((folder / _TENSORS).read_bytes())
    return tensors, load_scalars(folder)


def load_scalars(folder: str | Path) -> dict[str, Any]:
    """The JSON values alone of what `save_state` wrote; CheckpointError if the file is missing or damaged."""
    folder = Path(folder)
    with _reading(folder):
        return dict(json.loads((folder / _SCALARS).read_text("utf-8")))


# --- writing ---------------------------------------------------------------------------------------------------------


def _seal(folder: Path, sequence: int) -> None:
    """Force every file and folder to the disk and write the manifest, which comes last and covers itself."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, "sequence": sequence, "files": files}
    _write_text(folder / MANIFEST, json.dumps(manifest | {"digest": _digest(manifest)}, indent=1) + "\n")
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _fsync(path)


def _publish(partial: Path, target: Path) -> None:
    """Rename into place.

    A checkpoint of that name moves aside first; a crash in between is undone by `_restore_replaced`.
    """
    aside = _hidden(target.parent, "replaced", target.name)
    had_one = target.exists()
    if had_one:
        os.rename(target, aside)
    try:
        os.rename(partial, target)
    except BaseException:
        if had_one:
            os.rename(aside, target)
        raise
    _fsync(target.parent)
    _discard(aside)


def _point_latest(root: Path, name: str) -> None:
    partial = _hidden(root, "partial", LATEST)
    try:
        _write_text(partial, name + "\n")
        os.replace(partial, root / LATEST)
        _fsync(root)
    except OSError as error:  # the checkpoint itself is in place, and find_latest does not read this file
        warnings.warn(f"cannot update {root / LATEST}: {error}", stacklevel=3)
        _discard(partial)


def _located(root: Path, path: Path) -> Path:
    """A bare name lies in the root; anything longer is a path of its own, perhaps of another run's folder."""
    return (root / path if len(path.parts) == 1 else path).resolve()


def _prune(root: Path, newest: str, limit: int, protected: set[Path]) -> None:
    """Remove what is older than the `limit` newest whole checkpoints. A damaged one does not count as kept."""
    if limit <= 0:
        return
    kept = 0
    for folder in _newest_first(root):
        if kept >= limit and folder.name != newest and folder.resolve() not in protected and _is_ours(folder):
            _remove(folder)
        elif _looks_whole(folder):
            kept += 1


def _remove(folder: Path) -> None:
    """Rename out of the way, then delete, so that an interrupted deletion leaves no damaged checkpoint behind."""
    aside = _hidden(folder.parent, "removed", folder.name)
    try:
        os.rename(folder, aside)
    except OSError as error:
        warnings.warn(f"cannot remove the old checkpoint {folder}: {error}", stacklevel=4)
        return
    _discard(aside)


def _clean(root: Path) -> None:
    """Remove what interrupted saves left behind, except the work of another process that still lives."""
    _restore_replaced(root)
    for path in root.iterdir():
        owner = _LEFTOVER.fullmatch(path.name)
        if owner and not _is_alive(int(owner["pid"]), owner["host"], path):
            _discard(path)


def _discard(path: Path) -> None:
    """Delete a hidden file or folder; what cannot be deleted now is tried again at the next save."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _restore_replaced(root: Path) -> None:
    """Bring back a checkpoint that a crash caught between moving aside and the arrival of its successor."""
    for aside in root.glob(".replaced-*"):
        target = root / aside.name.removeprefix(".replaced-").split(".")[0]
        if not target.exists():
            with suppress(OSError):  # another process was quicker
                os.rename(aside, target)


def _hidden(root: Path, kind: str, name: str) -> Path:
    host = socket.gethostname().replace(".", "-").replace("/", "-")
    return root / f".{kind}-{name}.{os.getpid()}.{host}.{uuid.uuid4().hex[:8]}"


def _is_alive(pid: int, host: str, path: Path) -> bool:
    if host != socket.gethostname().replace(".", "-").replace("/", "-"):
        return time.time() - path.stat().st_mtime < _FOREIGN_STALE_SECONDS
    if pid == os.getpid():
        return False  # this process saves one checkpoint at a time
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_disk_problem(error: BaseException) -> bool:
    """Whether a write failed; libraries written in Rust put the system's error into a text of their own."""
    return isinstance(error, OSError) or "os error" in str(error) or "No space left" in str(error)


def _write_failure(root: Path, name: str, used: int, error: BaseException) -> str:
    message = f"cannot write {root / name}: {error}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "os error 28" in str(error) or "No space left" in str(error):
        needed = max([used, *(_tree_bytes(folder) for folder in _newest_first(root)[:1])])
        there = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        message += f"; it needs at least {needed:,} bytes, {free:,} are free: free some space or keep fewer checkpoints"
    return message + "; earlier checkpoints are untouched"


# --- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing: {folder} is no saved state") from None
    except Exception as error:  # safetensors raises its own class, which derives from Exception alone
        raise CheckpointError(f"the state in {folder} cannot be read: {error}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        digest = manifest.pop("digest")
        whole = digest == _digest(manifest)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the checkpoint is incomplete, or was not written by this program"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if not whole:
        raise CheckpointError(f"{path} is damaged: it does not match its own digest")
    edited = CheckpointError(f"{path} is not as this program writes it: another program's, or edited")
    if not isinstance(manifest.get("format"), int):
        raise edited
    if manifest["format"] > FORMAT:
        raise NewerFormatError(
            f"{path.parent} has format {manifest['format']}, this program reads {FORMAT}: update the program, or move "
            "that folder away to go on from an earlier checkpoint"
        )
    files, sequence = manifest.get("files"), manifest.get("sequence")
    if not isinstance(sequence, int) or not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise edited
    return manifest


def _is_entry(item: tuple[str, Any]) -> bool:
    """Whether a file of the manifest lies in its folder and has a size and a digest."""
    name, entry = item
    inside = name.isprintable() and not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and "sha256" in entry


def _newest_first(root: Path) -> list[Path]:
    """Every folder named like a checkpoint, by sequence of saving, then number; those without a sequence come first."""
    if not root.is_dir():
        return []
    folders = [folder for folder in root.iterdir() if _NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(folders, key=lambda folder: (_sequence(folder), _number(folder)), reverse=True)


def _sequence(folder: Path) -> float:
    """The folder's place in the order of saves; infinity, so that it is looked at first, if that cannot be read."""
    try:
        return int(_read_manifest(folder)["sequence"])
    except (CheckpointError, OSError):
        return float("inf")


def _number(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _next_sequence(root: Path) -> int:
    known = [_sequence(folder) for folder in _newest_first(root)]
    return 1 + int(max((s for s in known if s != float("inf")), default=0))


def _is_ours(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def _looks_whole(folder: Path) -> bool:
    try:
        verify(folder, hashes=False)
    except (CheckpointError, OSError):
        return False
    return True


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tree_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
