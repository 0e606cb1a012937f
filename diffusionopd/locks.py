"""One writer a folder: who writes into it says so there, and nobody else begins to.

    <folder>/writer.lock/<token>.json    the holder: host, process, its start, Slurm job, when it was taken

Taking is one rename, of a folder with that file onto ``writer.lock``: the system refuses it while a file is in there.
Of a holder that is gone the file is removed by its name, which no other holder has. So of any number that find the same
one gone a single one comes in, on every file system with an atomic rename.

On one machine a holder is gone when its process is; containers, which do not see each other's, and machines of one name
ask for a lock of the system on the holder's file. From another machine nobody can tell, so the folder stays closed
until the lock is removed by hand; only a Slurm job that was queued again has outlived its former start.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch.distributed as dist

from diffusionopd.distributed import gather_over_processes, world_size
from diffusionopd.files import FolderError, write_json, writing
from diffusionopd.signals import before_end

LOCK = "writer.lock"
_PREPARED = f".{LOCK}-"
_HIDDEN = "hidden"  # the start of a process that is there, of which the system tells other users nothing


class HeldError(ValueError):
    """Raised where another process writes into a folder; names the process, its machine and what to do."""


@dataclass(frozen=True)
class Holder:
    """A process that writes into a folder."""

    host: str
    boot: str  # of the machine's system: after the next one process numbers begin again
    namespace: str  # in which the process has its number: a container has its own
    pid: int
    started: str | None  # as the system counts it: process numbers are used again
    job: str  # of Slurm, empty without
    restarts: int  # how often Slurm has queued the job again
    taken: float  # seconds since the epoch

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        boot = namespace = ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        job, restarts = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        pid = os.getpid()
        return cls(socket.gethostname(), boot, namespace, pid, _start_of(pid), job, restarts, time.time())

    def is_gone(self, file: Path) -> bool:
        """Whether the holder, whose file this is, writes no more; False where nobody can tell."""
        here = Holder.here()
        if self.is_near(here):
            return _start_of(self.pid) not in (self.started, _HIDDEN)
        # Another container on this machine; this one before it was started anew, or another of its name
        if self.boot == here.boot != "" or self.host == here.host:
            return _can_be_locked(file)
        return self.job == here.job != "" and self.restarts < here.restarts

    def is_near(self, other: Holder) -> bool:
        """Whether the two see each other's process numbers."""
        place, others = ((of.boot or of.host, of.namespace) for of in (self, other))
        return place == others

    def describe(self) -> str:
        """For messages."""
        minutes = max(0, int(time.time() - self.taken)) // 60
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, for {minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class Lock:
    """A folder that is held."""

    file: Path

    def check(self) -> None:
        """Raise HeldError if somebody has removed the lock, or taken the folder over."""
        with suppress(FileNotFoundError):
            self.file.stat()
            return
        raise HeldError(
            f"{self.file.parent.parent} is not this process's any more: its lock was removed, or another start has "
            "taken over. Nothing more is written there."
        )


_held: dict[Path, tuple[int, int, bool]] = {}
"""By file of a lock: the process that took it, its descriptor of the file, and whether the folder was made for it."""


@contextmanager
def hold(folders: Iterable[Path], what: str, remedy: str) -> Iterator[list[Lock]]:
    """Be the only writer of ``folders`` inside the block. All processes of a run call this, and rank 0 takes them.

    Yields the locks, on every process. Raises on every one HeldError if another process writes into a folder, and
    FolderError, with ``what`` and ``remedy``, if it cannot be written.
    """
    files: list[Path] = []
    failure: ValueError | None = None
    try:
        try:
            for folder in folders if world_size() == 1 or dist.get_rank() == 0 else ():
                with writing(folder, what, remedy):
                    files.append(_take(folder))
        except (HeldError, FolderError) as error:
            failure = error
        found, failed = gather_over_processes([(files, failure)])[0]
        if failed is not None:
            raise failure or failed
        yield [Lock(file) for file in found]
    finally:
        for file in files:
            _release(file)


def refuse_if_held(folder: Path) -> None:
    """Raise HeldError if another process writes into ``folder``. Writes nothing."""
    if found := _find(folder):
        _refuse_living(*found)


def _release_all() -> None:
    """From another machine nobody would see that this process has ended."""
    for file in list(_held):
        _release(file)


before_end.append(_release_all)


def _take(folder: Path) -> Path:
    """Take a folder, which is made if there is none, and return the lock's file. Raises HeldError and OSError."""
    made, token = not folder.exists(), uuid.uuid4().hex[:12]
    target, prepared = folder / LOCK, folder / f"{_PREPARED}{token}"
    descriptor = -1
    try:
        file = write_json(prepared / f"{token}.json", asdict(Holder.here()), fsync=True)
        descriptor = os.open(file, os.O_RDWR)
        with suppress(OSError):  # not every file system has these locks; _can_be_locked gets the same error
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        while not _put(prepared, target):
            if found := _find(folder):
                _refuse_living(*found)
                found[0].unlink(missing_ok=True)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        shutil.rmtree(prepared, ignore_errors=True)
        raise
    _held[target / file.name] = os.getpid(), descriptor, made
    for stale in [entry for entry in folder.iterdir() if entry.name.startswith(_PREPARED)]:
        with suppress(OSError):  # most are others' who take their turn, and are renamed or removed meanwhile
            for other in stale.iterdir():  # of those that were killed at this place
                if (holder := _read(other)) and holder.is_gone(other):
                    shutil.rmtree(stale, ignore_errors=True)
    return target / file.name


def _put(prepared: Path, target: Path) -> bool:
    """Rename a folder; False if one that is not empty is in its place."""
    try:
        os.rename(prepared, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _release(file: Path) -> None:
    """Give a folder back, and remove it if it was made for the lock and nothing has come into it."""
    pid, descriptor, made = _held.pop(file, (0, -1, False))
    if pid != os.getpid():
        return  # a fork of the holder, or released already
    with suppress(OSError):
        os.close(descriptor)  # before the file goes, because NFS keeps a name for an open one
        file.unlink(missing_ok=True)
        file.parent.rmdir()  # not if the next holder is there already
        if made:
            file.parent.parent.rmdir()


def _find(folder: Path) -> tuple[Path, Holder | None] | None:
    """The file of a folder's holder and what it says, None if that cannot be read; None if there is no holder."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for file in (folder / LOCK).iterdir():
            return file, _read(file)
    return None


def _read(file: Path) -> Holder | None:
    try:
        return Holder(**json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        return None


def _refuse_living(file: Path, holder: Holder | None) -> None:
    """Raise HeldError unless the holder is gone."""
    if holder and holder.is_gone(file):
        return
    who = holder.describe() if holder else f"whoever left {file}, which cannot be read"
    advice = "Wait until it has ended, or choose another folder."
    if holder is None or not holder.is_near(Holder.here()):
        advice += f" If it runs no more, which cannot be seen from here, remove {file.parent} (rm -r) and start again."
    raise HeldError(f"{file.parent.parent} is being written to by {who}. {advice}")


def _start_of(pid: int) -> str | None:
    """When a process of this machine began, in the system's own count; None if it has ended.

    Not psutil's time of day on Linux: that follows the clock, which may be set while the process lives.
    """
    if not sys.platform.startswith("linux"):
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
        except psutil.NoSuchProcess:
            return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # from the third on
    except OSError:
        return _HIDDEN if psutil.pid_exists(pid) else None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _can_be_locked(file: Path) -> bool:
    """Whether no living process holds a lock on a file; False where nobody can tell."""
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
