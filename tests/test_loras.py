"""A table of LoRAs stands for the tasks of a run, whose student is one LoRA; and the page of such a run."""

from __future__ import annotations

import copy
import itertools
import json
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffusionopd.config_schema import ConfigError
from diffusionopd.data.loras import PROMPTS, read_loras
from diffusionopd.data.noise import Stream, noise
from diffusionopd.data.prompts import Prompt, PromptError, with_trigger
from diffusionopd.models.lora_files import load_lora
from diffusionopd.tiny import flow
from diffusionopd.training import check, load_config, train
from diffusionopd.training.costs.models import read_pipeline
from diffusionopd.training.loading import load_loras
from tools import merged

from .conftest import ROOT, TARGETS
from .pages import Page

HEADER = "name,lora,scale,trigger,prompts,guidance_scale"


@pytest.fixture
def two(make_lora, tmp_path):
    """Two LoRAs beside a table of them, in a folder that is not the current one; one adapts more than is usual."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(2):
        (folder / f"lora{i}").symlink_to(make_lora(20 + i, rank=4 + i, targets=[*TARGETS, *["ff.net.2"] * i]))
        (folder / f"prompts{i}.txt").write_text("a red circle\na {trigger} square\na green triangle\n")
    return folder


def write(folder, *lines, name="loras.csv"):
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return str(folder / name)


def test_triggers_are_put_where_the_prompt_or_the_trigger_says():
    prompts = [Prompt("a fox", {"prompt": "a fox"}, "file, line 1"), Prompt("a {trigger} fox", source="file, line 2")]
    made = with_trigger(prompts, "sks")
    assert [p.text for p in made] == ["sks, a fox", "a sks fox"]
    assert [(p.metadata, p.source) for p in made] == [(p.metadata, p.source) for p in prompts]
    assert [p.text for p in with_trigger(prompts[:1], "{prompt}, by sks")] == ["a fox, by sks"]
    assert with_trigger(prompts[:1], "") == prompts[:1]
    for trigger in ("", "{prompt}, by sks"):  # whose caption would be the place itself
        with pytest.raises(PromptError, match="line 2"):
            with_trigger(prompts, trigger)


def test_a_table_becomes_tasks(two):
    own = [str(two / f"lora{i}") for i in range(2)]
    prompts = str(two / "prompts0.txt")
    expected = [
        {"prompt_fn": "general_ocr", "name": "a", "lora_path": own[0], "scale": 0.8, "trigger": "sks, x"}
        | {"dataset": prompts, "guidance_scale": 3.0},
        {"prompt_fn": "general_ocr", "name": "b", "lora_path": own[1], "trigger": "by y: {prompt}", "dataset": PROMPTS},
        {"prompt_fn": "general_ocr", "name": "c", "lora_path": own[0], "trigger": "", "dataset": PROMPTS},
    ]
    rows = ['a,lora0,0.8,"sks, x",prompts0.txt,3', "", 'b,lora1,,y,"by {trigger}: {prompt}"', f"c,{own[0]}"]
    assert read_loras(write(two, HEADER, *rows)) == expected
    semicolons = ["a;lora0;0.8;sks, x;prompts0.txt;3", "b;lora1;;y;by {trigger}: {prompt}", "c;lora0"]
    assert read_loras(write(two, HEADER.replace(",", ";"), *semicolons)) == expected
    listed = [
        {"name": "a", "lora": own[0], "scale": 0.8, "trigger": "sks, x", "prompts": prompts, "guidance_scale": 3.0},
        {"name": "b", "lora": own[1], "trigger": "y", "prompts": "by {trigger}: {prompt}", "scale": None},
        {"name": "c", "lora": own[0]},
    ]
    assert read_loras(listed) == expected
    template = "{trigger}, " + "a very " * 60 + "large {prompt}"  # longer than the name of a file may be
    (task,) = read_loras([{"name": "a", "lora": own[0], "trigger": "y", "prompts": template}])
    assert task["trigger"] == template.replace("{trigger}", "y")
    with pytest.warns(UserWarning, match="a, b"):
        read_loras([{"name": name, "lora": path} for name, path in zip("ab", own, strict=True)])


def test_all_that_is_wrong_with_a_table_is_said_at_once(two, tmp_path):
    rows = [
        "a,lora0,big,,nowhere.txt", "", "a,./missing,0", "a b,lora1,1,,prompts0.txt", ",lora1,1,x,,0.5",
        "d,,1,x", "e,lora0,1,x,,1,more", "f,lora0,,,is {trigger} {prompt}",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        read_loras(write(two, HEADER, *rows))
    facts = [
        (2, "scale", "big"), (2, "prompts", "nowhere.txt"), (4, "lora", "missing"), (4, "scale", "0"),
        (4, "name", "'a'"), (5, "name", "a b"), (5, "prompts", "{trigger}"), (6, "name", "''"),
        (6, "guidance_scale", "0.5"), (7, "lora", ""), (8, "", "7"), (9, "prompts", "{trigger}"),
    ]  # fmt: skip
    problems = list(caught.value.problems)
    for line, column, fact in facts:
        place = f"loras.csv, line {line}" + (f", {column} " if column else " ")
        (found,) = (p for p in problems if place in p and fact in p)
        problems.remove(found)
    assert not problems
    for source, fact in (
        (write(two, HEADER, 'a,lora0,1,"blue', "b,lora1", name="open.csv"), "open.csv, up to line 3"),
        (write(two, HEADER, 'a,lora0,1,"blue', 'b,lora1,1,"red",', name="closed.csv"), "closed.csv, up to line 3"),
        (write(two, "lora,strenght", "x,1", name="header.csv"), "strenght"),
        (write(two, HEADER, name="empty.csv"), "empty.csv"),
        (str(tmp_path / "none.csv"), "none.csv"),
        ([{"name": "a", "lora": str(two / "lora0"), "triger": "x"}, 5], "triger"),
        ([], "loras"),
    ):
        with pytest.raises(ConfigError, match=fact):
            read_loras(source)
    for changes in (("train.teachers", "[{'name': 'x'}]"),), (("loras", "5"),):
        overrides = [("loras", write(two, HEADER, "a,lora0")), *changes]
        with pytest.raises(ConfigError, match="loras"):
            check(load_config(f"{ROOT}/config/merge.py:tiny", overrides), 1)


BASES = (
    ("tiny", "", (1.0, 14)),
    ("sd35", "stabilityai/stable-diffusion-3.5-medium", (4.5, 128)),
    ("sd35", "black-forest-labs/FLUX.1-dev", (3.5, 512)),
)


def test_a_round_fits_any_number_of_loras(two):
    for count, drawn, batches, steps in ((1, 0, 4, 4), (2, 0, 4, 4), (3, 0, 6, 8), (4, 0, 4, 4), (10, 4, 4, 4)):
        loras = [{"name": f"l{i}", "lora": str(two / "lora0"), "trigger": str(i)} for i in range(count)]
        for name, model, own in BASES:
            config = load_config(f"{ROOT}/config/merge.py:{name}", [("pretrained.model", model)] if model else [])
            config.loras, config.train.gradient_accumulation_steps = loras, steps if count != 3 else 4
            plan = check(config, 1, sources=False, model=read_pipeline(model) if model else None)
            assert (plan.values["sample.guidance_scale"], plan.values["max_sequence_length"]) == own
            assert (plan.shape.num_tasks, plan.shape.drawn) == (count, drawn)
            assert plan.shape.backward_batches == batches and plan.shape.rounds_per_step == 1
            assert config.loras == loras and not config.train.teachers


def distances(pipeline_folder, loras, texts, index, guidance, seed):
    """By model, from the first of ``loras``: the models' matrices in full, the stock pipeline's text and levels."""
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    models = {}
    for name, parts in loras.items():
        models[name] = copy.deepcopy(pipe.transformer)
        for lora, scale in parts:
            for module, a in lora.a.items():
                delta = scale * lora.alpha[module] / len(a) * lora.b[module].double() @ a.double()
                models[name].get_submodule(module).weight.data += delta.float()
    (tokens, pooled), (no_tokens, no_pooled) = (flow.encode(pipe, each) for each in (texts, [""] * len(texts)))
    pipe.scheduler.set_timesteps(2)
    x = noise((8, 16, 16), [(Stream.EVALUATION, seed, index, i) for i in range(len(texts))])
    squares = dict.fromkeys(models, 0.0)
    for sigma, after in itertools.pairwise(pipe.scheduler.sigmas.tolist()):
        v = {}
        for name, model in models.items():
            with torch.no_grad():
                yes, no = (
                    model(
                        x, timestep=torch.full((len(x),), sigma * 1000), encoder_hidden_states=t, pooled_projections=p
                    )
                    for t, p in ((tokens, pooled), (no_tokens, no_pooled))
                )
            g = guidance[name]
            v[name] = no.sample + g * (yes.sample - no.sample)
        lora = next(iter(v.values()))
        for name, each in v.items():
            squares[name] += (each - lora).double().square().mean().item() / 2
        x = x + (after - sigma) * lora
    return {name: square**0.5 for name, square in squares.items()}


def test_two_loras_in_one_run_with_its_page(tiny_config, two, pipeline_folder, monkeypatch):
    table = write(two, HEADER, "a,lora0,0.5,sks,prompts0.txt,2", "b,lora1,,by,prompts1.txt,1")
    options = {"eval_freq": 0, "sample_freq": 1, "num_epochs": 2, "train__student_init": "teachers"}
    options |= {"train__student_init_scale": 0.5, "train__lora_rank": 16}
    run, by_hand = (
        train(tiny_config(run_name=name, **options, **given)).parent.parent
        for name, given in (
            ("table", {"loras": table, "train__teachers": []}),
            ("by_hand", {"train__teachers": read_loras(table)}),
        )
    )
    assert len({tensors(folder) for folder in (run, by_hand)}) == 1
    saved = json.loads((run / "config.json").read_text())
    assert saved["loras"] is None and [t["name"] for t in saved["train"]["teachers"]] == ["a", "b"]
    assert len(list((run / "samples").glob("*.png"))) == 2

    monkeypatch.setattr(sys, "argv", ["merged", str(run), "--prompts", "2", "--ties"])
    merged.main()
    found, page = json.loads((run / "merged.json").read_text()), Page((run / "merged.html").read_text())
    models = {"base", "sum", "sum / n", "TIES", "student"}
    assert len(page.images) == 2 * 2 * (len(models) + 1)
    assert "a sks square" in page.text and "by, a red circle" in page.text
    a, b, student = (load_lora(f) for f in (two / "lora0", two / "lora1", run / "checkpoints" / "checkpoint-2"))
    assert student.a.keys() == a.a.keys() | b.a.keys() != a.a.keys()
    loras = {"LoRA": [(a, 0.5)], "base": [], "sum": [(a, 0.5), (b, 1)], "sum / n": [(a, 0.25), (b, 0.5)]}
    guidance = dict.fromkeys(loras, 2.0) | {"student": 1.0}
    texts = ["sks, a red circle", "a sks square"]
    wanted = distances(pipeline_folder, loras | {"student": [(student, 1)]}, texts, 0, guidance, saved["seed"])
    for name in models - {"TIES"}:
        assert found["a"]["distance"][name] == pytest.approx(wanted[name], rel=1e-3), name
        assert found["a"]["share"].get(name, 0) == pytest.approx(1 - (wanted[name] / wanted["base"]) ** 2, abs=1e-3)
    monkeypatch.setattr(sys, "argv", ["merged", str(run / "samples")])
    with pytest.raises(SystemExit):
        merged.main()


def test_names_that_differ_in_a_dash_alone_have_loras_of_their_own(tiny_config):
    config = tiny_config(num_epochs=1)
    for task, name in zip(config.train.teachers, ("a-b", "a_b"), strict=True):
        task["name"] = name
    plan = check(config, 1)
    loras = load_loras(plan, {})
    for task in plan.teachers:
        expected, found = load_lora(task.lora_path), loras[task.adapter]
        assert all(torch.equal(found.b[module], expected.b[module]) for module in expected.b)
    assert train(config).is_dir()


def tensors(run):
    """The bytes of a run's last state."""
    return b"".join(file.read_bytes() for file in sorted(run.glob("checkpoints/*/state/*.safetensors")))
