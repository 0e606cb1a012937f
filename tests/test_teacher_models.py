"""Teachers of their own weights beside a base: the same latents and texts, other transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file

from diffusionopd.config_schema import ConfigError
from diffusionopd.evaluation import job as evaluation
from diffusionopd.evaluation.results import SETTINGS
from diffusionopd.models import pipeline_files
from diffusionopd.models.loading import BackboneError, read_model
from diffusionopd.models.lora import Adapters
from diffusionopd.models.policies import STUDENT, Home, Policies, Request
from diffusionopd.models.teacher_models import HostWeights, read_teacher_model
from diffusionopd.tiny import models
from diffusionopd.training import check, train
from diffusionopd.training.describe import describe
from diffusionopd.training.resume import ResumeError, RunError
from scripts import evaluate

from .helpers import assert_bitwise, kept_gradients, make_batches, make_opd, metrics, perturb, state, with_rows


def transformer_of(seed: int = 5, **changes) -> SD3Transformer2DModel:
    config = {**models.transformer(0).config, **changes}
    torch.manual_seed(seed)
    return SD3Transformer2DModel.from_config(config)


@pytest.fixture(scope="session")
def deeper(tmp_path_factory) -> Path:
    """A larger sibling of the tiny base: six blocks of its width, as a transformer folder."""
    folder = tmp_path_factory.mktemp("deeper") / "transformer"
    transformer_of(num_layers=6).save_pretrained(folder)
    return folder


@pytest.fixture
def base(pipeline_folder):
    return read_model(str(pipeline_folder))


def with_model(config, folder, **fields):
    """A run whose second task has a teacher of its own weights."""
    config.train.teachers[1] |= {"model": str(folder), "lora_path": "", **fields}
    return config


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_form_is_the_stock_transformer(pipeline_folder, base, backbone, deeper, text, tmp_path):
    """A pipeline's folder, a transformer's, a file of the base's own shape: each as diffusers loads it."""
    tuned = transformer_of(7)
    stock = StableDiffusion3Pipeline.from_pretrained(pipeline_folder, transformer=tuned)
    stock.save_pretrained(tmp_path / "pipeline")
    for part in ("vae", "text_encoder", "text_encoder_3"):  # never read
        shutil.rmtree(tmp_path / "pipeline" / part)
    tuned.save_pretrained(tmp_path / "half", variant="fp16")
    save_file(tuned.state_dict(), tmp_path / "file.safetensors")
    x, conditions = torch.randn(2, *backbone.latent_shape(64)), text(2)
    args = x, conditions["tokens"], conditions["pooled"], torch.tensor([250.0, 250.0])
    larger = SD3Transformer2DModel.from_pretrained(deeper)
    digests = set()
    for source, expected in (("pipeline", tuned), ("half", tuned), ("file.safetensors", tuned), (deeper, larger)):
        model = read_teacher_model(str(tmp_path / source), base, download=False)
        assert model.size()[0] == sum(p.numel() for p in expected.parameters())
        beside = model.load(backbone)
        assert beside.vae is backbone.vae
        with torch.no_grad():
            assert torch.equal(beside.velocity(x, 0.25, conditions)[0], expected(*args, return_dict=False)[0])
        digests.add(model.digest())
    assert len(digests) == 4
    assert read_teacher_model("owner/not-here", base, download=False) is None


def test_of_a_model_of_the_hub_weights_of_a_variant_do(base, pipeline_folder, tmp_path, monkeypatch):
    """Where there are no plain ones; the hub is imitated by a folder."""
    remote, here = tmp_path / "remote", tmp_path / "here"
    transformer_of(7).save_pretrained(remote / "transformer", variant="fp16")
    shutil.copy(pipeline_folder / "model_index.json", remote)
    files = {str(file.relative_to(remote)): file for file in remote.rglob("*") if file.is_file()}

    def download(model, revision=None, allow_patterns=()):
        for name, file in files.items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, here / name)
        return str(here)

    monkeypatch.setattr(pipeline_files, "snapshot_download", download)
    monkeypatch.setattr(pipeline_files.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pipeline_files.HfApi, "list_repo_files", lambda *_, **options: list(files))
    model = read_teacher_model("owner/half", base)
    assert (here / "transformer" / "diffusion_pytorch_model.fp16.safetensors").is_file() and model.digest()


