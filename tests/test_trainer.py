"""Complete runs: equal however they are cut into processes, batches and starts; nothing saved is ever lost."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from diffusionopd.config_schema import ConfigError
from diffusionopd.evaluation.sampling import ImageGenerator
from diffusionopd.models.lora import Adapters
from diffusionopd.models.policies import STUDENT
from diffusionopd.training import check, checkpoint, checks, setup, train
from diffusionopd.training.resume import RunError

from .helpers import (
    assert_bitwise,
    assert_equal_rounds,
    change_models,
    files_of,
    metrics,
    rows,
    state,
    student,
    train_forked,
)


def test_a_run_writes_what_it_promises(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(num_epochs=3, save_freq=2, monitor_freq=2, sample_freq=3, eval_freq=3, eval_num_prompts=2)
    config.update_from_flattened_dict({"train.ema": True, "train.ema_decay": 0.2, "seed": 7, "allow_tf32": True})
    build, draw, runs, drawn = setup.build, ImageGenerator.__call__, [], []
    monkeypatch.setattr(setup, "build", lambda *arguments: runs.append(build(*arguments)) or runs[-1])

    def noted(self, *arguments):
        adapters = runs[0].adapters
        drawn.append((self.seed, adapters.active, [p.detach().clone() for p in adapters.parameters(STUDENT)]))
        return draw(self, *arguments)

    monkeypatch.setattr(ImageGenerator, "__call__", noted)
    last = train(config)
    run, tensors = tmp_path / "logs" / "run", state(last)
    assert torch.backends.cuda.matmul.allow_tf32 and runs[0].ema._model.decay == 0.2
    assert {(seed, active) for seed, active, _ in drawn} == {(7, STUDENT)}
    (_, _, start), *_, (_, _, end) = drawn  # evaluated before and after
    assert not any(b.any() for b in start[1::2])
    assert all(torch.equal(tensor, tensors[f"ema.{i}"]) for i, tensor in enumerate(end)), "the average"
    assert not all(torch.equal(tensor, tensors[f"student.{i}"]) for i, tensor in enumerate(end))
    assert last == run / "checkpoints" / "checkpoint-3"
    assert (run / "checkpoints" / "latest").read_text().strip() == "checkpoint-3"
    start, *trained = metrics(run)
    assert [row["round"] for row in (start, *trained)] == [0, 1, 2, 3]
    evaluated = {f"eval/{task}/jpeg_compressibility" for task in ("first", "second")}
    assert start.keys() == {"round", *evaluated}
    for row in trained:
        assert {"loss", "loss/first", "loss/second", "grad_norm", "lr", "seconds", "evaluations"} <= row.keys()
        assert row["loss"] == pytest.approx((row["loss/first"] + row["loss/second"]) / 2)
        assert 0 < row["loss"] < 1e3
        assert row["grad_norm"] > 0 and row["lora_norm"] > 0
    first = {key: value for key, value in trained[0].items() if "diversity/" in key}
    assert checkpoint.load_scalars(last / "state")["diversity"] == first, "with which a resumed run compares"
    for watched in ("monitor/first/jpeg_compressibility", "diversity/first"):
        assert all(watched in row for row in trained), "first, every second, last"
    assert [evaluated <= row.keys() for row in trained] == [False, False, True]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["round-000001.png", "round-000003.png"]
    assert json.loads((run / "config.json").read_text())["train"]["lora_rank"] == 4
    for name in ("checkpoint-2", "checkpoint-3"):
        checkpoint.verify(run / "checkpoints" / name)
        assert (run / "checkpoints" / name / "lora" / "adapter_config.json").is_file()
        assert (run / "checkpoints" / name / "diffusers" / "pytorch_lora_weights.safetensors").is_file()


def test_the_saved_lora_is_the_average_and_the_state_is_the_student(finished_runs, backbone):
    last = finished_runs("opd") / "checkpoints" / "checkpoint-3"
    tensors, adapters = state(last), Adapters(backbone.transformer)
    adapters.add_from("saved", last / "lora")
    for i, parameter in enumerate(adapters.parameters("saved")):
        scale = 2 if i % 2 else 1  # alpha 8, rank 4: B is saved for scale 1
        torch.testing.assert_close(parameter.detach(), scale * tensors[f"ema.{i}"])
    assert any(not torch.equal(t, tensors[k.replace("student", "ema")]) for k, t in student(last).items())


def test_the_seed_decides_where_the_student_starts(tiny_config, monkeypatch):
    starts = []
    change_models(monkeypatch, lambda backbone, adapters: starts.append(adapters.parameters(STUDENT)[0].clone()))
    for seed in (1, 2, 1):
        train(tiny_config(run_name=f"run{len(starts)}", num_epochs=1, seed=seed))
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])


def test_base_and_teachers_are_bitwise_unchanged(tiny_config, monkeypatch):
    build, before, modules = setup.build, {}, {}

    def watched(*arguments):
        run = build(*arguments)
        for module in (run.backbone.transformer, run.backbone.vae):
            modules.update(module.named_parameters())
        before.update({name: p.detach().clone() for name, p in modules.items()})
        return run

    monkeypatch.setattr(setup, "build", watched)
    train(tiny_config(num_epochs=2))
    changed = {name for name, parameter in modules.items() if not torch.equal(parameter, before[name])}
    assert changed and all(f".{STUDENT}." in name for name in changed)


def test_interrupted_and_resumed_equals_uninterrupted_bitwise(tiny_config, tmp_path):
    options = {"sample__noise_level": 0.7, "train__ema": True, "train__ema_interval": 2, "save_freq": 1}
    options |= {"train__lr_scheduler": "cosine", "train__lr_warmup_steps": 1, "eval_freq": 2, "eval_num_prompts": 1}
    complete = train(tiny_config(run_name="complete", **options))
    parts = shutil.copytree(complete.parent.parent, tmp_path / "logs" / "parts")
    for later in (2, 3):
        shutil.rmtree(parts / "checkpoints" / f"checkpoint-{later}")
    # What a crash may leave: metrics of rounds after the checkpoint, and a line cut short.
    file = parts / "metrics.jsonl"
    file.write_text(file.read_text() + '{"round": 2, "loss": 9}\n{"round": 3, "lo')
    resumed = train(tiny_config(run_name="parts", resume_from="auto", **options))
    assert_bitwise(state(complete), state(resumed))
    assert_bitwise(*(load_file(folder / "lora/adapter_model.safetensors") for folder in (complete, resumed)))
    expected = rows(tmp_path / "logs" / "complete")
    assert rows(parts) == expected and [row["round"] for row in expected] == [0, 1, 2, 3]
    assert [row["lr"] for row in expected[1:]] == pytest.approx([0.0, 1e-3, 5e-4])


def test_evaluations_by_folder_and_by_variant(tiny_config, tmp_path, monkeypatch):
    """A student that hardly moves: what is evaluated after the last round is what was before the first.

    JPEG sizes of a picture of no guidance and two steps, whichever evaluation it comes from, and means over folders.
    """
    config = tiny_config(num_epochs=1, eval_freq=1, train__learning_rate=1e-12, sample__eval_guidance_scale=3.0)
    task, one, two = config.train.teachers[0], tmp_path / "one", tmp_path / "two"
    shutil.copytree(task["dataset"], one)
    shutil.copytree(task["dataset"], two)
    (two / "test.txt").write_text("a yellow star\n")
    config.train.teachers[0] = {**task, "dataset": None, "datasets": [str(one), str(two)], "eval_num_steps": 3}
    config.eval_variants = {"plain": {"guidance_scale": 1.0, "num_steps": 2}, "long": {"num_steps": 4}}
    plan, seen = check(config, 1), []
    with monkeypatch.context() as patch:
        change_models(patch, lambda backbone, adapters: seen.append(backbone))
        train(config)
    own = plan.nfe_per_round
    assert seen[0].nfe == 2 * plan.evaluation_nfe + own.student + own.teacher
    assert any("times the forward passes of the 1 rounds" in note for note in plan.notes)
    start, end = metrics(tmp_path / "logs" / "run")
    names = [f"{task}{variant}" for task in ("first", "second") for variant in ("", "@plain", "@long")]
    names += [f"first{variant}/{folder}" for variant in ("", "@plain", "@long") for folder in ("one", "two")]
    evaluated = {f"eval/{name}/jpeg_compressibility" for name in names}
    assert evaluated == {key for key in start if key != "round"} == {key for key in end if key.startswith("eval/")}
    for key in evaluated:
        assert start[key] == pytest.approx(end[key], abs=0.02)
    for variant in ("", "@plain", "@long"):
        whole, *parts = (start[f"eval/first{variant}{part}/jpeg_compressibility"] for part in ("", "/one", "/two"))
        assert whole == pytest.approx((3 * parts[0] + 1 * parts[1]) / 4)
    plain = tiny_config(run_name="plain", num_epochs=1, eval_freq=1, sample__eval_guidance_scale=1.0)
    train(plain)
    same = "eval/second{}/jpeg_compressibility"
    assert metrics(tmp_path / "logs" / "plain")[0][same.format("")] == start[same.format("@plain")]
    assert len({start[same.format(variant)] for variant in ("", "@plain", "@long")}) == 3


def test_a_finished_run_stays_as_it_is(finished):
    """When it is started afresh, which is refused, and when it is resumed, which finds nothing to do."""
    folder, config = finished("opd")
    before, saved, fresh = files_of(folder), files_of(folder / "checkpoints"), config.copy_and_resolve_references()
    fresh.resume_from = None
    with pytest.raises(RunError) as caught:
        train(fresh)
    assert all(fact in str(caught.value) for fact in (str(folder), "checkpoint-3", "resume_from=auto"))
    assert files_of(folder) == before
    assert train(config) == folder / "checkpoints" / "checkpoint-3"
    assert files_of(folder / "checkpoints") == saved


def test_resume_from_a_path_or_a_damaged_checkpoint(finished, tmp_path):
    folder, config = finished("opd", rounds=2)
    root = folder / "checkpoints"
    config.run_name, config.resume_from = "other", str(root / "checkpoint-1")
    other = train(config)
    assert other == tmp_path / "logs" / "other" / "checkpoints" / "checkpoint-3"
    assert metrics(tmp_path / "logs" / "other")[0]["round"] == 2
    tensors = root / "checkpoint-2" / "state" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    config.run_name, config.resume_from = "third", str(root / "checkpoint-2")
    with pytest.raises(checkpoint.CheckpointError) as caught:
        train(config)
    assert str(tensors) in str(caught.value)
    config.run_name, config.resume_from = "run", "auto"
    with pytest.warns(UserWarning, match="checkpoint-2 is damaged"):
        resumed = train(config)
    assert_bitwise(student(resumed), student(other))


def test_student_of_another_rank_is_not_resumed(finished):
    _, config = finished("opd", num_epochs=4, train__lora_rank=8)
    with pytest.raises(RunError, match="rank"):
        train(config, allow_config_change=True)


def test_smaller_backward_batches_and_checkpointing_train_the_same_student(tiny_config):
    plain = student(train(tiny_config(run_name="plain", num_epochs=2)))
    for options, tolerances in (
        ({"train__batch_size": 1, "train__gradient_accumulation_steps": 4}, {"rtol": 1e-4, "atol": 2e-5}),
        ({"activation_checkpointing": True}, {"rtol": 1e-5, "atol": 1e-6}),
    ):
        other = student(train(tiny_config(run_name=str(len(options)), num_epochs=2, **options)))
        for name, tensor in plain.items():
            torch.testing.assert_close(tensor, other[name], **tolerances)


def test_a_student_can_start_from_a_lora(tiny_config, make_lora):
    """It gets the scale of a fresh one."""
    lora = make_lora(31, rank=4, alpha=2)
    options = {"train__lora_path": str(lora), "train__learning_rate": 1e-9, "train__ema": False}
    last = train(tiny_config(num_epochs=1, **options))
    start = load_file(lora / "adapter_model.safetensors")

    def check(folder):
        end, trained = load_file(folder / "lora" / "adapter_model.safetensors"), student(folder).values()
        assert start.keys() == end.keys()
        for name, tensor in start.items():
            same, own = (tensor * 0.5, tensor * 0.25) if "lora_B" in name else (tensor, tensor)
            torch.testing.assert_close(end[name], same, rtol=0, atol=1e-6)
            assert any(t.shape == own.shape and torch.allclose(t, own, rtol=0, atol=1e-6) for t in trained)

    check(last)
    check(train(tiny_config(num_epochs=2, resume_from="auto", **options)))


def test_every_setting_runs(tiny_config, tmp_path):
    """Also together: what none of the other tests trains with."""
    for name, options in {
        "half": {"mixed_precision": "bf16", "sample__solver": "dpm2", "train__target": "x0"},
        "cps": {"sample__solver": "cps", "sample__noise_level": 0.5, "train__self_normalize": True},
        "surrogate": {"train__loss": "policy_gradient", "sample__noise_level": 0.7, "log_with": "tensorboard"},
        "guided": {"train__cfg": True, "sample__guidance_scale": 2.0, "train__num_inner_epochs": 2},
        "groups": {"sample__num_image_per_prompt": 2, "sample__same_latent": True, "train__steps_per_rollout": 2},
    }.items():
        checkpoint.verify(train(tiny_config(num_epochs=1, run_name=name, **options)))
        assert metrics(tmp_path / "logs" / name)[0]["loss"] != 0
        assert (tmp_path / "logs" / name / "trackers").exists() == ("log_with" in options)


def test_one_process_equals_two(tiny_config, tmp_path):
    """Batch 4 in one process and batch 2 in each of two (gloo) processes."""
    # Adam makes a whole step of a gradient that is rounding, unless its epsilon is far above that.
    common = {"num_epochs": 4, "sample__noise_level": 0.7, "monitor_freq": 2, "train__adam_epsilon": 1e-2}
    one = train(tiny_config(run_name="one", sample__train_batch_size=4, train__batch_size=4, **common))
    train_forked(tiny_config(run_name="two", **common))
    two = tmp_path / "logs" / "two" / "checkpoints" / "checkpoint-4"
    assert_equal_rounds(*(metrics(tmp_path / "logs" / name) for name in ("one", "two")))
    for name, tensor in student(one).items():
        torch.testing.assert_close(tensor, student(two)[name], rtol=1e-3, atol=2e-5)
    unreached = "base_model.model.transformer_blocks.3.attn.add_q_proj.lora_A.weight"
    loras = [load_file(folder / "lora" / "adapter_model.safetensors") for folder in (one, two)]
    assert torch.equal(loras[0][unreached], loras[1][unreached]), "no gradient in one process and in two"


def test_a_complete_text_cache_never_loads_an_encoder(finished, monkeypatch):
    _, config = finished("opd", rounds=2)
    monkeypatch.setattr(
        "diffusionopd.models.text_cache.load_text_encoder", lambda *a, **k: pytest.fail("an encoder was loaded")
    )
    assert train(config) is not None


def test_a_broken_teacher_stops_before_training(tiny_config, tmp_path):
    config = tiny_config()
    folder = shutil.copytree(config.train.teachers[1]["lora_path"], tmp_path / "teacher")
    config.train.teachers[1]["lora_path"] = str(folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError) as caught:
        train(config)
    assert str(folder) in str(caught.value)
    assert "train.teachers[1].lora_path" in str(caught.value)
    assert not (tmp_path / "logs" / "run" / "checkpoints").exists()


def test_dry_run_loads_and_writes_nothing(tiny_config, tmp_path, capsys, no_weights):
    assert train(tiny_config(), dry_run=True) is None
    assert "dry run" in capsys.readouterr().out
    assert not (tmp_path / "logs" / "run").exists()


def test_a_base_that_comes_from_the_hub_is_checked_like_one_that_is_here(make_config, tmp_path, monkeypatch):
    here = []
    monkeypatch.setattr(checks, "is_here", lambda *source: bool(here))
    monkeypatch.setattr(setup, "read_model", lambda **source: here.append(source))
    monkeypatch.setattr(setup, "build", lambda *_: pytest.fail("weights would load"))
    with pytest.raises(ConfigError, match="resolution"):
        train(make_config(tmp_path, resolution=36))
    assert len(here) == 1
