"""Atomic writes: all of a new content or the old one, nothing else left behind."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from diffusionopd.files import sha256, write_atomically, write_json


def test_content_arrives_and_missing_folders_are_made(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"\x00\xff", "日本\n", b""):
        assert write_atomically(path, content, fsync=content == b"") == path
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert list(path.parent.iterdir()) == [path]
    write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    with pytest.raises(TypeError):
        write_json(path, object())
    assert json.loads(path.read_text()) == {"a": [1, None]}


def test_a_failure_at_any_step_leaves_the_old_content(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    path = write_atomically(tmp_path / "file", "old")
    for owner, name in ((Path, "write_bytes"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(OSError, match="No space"):
                write_atomically(path, "new", fsync=True)
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_is_to_survive_a_loss_of_power_is_forced_to_the_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append(Path(os.readlink(f"/proc/self/fd/{number}"))))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), replace(*paths)))
    write_atomically(tmp_path / "file", "x", fsync=True)
    partial, renamed, folder = events
    assert (partial.parent, renamed, folder) == (tmp_path, "renamed", tmp_path)
    write_atomically(tmp_path / "file", "x")
    assert events[3:] == ["renamed"]
