"""The catalogue of downloads, its sources other than plain files, and the command."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError

from diffusionopd.rewards import clip
from tests.loopback import CONTENT, SHA256, entry, left, loopback
from tools.download import main
from tools.downloads import (
    CATALOGUE,
    DownloadError,
    File,
    Item,
    Repository,
    choose,
    download,
    transfer,
)
from tools.downloads.files import fetch, question
from tools.downloads.transfer import snapshot

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def server(monkeypatch):
    with loopback(monkeypatch, {"/file.bin": CONTENT}) as server:
        yield server


# --- the question ----------------------------------------------------------------------------------------------------

ASKED = """
async def ask(prompt, image):
    question = f"<image>\\nRate this.\\nFinal Score: \\'1\\'\\nCaption: [{prompt}]"
    return question
"""


def test_question_is_taken_out_of_the_source_without_running_it(server, tmp_path):
    expected = "<image>\nRate this.\nFinal Score: '1'\nCaption: [{prompt}]\n"
    assert question(ASKED.encode()).decode() == expected
    server.files["/client.py"] = ("raise SystemExit\n" + ASKED).encode()
    digest = hashlib.sha256(expected.encode()).hexdigest()
    fetch(entry(server, digest, "client.py", "question.txt", extract=True), tmp_path)
    assert (tmp_path / "question.txt").read_text() == expected
    server.files["/client.py"] = b"x = 1"
    with pytest.raises(DownloadError, match="holds 0"):
        fetch(entry(server, digest, "client.py", "question.txt", extract=True), tmp_path, force=True)
    assert (tmp_path / "question.txt").read_text() == expected
    assert not (tmp_path / "question.txt.part").exists()


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("x = 1", "holds 0"),
        ("question = f'Rate {prompt}'", "holds 0"),
        (ASKED + ASKED.replace("Rate", "Judge"), "holds 2"),
        ("not python (", "not a Python file"),
    ],
)
def test_source_without_one_question_is_refused(source, what):
    with pytest.raises(DownloadError, match=what):
        question(source.encode())


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_repository_is_loaded_with_its_patterns(monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: calls.append((name, options)))
    snapshot(Repository("owner/name", ("*.json",), ("*fp16*",)))
    assert calls == [("owner/name", {"allow_patterns": ["*.json"], "ignore_patterns": ["*fp16*"]})]


@pytest.mark.parametrize("gated", [True, False])
def test_hub_errors_name_the_remedy_and_no_token(monkeypatch, gated):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def refuse(name, **options):
        if gated:
            request = SimpleNamespace(url="", headers={}, method="GET")
            raise GatedRepoError("gated", response=SimpleNamespace(headers={}, request=request, status_code=403))
        raise OSError("no answer with hf_secret from http://me:word@proxy/x?signature=1")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    what = "accept the licence at https://huggingface.co/owner/name.*hf auth login" if gated else "connection"
    with pytest.raises(DownloadError, match=what) as caught:
        snapshot(Repository("owner/name", ("*",)))
    assert not any(secret in str(caught.value) for secret in ("hf_secret", "me:word", "signature"))


# --- the catalogue and the command -----------------------------------------------------------------------------------


def test_catalogue_is_consistent():
    parts = [part for items in CATALOGUE.values() for item in items.values() for part in item.parts]
    files = {part for part in parts if isinstance(part, File)}
    assert len({file.path for file in files}) == len(files)
    for file in files:
        assert re.fullmatch(r"(dataset/(geneval|ocr|pickscore|drawbench)|reward_ckpts)/[\w.+-]+", file.path)
        assert re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{8}|", file.sha256)
        assert all(transfer.resolve(url).startswith("https://") for url in file.urls)
    assert all(len(file.sha256) == 64 and file.size for file in files if file.path.endswith(("test.txt", "test.jsonl")))
    names = {part.name for part in parts if isinstance(part, Repository)}
    assert {clip.CLIP_L, clip.CLIP_H_PROCESSOR, clip.PICKSCORE} <= names


def test_scorers_look_where_files_are_put():
    """Every `reward_ckpts/...` that a scorer names is downloaded to that name, and every download is looked for."""
    named = set()
    for path in (ROOT / "diffusionopd" / "rewards").rglob("*.py"):
        strings = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        named |= {text for text in map(str, strings) if re.fullmatch(r"reward_ckpts/[^/\s]+\.\w+", text)}
    offered = {part.path for item in CATALOGUE["rewards"].values() for part in item.parts if isinstance(part, File)}
    assert named == offered


def test_mirror_and_endpoint(monkeypatch):
    monkeypatch.setenv("DIFFUSIONOPD_MIRROR", "https://mirror.example/")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    github = "https://raw.githubusercontent.com/owner/name/commit/file"
    assert transfer.resolve(github) == f"https://mirror.example/{github}"
    assert transfer.resolve("hub:owner/name/a/b.pt") == "https://hub.example/owner/name/resolve/main/a/b.pt"
    assert transfer.resolve("https://elsewhere.example/x") == "https://elsewhere.example/x"


def test_one_failure_does_not_keep_the_others(server, tmp_path):
    gone, there = entry(server, name="gone", path="gone"), entry(server)
    items = {"a": Item((gone, there), ""), "b": Item((there,), "")}
    outcomes = list(download(items, tmp_path))
    assert [(name, well) for name, _, well in outcomes] == [("gone", False), ("folder/file.bin", True)]
    assert "404" in outcomes[0][1]
    assert hashlib.sha256((tmp_path / "folder" / "file.bin").read_bytes()).hexdigest() == SHA256


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(DownloadError, match=r"no genevall among rewards; there are: .*geneval"):
        choose("rewards", ["genevall"])
    assert set(choose("datasets", [])) == {"geneval", "ocr", "pickscore", "drawbench"}


def run_script(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "download.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_list_and_dry_run_write_nothing(tmp_path, capsys):
    for kind in CATALOGUE:
        for flag in ("--list", "--dry_run"):
            assert main([kind, flag, "--root", str(tmp_path)]) == 0
            printed = capsys.readouterr().out
            assert all(f"{name}: " in printed for name in CATALOGUE[kind])
    assert left(tmp_path) == []


def test_command_fails_with_a_list_of_what_failed(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSIONOPD_MIRROR", server.url.replace("://", "://me:word@"))
    done = run_script("datasets", "drawbench", "--root", tmp_path)
    assert done.returncode == 1
    assert "1 failed:" in done.stderr and "dataset/drawbench/test.txt" in done.stderr and "404" in done.stderr
    assert "me:word" not in done.stdout + done.stderr
    assert run_script("datasets", "nothing").returncode == 1