def test_what_cannot_stand_beside_the_base_is_named_before_weights_load(pipeline_folder, base, deeper, tmp_path):
    """Each difference of configurations, and whatever is wrong with the weights."""
    other = tmp_path / "other"
    shutil.copytree(pipeline_folder, other)
    for name, changes in {
        "vae/config.json": {"scaling_factor": 0.5, "shift_factor": 0.25},
        "scheduler/scheduler_config.json": {"num_train_timesteps": 500},
        "text_encoder_2/config.json": {"projection_dim": 32},
    }.items():
        file = other / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    wide, deep = tmp_path / "wide", tmp_path / "deep.safetensors"
    transformer_of(joint_attention_dim=64, in_channels=4).save_pretrained(wide)
    save_file(transformer_of(num_layers=6).state_dict(), deep)
    shutil.copytree(deeper, damaged := tmp_path / "damaged")
    weights = damaged / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (bare := tmp_path / "bare").mkdir()
    (bare / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    for source, facts in (
        (other, ("scaling_factor 0.5", "shift_factor 0.25", "num_train_timesteps 500", "projection_dim 32")),
        (wide, ("joint_attention_dim 64", "128", "in_channels 4", "8")),
        (deep, ("config.json",)),
        (damaged, ("damaged",)),
        (bare, ("FluxTransformer2DModel", "SD3Transformer2DModel")),
        (tmp_path, ("model_index.json",)),
        (tmp_path / "nothing", ("no such",)),
    ):
        with pytest.raises(BackboneError) as caught:
            read_teacher_model(str(source), base, download=False)
        assert [fact for fact in (str(source), *facts) if fact not in str(caught.value)] == []


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def policies(backbone, adapters, base, deeper, make_lora, text):
    """The student and `teacher_a` on the base; `teacher_c`, a deeper transformer, and `teacher_d`, a LoRA on it."""
    backbone.negative = text(1, 9)
    perturb(adapters, std=0.05)
    model = read_teacher_model(str(deeper), base)
    other = model.load(backbone, waits=True)
    own = Adapters(other.transformer)
    own.add_teacher("teacher_d", make_lora(3, targets=["0.attn.to_q"]))
    host = HostWeights(other.transformer, other.device)
    others = {"teacher_c": Home(other, own, None, host), "teacher_d": Home(other, own, "teacher_d", host)}
    return Policies(backbone, adapters, others)


def test_policies_of_several_transformers_are_asked_by_transformer(policies, text, monkeypatch):
    """Each answer is its own transformer's; the weights that wait come once, and go when others are asked for."""
    generator = torch.Generator().manual_seed(3)
    shape = policies.backbone.latent_shape(64)
    names = ("teacher_c", "teacher_a", "teacher_d", None)
    asked = [
        Request(name, torch.randn(2, *shape, generator=generator), 0.5, text(2, i), 1.0 + i)
        for i, name in enumerate(names)
    ]
    moved = []
    monkeypatch.setattr(HostWeights, "come", lambda host: moved.append(host))
    order, own = [], Policies.use
    monkeypatch.setattr(Policies, "use", lambda self, name: (order.append(name), own(self, name))[1])
    layers = [layer for layer in policies.home("teacher_d").adapters.transformer.modules() if hasattr(layer, "stacked")]

    def stacked():
        return [layer for layer in layers if layer.stacked is not None]

    policies._passes(asked)
    assert layers and not stacked(), "their weights wait yet, elsewhere"
    together, policies.side_by_side = policies.frozen(asked), False
    assert stacked()
    other = HostWeights(torch.nn.Linear(1, 1), policies.backbone.device)
    policies._come_to(dataclasses.replace(policies.home("teacher_c"), host=other))
    assert not stacked(), "they have gone"
    moved.clear()
    assert order == [], "a forward of each transformer, in which each sample has its own LoRA"
    answers = policies.frozen(asked)
    assert order == ["teacher_c", "teacher_d", "teacher_a", None]
    assert len(moved) == 1
    assert policies.nfe == 2 * (2 + 4 + 4 + 4)
    torch.testing.assert_close(together, answers, rtol=1e-5, atol=1e-5)
    for request, answer in zip(asked, answers, strict=True):
        home = policies.home(request.policy)
        with torch.no_grad(), home.adapters.using(home.adapter):
            wanted = home.backbone.velocity(request.x, request.sigma, request.conditions, request.guidance)
        assert all(torch.equal(a, b) for a, b in zip(answer, wanted, strict=True))
    assert not torch.equal(answers[0][0], answers[2][0])


@pytest.mark.gpu
def test_weights_that_wait_are_one_at_a_time_on_the_device(policies):
    hosts = []
    for _ in range(2):
        module = torch.nn.Linear(2, 2)
        module.register_buffer("constant", torch.ones(1))
        hosts.append((module, HostWeights(module, torch.device("cuda"))))
    before = [p.clone() for p in hosts[0][0].parameters()]
    for module, host in [*hosts, hosts[0]]:
        policies._come_to(Home(policies.backbone, policies.adapters, None, host))
        for other, _ in hosts:
            assert {t.device.type for t in other.state_dict().values()} == {"cuda" if other is module else "cpu"}
    assert all(torch.equal(p.cpu(), old) for p, old in zip(hosts[0][0].parameters(), before, strict=True))


def test_a_round_of_both_kinds_of_teachers_equals_the_slow_loop(policies, text, monkeypatch):
    """A LoRA of the base, and a model whose target is beyond it by the student's base."""
    backbone, adapters = policies.backbone, policies.adapters
    opd = make_opd(backbone, adapters, text)
    opd.policies = policies
    batches = make_batches(backbone, text, guidances=(1.0, 2.0), tasks="ac")
    batches[1:] = with_rows(batches[1:], strength=1.5)
    result, found = kept_gradients(opd, batches, monkeypatch)

    def velocity(name, x, sigma, text, guidance):
        home = policies.home(name)
        with home.adapters.using(home.adapter), torch.set_grad_enabled(name == STUDENT):
            return home.backbone.velocity(x, sigma, text, guidance)[0]

    total = 0.0
    for batch, guidance in zip(batches, (1.0, 2.0), strict=True):
        x = batch.noise
        for tr in opd.transitions[:4]:
            target = velocity(batch.rows[0].teacher, x, tr.sigma, batch.text, guidance)
            if guidance == 2.0:
                v_base = velocity(None, x, tr.sigma, batch.text, guidance)
                target = v_base + 1.5 * (target - v_base)
            v = velocity(STUDENT, x, tr.sigma, batch.text, 1.0)
            total = total + 0.5 * (tr.b * (v - target)).square().mean() / 8
            x = (x + tr.b * v).detach()
    adapters.transformer.zero_grad()
    with adapters.using(STUDENT):
        total.backward()
    assert result.losses.mean == pytest.approx(total.item(), rel=1e-4)
    for mine, p in zip(found, adapters.parameters(STUDENT), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-7)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_resumes_bitwise_counts_and_knows_its_model(tiny_config, deeper, tmp_path):
    """Interrupted or not, the weights waiting on the host or not; two tasks share one copy."""
    shutil.copytree(deeper, model := tmp_path / "model")

    def config(**changes):
        made = with_model(tiny_config(num_epochs=2, train__merge_teachers=True, **changes), model, strength=1.2)
        made.train.teachers = [*made.train.teachers, {**made.train.teachers[1], "name": "third", "strength": 1.0}]
        made.sample.num_batches_per_epoch = made.train.gradient_accumulation_steps = 3
        return made

    plan = check(config(), 1)
    nfe = plan.nfe_per_round
    complete = train(config(run_name="complete"))
    rows = metrics(tmp_path / "logs" / "complete")
    assert [row["evaluations"] for row in rows] == [nfe.student + nfe.teacher + nfe.base] * 2
    cut = config(run_name="cut", teacher_device="cpu")
    cut.num_epochs = 1
    train(cut)
    cut.num_epochs, cut.resume_from = 2, "auto"
    assert_bitwise(state(complete), state(train(cut)))
    cut.num_epochs, cut.train.teachers[2]["model"] = 3, str(deeper)
    with pytest.raises(ResumeError, match=r"teachers\[2\].model"):
        train(cut)
    cut.train.teachers[2]["model"] = str(model)
    transformer_of(8, num_layers=6).save_pretrained(model)
    with pytest.raises(RunError) as caught:
        train(cut)
    assert all(f"the model of {name}" in str(caught.value) for name in ("second", "third"))


def test_what_cannot_be_run_is_said_before_weights_load(tiny_config, deeper, make_lora, tmp_path):
    size = sum(tensor.numel() for tensor in transformer_of(num_layers=6).state_dict().values())
    said = describe(check(with_model(tiny_config(teacher_device="cpu"), deeper), 1))
    assert all(fact in said for fact in (str(deeper), f"{4 * size / 1e9:.3g} GB", "host"))
    lora = str(make_lora(9, targets=["0.attn.to_q"]))
    assert lora in describe(check(with_model(tiny_config(), deeper, lora_path=lora, scale=0.5), 1))
    transformer_of(pos_embed_max_size=4).save_pretrained(tmp_path / "small")
    for changes, fields, key, fact in (
        ({}, {"scale": 0.5}, "train.teachers[1].scale", "0.5"),
        ({"train__student_init": "teachers"}, {}, "train.student_init", "train.teachers[1]"),
        ({}, {"model": str(tmp_path / "small")}, "train.teachers[1].model", "64"),
        ({}, {"model": str(tmp_path / "nothing")}, "train.teachers[1].model", "nothing"),
        ({}, {"model": "path/to/model"}, "train.teachers[1].model", "placeholder"),
        ({}, {"lora_path": "path/to/lora"}, "train.teachers[1].lora_path", "placeholder"),
        ({"teacher_device": "cuda"}, {}, "teacher_device", "cpu"),
    ):
        with pytest.raises(ConfigError) as caught:
            check(with_model(tiny_config(**changes), deeper, **fields), 1)
        (problem,) = caught.value.problems
        assert problem.split()[0] == key and fact in problem


def test_its_evaluation_is_that_of_a_base_with_its_transformer(pipeline_folder, deeper, shared, make_lora, tmp_path):
    """As it is and with a LoRA on it; images by bytes."""
    (task, _), cache = shared
    without = shutil.ignore_patterns("transformer")
    shutil.copytree(deeper, shutil.copytree(pipeline_folder, tmp_path / "stock", ignore=without) / "transformer")
    lora = str(make_lora(9, targets=["0.attn.to_q"]))
    teachers = [{"name": "a", "model": str(deeper)}, {"name": "b", "model": str(deeper), "lora_path": lora}]
    (tmp_path / "config.json").write_text(json.dumps({"train": {"teachers": teachers}}))
    common = ["--dataset", task["dataset"], "--rewards", "jpeg_compressibility", "--limit", "2", "--resolution", "64"]
    common += ["--num_inference_steps", "2", "--guidance_scale", "1", "--max_sequence_length", "14", "--save_images"]
    common += ["--cache_dir", str(cache), "--config", str(tmp_path / "config.json")]
    images = {}
    for model, flags in (
        (pipeline_folder, ["--teacher", "a", "--teacher", "b", "--base"]),
        (tmp_path / "stock", ["--base", "--lora", lora]),
    ):
        out = tmp_path / f"out-{model.name}"
        job = evaluate.make_job(
            evaluate.parse_flags([*common, *flags, "--model", str(model), "--output_dir", str(out)])
        )
        evaluation.run(job, PartialState(cpu=True))
        images[model.name] = {
            f.parts[-3]: [p.read_bytes() for p in sorted(f.parent.iterdir())] for f in out.rglob("00000.jpg")
        }
    ours, stock_images = images[pipeline_folder.name], images["stock"]
    assert ours["teacher-a"] == stock_images["base"] != ours["base"]
    assert ours["teacher-b"] == stock_images["lora"] != ours["teacher-a"]
    settings = json.loads((tmp_path / f"out-{pipeline_folder.name}" / "teacher-a" / SETTINGS).read_text())
    assert settings["own_model"] == str(deeper) and settings["own_model_hash"]
