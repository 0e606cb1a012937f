"""Files from a loopback server: cuts, resumption, damage, refusals, and files that are there already."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from tools.downloads import DownloadError, File, transfer
from tools.downloads.files import SUMS, fetch, record, recorded

from .loopback import CONTENT, SHA256, entry, left


@pytest.fixture
def path(tmp_path) -> Path:
    """Where the catalogue's entry belongs."""
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "file.bin"


def test_a_file_is_put_into_place_recorded_and_not_asked_for_again(server, path, tmp_path):
    assert fetch(entry(server), tmp_path) is True
    assert path.read_bytes() == CONTENT and left(tmp_path) == [f"folder/{SUMS}", "folder/file.bin"]
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "-c", SUMS], cwd=path.parent, capture_output=True).returncode == 0
    server.requests.clear()
    for sha256 in (SHA256, ""):  # the second by the recorded digest
        assert fetch(entry(server, sha256), tmp_path) is False
    assert server.requests == []
    path.write_bytes(CONTENT[:-1] + b"!")  # same size
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch(entry(server, sha256=""), tmp_path)


@pytest.mark.parametrize(
    ("changes", "partial", "asked"),
    [
        ({"cuts": 2}, b"", [None, "bytes=65536-", "bytes=131072-"]),  # in whole chunks
        ({"cuts": 1, "ranges": False}, b"", [None, "bytes=65536-"]),
        ({}, CONTENT, ["bytes=300000-"]),
        ({}, CONTENT + b"more", ["bytes=300004-", None]),
    ],
    ids=["cut twice", "no ranges", "all of it there", "more than all there"],
)
def test_what_has_arrived_is_kept(server, path, tmp_path, changes, partial, asked):
    vars(server).update(changes)
    if partial:
        path.with_name("file.bin.part").write_bytes(partial)
    fetch(entry(server), tmp_path, pause=0)
    assert path.read_bytes() == CONTENT and [ranges for _, ranges in server.requests] == asked


@pytest.mark.parametrize("status", [None, 429, 500, 503])
def test_a_download_is_given_up_in_the_end_and_resumed_by_the_next_run(server, path, tmp_path, status):
    server.statuses["/file.bin"] = status
    server.cuts, server.cut = (0 if status else 99), 0
    path.with_name("file.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(DownloadError, match=str(status or "5 attempts")):
        fetch(entry(server), tmp_path, pause=0)
    assert left(tmp_path) == ["folder/file.bin.part"] and len(server.requests) == transfer.ATTEMPTS
    server.cuts, server.statuses = 0, {}
    fetch(entry(server), tmp_path, pause=0)
    assert server.requests[-1] == ("/file.bin", "bytes=1000-") and path.read_bytes() == CONTENT


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_has_arrived_outlives_a_stop_while_it_is_verified(server, path, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, DownloadError)):
        patch.setattr("tools.downloads.files.sha256", Mock(side_effect=error))
        fetch(entry(server), tmp_path)
    assert left(tmp_path) == ["folder/file.bin.part"]
    fetch(entry(server), tmp_path)
    assert server.requests[1:] == [("/file.bin", "bytes=300000-")] and path.read_bytes() == CONTENT


def test_what_is_not_the_file_is_refused_and_nothing_left(server, path, tmp_path):
    page, packed = {"Content-Type": "text/html; charset=utf-8"}, {"Content-Encoding": "gzip"}
    for sha256, server.headers["/file.bin"] in (("0" * 64, {}), ("", page), ("", packed)):
        with pytest.raises(DownloadError):
            fetch(entry(server, sha256), tmp_path)
        assert left(tmp_path) == []
    server.headers.clear()
    assert fetch(entry(server, SHA256[:8]), tmp_path) and recorded(path) == SHA256  # where no more digits are published
    with pytest.raises(DownloadError, match=str(path)):
        fetch(entry(server, "12345678"), tmp_path, force=True)
    assert path.read_bytes() == CONTENT  # the old one stays
    with pytest.raises(DownloadError, match=f"{path}/below"):
        fetch(entry(server, path="folder/file.bin/below/file"), tmp_path)


