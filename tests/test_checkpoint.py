"""Checkpoints are complete or not there: round trips bit for bit, damage, crashes and full disks at every write."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import socket
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from diffusionopd.training.checkpoint import (
    CheckpointError,
    find_latest,
    folders,
    load_state,
    locate,
    make_newest,
    save,
    save_state,
    verify,
)


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """Paths whose fsync was asked for, in order; waiting for a real disk takes half a minute and tests the kernel."""
    paths = []
    monkeypatch.setattr(os, "fsync", lambda number: paths.append(Path(os.readlink(f"/proc/self/fd/{number}"))))
    return paths


def save_round(root, n, value=None, **options):
    """A save of two files in two folders whose content is `value`."""
    value = n if value is None else value

    def write(folder: Path) -> None:
        save_state(folder / "state", {"w": torch.full((4,), float(value))}, {"round": value})
        (folder / "lora").mkdir()
        (folder / "lora" / "adapter_config.json").write_text(json.dumps({"r": value}))

    return save(root, f"checkpoint-{n}", write, **options)


def value_of(folder):
    tensors, scalars = load_state(folder / "state")
    assert torch.equal(tensors["w"], torch.full((4,), float(scalars["round"])))
    return scalars["round"]


def names(root):
    return sorted(path.name for path in root.iterdir())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- state -----------------------------------------------------------------------------------------------------------


def test_tensors_come_back_bit_for_bit(tmp_path):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3.4e38, 1 / 3], dtype=torch.float64)
    base = torch.arange(6.0)
    tensors = (
        {str(t): special.to(t) for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
        | {
            "a/b.c": torch.tensor([2**63 - 1, -(2**63)]),
            "booleans": torch.tensor([True, False]),
            "number": torch.tensor(7),
            "empty": torch.zeros(0, 3),
            "transposed": torch.arange(12.0).view(3, 4).t(),
            "parameter": torch.ones(3, requires_grad=True),
            "complete": base,  # these share storage, and are saved apart
            "same": base,
            "part": base[2:4],
        }
    )
    save_state(tmp_path, tensors, {})
    loaded = load_state(tmp_path)[0]
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        saved, given = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (loaded[name], tensor))
        assert torch.equal(saved, given), name


def test_scalars_come_back_exactly_and_what_cannot_is_named(tmp_path):
    scalars = {"round": 10**18, "lr": 0.1 + 0.2, "tiny": 5e-324, "none": None, "nested": {"a": [1, "ü", True]}}
    folder = tmp_path / "new" / "folder"
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is missing"):
        load_state(folder)
    save_state(folder, {}, scalars)
    assert load_state(folder) == ({}, scalars)
    for value in (torch.zeros(1), object(), {1, 2}, b"bytes"):
        with pytest.raises(TypeError, match="JSON"):
            save_state(folder, {}, {"bad": value})
    for name in ("scalars.json", "tensors.safetensors"):
        save_state(folder, {"w": torch.ones(4)}, {"round": 1})
        truncate(folder / name)
        with pytest.raises(CheckpointError, match=str(folder)):
            load_state(folder)


# --- saving, finding, pruning ----------------------------------------------------------------------------------------


def test_a_run_stands_for_its_latest_checkpoint(tmp_path):
    """The one that `latest` names, else the newest valid one, which is said; other paths stay as they are written."""
    run = tmp_path / "run"
    root = run / "checkpoints"
    for n in (1, 2, 3):
        save_round(root, n, n)
    shutil.rmtree(root / "checkpoint-3")
    forms = (run, root, root / "latest", run / "latest")
    for content, expected in (
        *((content, "checkpoint-2") for content in ("checkpoint-3\n", "", "../..", "\ud800", None)),
        ("checkpoint-1\n", "checkpoint-1"),
    ):
        (root / "latest").unlink(missing_ok=True)
        if content is not None:
            (root / "latest").write_bytes(content.encode(errors="surrogatepass"))
        for path in forms:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                assert locate(path) == root / expected, (path, content)
            told = [str(warning.message) for warning in said]
            assert len(told) == (expected == "checkpoint-2") and all(f"taking {expected}" in text for text in told)
    for name in ("checkpoint-1", "checkpoint-2"):
        (root / name / "manifest.json").unlink()
    (root / "latest").unlink()
    with pytest.warns(UserWarning, match="checkpoint-2"), pytest.raises(CheckpointError, match=str(root)):
        locate(run)
    trained = tmp_path / "of another trainer"  # which leaves its LoRA beside checkpoints of its own
    (trained / "checkpoint-500").mkdir(parents=True)
    (trained / "pytorch_lora_weights.safetensors").touch()
    for path in (
        trained,
        root / "checkpoint-1",
        root / "checkpoint-9",
        tmp_path / "none" / "latest",
        "./own/name",
        "owner/latest",
    ):
        assert str(locate(path)) == str(Path(path))


def test_the_newest_is_the_one_saved_last(tmp_path):
    """A run that went back to an earlier checkpoint goes on from its own saves, not from the abandoned ones."""
    root = tmp_path / "run" / "checkpoints"
    assert find_latest(root) is None
    for n, value in ((5, 5), (20, 20), (10, 10), (20, 21)):
        folder = save_round(root, n, value)
        verify(folder)
        assert find_latest(root) == folder == root / f"checkpoint-{n}" and value_of(folder) == value
        assert (root / "latest").read_text().strip() == folder.name
    assert names(root) == ["checkpoint-10", "checkpoint-20", "checkpoint-5", "latest"]


def test_everything_is_forced_to_disk_before_and_after_the_rename(tmp_path, monkeypatch, synced):
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *paths: (synced.append(paths), rename(*paths)))
    folder = save_round(tmp_path, 1)
    moment = next(i for i, entry in enumerate(synced) if isinstance(entry, tuple))
    partial, target = map(Path, synced[moment])
    assert target == folder
    written = {partial / path.relative_to(folder) for path in folder.rglob("*")} | {partial}
    forced = [p.with_name("manifest.json") if p.name.startswith(".manifest.json") else p for p in synced[:moment]]
    assert set(forced) == written
    assert synced[moment + 1] == tmp_path  # the rename itself
    assert synced[-1] == tmp_path  # the rename of `latest`


def test_limit_keeps_the_newest_valid_ones_and_what_is_protected(tmp_path):
    other = save_round(tmp_path / "other", 1)
    for limit in (None, 0, 1, 2, 3):
        root = tmp_path / str(limit)
        for n in range(1, 8):
            save_round(root, n, limit=limit, protect=[other])  # that of another run protects none of this one
            kept = range(max(1, n - limit + 1) if limit else 1, n + 1)
            assert names(root) == sorted([*(f"checkpoint-{k}" for k in kept), "latest"])
    root = tmp_path / "protected"
    first = save_round(root, 1)
    (root / "checkpoint-0" / "lora").mkdir(parents=True)  # folders of others, for example an upstream checkpoint
    (root / "notes").mkdir()
    for n in range(2, 6):
        save_round(root, n, limit=1, protect=[Path(os.path.relpath(first))])
    assert names(root) == ["checkpoint-0", "checkpoint-1", "checkpoint-5", "latest", "notes"]
    root = tmp_path / "damaged"
    for n in range(1, 4):
        save_round(root, n)
    for n in (2, 3):
        (root / f"checkpoint-{n}" / "state" / "tensors.safetensors").write_bytes(b"")
    save_round(root, 4, limit=2)
    verify(root / "checkpoint-1")
    assert "checkpoint-4" in names(root)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_damage_is_named_and_the_previous_checkpoint_taken(tmp_path):
    for n in (1, 2):
        save_round(tmp_path, n)
    for file in ("state/tensors.safetensors", "state/scalars.json", "lora/adapter_config.json", "manifest.json"):
        for damage in (Path.unlink, truncate, flip_a_bit, lambda path: path.write_bytes(b"")):
            folder = save_round(tmp_path, 3)  # also when the run comes past it again: it is replaced
            assert find_latest(tmp_path) == folder
            damage(folder / file)
            with pytest.raises(CheckpointError, match=str(folder / file)):
                verify(folder)
            with pytest.warns(UserWarning, match=f"{folder} .*{Path(file).name}"):
                assert find_latest(tmp_path) == tmp_path / "checkpoint-2"
    for n in (1, 2):
        truncate(tmp_path / f"checkpoint-{n}" / "manifest.json")
    with pytest.warns(UserWarning) as caught:
        assert find_latest(tmp_path) is None
    assert len(caught) == 3


def test_any_manifest_and_any_latest_is_handled(tmp_path):
    for n in (1, 2):
        folder = save_round(tmp_path, n)
    for content in (b"checkpoint-99\n", b"\xff\xfe", b"", None):
        (tmp_path / "latest").unlink() if content is None else (tmp_path / "latest").write_bytes(content)
        assert find_latest(tmp_path) == folder
    (folder / "notes.txt").write_text("what is added does not matter")
    verify(folder)
    for content in ("{}", "[]", "null", '{"digest": 1, "files": 3}'):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match=str(folder / "manifest.json")):
            verify(folder)


# --- crashes and full disks ------------------------------------------------------------------------------------------

OPERATIONS = [(os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")]
OPERATIONS += [(Path, name) for name in ("mkdir", "unlink", "write_bytes", "write_text")]


def interrupt(patch, moment, act=None):
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


def at_every_operation(folder, monkeypatch, disturbed_save):
    """`disturbed_save(root, n, moment)` saves checkpoint n with the value 99; then all must be as it should."""

    def prepare(root):
        for k in (1, 2):
            save_round(root, k)
        return root

    for n in (3, 2):  # a new name, and the same name again
        with monkeypatch.context() as patch:
            root = prepare(folder / f"count{n}")
            seen = interrupt(patch, -1)
            save_round(root, n, limit=2)
        assert seen[0] > 12
        for moment in range(seen[0]):
            root = prepare(folder / f"{n}-{moment}")
            disturbed_save(root, n, moment)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # no damaged checkpoint either, not just a way around it
                assert value_of(find_latest(root)) in (2, 99)
            save_round(root, 4, limit=2)
            assert value_of(find_latest(root)) == 4
            assert not [name for name in names(root) if name.startswith(".")], f"left behind after operation {moment}"


def test_a_kill_at_every_file_operation_loses_at_most_that_save(tmp_path, monkeypatch):
    """A child process is killed without any clean-up before each operation of a save, and after half a write."""

    def die(args, original):
        if original.__name__ in ("write_bytes", "write_text"):
            original(args[0], args[1][: len(args[1]) // 2])
        os._exit(9)

    def killed(root, n, moment):
        child = os.fork()
        if child == 0:
            interrupt(monkeypatch, moment, die)
            save_round(root, n, value=99, limit=2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    at_every_operation(tmp_path, monkeypatch, killed)


@pytest.mark.filterwarnings("ignore:cannot")
def test_a_failing_write_at_every_file_operation_leaves_the_others(tmp_path, monkeypatch):
    failed = []

    def failing(root, n, moment):
        code = (errno.ENOSPC, errno.EIO, errno.EDQUOT)[moment % 3]

        def fail(args, original):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            interrupt(patch, moment, fail)
            try:
                save_round(root, n, value=99, limit=2)
            except CheckpointError as error:
                failed.append(moment)
                assert f"checkpoint-{n}" in str(error) and os.strerror(code) in str(error)

    at_every_operation(tmp_path, monkeypatch, failing)
    assert len(failed) > 16


def test_a_checkpoint_that_is_gone_on_from_is_the_newest(tmp_path, monkeypatch):
    """From then on; what fails at any moment damages neither it nor the others."""

    def fail(args, original):
        if original.__name__ == "write_bytes":
            original(args[0], args[1][: len(args[1]) // 2])
        raise OSError(errno.EIO, "gone")

    for n in (1, 2, 3):
        save_round(tmp_path, n)
    made = []
    for moment in range(20):
        with monkeypatch.context() as patch, suppress(OSError):
            seen = interrupt(patch, moment, fail)
            make_newest(tmp_path / "checkpoint-1")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made.append(find_latest(tmp_path).name)
        for n in (1, 2, 3):
            verify(tmp_path / f"checkpoint-{n}")
        if made[-1] == "checkpoint-1":
            make_newest(tmp_path / "checkpoint-3")
    assert moment > seen[0] > 6 and set(made) == {"checkpoint-1", "checkpoint-3"}
    make_newest(tmp_path / "checkpoint-1")
    assert find_latest(tmp_path) == locate(tmp_path) == tmp_path / "checkpoint-1"
    save_round(tmp_path, 4, limit=2)
    assert [folder.name for folder in folders(tmp_path)] == ["checkpoint-4", "checkpoint-1"]


def test_errors_of_the_writer_leave_nothing(tmp_path):
    """They pass through, but for a full disk, which safetensors' own writer reports by an exception of its own."""
    save_round(tmp_path, 1)
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error, raised, fact in (
        (full, CheckpointError, "checkpoint-2: .*No space left"),
        (RuntimeError("bug"), RuntimeError, "bug"),
        (KeyboardInterrupt("key"), KeyboardInterrupt, "key"),
        (SystemExit(1), SystemExit, "1"),
    ):

        def write(folder, error=error):
            (folder / "half").write_bytes(b"0" * 1000)
            raise error

        with pytest.raises(raised, match=fact):
            save(tmp_path, "checkpoint-2", write)
        assert names(tmp_path) == ["checkpoint-1", "latest"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file/checkpoint-1"):
        save_round(tmp_path / "file", 1)


def test_work_of_a_living_process_is_left_alone(tmp_path):
    """Two runs that share a folder by mistake do not delete each other's save in progress."""
    host = socket.gethostname()
    owners = f"{host}-{os.getppid()}", f"{host}-4194999", "elsewhere-1"  # the second is beyond the largest process id
    living, dead, foreign = (tmp_path / f".partial-{owner}-0123abcd" for owner in owners)
    for folder in (living, dead, foreign):
        folder.mkdir()
    save_round(tmp_path, 1)
    assert names(tmp_path) == sorted([living.name, foreign.name, "checkpoint-1", "latest"])
    os.utime(foreign, (0, 0))
    save_round(tmp_path, 2)
    assert foreign.name not in names(tmp_path)
