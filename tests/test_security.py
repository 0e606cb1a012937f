"""What docs/security.md promises: no code from data, no secret in a file or message, nothing served, pages that run
nothing."""

from __future__ import annotations

import ast
import itertools
import json
import os
import pickle
import shutil
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionopd.config_schema import ConfigError, find_secrets, redacted
from diffusionopd.evaluation.results import Record, Summary, averages_json, summarise
from diffusionopd.models.loading import BackboneError, load_backbone, load_text_encoder
from diffusionopd.models.lora_files import AdapterError, load_lora
from diffusionopd.models.text_cache import TextCache, TextCacheError
from diffusionopd.rewards import RewardError, build_scorer, check_options
from diffusionopd.rewards.judges.server import api_root, read_key
from diffusionopd.rewards.unifiedreward import UnifiedReward
from diffusionopd.rewards.weights import load_official
from diffusionopd.training import check, checkpoint, train
from diffusionopd.training.command import parse, plain_errors
from tools.downloads import DownloadError, transfer
from tools.downloads.catalogue import File
from tools.downloads.files import fetch
from tools.report import Drawn, Report, Task, compare, read_models, render, render_comparison, render_gallery
from tools.report import Image as Shown

from .conftest import ROOT
from .loopback import entry, left
from .pages import Page

