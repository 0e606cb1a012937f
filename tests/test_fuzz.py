"""Readers of data from outside: they work, or one of our errors names the file. Nothing else gets through.

FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py looks at that many new random cases of each test.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import nn

from diffusionopd.algorithms.optim import Ema, OptimizerSettings, StudentOptimizer
from diffusionopd.data.prompts import Prompt, PromptError, read_prompts
from diffusionopd.evaluation.results import EvaluationError, ResultFolder, read_averages, read_records
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import AdapterError, load_lora
from diffusionopd.models.text_cache import TextCache, TextCacheError
from diffusionopd.training import checkpoint, load_config
from diffusionopd.training.resume import ResumeError, RunError, find_start
from diffusionopd.training.setup import restore

from .conftest import ROOT

TINY = f"{ROOT / 'config' / 'tiny.py'}:mopd"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Examples of each test, new ones every time; 0: a fixed few, the same in every run."""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Relative paths of the tiny configuration are meant from here; warnings about what is skipped are expected."""
    monkeypatch.chdir(ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fuzz(**strategies: Any) -> Callable:
    """A test of a few cases, deterministic unless FUZZ_EXAMPLES asks for many random ones."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    options = {"deadline": None, "database": None, "phases": phases, "suppress_health_check": list(HealthCheck)}
    decorate = settings(max_examples=EXAMPLES or 40, derandomize=not EXAMPLES, **options)
    return lambda test: decorate(given(**strategies)(test))


@contextmanager
def only(*errors: type[ValueError], naming: object) -> Iterator[None]:
    """Success, or one of these errors, whose message holds `naming` and says something else too."""
    try:
        yield
    except errors as error:
        assert type(error) in errors and str(naming) in str(error) and len(str(error)) > len(str(naming)) + 10, error


# --- what is drawn ----------------------------------------------------------------------------------------------------

odd_text = st.text(max_size=12) | st.sampled_from(
    ["", " ", "None", "nan", "\x00", "\ud800", "\u2028", "..", "/", "a/b", "\ufeff", "x" * 3000, "-1", "[", "(a+"]
)
odd_numbers = st.one_of(
    st.integers(-3, 40), st.floats(), st.sampled_from([10**400, -(10**400), 2**63, 1e308, -0.0, 0.5, 1e-320])
)
json_values = st.recursive(
    st.none() | st.booleans() | odd_numbers | odd_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=6,
)
deep = st.integers(1, 200_000).map(lambda depth: b"[" * depth)


def encode(value: Any) -> bytes:
    """The JSON text of a value; halves of surrogate pairs as escapes, NaN as Python writes it."""
    return json.dumps(value).encode()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON document, from the outside in."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def altered(document: Any) -> st.SearchStrategy[Any]:
    """The document with one to three places replaced, removed, or joined by another."""

    def apply(changes: list[tuple[int, str, Any]]) -> Any:
        result = copy.deepcopy(document)
        for number, kind, value in changes:
            if not (found := list(places(result))):
                return value
            container, key = found[number % len(found)]
            if kind == "remove":
                del container[key]
            else:
                container[str(value)[:20] if kind == "add" and isinstance(container, dict) else key] = value
        return result

    kinds = st.sampled_from(["replace", "replace", "replace", "remove", "add"])
    return (
        st.lists(st.tuples(st.integers(0, 1000), kinds, json_values), min_size=1, max_size=3).map(apply) | json_values
    )


def damaged(content: bytes, within: int | None = None) -> st.SearchStrategy[bytes]:
    """The bytes with one to four places overwritten, cut, doubled or cut off; of the first `within` bytes only."""

    def apply(changes: list[tuple[int, str, bytes]]) -> bytes:
        result = content
        for at, kind, new in changes:
            middle = {"double": result[at : at + 20], "cut": b"", "end": b""}.get(kind, new)
            rest = {"end": len(result), "insert": at, "double": at}.get(kind, at + len(new))
            result = result[:at] + middle + result[rest:]
        return result

    kinds = st.sampled_from(["overwrite", "overwrite", "overwrite", "insert", "cut", "double", "end"])
    new = st.binary(min_size=1, max_size=8) | st.sampled_from([b"0", b'"', b"}", b"\xff" * 8, b"\n", b"-", b"\x00"])
    at = st.integers(0, min(len(content), within or len(content)))
    return st.lists(st.tuples(at, kinds, new), min_size=1, max_size=4).map(apply)


