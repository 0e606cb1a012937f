"""Checkpoints are whole or not there: bitwise round trips, damage, crashes and full disks at every write, pruning."""

import errno
import itertools
import json
import math
import os
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from diffusionopd.training.checkpoint import CheckpointError, find_latest, load_state, save, save_state, verify


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """Paths whose fsync was asked for, in order; waiting for a real disk takes half a minute and tests the kernel."""
    paths = []

    def fsync(descriptor):
        paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


def writer(value):
    """A save of two files in two folders whose content is `value`."""

    def write(folder: Path) -> None:
        save_state(folder / "state", {"w": torch.full((4,), float(value))}, {"round": value})
        (folder / "lora").mkdir()
        (folder / "lora" / "adapter_config.json").write_text(json.dumps({"r": value}))

    return write


def save_round(root, n, value=None, **options):
    return save(root, f"checkpoint-{n}", writer(n if value is None else value), **options)


def value_of(folder):
    tensors, scalars = load_state(folder / "state")
    assert torch.equal(tensors["w"], torch.full((4,), float(scalars["round"])))
    return scalars["round"]


def names(root):
    return sorted(path.name for path in root.iterdir())


# --- state -----------------------------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3.4e38, 1 / 3]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(SPECIAL),
        torch.tensor(SPECIAL, dtype=torch.float64),
        torch.tensor(SPECIAL).to(torch.bfloat16),
        torch.tensor(SPECIAL).to(torch.float16),
        torch.tensor([2**63 - 1, -(2**63)]),
        torch.tensor([True, False]),
        torch.tensor(7),
        torch.zeros(0, 3),
        torch.arange(12.0).view(3, 4).t(),
        torch.ones(3, requires_grad=True),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{list(tensor.shape)}",
)
def test_tensors_come_back_bit_for_bit(tmp_path, tensor):
    save_state(tmp_path, {"a/b.c": tensor}, {})
    loaded = load_state(tmp_path)[0]["a/b.c"]
    assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape
    assert torch.equal(loaded.contiguous().view(-1).view(torch.uint8), tensor.detach().reshape(-1).view(torch.uint8))


def test_tensors_that_share_storage_are_saved_apart(tmp_path):
    base = torch.arange(6.0)
    save_state(tmp_path, {"whole": base, "same": base, "part": base[2:4]}, {})
    tensors, _ = load_state(tmp_path)
    assert torch.equal(tensors["same"], base) and torch.equal(tensors["part"], base[2:4])


def test_scalars_come_back_exactly(tmp_path):
    scalars = {"round": 10**18, "lr": 0.1 + 0.2, "tiny": 5e-324, "none": None, "nested": {"a": [1, "ü", True]}}
    save_state(tmp_path / "new" / "folder", {}, scalars)
    assert load_state(tmp_path / "new" / "folder") == ({}, scalars)


def test_scalars_that_json_cannot_hold_are_refused(tmp_path):
    for value in (torch.zeros(1), object(), {1, 2}, b"bytes"):
        with pytest.raises(TypeError, match="JSON"):
            save_state(tmp_path, {}, {"bad": value})


def test_missing_or_damaged_state_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is missing"):
        load_state(tmp_path)
    save_state(tmp_path, {"w": torch.ones(4)}, {"round": 1})
    (tmp_path / "scalars.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path)
    save_state(tmp_path, {"w": torch.ones(4)}, {"round": 1})
    content = (tmp_path / "tensors.safetensors").read_bytes()
    (tmp_path / "tensors.safetensors").write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path)


# --- saving, finding, pruning ----------------------------------------------------------------------------------------


def test_saved_checkpoint_is_found_and_verified(tmp_path):
    assert find_latest(tmp_path / "nowhere") is None
    assert find_latest(tmp_path) is None
    root = tmp_path / "run" / "checkpoints"
    for n in (5, 10):
        folder = save_round(root, n)
        assert folder == root / f"checkpoint-{n}"
        verify(folder)
        assert find_latest(root) == folder and value_of(folder) == n
        assert (root / "latest").read_text().strip() == folder.name
    assert names(root) == ["checkpoint-10", "checkpoint-5", "latest"]


def test_newest_means_saved_last(tmp_path):
    """A run that went back to an earlier checkpoint goes on from its own saves, not from the abandoned ones."""
    for n in (10, 20, 30):
        save_round(tmp_path, n)
    save_round(tmp_path, 20, value=21)
    assert value_of(find_latest(tmp_path)) == 21