SOURCES = [
    path
    for folder in ("diffusionopd", "tools", "scripts", "benchmarks", "experiments", "config")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


# --- the source: what ruff's rules (S, TID251 in pyproject.toml) leave open ------------------------------------------

# Keywords that are allowed one value only, wherever they occur.
ONLY = {"trust_remote_code": False, "allow_pickle": False, "shell": False, "verify": True, "weights_only": True}
# from_pretrained of these reads no weights (tokenizers, processors), or takes the safetensors file there (PEFT).
WITHOUT_WEIGHTS = (
    "part_class(index, 'scheduler')",
    "self.kind.config_class",
    "reader",
    "PeftModel",
)


def broken_rules(source: str) -> list[str]:
    """The calls that load weights which may be programs, run Python files, or listen elsewhere than on loopback."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        loader, dot, method = name.rpartition(".")
        loads = method == "from_pretrained" and loader not in WITHOUT_WEIGHTS
        places = [*call.args[:1], *(k.value for k in call.keywords if k.arg == "server_address")]
        opens = [each for each in places if name.endswith((".bind", "HTTPServer")) and isinstance(each, ast.Tuple)]
        if (
            any(given.get(key, str(value)) != str(value) for key, value in ONLY.items())
            or (name == "torch.load" and "weights_only" not in given)
            or (loads and given.get("use_safetensors") != "True")
            or any(ast.unparse(each.elts[0]) not in ("'127.0.0.1'", "'::1'", "'localhost'") for each in opens)
            or name in ("compile", "__import__")
            or name.endswith("exec_module")
        ):
            found.append(ast.unparse(call))
    return found


def test_the_source_does_nothing_forbidden():
    """Files that are run are configurations alone, in one place."""
    forbidden = (
        "torch.load(p); np.load(p, allow_pickle=flag); M.from_pretrained(n, **o); s.bind(('', 80)); __import__(n)"
    )
    forbidden += "; readers.from_pretrained(n); HTTPServer(server_address=('0.0.0.0', 80))"
    assert len(broken_rules(forbidden)) == 7
    found = {path.relative_to(ROOT).as_posix(): broken_rules(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert found.pop("diffusionopd/config_schema/load.py") == ["spec.loader.exec_module(module)"]
    assert {path: calls for path, calls in found.items() if calls} == {}


# --- weights that are programs ---------------------------------------------------------------------------------------


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.write_text, (self.file, "executed")


@pytest.fixture
def canary(tmp_path):
    """`canary(path)` writes a malicious checkpoint; afterwards none must have been run."""
    alarm = tmp_path / "alarm"

    def write(path: Path, legacy: bool = False) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"state_dict": {"w": torch.zeros(1)}, "more": Canary(alarm)}
        path.write_bytes(pickle.dumps(content)) if legacy else torch.save(content, path)
        return str(path)

    torch.load(write(tmp_path / "file"), weights_only=False)
    assert alarm.read_text() == "executed", "it sings"
    alarm.unlink()
    yield write
    assert not alarm.exists()


def copied(folder: Path, target: Path) -> Path:
    """A copy whose weights are links; one is replaced by unlinking it first."""
    link = lambda a, b: (os.link if a.endswith(".safetensors") else shutil.copy)(a, b)  # noqa: E731
    return Path(shutil.copytree(folder, target, copy_function=link))


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_pickles_are_no_loras(canary, tmp_path):
    names = ("adapter_model.bin", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    for name, legacy in itertools.product(names, (False, True)):
        folder = tmp_path / f"{name}{legacy}"
        canary(folder / name, legacy)
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
        with pytest.raises(AdapterError, match=str(folder)):
            load_lora(folder)


def test_pickles_are_no_scorers(canary, tmp_path, monkeypatch):
    seen = []  # by mmdetection, were it there
    apis = types.SimpleNamespace(inference_detector=None, init_detector=lambda *args, **options: seen.append(args))
    monkeypatch.setitem(sys.modules, "mmdet", types.SimpleNamespace(apis=apis))
    for legacy in (False, True):
        path = canary(tmp_path / "weights.pt", legacy)
        for name, options in (
            ("hpsv2", {}), ("imagereward", {}), ("geneval", {"detector": "converted"}),
            ("geneval", {"detector": f"mmdet:{path}"}),
        ):  # fmt: skip
            with pytest.raises(RewardError, match=path):
                build_scorer(name, options={"checkpoint": path} | options)
        with pytest.raises(RewardError, match=path):
            load_official("aesthetic", path, dict)
    assert seen == []
    folder = tmp_path / "clip"
    canary(folder / "pytorch_model.bin")
    for kind, name, options in (
        ("clip", "clipscore", {"model": str(folder)}),
        ("mask2former", "geneval", {"detector": f"transformers:{folder}"}),
    ):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(RewardError, match="cannot be loaded"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build_scorer(name, options=options)


def test_pickles_are_no_base_model(canary, pipeline_folder, tmp_path):
    for part in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        model = copied(pipeline_folder, tmp_path / part)
        (weights,) = (model / part).glob("*.safetensors")
        weights.unlink()
        load = load_text_encoder if "text" in part else load_backbone
        pickled = "pytorch_model.bin" if "text" in part else "diffusion_pytorch_model.bin"
        for name, fact in ((pickled, r"\.bin may hold code"), (weights.name, "")):
            canary(model / part / name)
            with pytest.raises(BackboneError, match=f"(?s)cannot be loaded.*{fact}"):
                load(str(model))


def test_pickles_are_no_state_and_no_embedding(canary, tmp_path):
    canary(tmp_path / "state" / "tensors.safetensors")
    (tmp_path / "state" / "scalars.json").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        checkpoint.load_state(tmp_path / "state")
    cache = TextCache(tmp_path / "cache", "model", 14, torch.float32)
    canary(cache.path("a prompt"))
    with pytest.raises(TextCacheError, match="was damaged"), pytest.warns(UserWarning, match="removed"):
        cache.get(["a prompt"])


# --- models that bring code ------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path({alarm!r}).write_text("executed")
class Brought:
    from_pretrained = classmethod(lambda cls, *args, **options: cls())
"""
BROUGHT = ["brought", "Brought"]
MODELS = (
    ("text_encoder", BROUGHT, {}),
    ("tokenizer", BROUGHT, {}),
    ("text_encoder_2", ["transformers", "AutoModel"], {"auto_map": {"AutoModel": "brought.Brought"}}),
    ("tokenizer_3", ["transformers", "AutoTokenizer"], {"auto_map": {"AutoTokenizer": ["brought.Brought", None]}}),
    ("feature_extractor", BROUGHT, {}),
    ("transformer", ["diffusers", "SD3Transformer2DModel"], {"auto_map": {"AutoModel": "brought.Brought"}}),
    ("_class_name", BROUGHT, {}),
)


def test_code_of_a_model_is_not_run(pipeline_folder, tmp_path):
    alarm = tmp_path / "alarm"
    for part, kind, config in MODELS:
        model = copied(pipeline_folder, tmp_path / part)
        folder = model if part == "_class_name" else model / part
        folder.mkdir(exist_ok=True)
        (folder / "brought.py").write_text(CODE.format(alarm=str(alarm)))
        rewrite(model / "model_index.json", **{part: kind})
        for file in [*folder.glob("config.json"), *folder.glob("tokenizer_config.json")] if config else []:
            rewrite(file, **config)
        for load in (load_text_encoder, load_backbone):
            try:
                load(str(model))
                refused = False
            except BackboneError as error:
                refused = part in str(error)
                assert str(model) in str(error)  # noqa: PT017 (what is left alone may load)
            assert refused or load is load_backbone or not part.startswith(("text_encoder", "tokenizer"))
        assert not alarm.exists()
    for source in ("owner/name/../../secret", "../name", "owner/..", "owner/name/.."):
        with pytest.raises(AdapterError, match=source):  # hub ids do not lead out of their repository
            load_lora(source)


# --- downloads -------------------------------------------------------------------------------------------------------


def test_other_schemes_and_too_much_are_refused(server, tmp_path, monkeypatch):
    assert server.server_address[0] == "127.0.0.1", "the server of these tests is seen by this machine only"
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x"):
        server.redirects = {"/file.bin": target}
        with pytest.raises(DownloadError, match="http"):
            fetch(entry(server), tmp_path, pause=0)
    server.redirects = {}
    for server.announced in (True, False):
        with pytest.raises(DownloadError, match="1000 bytes"):
            fetch(entry(server, sha256="", size=1000), tmp_path, pause=0)
    hop = types.SimpleNamespace(url="http://host/file", status_code=302, headers={}, is_redirect=True)
    monkeypatch.setattr(transfer.requests, "get", lambda *args, **options: options["hooks"]["response"](hop))
    with pytest.raises(DownloadError, match="https"):
        fetch(File("file.bin", ("https://host/file",)), tmp_path, pause=0)
    assert left(tmp_path) == []


# --- secrets ---------------------------------------------------------------------------------------------------------

HUB_TOKEN = "hf_" + "Q7x" * 10
SECRETS = {"HF_TOKEN": HUB_TOKEN, "WANDB_API_KEY": "w" * 20 + "0123456789" * 2, "A_KEY": "unified reward's key"}


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return list(SECRETS.values())


def test_secrets_of_the_environment_are_in_no_file_and_no_output(secrets, tiny_config, tmp_path, capfd):
    train(tiny_config(num_epochs=1, log_with="tensorboard", sample_freq=1))
    run = tmp_path / "logs" / "run"
    assert (run / "trackers").is_dir() and (run / "checkpoints" / "latest").is_file()
    output = "".join(capfd.readouterr())
    assert "writing to" in output
    written = [output.encode(), *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())]
    assert len(written) > 5 and not any(secret.encode() in content for content in written for secret in secrets)


