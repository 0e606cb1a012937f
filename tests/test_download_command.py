"""The catalogue of downloads, its sources other than plain files, and the command."""

from __future__ import annotations

import ast
import hashlib
import re
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError

from diffusionopd.rewards import clip
from tests.loopback import CONTENT, entry, left, loopback
from tools.download import main
from tools.downloads import CATALOGUE, DownloadError, File, Item, Repository, choose, download, transfer
from tools.downloads.files import fetch, question

from .conftest import ROOT


@pytest.fixture
def server(monkeypatch):
    with loopback(monkeypatch, {"/file.bin": CONTENT}) as server:
        yield server


ASKED = """
async def ask(prompt, image):
    question = f"<image>\\nRate this.\\nFinal Score: \\'1\\'\\nCaption: [{prompt}]"
    return question
"""


def test_question_is_taken_out_of_the_source_without_running_it(server, tmp_path):
    expected = "<image>\nRate this.\nFinal Score: '1'\nCaption: [{prompt}]\n"
    server.files["/client.py"] = ("raise SystemExit\n" + ASKED).encode()
    file = entry(server, hashlib.sha256(expected.encode()).hexdigest(), "client.py", "question.txt", extract=True)
    fetch(file, tmp_path)
    for source in ("x = 1", "question = f'Rate {prompt}'", ASKED + ASKED.replace("Rate", "Judge"), "not python ("):
        with pytest.raises(DownloadError, match="question"):
            question(source.encode())
    server.files["/client.py"] = b"x = 1"
    with pytest.raises(DownloadError):
        fetch(file, tmp_path, force=True)
    assert (tmp_path / "question.txt").read_text() == expected and not (tmp_path / "question.txt.part").exists()


@pytest.mark.parametrize("gated", [None, True, False])
def test_a_repository_is_loaded_with_its_patterns_and_errors_name_the_remedy_and_no_token(monkeypatch, gated):
    calls = []

    def load(name, **options):
        calls.append((name, options))
        if gated:
            request = SimpleNamespace(url="", headers={}, method="GET")
            raise GatedRepoError("gated", response=SimpleNamespace(headers={}, request=request, status_code=403))
        if gated is False:
            raise OSError("no answer with hf_secret from http://me:word@proxy/x?signature=1")

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", load)
    items = {"x": Item((Repository("owner/name", ("*.json",), ("*fp16*",)),), "")}
    ((name, outcome, well),) = download(items, ROOT)
    assert calls == [("owner/name", {"allow_patterns": ["*.json"], "ignore_patterns": ["*fp16*"]})]
    assert (name, well) == ("owner/name", gated is None)
    assert gated is None or ("https://huggingface.co/owner/name" if gated else "HF_ENDPOINT") in outcome
    assert not any(secret in outcome for secret in ("hf_secret", "me:word", "signature"))


def test_catalogue_is_consistent_and_scorers_look_where_files_are_put():
    parts = [part for items in CATALOGUE.values() for item in items.values() for part in item.parts]
    files = {part for part in parts if isinstance(part, File)}
    assert len({file.path for file in files}) == len(files)
    for file in files:
        assert re.fullmatch(r"(dataset/(geneval|ocr|pickscore|drawbench)|reward_ckpts)/[\w.+-]+", file.path)
        assert re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{8}|", file.sha256)
        assert all(transfer.resolve(url).startswith("https://") for url in file.urls)
        assert not file.path.endswith(("test.txt", "test.jsonl")) or len(file.sha256) == 64 and file.size
    names = {part.name for part in parts if isinstance(part, Repository)}
    assert {clip.CLIP_L, clip.CLIP_H_PROCESSOR, clip.PICKSCORE} <= names
    named = set()
    for path in (ROOT / "diffusionopd" / "rewards").rglob("*.py"):
        strings = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        named |= {text for text in map(str, strings) if re.fullmatch(r"reward_ckpts/[^/\s]+\.\w+", text)}
    assert named == {file.path for file in files if file.path.startswith("reward_ckpts/")}


def test_mirror_and_endpoint(monkeypatch):
    monkeypatch.setenv("DIFFUSIONOPD_MIRROR", "https://mirror.example/")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    github = "https://raw.githubusercontent.com/owner/name/commit/file"
    for url, expected in {
        github: f"https://mirror.example/{github}",
        "hub:owner/name/a/b.pt": "https://hub.example/owner/name/resolve/main/a/b.pt",
        "https://elsewhere.example/x": "https://elsewhere.example/x",
    }.items():
        assert transfer.resolve(url) == expected


def test_one_failure_does_not_keep_the_others(server, tmp_path):
    gone, there = entry(server, name="gone", path="gone"), entry(server)
    outcomes = list(download({"a": Item((gone, there), ""), "b": Item((there,), "")}, tmp_path))
    assert [(name, well) for name, _, well in outcomes] == [("gone", False), ("folder/file.bin", True)]
    assert "404" in outcomes[0][1] and (tmp_path / "folder" / "file.bin").read_bytes() == CONTENT


def test_list_and_dry_run_write_nothing(tmp_path, capsys):
    for kind in CATALOGUE:
        for flag in ("--list", "--dry_run"):
            assert main([kind, flag, "--root", str(tmp_path)]) == 0
            printed = capsys.readouterr().out
            assert all(f"{name}: " in printed for name in CATALOGUE[kind])
    assert left(tmp_path) == []


def test_command_fails_with_a_list_of_what_failed(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFUSIONOPD_MIRROR", server.url.replace("://", "://me:word@"))
    assert main(["datasets", "drawbench", "--root", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "dataset/drawbench/test.txt" in printed.err and "404" in printed.err
    assert "me:word" not in printed.out + printed.err
    assert set(choose("datasets", [])) == {"geneval", "ocr", "pickscore", "drawbench"}
    with pytest.raises(SystemExit, match="genevall.*geneval"):
        main(["rewards", "genevall"])
