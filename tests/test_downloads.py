"""Files from a loopback server: cuts, resumption, damage, refusals, and files that are there already."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from tests.loopback import CONTENT, SHA256, entry, left, loopback
from tools.downloads import DownloadError, File, transfer
from tools.downloads.files import SUMS, fetch, record, recorded


@pytest.fixture
def server(monkeypatch):
    with loopback(monkeypatch, {"/file.bin": CONTENT}) as server:
        yield server


# --- one file --------------------------------------------------------------------------------------------------------


def test_file_is_put_into_place_and_its_digest_recorded(server, tmp_path):
    assert fetch(entry(server), tmp_path) is True
    path = tmp_path / "folder" / "file.bin"
    assert path.read_bytes() == CONTENT
    assert left(tmp_path) == [f"folder/{SUMS}", "folder/file.bin"]
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "-c", SUMS], cwd=path.parent, capture_output=True).returncode == 0


def test_verified_file_is_not_asked_for_again(server, tmp_path):
    fetch(entry(server), tmp_path)
    server.requests.clear()
    assert fetch(entry(server), tmp_path) is False
    assert fetch(entry(server, sha256=""), tmp_path) is False  # by the recorded digest
    assert server.requests == []


def test_cut_connection_is_resumed_where_it_broke(server, tmp_path):
    server.cuts = 2
    fetch(entry(server), tmp_path, pause=0)
    assert (tmp_path / "folder" / "file.bin").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=65536-", "bytes=131072-"]  # in whole chunks


def test_given_up_download_is_resumed_by_the_next_run(server, tmp_path):
    server.cuts, server.cut = 99, 0
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(DownloadError, match="5 attempts"):
        fetch(entry(server), tmp_path, pause=0)
    assert left(tmp_path) == ["folder/file.bin.part"] and len(server.requests) == transfer.ATTEMPTS
    server.cuts = 0
    fetch(entry(server), tmp_path, pause=0)
    assert server.requests[-1] == ("/file.bin", "bytes=1000-")
    assert (tmp_path / "folder" / "file.bin").read_bytes() == CONTENT


def test_server_without_ranges_starts_over(server, tmp_path):
    server.ranges, server.cuts = False, 1
    fetch(entry(server), tmp_path, pause=0)
    assert (tmp_path / "folder" / "file.bin").read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("partial", [CONTENT, CONTENT + b"more"], ids=["all of it", "more than all"])
def test_partial_file_with_nothing_behind_it(server, tmp_path, partial):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.bin.part").write_bytes(partial)
    fetch(entry(server), tmp_path, pause=0)
    assert (tmp_path / "folder" / "file.bin").read_bytes() == CONTENT
    assert len(server.requests) == (1 if partial == CONTENT else 2)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_asked_again_and_given_up_in_the_end(server, tmp_path, status):
    server.statuses["/file.bin"] = status
    with pytest.raises(DownloadError, match=rf"{status}"):
        fetch(entry(server), tmp_path, pause=0)
    assert len(server.requests) == transfer.ATTEMPTS


def test_wrong_digest_is_refused_and_nothing_left(server, tmp_path):
    with pytest.raises(DownloadError, match="not the published file"):
        fetch(entry(server, sha256="0" * 64), tmp_path)
    assert left(tmp_path) == []


def test_first_digits_of_a_digest_are_enough_where_no_more_are_published(server, tmp_path):
    assert fetch(entry(server, sha256=SHA256[:8]), tmp_path)
    assert recorded(tmp_path / "folder" / "file.bin") == SHA256
    with pytest.raises(DownloadError, match="not the published file"):
        fetch(entry(server, sha256="12345678"), tmp_path, force=True)
    assert (tmp_path / "folder" / "file.bin").read_bytes() == CONTENT  # the old one stays


def test_hub_files_are_loaded_by_its_client_and_checked_by_what_it_states(tmp_path, monkeypatch):
    calls, digest = [], [SHA256]

    def load(repository, name, *, local_dir):
        calls.append((repository, name))
        if repository == "old/name":
            raise EntryNotFoundError("gone")
        (Path(local_dir) / "sub").mkdir(parents=True)
        (Path(local_dir) / name).write_bytes(CONTENT)
        return str(Path(local_dir) / name)

    def facts(url):
        assert url.endswith("/name/resolve/main/sub/file.bin")
        return SimpleNamespace(size=len(CONTENT), etag=digest[0])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", load)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", facts)
    file = File("folder/file.bin", ("hub:old/name/sub/file.bin", "hub:owner/name/sub/file.bin"))
    assert fetch(file, tmp_path)
    assert calls == [("old/name", "sub/file.bin"), ("owner/name", "sub/file.bin")]
    path = tmp_path / "folder" / "file.bin"
    assert path.read_bytes() == CONTENT and recorded(path) == SHA256
    (tmp_path / "folder" / SUMS).unlink()
    assert fetch(file, tmp_path) is False and recorded(path) == SHA256
    (tmp_path / "folder" / SUMS).unlink()
    path.write_bytes(b"my own")
    with pytest.raises(DownloadError, match="--force"):
        fetch(file, tmp_path)
    assert path.read_bytes() == b"my own" and len(calls) == 2
    digest[0] = "0" * 64
    with pytest.raises(DownloadError, match="not the published file"):
        fetch(file, tmp_path, force=True)
    assert path.read_bytes() == b"my own" and left(tmp_path) == ["folder/file.bin"]


def test_missing_file_falls_back_to_the_next_source(server, tmp_path):
    file = File("file.bin", (f"{server.url}/moved.bin", f"{server.url}/file.bin"), SHA256)
    assert fetch(file, tmp_path)
    with pytest.raises(DownloadError, match=r"moved\.bin.*404"):
        fetch(entry(server, name="moved.bin", path="other.bin"), tmp_path)
    assert left(tmp_path) == [SUMS, "file.bin"]


@pytest.mark.parametrize("headers", [{"Content-Type": "text/html; charset=utf-8"}, {"Content-Encoding": "gzip"}])
def test_other_things_than_the_file_are_refused(server, tmp_path, headers):
    server.headers["/file.bin"] = headers
    with pytest.raises(DownloadError):
        fetch(entry(server, sha256=""), tmp_path)
    assert left(tmp_path) == []


def test_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(DownloadError, match="cannot be written"):
        fetch(entry(server), tmp_path)


# --- files that are there already ------------------------------------------------------------------------------------


def test_damaged_or_foreign_file_is_named_and_replaced_only_by_force(server, tmp_path):
    path = tmp_path / "folder" / "file.bin"
    path.parent.mkdir()
    path.write_bytes(b"my own prompts")
    for file in (entry(server), entry(server, sha256="")):  # by digest; by the size that the server states
        with pytest.raises(DownloadError, match="--force"):
            fetch(file, tmp_path)
    assert path.read_bytes() == b"my own prompts"
    assert fetch(entry(server), tmp_path, force=True)
    assert path.read_bytes() == CONTENT


def test_later_damage_is_found_by_the_recorded_digest(server, tmp_path):
    fetch(entry(server, sha256=""), tmp_path)
    path = tmp_path / "folder" / "file.bin"
    path.write_bytes(CONTENT[:-1] + b"!")  # same size
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch(entry(server, sha256=""), tmp_path)


def test_file_put_there_by_hand_is_accepted_and_recorded(server, tmp_path):
    path = tmp_path / "folder" / "file.bin"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert fetch(entry(server, sha256=""), tmp_path) is False
    assert recorded(path) == SHA256


def test_sums_keep_other_entries_and_survive_foreign_lines(tmp_path):
    (tmp_path / SUMS).write_text("a comment\n" + "1" * 64 + "  first\n")
    record(tmp_path / "second", "2" * 64)
    record(tmp_path / "second", "3" * 64)
    assert recorded(tmp_path / "first") == "1" * 64 and recorded(tmp_path / "second") == "3" * 64
