"""What is published: loads elsewhere at full strength, says nothing without evidence, is exactly what is listed."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
from dataclasses import replace

import diffusers
import pytest
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file

from diffusionopd.algorithms import ALGORITHMS
from diffusionopd.evaluation.job import lora_hash
from diffusionopd.models.flux2 import Flux2
from diffusionopd.models.loading import ModelInfo, load_backbone
from diffusionopd.models.lora import Adapters
from diffusionopd.models.lora_files import load_lora
from diffusionopd.models.qwen_image21 import QwenImage21
from diffusionopd.models.qwen_image_edit import QwenImageEdit
from diffusionopd.models.sd3 import StableDiffusion3
from diffusionopd.models.z_image import ZImage
from tools.publish import main
from tools.publishing.card import render_card
from tools.publishing.content import find_student
from tools.publishing.public import public
from tools.publishing.scores import read_scores

from .helpers import peft_velocity, velocity
from .hub import TOKEN, hub
from .loopback import left
from .test_compare import write

FILES = [
    "README.md", "config.json", "lora/adapter_config.json", "lora/adapter_model.safetensors", "metrics.jsonl",
    "pytorch_lora_weights.safetensors", "samples.png",
]  # fmt: skip


@pytest.fixture
def run(finished):
    """A run of three rounds with grids of images."""
    folder, _ = finished()
    (folder / "samples").mkdir()
    for number in (1, 2, 3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "samples" / f"round-{number:06d}.png")
    return folder


def publish(*arguments):
    main([str(argument) for argument in arguments])


def table(card: str, data_set: str) -> dict[str, list[str]]:
    """The rows of a data set's scores by model, without their spaces."""
    lines = card.split(f"**{data_set}**")[1].split("\n\n")[1].splitlines()
    return {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}


def test_both_formats_load_elsewhere_at_full_strength(run, tmp_path, pipeline_folder, backbone, text):
    publish(run, "me/name", "--folder", out := tmp_path / "out")
    adapters = Adapters(backbone.transformer)
    bare = velocity(backbone, text)
    adapters.add_from("s", run / "checkpoints" / "checkpoint-3" / "lora")
    adapters.use("s")
    expected = velocity(backbone, text)
    assert (expected - bare).norm() > 1e-3 * bare.norm()

    stock = load_backbone(str(pipeline_folder))
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    pipeline.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    stock.transformer = pipeline.transformer
    for found in (velocity(stock, text), peft_velocity(pipeline_folder, out / "lora", text)):
        assert (found - expected).norm() <= 1e-5 * (expected - bare).norm()

    student, layers = find_student(str(run)), adapters.transformer.modules()
    adapters.add_from("rs", rs := replace(student.lora, rslora=True))
    scales = {layer.scaling["rs"] for layer in layers if "rs" in getattr(layer, "scaling", {})}
    assert replace(student, lora=rs).strengths == pytest.approx(list(scales))

    # ComfyUI's rule: B A, without a look at the header, times the strength that its user is told to set.
    tensors, told = load_file(out / "pytorch_lora_weights.safetensors"), (out / "README.md").read_text()
    strength = float(re.search(r"strength (\d+(?:\.\d+)?)", told)[1])
    merged = load_backbone(str(pipeline_folder))
    for key in tensors:
        if (name := key.removeprefix("transformer.").removesuffix(".lora_A.weight")) + ".lora_A.weight" in key:
            change = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
            merged.transformer.get_submodule(name).weight.data += strength * change
    assert (velocity(merged, text) - expected).norm() <= 1e-4 * (expected - bare).norm()