def test_everything_is_forced_to_disk_before_and_after_the_rename(tmp_path, monkeypatch, synced):
    rename = os.rename

    def renaming(source, target):
        synced.append((Path(source), Path(target)))
        rename(source, target)

    monkeypatch.setattr(os, "rename", renaming)
    folder = save_round(tmp_path, 1)
    moment = next(i for i, entry in enumerate(synced) if isinstance(entry, tuple))
    partial, target = synced[moment]
    assert target == folder
    written = {partial / path.relative_to(folder) for path in folder.rglob("*")} | {partial}
    forced = [p.with_name("manifest.json") if p.name.startswith(".manifest.json") else p for p in synced[:moment]]
    assert set(forced) == written
    assert synced[moment + 1] == tmp_path  # the rename itself
    assert synced[-1] == tmp_path  # the rename of `latest`


def test_limit_keeps_the_newest(tmp_path):
    for limit in (None, 0, 1, 2, 3):
        for n in range(1, 8):
            save_round(tmp_path / str(limit), n, limit=limit)
            kept = range(max(1, n - limit + 1) if limit else 1, n + 1)
            assert names(tmp_path / str(limit)) == sorted([*(f"checkpoint-{k}" for k in kept), "latest"])


def test_protected_checkpoint_is_never_removed(tmp_path):
    first = save_round(tmp_path, 1)
    for n in range(2, 6):
        save_round(tmp_path, n, limit=1, protect=[Path(os.path.relpath(first))])
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-5", "latest"]


def test_protecting_a_checkpoint_of_another_run_protects_none_of_this_one(tmp_path):
    other = save_round(tmp_path / "other", 1)
    for n in range(1, 4):
        save_round(tmp_path / "this", n, limit=1, protect=[other])
    assert names(tmp_path / "this") == ["checkpoint-3", "latest"]


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "checkpoint-1" / "lora").mkdir(parents=True)  # for example an upstream checkpoint
    (tmp_path / "notes").mkdir()
    for n in range(2, 6):
        save_round(tmp_path, n, limit=1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-5", "latest", "notes"]


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path):
    for n in range(1, 4):
        save_round(tmp_path, n)
    for n in (2, 3):
        (tmp_path / f"checkpoint-{n}" / "state" / "tensors.safetensors").write_bytes(b"")
    save_round(tmp_path, 4, limit=2)
    verify(tmp_path / "checkpoint-1")
    assert "checkpoint-4" in names(tmp_path)


# --- damage ----------------------------------------------------------------------------------------------------------


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "missing"),
    "truncated": (truncate, "bytes instead of|damaged"),
    "flipped": (flip_a_bit, "sha256|damaged|digest"),
    "emptied": (lambda path: path.write_bytes(b""), "bytes instead of|damaged"),
}
FILES = ["state/tensors.safetensors", "state/scalars.json", "lora/adapter_config.json", "manifest.json"]


@pytest.mark.parametrize(("file_name", "damage"), list(itertools.product(FILES, DAMAGE)))
def test_damage_is_named_and_the_previous_checkpoint_taken(tmp_path, file_name, damage):
    for n in (1, 2, 3):
        save_round(tmp_path, n)
    do_damage, problem = DAMAGE[damage]
    do_damage(tmp_path / "checkpoint-3" / file_name)
    with pytest.raises(CheckpointError, match=rf"{Path(file_name).name}.*({problem})"):
        verify(tmp_path / "checkpoint-3")
    with pytest.warns(UserWarning, match=rf"checkpoint-3 is damaged.*{Path(file_name).name}"):
        assert find_latest(tmp_path) == tmp_path / "checkpoint-2"
    save_round(tmp_path, 3, value=33)  # the run comes past it again and replaces it
    assert value_of(find_latest(tmp_path)) == 33


def test_all_damaged_is_none_with_a_warning_each(tmp_path):
    for n in (1, 2):
        truncate(save_round(tmp_path, n) / "manifest.json")
    with pytest.warns(UserWarning) as caught:
        assert find_latest(tmp_path) is None
    assert {name for name in ("checkpoint-1", "checkpoint-2") for w in caught if name in str(w.message)} == {
        "checkpoint-1",
        "checkpoint-2",
    }


def test_any_manifest_content_is_handled(tmp_path):
    folder = save_round(tmp_path, 1)
    for content in ("{}", "[]", "null", '{"digest": 1, "files": 3}', "["):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json.*damaged"):
            verify(folder)


def test_lost_or_wrong_latest_file_does_not_matter(tmp_path):
    for n in (1, 2):
        save_round(tmp_path, n)
    for content in (b"checkpoint-99\n", b"\xff\xfe", b""):
        (tmp_path / "latest").write_bytes(content)
        assert value_of(find_latest(tmp_path)) == 2
    (tmp_path / "latest").unlink()
    assert value_of(find_latest(tmp_path)) == 2


def test_added_files_do_not_invalidate(tmp_path):
    folder = save_round(tmp_path, 1)
    (folder / "notes.txt").write_text("mine")
    verify(folder)
    assert find_latest(tmp_path) == folder


# --- crashes and full disks ------------------------------------------------------------------------------------------