def texts(document: Any) -> st.SearchStrategy[bytes]:
    """Files that should hold one JSON document."""
    return altered(document).map(encode) | damaged(encode(document)) | deep


def lines(document: Any) -> st.SearchStrategy[bytes]:
    """Files of JSON lines: complete, altered and damaged ones, other bytes, nested too deeply, with any line ends."""
    line = st.just(encode(document)) | texts(document) | st.binary(max_size=20)
    ends = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8"])
    start, last = st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]), st.sampled_from([b"", b"\n"])
    return st.builds(lambda *x: x[0] + x[1].join(x[2]) + x[3], start, ends, st.lists(line, max_size=4), last)


# --- prompts and results ----------------------------------------------------------------------------------------------

CLAUSES = [{"class": "dog", "count": 1, "color": "red"}, {"class": "car", "count": 2, "position": ["left of", 0]}]
METADATA = {"prompt": "a red dog", "tag": "position", "include": CLAUSES, "exclude": [{"class": "dog", "count": 3}]}
RECORD = {"sample_id": 0, "prompt": "a red dog", "metadata": METADATA, "scores": {"ocr": 0.5, "geneval": 1}}


@example(content=b'{"prompt": "a", "x": "\\ud800"}', kind="geneval")
@example(content=b'{"prompt": "a", "x": 1e999}', kind="geneval")
@fuzz(content=lines(METADATA) | st.binary(max_size=60), kind=st.sampled_from(["geneval", "general_ocr"]))
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