def test_hub_files_are_loaded_by_its_client_and_checked_by_what_it_states(path, tmp_path, monkeypatch):
    calls, digest = [], [SHA256]

    def load(repository, name, *, local_dir):
        calls.append((repository, name))
        if repository == "old/name":
            raise EntryNotFoundError("gone")
        (Path(local_dir) / "sub").mkdir(parents=True)
        (Path(local_dir) / name).write_bytes(CONTENT)
        return str(Path(local_dir) / name)

    def facts(url):
        if "/old/name/" in url:
            raise EntryNotFoundError("gone")
        assert url.endswith("/name/resolve/main/sub/file.bin")
        return SimpleNamespace(size=len(CONTENT), etag=digest[0])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", load)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", facts)
    file = File("folder/file.bin", ("hub:old/name/sub/file.bin", "hub:owner/name/sub/file.bin"))
    assert fetch(file, tmp_path)
    assert calls == [("old/name", "sub/file.bin"), ("owner/name", "sub/file.bin")]
    assert path.read_bytes() == CONTENT and recorded(path) == SHA256
    path.with_name(SUMS).unlink()
    assert fetch(file, tmp_path) is False and recorded(path) == SHA256
    path.with_name(SUMS).unlink()
    path.write_bytes(b"my own")
    for digest[0], force in ((SHA256, False), ("0" * 64, True)):
        with pytest.raises(DownloadError, match=str(path)):
            fetch(file, tmp_path, force=force)
        assert path.read_bytes() == b"my own" and left(tmp_path) == ["folder/file.bin"]


def test_missing_file_falls_back_to_the_next_source(server, tmp_path):
    assert fetch(File("file.bin", (f"{server.url}/moved.bin", f"{server.url}/file.bin"), SHA256), tmp_path)
    with pytest.raises(DownloadError, match=r"moved\.bin.*404"):
        fetch(entry(server, name="moved.bin", path="other.bin"), tmp_path)
    assert left(tmp_path) == [SUMS, "file.bin"]
    (tmp_path / SUMS).unlink()  # known by what a source says alone
    assert not fetch(File("file.bin", (f"{server.url}/moved.bin", f"{server.url}/file.bin"), ""), tmp_path)
    assert recorded(tmp_path / "file.bin") == SHA256


def test_a_foreign_file_is_named_and_replaced_only_by_force_and_one_put_there_by_hand_recorded(server, path, tmp_path):
    path.write_bytes(b"my own prompts")
    for sha256 in (SHA256, ""):  # by digest; by the size that the server states
        with pytest.raises(DownloadError, match="--force"):
            fetch(entry(server, sha256), tmp_path)
    assert path.read_bytes() == b"my own prompts"
    assert fetch(entry(server), tmp_path, force=True) and path.read_bytes() == CONTENT
    path.with_name(SUMS).unlink()
    assert fetch(entry(server, sha256=""), tmp_path) is False and recorded(path) == SHA256


def test_what_is_there_is_no_better_known_than_by_its_record(server, path, tmp_path):
    path.write_bytes(CONTENT)
    with pytest.raises(DownloadError, match=r"nothing is known.*--force"):  # made of a source
        fetch(replace(entry(server, sha256=""), convert="any"), tmp_path)
    record(path, SHA256[:8] + "0" * 56)
    with pytest.raises(DownloadError, match="SHA-256"):  # of some the catalogue has no more than that
        fetch(entry(server, sha256=SHA256[:8]), tmp_path)
    assert recorded(path) == SHA256[:8] + "0" * 56


def test_sums_keep_other_entries_and_survive_foreign_lines(tmp_path):
    (tmp_path / SUMS).write_text("a comment\n" + "1" * 64 + "  first\n")
    for digit in "23":
        record(tmp_path / "second", digit * 64)
    assert [recorded(tmp_path / name) for name in ("first", "second")] == ["1" * 64, "3" * 64]
