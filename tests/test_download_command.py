"""The catalogue of downloads, its sources other than plain files, and the command."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError

from diffusionopd.evaluation.testsets import BENCHMARKS
from diffusionopd.rewards import REGISTRY, clip
from tools.download import main
from tools.downloads import CATALOGUE, DownloadError, File, Item, Repository, choose, download, transfer
from tools.downloads.convert import CONVERSIONS
from tools.downloads.files import fetch

from .conftest import ROOT
from .loopback import CONTENT, entry, left

ASKED = """
async def ask(prompt, image):
    question = f"<image>\\nRate this.\\nFinal Score: \\'1\\'\\nCaption: [{prompt}]"
    return question
"""


def test_question_is_taken_out_of_the_source_without_running_it(server, tmp_path):
    expected = "<image>\nRate this.\nFinal Score: '1'\nCaption: [{prompt}]\n"
    server.files["/client.py"] = ("raise SystemExit\n" + ASKED).encode()
    digest = hashlib.sha256(expected.encode()).hexdigest()
    file = entry(server, digest, "client.py", "question.txt", convert="unifiedreward_question")
    fetch(file, tmp_path)
    server.files["/client.py"] = b"x = 1"
    with pytest.raises(DownloadError):
        fetch(file, tmp_path, force=True)
    assert (tmp_path / "question.txt").read_text() == expected and not (tmp_path / "question.txt.part").exists()


WISE_CLIENT = """
def messages(prompt_data, image):
    return [
        {"role": "system", "content": [{"type": "text", "text": "Be strict."}]},
        {"role": "user", "content": [
            {"type": "text",
             "text": f"Rate {{1}}.\\nPROMPT: {prompt_data['Prompt']}\\nWHY: {prompt_data['Explanation']}"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        ]},
    ]
"""


def test_what_wise_asks_is_taken_out_of_its_client(tmp_path):
    made = json.loads(CONVERSIONS["wise_question"]([("raise SystemExit\n" + WISE_CLIENT).encode()]))
    assert made == {"system": "Be strict.", "question": "Rate {1}.\nPROMPT: {prompt}\nWHY: {Explanation}"}


def test_prompts_of_several_sources_become_one_file(server, tmp_path, monkeypatch):
    """By their number, whatever the order of the files; parts do not stay behind."""
    of = lambda n: [{"Prompt": f"p{n}", "Explanation": "e", "Category": "time", "prompt_id": n}]  # noqa: E731
    server.files |= {"/b.json": json.dumps(of(2)).encode(), "/a.json": json.dumps(of(1)).encode()}
    file = File("set/test.jsonl", (f"{server.url}/b.json",), convert="wise_prompts", also=(f"{server.url}/a.json",))
    server.statuses["/a.json"] = 404
    with pytest.raises(DownloadError, match="404"):
        fetch(file, tmp_path)
    assert left(tmp_path) == ["set/test.jsonl.part"], "the first has arrived"
    server.statuses.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tools.downloads.files.sha256", Mock(side_effect=KeyboardInterrupt))
        fetch(file, tmp_path)
    assert fetch(file, tmp_path) and not fetch(file, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / file.path).read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["p1", "p2"] and lines[0].keys() == {*of(1)[0], "prompt"} - {"Prompt"}
    assert left(tmp_path) == ["set/SHA256SUMS", "set/test.jsonl"]
    for wrong in (b"<html>", b"{}", b'[{"Prompt": "p"}]', b"[1]"):
        server.files["/a.json"] = wrong
        with pytest.raises(DownloadError, match="prompts"):
            fetch(file, tmp_path, force=True)
    assert left(tmp_path) == ["set/SHA256SUMS", "set/test.jsonl"]


DPG_TABLE = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
    'a,"Two cats, one\nred","k",1,0,entity,whole,"entity - whole (cats)",Are there cats?\n'
    'a,"Two cats, one\nred","k",2,"1, 1",attribute,color,"attribute - color (cat, red)",Is one red?\n'
    "b,A dog,k,1,0,entity,whole,entity - whole (dog),Is there a dog?\n"
)


def test_the_questions_of_a_table_are_grouped_by_prompt():
    first, second = map(json.loads, CONVERSIONS["dpgbench_prompts"]([DPG_TABLE.encode()]).splitlines())
    assert first["prompt"] == "Two cats, one\nred" and second["prompt"] == "A dog"
    assert first["questions"][1] == {
        "id": 2, "question": "Is one red?", "category": "attribute - color", "needs": [1, 1],
    }  # fmt: skip


def test_complex_prompts_get_their_kinds_from_the_lists_of_some():
    """As officially: up to the first full stop, in lower case."""
    lists = [b"A b. More\nC d.\nE f", b"a B.", b"c d\n"]
    made = [json.loads(line) for line in CONVERSIONS["compbench_complex"](lists).splitlines()]
    assert [tuple(each.values()) for each in made] == [("A b. More", "spatial"), ("C d.", "action"), ("E f", "both")]


HPSV3 = 'raise SystemExit\nINSTRUCTION = """\nT - {text_prompt}\n"""\nprompt_with_special_token = "\\nR: <|Reward|>"\n'


def test_what_hpsv3_is_told_is_taken_out_of_its_source():
    assert CONVERSIONS["hpsv3_instruction"]([HPSV3.encode()]) == b"\nT - {text_prompt}\n\nR: <|Reward|>"


def test_sources_of_another_form_are_refused():
    for conversion, what, *wrong in (
        ("unifiedreward_question", "question", "question = f'Rate {prompt}'", ASKED + ASKED.replace("Rate", "Judge")),
        ("wise_question", "question", WISE_CLIENT.replace("Explanation", "Reason"), WISE_CLIENT * 2),
        ("hpsv3_instruction", "question", HPSV3.replace("{text", "{"), HPSV3.replace("Reward", "R")),
        ("dpgbench_prompts", "table", "<html>\n<p>", DPG_TABLE.replace("dependency", "other"),
         DPG_TABLE.replace(",0,", ",x,")),
        ("compbench_complex", "three lists", "a", ("<html>", "a", "b"), ("a", "", "b")),
    ):  # fmt: skip
        for sources in (*wrong, *(("x = 1", "not python (") if what == "question" else ())):
            given = [sources] if isinstance(sources, str) else sources
            with pytest.raises(DownloadError, match=what):
                CONVERSIONS[conversion]([source.encode() for source in given])


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
    prompts = {folder for folder, _ in BENCHMARKS.values()}
    assert prompts >= {f"dataset/{name}" for name in CATALOGUE["datasets"]}
    for file in files:
        assert re.fullmatch(r"(dataset/\w+|reward_ckpts)/[\w.+-]+", file.path)
        assert re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{8}|", file.sha256)
        assert all(transfer.resolve(url).startswith("https://") for url in file.urls)
        assert not file.path.endswith(("test.txt", "test.jsonl")) or len(file.sha256) == 64 and file.size
        assert file.convert in ("", *CONVERSIONS) and (file.convert or not file.also)
        assert file.path.startswith("reward_ckpts/") or str(Path(file.path).parent) in prompts
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
            shown = [name for name, item in CATALOGUE[kind].items() if flag == "--list" or not item.named]
            assert all(f"{name}: " in printed for name in shown) and printed.count(": ") >= len(shown)
    assert left(tmp_path) == []


def test_command_fails_with_a_list_of_what_failed(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFUSIONOPD_MIRROR", server.url.replace("://", "://me:word@"))
    assert main(["datasets", "drawbench", "--root", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "dataset/drawbench/test.txt" in printed.err and "404" in printed.err
    assert "me:word" not in printed.out + printed.err
    assert set(choose("datasets", [])) == {"geneval", "ocr", "pickscore", "drawbench"}
    beside_table_1 = {"wise", "wise_verified", "hpsv3", *(name for name in REGISTRY if name.startswith("compbench_"))}
    assert set(choose("rewards", [])) == CATALOGUE["rewards"].keys() - beside_table_1
    with pytest.raises(SystemExit, match="genevall.*geneval"):
        main(["rewards", "genevall"])