@example(content=b"[" * 2000 + b"\n")
@fuzz(content=lines(RECORD))
def test_results_of_an_evaluation(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "results"
    folder.mkdir(exist_ok=True)
    (folder / "evaluation_settings.json").write_text("{}")
    (folder / "evaluation_results.part1.jsonl").unlink(missing_ok=True)
    (folder / "evaluation_results.jsonl").write_bytes(content)
    with only(EvaluationError, naming=folder):
        read_records(folder / "evaluation_results.jsonl")
        files = ResultFolder(folder)
        files.open({}, [Prompt("a red dog", METADATA)] * 2, resume=True, need_images=False)
        assert files.done() <= {0, 1}
        files.close()
        assert read_averages(folder / "average_scores.json").keys() <= {"ocr", "geneval"} or files.done()


# --- LoRAs ------------------------------------------------------------------------------------------------------------

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
FIRST = min(key for key in HEADER if key != "__metadata__")


headers = st.one_of(
    altered(HEADER).map(encode),
    types.map(lambda kind: encode({k: v | {"dtype": kind} if "dtype" in v else v for k, v in HEADER.items()})),
    st.one_of(
        st.fixed_dictionaries({"data_offsets": st.lists(offsets, min_size=2, max_size=2)}),
        st.fixed_dictionaries({"shape": st.lists(offsets, max_size=4)}),
    ).map(lambda changed: encode(HEADER | {FIRST: HEADER[FIRST] | changed})),
    st.just(encode(HEADER)[:-1] + b"," + encode(HEADER)[1:]),  # every key twice
    deep,
)
weights_files = damaged(LORA, HEADER_END) | headers.map(with_header)


@fuzz(config=st.just(encode(PEFT)) | texts(PEFT), weights=st.just(LORA) | weights_files)
def test_peft_folders(tmp_path_factory, config, weights):
    folder = tmp_path_factory.getbasetemp() / "peft"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    with only(AdapterError, naming=folder):
        add_to_a_model(folder)


@fuzz(
    metadata=texts(DIFFUSERS),
    weights=st.none() | weights_files,
    alphas=st.lists(st.sampled_from([[], [1], [2, 2], [0]]), max_size=2),
    number=st.sampled_from([1.0, 0.0, float("nan"), float("inf"), -1.0]),
)
def test_diffusers_files(tmp_path_factory, metadata, weights, alphas, number):
    path = tmp_path_factory.getbasetemp() / "pytorch_lora_weights.safetensors"
    if weights is None:
        tensors = {name.replace("base_model.model", "transformer"): tensor for name, tensor in PAIRS.items()}
        tensors |= {
            f"transformer.{name}.alpha": torch.full(shape, number)
            for name, shape in zip(("first", "second"), alphas, strict=False)
        }
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
        scalars = {"round": 3, "num_processes": 1, "written_for": 1, "tasks_per_pass": 1, "diversity": {"a": 0.5}}
        scalars |= {"scaler": {"steps": 3, "loss_scale": 1e4}, "versions": {"torch": "2"}, "digests": {"a": "b"}}
        checkpoint.save_state(folder / "state", tensors, scalars)
        (folder / "config.json").write_text(json.dumps(load_config(TINY).to_dict()))

    folder = checkpoint.save(root, "checkpoint-3", write)
    resume(folder)  # whole, it is one that a run goes on from
    return folder, {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(folder) -> None:
    """As a run does: verify, compare, read."""
    config = load_config(TINY, [("resume_from", str(folder)), ("seed", "7"), ("save_dir", str(folder.parent.parent))])
    with suppress(ResumeError):
        find_start(config, 1)
    start = find_start(config, 1, allow_change=True)
    assert start.completed >= 0
    start.check_digests({"the base model": "0"})
    start.describe()
    parameters = [nn.Parameter(torch.zeros(2, 3))]
    algorithm = SimpleNamespace(load_state=lambda tensors: None)
    restore(start, StudentOptimizer(parameters, OptimizerSettings()), Ema(parameters, 0.9, 1), algorithm)


@fuzz(data=st.data())
def test_damaged_checkpoints(saved, data):
    folder, contents = saved
    path = data.draw(st.sampled_from(sorted(contents)))
    content = data.draw(damaged(contents[path]))
    for each, complete in contents.items():
        each.write_bytes(content if each == path else complete)
    with only(checkpoint.CheckpointError, ResumeError, RunError, naming=folder):
        resume(folder)
    assert checkpoint.find_latest(folder.parent) in (folder, None)


@fuzz(data=st.data())
def test_checkpoints_of_another_content(saved, data):
    """Complete by their digests, but not what this version writes: an older one, another program, somebody's edit."""
    folder, contents = saved
    for each, complete in contents.items():
        each.write_bytes(complete)
    name = data.draw(
        st.sampled_from(["manifest.json", "state/scalars.json", "config.json", "state/tensors.safetensors"])
    )
    path = folder / name
    if name.endswith("json"):
        content = json.loads(contents[path])
        content.pop("digest", None)
        written = data.draw(altered(content))
        if name == "manifest.json" and isinstance(written, dict):
            digest = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
            written |= {"digest": digest}
        path.write_bytes(encode(written))
    else:
        names = ["student.0", "student.1", "student.x", "student", "ema.0", "optimizer.0.step", "optimizer.0", ""]
        shapes = st.sampled_from([(), (2, 3), (3, 2), (1,)])
        tensors = data.draw(st.dictionaries(st.sampled_from(names), shapes.map(torch.ones), max_size=4))
        path.write_bytes(safetensors_bytes(tensors))
    if name != "manifest.json":
        (folder / "manifest.json").unlink()
        checkpoint._finalize(folder, 1)
    with only(checkpoint.CheckpointError, checkpoint.NewerFormatError, ResumeError, RunError, naming=folder):
        resume(folder)
    with only(checkpoint.NewerFormatError, naming=folder):
        checkpoint.find_latest(folder.parent)
    assert checkpoint.folders(folder.parent) == [folder]


@fuzz(data=st.data())
def test_text_caches(tmp_path_factory, data):
    cache = TextCache(tmp_path_factory.getbasetemp() / "text", "model", 3, torch.float32, memory_bytes=0)
    row = {"tokens": torch.ones(3, 4), "pooled": torch.ones(2)}
    content = safetensors_bytes(row | {"crc32": torch.tensor([1910909584])}, {"prompt": '"a"'})
    end = 8 + struct.unpack("<Q", content[:8])[0]
    other = data.draw(damaged(content, end) | altered(json.loads(content[8:end])).map(encode) | deep)
    path = cache.path("a prompt")
    path.parent.mkdir(parents=True, exist_ok=True)
    for written in (other, content):
        path.write_bytes(written)
        with only(TextCacheError, naming="a prompt"):
            if not cache.missing(["a prompt"]):
                batch = cache.get(["a prompt", "a prompt"])
                assert batch["tokens"].shape == (2, 3, 4) and batch["tokens"].dtype == torch.float32