OPERATIONS = [
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (shutil, "rmtree"),
    (Path, "mkdir"),
    (Path, "unlink"),
    (Path, "write_bytes"),
    (Path, "write_text"),
]


def interrupt(patch, moment, act):
    """Make the `moment`-th file operation (counted from 0) call `act` in its place; return a counter of operations."""
    seen = [0]
    for owner, name in OPERATIONS:
        original = getattr(owner, name)

        def operation(*args, original=original, **kwargs):
            seen[0] += 1
            if seen[0] == moment + 1:
                act(args, original)
            return original(*args, **kwargs)

        patch.setattr(owner, name, operation)
    return seen


def count_operations(root, monkeypatch, n):
    with monkeypatch.context() as patch:
        seen = interrupt(patch, -1, None)
        save_round(root, n, limit=2)
    return seen[0]


@pytest.mark.parametrize("n", [3, 2], ids=["new name", "same name again"])
def test_kill_at_every_file_operation_loses_at_most_that_save(tmp_path, monkeypatch, n):
    """A child process is killed without any clean-up before each operation of a save, and after half a write."""

    def die(args, original):
        if original.__name__ in ("write_bytes", "write_text"):
            original(args[0], args[1][: len(args[1]) // 2])
        os._exit(9)

    def prepare(root):
        for k in (1, 2):
            save_round(root, k)

    prepare(tmp_path / "count")
    operations = count_operations(tmp_path / "count", monkeypatch, n)
    assert operations > 12
    for moment in range(operations):
        root = tmp_path / str(moment)
        prepare(root)
        child = os.fork()
        if child == 0:
            interrupt(monkeypatch, moment, die)
            save_round(root, n, value=99, limit=2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a kill leaves no damaged checkpoint either, not just a way around it
            assert value_of(find_latest(root)) in (2, 99)
        save_round(root, 4, limit=2)
        assert value_of(find_latest(root)) == 4
        left = [name for name in names(root) if name.startswith(".")]
        assert left == [], f"left behind after a kill at operation {moment}"


@pytest.mark.filterwarnings("ignore:cannot")
@pytest.mark.parametrize("n", [3, 2], ids=["new name", "same name again"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_failing_write_at_every_file_operation_leaves_the_others(tmp_path, monkeypatch, n, code):
    def fail(args, original):
        raise OSError(code, os.strerror(code))

    for k in (1, 2):
        save_round(tmp_path / "count", k)
    failed = 0
    for moment in range(count_operations(tmp_path / "count", monkeypatch, n)):
        root = tmp_path / str(moment)
        for k in (1, 2):
            save_round(root, k)
        with monkeypatch.context() as patch:
            interrupt(patch, moment, fail)
            try:
                save_round(root, n, value=99, limit=2)
            except CheckpointError as error:
                failed += 1
                assert f"checkpoint-{n}" in str(error) and os.strerror(code) in str(error)
        assert value_of(find_latest(root)) in (2, 99)
        save_round(root, 4, limit=2)
        assert value_of(find_latest(root)) == 4
        assert [name for name in names(root) if name.startswith(".")] == []
    assert failed > 8


def test_full_disk_told_by_a_library_in_its_own_words(tmp_path):
    """safetensors' own writer reports the system's error as text of another exception class."""

    def write(folder):
        (folder / "half").write_bytes(b"0" * 1000)
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save_round(tmp_path, 1)
    with pytest.raises(CheckpointError, match="checkpoint-2: .*No space left"):
        save(tmp_path, "checkpoint-2", write)
    assert names(tmp_path) == ["checkpoint-1", "latest"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_other_errors_of_the_writer_pass_through_and_leave_nothing(tmp_path, error):
    def write(folder):
        (folder / "half").write_text("half")
        raise error

    save_round(tmp_path, 1)
    with pytest.raises(type(error)):
        save(tmp_path, "checkpoint-2", write)
    assert names(tmp_path) == ["checkpoint-1", "latest"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot write .*checkpoint-1"):
        save_round(tmp_path, 1)


def test_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write .*checkpoint-1"):
        save_round(tmp_path / "checkpoints", 1)
    assert find_latest(tmp_path / "checkpoints") is None


def test_work_of_a_living_process_is_left_alone(tmp_path):
    """Two runs that share a folder by mistake do not delete each other's save in progress."""
    host = socket.gethostname()
    living, dead, foreign = (
        tmp_path / f".partial-{owner}-0123abcd"
        for owner in (f"{host}-{os.getppid()}", f"{host}-4194999", "elsewhere-1")  # beyond the largest process id
    )
    for folder in (living, dead, foreign):
        folder.mkdir()
    save_round(tmp_path, 1)
    assert names(tmp_path) == sorted([living.name, foreign.name, "checkpoint-1", "latest"])
    os.utime(foreign, (0, 0))
    save_round(tmp_path, 2)
    assert foreign.name not in names(tmp_path)
