"""Whatever is read from a file, a flag or a server: it works, or one of our errors names it. Nothing else gets through.

FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py looks at that many new random cases of each test.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import struct
import warnings
from contextlib import suppress
from types import SimpleNamespace

import pytest
import requests
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import nn

from diffusionopd.algorithms.optim import Ema, StudentOptimizer
from diffusionopd.config_schema import (
    ConfigError,
    ResumeError,
    Start,
    base_config,
    check,
    load_config,
    split_arguments,
)
from diffusionopd.config_schema.load import _with_defaults
from diffusionopd.config_schema.values import flatten
from diffusionopd.data.prompts import PromptError, read_prompts
from diffusionopd.evaluation.job import find_checkpoint
from diffusionopd.evaluation.results import (
    EvaluationError,
    Record,
    ResultFolder,
    averages_json,
    read_averages,
    read_records,
    summarise,
)
from diffusionopd.evaluation.testsets import BenchmarkError
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import AdapterError, load_lora
from diffusionopd.models.text_cache import TextCache, TextCacheError
from diffusionopd.rewards import RewardError
from diffusionopd.rewards.chat_server import ChatServer, api_root
from diffusionopd.rewards.geneval.rules import parse_request
from diffusionopd.rewards.unifiedreward import final_score
from diffusionopd.training import checkpoint
from diffusionopd.training.metrics import MetricsWriter
from diffusionopd.training.resume import open_resume
from diffusionopd.training.state import RunError, load_state
from tools.report import ComparisonError, compare, csv_table, read_models, render_comparison, text_comparison
from tools.report.collect import ReportError, collect, read_metrics

from .conftest import ROOT
from .fuzzing import altered, damaged, deep, encode, fuzz, json_values, lines, odd_text, only, scalars

TINY = f"{ROOT / 'config' / 'tiny.py'}:mopd"
evaluate = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Relative paths of the tiny configuration are meant from here; warnings about what is skipped are expected."""
    monkeypatch.chdir(ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- prompts ---------------------------------------------------------------------------------------------------------

CLAUSES = [
    {"class": "dog", "count": 1, "color": "red"},
    {"class": "car", "count": 2, "position": ["left of", 0]},
]
METADATA = {"prompt": "a red dog", "tag": "position", "include": CLAUSES, "exclude": [{"class": "dog", "count": 3}]}


@fuzz(60)
@given(
    content=lines(METADATA) | st.binary(max_size=60) | deep.map(str.encode),
    kind=st.sampled_from(["geneval", "general_ocr"]),
)
@example(content=b'{"prompt": "a", "x": "\\ud800"}', kind="geneval")
@example(content=b'{"prompt": "a", "x": 1e999}', kind="geneval")
def test_prompt_files(tmp_path_factory, content, kind):
    path = tmp_path_factory.getbasetemp() / "prompts"
    path.write_bytes(content)
    with only(PromptError, naming=path):
        prompts = read_prompts(path, kind)
        assert prompts
        for prompt in prompts:
            assert prompt.text.strip() and prompt.text.encode()
            written = json.dumps(prompt.metadata, ensure_ascii=False, allow_nan=False).encode()  # as results are
            assert json.loads(written) == prompt.metadata


@fuzz(80)
@given(metadata=altered(METADATA))
def test_geneval_metadata(metadata):
    if isinstance(metadata, dict):
        with only(RewardError, naming="'a prompt'"):
            request = parse_request("a prompt", metadata)
            assert request.include


# --- results and metrics ---------------------------------------------------------------------------------------------

RECORD = {"sample_id": 0, "prompt": "a red dog", "metadata": METADATA, "scores": {"ocr": 0.5, "geneval": 1}}


@fuzz(60)
@given(content=lines(RECORD))
def test_results_of_an_evaluation(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "results"
    folder.mkdir(exist_ok=True)
    (folder / "evaluation_settings.json").write_text("{}")
    (folder / "evaluation_results.part1.jsonl").unlink(missing_ok=True)
    (folder / "evaluation_results.jsonl").write_bytes(content)
    with only(EvaluationError, naming=folder):
        read_records(folder / "evaluation_results.jsonl")
        files = ResultFolder(folder)
        files.open({}, ["a red dog", "a red dog"], resume=True, need_images=False)
        assert files.done() <= {0, 1}
        files.close()
        assert read_averages(folder / "average_scores.json").keys() <= {"ocr", "geneval"} or files.done()


SETTINGS = {"dataset": "ocr", "rewards": ["ocr"], "images_per_prompt": 1, "seed": 42, "model": "m", "lora": None}
AVERAGES = averages_json(summarise([Record(**RECORD)]))


@fuzz(60)
@given(
    averages=altered(AVERAGES).map(encode) | damaged(encode(AVERAGES)),
    settings=altered(SETTINGS).map(encode) | deep.map(str.encode) | st.just(encode(SETTINGS)),
    records=lines(RECORD) | st.just(encode(RECORD) + b"\n"),
)
def test_evaluations_that_are_compared(tmp_path_factory, averages, settings, records):
    folder = tmp_path_factory.getbasetemp() / "compared"
    folder.mkdir(exist_ok=True)
    (folder / "average_scores.json").write_bytes(averages)
    (folder / "evaluation_settings.json").write_bytes(settings)
    (folder / "evaluation_results.jsonl").write_bytes(records)
    with only(ComparisonError, EvaluationError, naming=folder):
        comparison = compare(read_models([f"one={folder}"]))
        render_comparison(comparison, "title")
        text_comparison(comparison)
        csv_table(comparison)


ROW = {"round": 2, "loss": 0.1, "loss/a": 0.1, "seconds": 1.0, "monitor/a/ocr": 0.5}


@fuzz(60)
@given(content=lines(ROW) | st.binary(max_size=40))
def test_metrics_of_a_run(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    path.write_bytes(content)
    with only(ReportError, naming=path):
        rows = read_metrics(path.parent)
        assert [row["round"] for row in rows] == sorted({row["round"] for row in rows})
    MetricsWriter(path).truncate_after(2)
    kept = path.read_bytes()
    MetricsWriter(path).write({"round": 3, "loss": 0.5})
    assert path.read_bytes().startswith(kept)
    assert json.loads(path.read_text().splitlines()[-1]) == {"round": 3, "loss": 0.5}


# --- configurations --------------------------------------------------------------------------------------------------

KEYS = sorted(flatten(base_config()))
FIELDS = ("name", "dataset", "lora_path", "proxy_reward", "prompt_fn", "guidance_scale", "eval_num_steps", "other")
keys = st.one_of(
    st.sampled_from(KEYS),
    st.builds("train.teachers[{}].{}".format, st.integers(-1, 3), st.sampled_from(FIELDS)),
    st.builds(
        "{}{}".format, st.sampled_from(KEYS), st.sampled_from(["[0]", "[-9]", "[", ".x", ".", "[0].y", "[a]", "[0][1]"])
    ),
    st.builds("reward_options.{}.{}".format, st.sampled_from(["ocr", "hpsv2", "none", ""]), odd_text),
    odd_text,
)
texts = st.one_of(
    st.none(),
    odd_text,
    json_values.map(str),
    st.sampled_from(
        ["(" * 300, "-" * 5000 + "1", "[" * 50_000, "9" * 5000, "1e999", "{1:2}", "{[]:1}", "b'x'", "1j", "..."]
    ),
)


@fuzz(60)
@given(given=st.lists(st.tuples(keys, texts), min_size=1, max_size=3), processes=st.integers(1, 9))
def test_overrides(given, processes):
    arguments = [f"--config={TINY}"]
    arguments += [f"--config.{key}" + ("" if text is None else f"={text}") for key, text in given]
    with only(ConfigError):
        source, overrides, _ = split_arguments(arguments)
        check(load_config(source, overrides), processes).describe()


@fuzz(80)
@given(
    changes=st.lists(st.tuples(st.sampled_from(KEYS), json_values), min_size=1, max_size=2),
    teachers=st.none() | altered(json.loads(json.dumps(flatten(load_config(TINY))["train.teachers"]))),
)
def test_values_of_configurations(changes, teachers):
    config = load_config(TINY).to_dict()
    for key, value in [*changes, *([] if teachers is None else [("train.teachers", teachers)])]:
        *section, last = key.split(".")
        (config[section[0]] if section else config)[last] = value
    with only(ConfigError):
        check(_with_defaults(config), 1, {"tiny_ocr", "tiny_scene", "tiny_compose"}).describe()


# --- LoRAs -----------------------------------------------------------------------------------------------------------

PEFT = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["first", "second"], "bias": "none",
    "rank_pattern": {"second": 3}, "alpha_pattern": {"second": 1.5}, "use_rslora": False,
}  # fmt: skip
PAIRS = {
    f"base_model.model.{name}.lora_{part}.weight": torch.ones((rank, 4) if part == "A" else (4, rank))
    for name, rank in (("first", 2), ("second", 3))
    for part in "AB"
}
LORA = safetensors_bytes(PAIRS, {"format": "pt"})
HEADER_END = 8 + struct.unpack("<Q", LORA[:8])[0]
HEADER = json.loads(LORA[8:HEADER_END])
DIFFUSERS = {f"transformer.{key}": value for key, value in PEFT.items()}


def with_header(text: bytes) -> bytes:
    """The LoRA's file with another header."""
    return struct.pack("<Q", len(text)) + text + LORA[HEADER_END:]


def add_to_a_model(path) -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    adapters = Adapters(model)
    adapters.add_teacher("teacher", load_lora(path))
    adapters.use("teacher")
    assert all(layer(torch.ones(1, 4)).isfinite().all() for layer in model.values())


types = st.sampled_from(["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4", "F32", "", "X"])
offsets = st.sampled_from([0, 1, 32, 2**31, 2**63 - 1, 2**64, -1, 10**30])


def with_types(kind: str) -> bytes:
    return encode({key: value | {"dtype": kind} if "dtype" in value else value for key, value in HEADER.items()})


def with_first(**changed) -> bytes:
    first = min(key for key in HEADER if key != "__metadata__")
    return encode(HEADER | {first: HEADER[first] | changed})


headers = st.one_of(
    altered(HEADER).map(encode),
    types.map(with_types),
    st.lists(offsets, min_size=2, max_size=2).map(lambda ends: with_first(data_offsets=ends)),
    st.lists(offsets, max_size=4).map(lambda shape: with_first(shape=shape)),
    st.just(encode(HEADER)[:-1] + b"," + encode(HEADER)[1:]),  # every key twice
    deep.map(str.encode),
)


@fuzz(80)
@given(
    config=st.just(encode(PEFT)) | altered(PEFT).map(encode) | damaged(encode(PEFT)) | deep.map(str.encode),
    weights=st.just(LORA) | damaged(LORA, HEADER_END) | headers.map(with_header),
)
def test_peft_folders(tmp_path_factory, config, weights):
    folder = tmp_path_factory.getbasetemp() / "peft"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    with only(AdapterError, naming=folder):
        add_to_a_model(folder)


@fuzz(60)
@given(
    metadata=(altered(DIFFUSERS).map(encode) | deep.map(str.encode) | damaged(encode(DIFFUSERS))),
    weights=st.none() | damaged(LORA, HEADER_END) | headers.map(with_header),
    alphas=st.lists(st.sampled_from([[], [1], [2, 2], [0]]), max_size=2),
    number=st.sampled_from([1.0, 0.0, float("nan"), float("inf"), -1.0]),
)
def test_diffusers_files(tmp_path_factory, metadata, weights, alphas, number):
    path = tmp_path_factory.getbasetemp() / "pytorch_lora_weights.safetensors"
    if weights is None:
        tensors = {name.replace("base_model.model", "transformer"): tensor for name, tensor in PAIRS.items()}
        for name, shape in zip(("first", "second"), alphas, strict=False):
            tensors[f"transformer.{name}.alpha"] = torch.full(shape, number)
        weights = safetensors_bytes(tensors, {"lora_adapter_metadata": metadata.decode("utf-8", "replace")})
    path.write_bytes(weights)
    with only(AdapterError, naming=path):
        add_to_a_model(path)


# --- what runs keep --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with a state of one parameter, and the content of its files."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    parameter = nn.Parameter(torch.ones(2, 3))
    tensors = {"student.0": parameter, "ema.0": parameter}
    tensors |= {f"optimizer.0.{name}": torch.ones(2, 3) for name in ("exp_avg", "exp_avg_sq")}
    tensors["optimizer.0.step"] = torch.tensor(3.0)

    def write(folder):
        scalars = {"round": 3, "num_processes": 1, "scaler": {}, "versions": {"torch": "2"}, "digests": {"a": "b"}}
        checkpoint.save_state(folder / "state", tensors, scalars)
        (folder / "config.json").write_text(json.dumps(load_config(TINY).to_dict()))

    folder = checkpoint.save(root, "checkpoint-3", write)
    return folder, {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(folder) -> None:
    """As a run does: verify, compare, read."""
    config = load_config(TINY, [("resume_from", str(folder)), ("seed", "7")])
    plan = SimpleNamespace(run_dir=folder.parent.parent, num_processes=1)
    with suppress(ResumeError):
        open_resume(Start(config, config, 1), plan, allow_change=False)
    opened = open_resume(Start(config, config, 1), plan, allow_change=True)
    assert opened.completed >= 0
    opened.check_digests({"the base model": "0"})
    opened.describe()
    parameters = [nn.Parameter(torch.zeros(2, 3))]
    optimizer = StudentOptimizer(
        parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, epsilon=1e-8, max_grad_norm=1.0, loss_scale=1.0
    )
    learner = SimpleNamespace(optimizer=optimizer, load_state=lambda tensors: None)
    load_state(folder / "state", learner, Ema(parameters, 0.9, 1))


@fuzz(60)
@given(data=st.data())
def test_damaged_checkpoints(saved, data):
    folder, contents = saved
    path = data.draw(st.sampled_from(sorted(contents)))
    content = data.draw(damaged(contents[path]))
    for each, whole in contents.items():
        each.write_bytes(content if each == path else whole)
    with only(checkpoint.CheckpointError, ResumeError, RunError, naming=folder):
        resume(folder)
    assert checkpoint.find_latest(folder.parent) in (folder, None)


@fuzz(50)
@given(data=st.data())
def test_checkpoints_of_another_content(saved, data):
    """Whole by their digests, but not what this version writes: an older one, another program, somebody's edit."""
    folder, contents = saved
    for each, whole in contents.items():
        each.write_bytes(whole)
    kind = data.draw(st.sampled_from(["manifest", "scalars", "config", "tensors"]))
    if kind == "manifest":
        manifest = data.draw(
            altered({k: v for k, v in json.loads(contents[folder / "manifest.json"]).items() if k != "digest"})
        )
        if isinstance(manifest, dict):
            digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
            (folder / "manifest.json").write_text(json.dumps(manifest | {"digest": digest}))
    elif kind == "tensors":
        names = st.sampled_from(
            ["student.0", "student.1", "student.x", "student", "ema.0", "optimizer.0.step", "optimizer.0", ""]
        )
        shapes = st.sampled_from([(), (2, 3), (3, 2), (1,)])
        tensors = data.draw(st.dictionaries(names, shapes.map(torch.ones), max_size=4))
        (folder / "state" / "tensors.safetensors").write_bytes(safetensors_bytes(tensors))
    else:
        path = folder / ("config.json" if kind == "config" else "state/scalars.json")
        path.write_bytes(data.draw(altered(json.loads(contents[path])).map(encode) | deep.map(str.encode)))
    if kind != "manifest":
        (folder / "manifest.json").unlink()
        checkpoint._finalize(folder, 1)
    with only(checkpoint.CheckpointError, checkpoint.NewerFormatError, ResumeError, RunError, naming=folder):
        resume(folder)
    with only(checkpoint.NewerFormatError, naming=folder):
        checkpoint.find_latest(folder.parent)
    checkpoint.folders(folder.parent)


@fuzz(60)
@given(data=st.data())
def test_text_caches(tmp_path_factory, data):
    cache = TextCache(tmp_path_factory.getbasetemp() / "text", "model", 3, torch.float32, memory_items=0)
    row = {"tokens": torch.ones(3, 4), "pooled": torch.ones(2)}
    content = safetensors_bytes(row | {"crc32": torch.tensor([1910909584])}, {"prompt": '"a"'})
    end = 8 + struct.unpack("<Q", content[:8])[0]
    other = data.draw(damaged(content, end) | altered(json.loads(content[8:end])).map(encode) | deep.map(str.encode))
    path = cache.path("a prompt")
    path.parent.mkdir(parents=True, exist_ok=True)
    for written in (other, content):
        path.write_bytes(written)
        with only(TextCacheError, naming="a prompt"):
            if not cache.missing(["a prompt"]):
                batch = cache.get(["a prompt", "a prompt"])
                assert batch["tokens"].shape == (2, 3, 4) and batch["tokens"].dtype == torch.float32


# --- flags and servers -----------------------------------------------------------------------------------------------

SAVED = {
    "resolution": 64, "max_sequence_length": 14, "reward_options": {}, "pretrained": {"model": "assets/tiny/model"},
    "sample": {"eval_guidance_scale": 1.0, "eval_num_steps": 2, "teacher_guidance_scale": 1.0},
    "train": {"teachers": [{
        "name": "ocr", "dataset": "assets/tiny/dataset/ocr", "lora_path": "assets/tiny/teachers/ocr/lora",
        "proxy_reward": {"tiny_ocr": 1.0}, "prompt_fn": "general_ocr", "guidance_scale": 1.0,
    }]},
}  # fmt: skip
flags = st.one_of(
    st.builds("--{}={}".format, st.sampled_from(
        ["limit", "seed", "batch_size", "resolution", "guidance_scale", "num_inference_steps", "num_images_per_prompt"]
    ), scalars),
    st.builds("--rewards={}".format, odd_text),
    st.builds("--reward_options={}".format, odd_text | st.sampled_from(["ocr.engine=x", "ocr.=1", "a.b=" + "(" * 300])),
    st.builds("--model={}".format, odd_text),
)  # fmt: skip


@fuzz(60)
@given(
    config=altered(SAVED).map(encode) | damaged(encode(SAVED)) | deep.map(str.encode),
    which=st.sampled_from([["--base"], ["--teacher=ocr"]]),
    more=st.lists(flags, max_size=2),
    dataset=st.just("ocr") | odd_text,
)
def test_flags_and_configurations_of_the_evaluator(tmp_path_factory, config, which, more, dataset):
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_bytes(config)
    arguments = [*which, f"--config={path}", f"--dataset={dataset}", "--output_dir=nowhere", *more]
    ours = (ConfigError, EvaluationError, AdapterError, RewardError, BenchmarkError, PromptError)
    try:
        with only(*ours):
            evaluate["make_job"](evaluate["parse_flags"](arguments))
    except SystemExit as error:  # argparse's own message
        assert error.code == 2


@fuzz(40)
@given(pointer=st.binary(max_size=20) | odd_text.map(lambda text: text.encode("utf-8", "replace")))
def test_pointers_to_checkpoints(tmp_path_factory, pointer):
    folder = tmp_path_factory.getbasetemp() / "run" / "checkpoints"
    (folder / "checkpoint-1" / "lora").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint-1" / "lora" / "adapter_config.json").touch()
    (folder / "latest").write_bytes(pointer)
    with only(EvaluationError, naming=folder.parent):
        assert find_checkpoint(str(folder.parent)).is_relative_to(folder)


ANSWER = {"choices": [{"message": {"role": "assistant", "content": "Final Score: 4.5"}}], "model": "m"}


@fuzz(100)
@given(
    body=altered(ANSWER).map(encode) | damaged(encode(ANSWER)) | deep.map(str.encode) | st.binary(max_size=30),
    said=st.text(max_size=30).map("Final Score: {}".format),
)
def test_answers_of_the_reward_server(body, said):
    server = ChatServer("http://127.0.0.1:1")
    response = requests.Response()
    response.status_code, response._content, response._content_consumed = 200, body, True
    server._session.request = lambda *arguments, **options: response
    with only(RewardError, naming=server.root):
        said += server.ask("model", "data:,", "question")
    value = final_score(said)
    assert value is None or 1 <= value <= 5


@fuzz(60)
@given(
    url=odd_text
    | st.builds("{}://{}:{}/{}".format, st.sampled_from(["http", "https", "file", ""]), odd_text, scalars, odd_text)
)
def test_addresses_of_the_reward_server(url):
    with only(RewardError, naming="base_url"):
        assert api_root(url).startswith(("http://", "https://"))


RUN = {
    "pretrained": {"model": "m"}, "sample": {"num_steps": 2, "eval_num_steps": 2, "guidance_scale": 1.0},
    "train": {"teachers": [{"name": "a", "proxy_reward": {"ocr": 1.0}}], "lora_rank": 4, "cfg": False},
}  # fmt: skip


@fuzz(60)
@given(config=altered(RUN).map(encode) | deep.map(str.encode) | damaged(encode(RUN)))
def test_reports_of_runs(tmp_path_factory, config):
    run = tmp_path_factory.getbasetemp() / "reported"
    run.mkdir(exist_ok=True)
    (run / "config.json").write_bytes(config)
    (run / "metrics.jsonl").write_bytes(encode(ROW))
    for model in ("base", "teacher-a", "student"):
        folder = run / model / "a"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "average_scores.json").write_bytes(encode(AVERAGES))
    with only(ReportError, naming=run):
        collect(run, run, "title")