def test_a_configuration_with_a_secret_is_refused_before_anything_is_written(secrets, tiny_config, tmp_path):
    hidden = [*secrets, "some key", "some token", "me:word"]
    for key, value in (
        ("reward_options", {"unifiedreward": {"api_key": "some key"}}),
        ("reward_options", {"unifiedreward": {"base_url": "http://me:word@host:1"}}),
        ("reward_options", {"unifiedreward": {"api_key_variable": HUB_TOKEN}}),
        ("run_name", f"run-{HUB_TOKEN}"),
        ("wandb_token", "some token"),
        ("pretrained__model", "https://me:word@host/model"),
        ("train__lora_path", f"owner/{SECRETS['WANDB_API_KEY']}"),
    ):
        config = tiny_config(**{key: value})
        for act in (train, lambda config: check(config, 1)):
            with pytest.raises(ConfigError, match="environment variable") as caught:
                act(config)
            assert key.replace("__", ".") in str(caught.value)
            assert not any(secret in str(caught.value) for secret in hidden)
    assert not (tmp_path / "logs").exists()


def test_a_secret_on_the_command_line_is_refused_and_not_repeated(secrets, capsys):
    for argument in (
        f"config.reward_options.unifiedreward.api_key={HUB_TOKEN}",
        f"config.train.lora_path=https://me:{HUB_TOKEN}@host/x",
        f"config.train.lora_path=x {HUB_TOKEN}",
        f"token={HUB_TOKEN}",
    ):
        with pytest.raises(SystemExit) as ended, plain_errors():
            train(**parse(["--config", f"{ROOT}/config/tiny.py:mopd", f"--{argument}", "--dry_run"], ""))
        output = "".join(capsys.readouterr())
        assert ended.value.code == 2 and output and not any(secret in output for secret in secrets)