def test_files_are_of_the_checkpoints_round_and_hold_no_local_path(run, tmp_path, pipeline_folder):
    publish(run / "checkpoints" / "checkpoint-2", "me/name", "--folder", out := tmp_path / "out")
    assert left(out) == FILES
    assert [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert Image.open(out / "samples.png").getpixel((0, 0)) == (2, 0, 0)
    contents = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    for secret in (tmp_path.parent, pipeline_folder.parent):  # the run's folder, the base's
        assert not any(str(secret).encode() in content for content in contents)
    config = json.loads((out / "config.json").read_text())
    assert config["pretrained"]["model"].endswith("/model") and config["train"]["lora_rank"] == 4
    assert ModelCard((out / "README.md").read_text()).data.base_model is None


def test_metadata_of_the_card(run, tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder called as the owner is
    given = ("--base_model", "some/base", "--license", "other")
    publish(run, "me/name", "--folder", out := tmp_path / "out", *given)
    card = ModelCard((out / "README.md").read_text())
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("some/base", "other", "diffusers")
    for fact in ('from_pretrained("some/base")', 'load_lora_weights("me/name"', "first", "second", "3 rounds"):
        assert fact in card.text, fact
    assert "## Scores" not in card.text
    assert json.loads((out / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"


def test_the_code_of_the_card_is_for_the_bases_pipeline(run):
    student = find_student(str(run))
    assert student.model.family is StableDiffusion3
    values = student.values | {"sample.eval_guidance_scale": 4.5, "pretrained.variant": "fp16"}
    values["max_sequence_length"] = 128
    card = render_card(replace(student, values=values, base_model="a/b"), "me/name")
    assert 'from_pretrained("a/b", variant="fp16")' in card

    def of(pipeline, family):
        return ModelInfo("m", family, {"index": {"_class_name": pipeline}})

    for model, facts in (
        (student.model, ("StableDiffusion3Pipeline.from_single_file(", "guidance_scale=4.5, max_sequence_length=128,")),
        (of("ZImagePipeline", ZImage), ("ZImagePipeline.", "_scale=3.5,")),
        (of("QwenImage21Pipeline", QwenImage21), ("true_cfg_scale=4.5, negative_prompt=' ',",)),
        (of("QwenImageEditPlusPipeline", QwenImageEdit), ("image=load_image(", "import load_image")),
        (of("Flux2KleinPipeline", Flux2), ("guidance_scale=4.5, max_sequence_length=128,",)),
        (None, ("4.5",)),
    ):
        card = render_card(replace(student, values=values, base_model="a/b/c.safetensors", model=model), "me/name")
        code = card.partition("```python")[2].partition("```")[0]
        assert [fact for fact in facts if fact not in code] == []
        call = next(node for node in ast.walk(ast.parse(code)) if getattr(getattr(node, "func", 0), "id", "") == "pipe")
        if model:
            pipeline = getattr(diffusers, model.configs["index"]["_class_name"])
            known = {option.arg: None for option in call.keywords if option.arg}
            inspect.signature(pipeline.__call__).bind(None, *call.args, **known)
            assert known.keys() >= {"prompt"} and not call.args  # the first one is an image in some


def test_cards_of_all_algorithms_say_what_was_learnt_from(run):
    student = find_student(str(run))
    single = {"train.teachers": [], "dataset": "some/prompts", "prompt_fn": "general_ocr", "reward_fn": {"ocr": 0.5}}
    for name, algorithm in ALGORITHMS.items():
        for tasks, row in (({}, "second"), ({} if algorithm.has_teachers else single, "prompts")):
            values = {**student.values, **tasks, "train.algorithm": name}
            card = ModelCard(render_card(replace(student, values=values), "me/name"))
            assert f"`{name}`" in card.text and row in card.text
            assert ("lora`" in card.text) == algorithm.has_teachers == ("distillation" in card.data.tags)
            assert ("ocr 0.5" in card.text) == bool(tasks)
    values = {**student.values, "train.teachers": [{**student.values["train.teachers"][0], "trigger": "sks style"}]}
    assert ", with `sks style` |" in render_card(replace(student, values=values), "me/name")


def test_scores_are_those_of_this_base_these_teachers_and_this_student(run, shared, tmp_path, pipeline_folder, capsys):
    student = lora_hash(load_lora(run / "checkpoints" / "checkpoint-3"))
    teacher = shared[0][1]["lora_path"]
    own = {"model": str(pipeline_folder), "dataset": "second", "num_inference_steps": 7, "guidance_scale": 1.0}
    of_teacher = {"lora": teacher, "lora_hash": lora_hash(load_lora(teacher)), "guidance_scale": 2.0}
    other = {"lora": "x", "lora_hash": "of an earlier round"}
    for name, scores, settings in (
        ("base/second", [0.0, 0.5], {"lora": None}),
        ("anything", [0.5, 1.0], of_teacher),
        ("student/second", [0.25, 0.75], {"lora": "moved", "lora_hash": student}),
        ("teacher-first/second", [0.111, 0.111], other),
        ("student/third", [0.111, 0.111], other | {"dataset": "third"}),
        ("base/other", [0.111, 0.111], {"lora": None, "model": "another/base", "dataset": "third"}),
    ):
        write(run / "evaluation" / name, {"ocr": scores}, **(own | settings))
    upstream = run / "evaluation" / "upstream"
    write(upstream, {"ocr": [0.111, 0.111]})
    (upstream / "evaluation_settings.json").unlink()
    publish(run, "me/name", "--folder", out := tmp_path / "out")
    said, card = capsys.readouterr().out, (out / "README.md").read_text()
    assert list(table(card, "second").items()) == [
        ("model", ["guidance", "ocr"]), ("---", ["---", "---"]), ("base", ["1", "0.250 ± 0.250"]),
        ("teacher second", ["2", "0.750 ± 0.250"]), ("student", ["1", "0.500 ± 0.250"]),
    ]  # fmt: skip
    assert "2 distinct prompts" in card and "7 steps" in card and "0.111" not in card and "third" not in card
    for name in ("teacher-first/second", "student/third", "base/other", "upstream"):
        assert f"evaluation/{name}" in said


def test_teachers_of_the_hub_are_known_by_their_place_in_its_cache(run, tmp_path):
    student, places = find_student(str(run)), {"root": "own/er", "a": "own/er/a@v1", "b": "own/er/a/b/"}
    places["lost"] = "teacher.safetensors"
    tasks = [{"name": name, "lora_path": place} for name, place in places.items()]
    student = replace(student, values={**student.values, "train.teachers": tasks})
    for number, (inside, digest) in enumerate([("", "?"), ("/a", "?"), ("/a/b", "?"), ("/c", "?"), ("", ["?", "?"])]):
        lora = f"{'1 times the sum of x, ' * (digest != '?')}/cache/models--own--er/snapshots/0{inside}"
        own = {"model": student.values["pretrained.model"], "dataset": "x", "lora": lora, "lora_hash": digest}
        write(tmp_path / "evaluation" / str(number), {"ocr": [number / 4, number / 4]}, **own)
    (scores,), _, left_out = read_scores(student, tmp_path / "evaluation")
    assert [(name, value) for name, _, (value,) in scores.rows] == [
        ("teacher root", "0.000 ± 0.000"), ("teacher a", "0.250 ± 0.000"), ("teacher b", "0.500 ± 0.000"),
    ]  # fmt: skip
    assert [line.split(": ")[0] for line in left_out] == ["evaluation/3", "evaluation/4"] and "a merge" in left_out[1]


def test_dry_run_lists_what_would_be_and_writes_nothing(run, tmp_path, capsys):
    before = left(tmp_path)
    publish(run, "me/name", "--dry_run", "--folder", tmp_path / "out")
    listed = {name: size for size, name in re.findall(r"([\d,]+) bytes +(\S+)", capsys.readouterr().out)}
    assert left(tmp_path) == before and sorted(listed) == FILES
    publish(run, "me/name", "--folder", out := tmp_path / "out")
    assert all(int(size.replace(",", "")) == (out / name).stat().st_size for name, size in listed.items())


def test_upload_is_exactly_what_is_listed_and_replaces_nothing_unasked(run, tmp_path, monkeypatch, capsys):
    publish(run, "me/name", "--folder", out := tmp_path / "out")
    # Not bytes: safetensors writes the entries of a header in any order.
    expected = {name: (out / name).stat().st_size for name in FILES}

    def sizes(repository):
        return {name: len(content) for name, content in repository["files"].items()}

    with hub(monkeypatch) as server:
        publish(run, "me/name", "--private")
        assert f"{server.url}/me/name" in capsys.readouterr().out
        repository = server.repositories["me/name"]
        assert sizes(repository) == {".gitattributes": 0, **expected} and repository["private"]
        assert repository["files"]["README.md"] == (out / "README.md").read_bytes()

        repository["files"] = {"README.md": b"mine", "more.txt": b""}
        with pytest.raises(SystemExit, match=r"^error: [^\n]*me/name[^\n]*more.txt[^\n]*--overwrite$"):
            publish(run, "me/name")
        assert repository["files"] == {"README.md": b"mine", "more.txt": b""}
        publish(run, "me/name", "--overwrite")
        assert sizes(repository) == {"more.txt": 0, **expected} and repository["private"]
        server.repositories["me/open"] = {"private": False, "files": {}}
        with pytest.raises(SystemExit, match=r"^error: [^\n]*me/open is public[^\n]*$"):
            publish(run, "me/open", "--private")
        posts = [path for method, path in server.requests if method == "POST" and "me/open" in path]
        assert posts == [] and server.repositories["me/open"]["files"] == {}


def test_mistakes_end_in_one_line(run, tmp_path, monkeypatch):
    out = ["--folder", tmp_path / "out"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    shutil.copytree(run / "checkpoints" / "checkpoint-3" / "lora", tmp_path / "alone")
    damaged = tmp_path / "damaged"
    shutil.copytree(run / "checkpoints" / "checkpoint-3", damaged)
    (damaged / "diffusers" / "pytorch_lora_weights.safetensors").write_bytes(b"no")

    def refused(fact, *arguments):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{re.escape(fact)}[^\n]*$") as ended:
            publish(*arguments)
        return str(ended.value)

    refused("name", run, "name", *out)
    refused("a/b/c", run, "a/b/c", *out)
    refused("none", tmp_path / "none", "me/name", *out)
    refused("diffusers", tmp_path / "alone", "me/name", *out)
    refused("damaged", damaged, "me/name", *out)
    refused("mine.txt", run, "me/name", "--folder", tmp_path / "full")
    refused("elsewhere", run, "me/name", "--evaluation", tmp_path / "elsewhere", *out)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    refused("hf auth login", run, "me/name")
    with hub(monkeypatch) as server:
        monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 8)
        assert "wrong" not in refused("hf auth login", run, "me/name") and server.repositories == {}
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    refused("me/name", run, "me/name")
    assert not (tmp_path / "out").exists()


def test_values_lose_secrets_and_local_paths(monkeypatch):
    monkeypatch.setenv("SOME_PASSWORD", "open sesame")
    kept = {"model": "owner/name", "relative": "assets/tiny", "url": "https://host:1/a/b", "number": 3, "empty": None}
    changed = {
        "absolute": ("/home/me/my models/base", ".../base"), "home": ("~/x/y", ".../y"),
        "inside": (["mmdet:/home/me/c.py", "see /a/b, file:///c/d"], ["mmdet:.../c.py", "see .../b, .../d"]),
        "api_key": ("key", "***"), "password": ("open sesame", "***"), "log": (f"with {TOKEN}", "***"),
        "server": ("https://me:word@host/", "***"),
    }  # fmt: skip
    found = public(kept | {name: before for name, (before, _) in changed.items()})
    assert found == kept | {name: after for name, (_, after) in changed.items()}
