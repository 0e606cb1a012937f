"""Atomic writes: all of a new content or the old one, nothing else left behind."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from diffusionopd import files
from diffusionopd.files import FolderError, located, looked_in, sha256, user_path, write_atomically, write_json


def test_paths_lead_where_people_mean_them(tmp_path, monkeypatch):
    """``~`` is a home; a relative path is one from here, or of the project when it is only there."""
    project, here = tmp_path / "project", tmp_path / "here"
    for folder in (project / "assets", project / "both", here / "both", tmp_path / "beside"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(files, "PROJECT", project)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(here)
    for text, found in (
        *(("~/a", "/home/me/a"), ("~", "/home/me"), ("./~/a", "./~/a"), ("a/~", "a/~")),
        *(("assets", str(project / "assets")), ("both", "both"), ("owner/name", "owner/name"), ("", ""), ("/a", "/a")),
        *(("./assets", "./assets"), ("../beside", "../beside"), ("../project/../beside/x", "../project/../beside/x")),
    ):
        assert located(text) == found
    assert user_path("assets") == "assets" and user_path("~/a") == "/home/me/a", (
        "what is written is never the project's"
    )
    for text in ("~nobody-of-that-name/a", "~nobody-of-that-name"):
        with pytest.raises(FolderError, match=text):
            located(text)
    assert str(here) in looked_in("x") and str(project) in looked_in("x") and looked_in("/x") == ""
    assert str(project) not in looked_in("./x")
    monkeypatch.setattr(files, "PROJECT", None)
    assert located("assets") == "assets" and looked_in("x") == f" in {here}"


def test_content_arrives_and_missing_folders_are_made(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"\x00\xff", "日本\n", b""):
        assert write_atomically(path, content, fsync=content == b"") == path
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert list(path.parent.iterdir()) == [path]
    write_json(path, {"a": [1, None]})
    with pytest.raises(TypeError):
        write_json(path, object())
    assert json.loads(path.read_text()) == {"a": [1, None]}


def test_a_failure_at_any_step_leaves_the_old_content(tmp_path, monkeypatch):
    """With fsync: what is written before the rename, and the rename after it."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    path, events, replace = write_atomically(tmp_path / "file", "old"), [], os.replace
    for owner, name in ((Path, "write_bytes"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(owner, name, fail)
            write_atomically(path, "new", fsync=True)
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "fsync", lambda number: events.append(Path(os.readlink(f"/proc/self/fd/{number}"))))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), replace(*paths)))
    write_atomically(path, "x", fsync=True)
    write_atomically(path, "x")
    assert events[0].parent == tmp_path and events[1:] == ["renamed", tmp_path, "renamed"]