def test_secrets_are_found_redacted_and_never_quoted(monkeypatch):
    monkeypatch.setenv("SOME_PASSWORD", "open sesame")
    text = f"open sesame, {HUB_TOKEN} at http://u:p@host/a?sig=1 and https://host/b. Did you mean c?"
    assert redacted(text) == "***, *** at http://host/a and https://host/b. Did you mean c?"
    monkeypatch.setenv("MY_KEY", "1")
    alike = {"max_tokens": "4", "tokenizer": "bert", "api_key_variable": "KEY", "token": None, "a": ["1", "sk-"]}
    assert list(find_secrets(alike)) == []
    check_options({"unifiedreward": {"api_key_variable": "MY_KEY", "base_url": "http://127.0.0.1:17140"}})
    for refuse, secret in (
        (lambda: check_options({"unifiedreward": {"api_key": "some key"}}), "some key"),
        (lambda: api_root("http://u:p@host"), "u:p"),
        (lambda: api_root("http://host/v1?key=1"), "key=1"),
        (lambda: api_root("u:p@host"), "u:p"),
        (lambda: read_key("sk-0123456789"), "sk-"),
    ):
        with pytest.raises(RewardError) as caught:
            refuse()
        assert secret not in str(caught.value)


def test_a_key_that_goes_unencrypted_to_another_machine_is_warned_of(monkeypatch, recwarn):
    monkeypatch.setenv("A_KEY", "some key")
    monkeypatch.setattr(UnifiedReward, "_request", lambda *arguments: None)
    for address, variable, warned in (
        ("http://127.0.0.1:1", "A_KEY", False), ("https://elsewhere.example:1", "A_KEY", False),
        ("http://elsewhere.example:1", "NOT_SET", False), ("http://elsewhere.example:1", "A_KEY", True),
    ):  # fmt: skip
        UnifiedReward(address, api_key_variable=variable)
        assert any("unencrypted" in str(entry.message) for entry in recwarn) == warned


def test_what_a_server_may_not_do(server):
    """Redirect images elsewhere, write to the terminal."""
    said = []
    for server.redirects in ({f"/v1/{name}": f"{server.url}/elsewhere" for name in ("models", "chat/completions")}, {}):
        with pytest.raises(RewardError) as caught:
            UnifiedReward(server.url, retries=0)
        said.append(str(caught.value))
        server.statuses["/v1/models"], server.files["/v1/models"] = 500, b"\x1b]0;title\x07\x1b[2J\x9b1m text"
    assert "HTTP 302" in said[0] and {path for path, _ in server.requests} == {"/v1/models"}
    assert "title" in said[1] and said[1].isprintable()


# --- pages -----------------------------------------------------------------------------------------------------------

EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(1)>' onload='alert(1)&lt;"
ALLOWED = set(
    "html head meta title style body main header h1 h2 h3 section p span div strong b small figure figcaption img "
    "table thead tbody tfoot tr th td dl dt dd ul li".split()
)


def test_pages_run_nothing(tmp_path):
    models = ("base", f"teacher-{EVIL}", "student")
    scores = {model: Summary(0.1 * i, 0.0, 3) for i, model in enumerate(models)}
    for name in ("a", "b"):
        image = tmp_path / name / "images" / "00000.jpg"
        image.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(image)
        records = [Record(0, EVIL, {EVIL: EVIL}, {EVIL: 0.5, "ocr": float(name == "a")})]
        settings = {"dataset": EVIL, "model": EVIL, "lora": EVIL, "rewards": [EVIL], "seed": EVIL + name}
        for file, content in (
            ("average_scores.json", averages_json(summarise(records))), ("evaluation_settings.json", settings),
            ("evaluation_results.jsonl", vars(records[0])),
        ):  # fmt: skip
            (tmp_path / name / file).write_text(json.dumps(content) + "\n")
    shown = Shown(EVIL, dict.fromkeys(models, image), dict.fromkeys(models, 0.5))
    task = Task(EVIL, EVIL, scores, *[[(1.0, 0.2), (2.0, 0.1)]] * 3, [shown])
    compared = read_models([f"{EVIL.replace('=', '')}={tmp_path / 'a'}", str(tmp_path / "b")])
    column = Drawn(EVIL, [np.zeros((8, 8, 3), np.uint8)], EVIL)
    pages = (
        render(Report(EVIL, [task], 2, 5.0, [(EVIL, EVIL)])), render_comparison(compare(compared), EVIL),
        render_gallery(EVIL, [(EVIL, EVIL)], [column], [(EVIL, EVIL)], [EVIL]),
    )  # fmt: skip
    for page in map(Page, pages):
        assert {tag for tag, _ in page.tags} <= ALLOWED
        attributes = [pair for _, given in page.tags for pair in given.items()]
        assert not [n for n, _ in attributes if n.startswith("on") or n in ("href", "action", "srcdoc")]
        assert all(value.startswith("data:image/") for name, value in attributes if name == "src")
        (policy,) = [value for name, value in attributes if name == "content" and "default-src" in value]
        assert policy.startswith("default-src 'none'") and "script" not in policy
        assert "<script>alert(1)</script>" in page.text, "shown as text"
