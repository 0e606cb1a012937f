"""Resuming: another experiment is refused, another number of processes makes the same round, damage is said."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from diffusionopd.config_schema import ResumeError, base_config, changes_since, check, flatten, load_config, resumed
from diffusionopd.config_schema.__main__ import main
from diffusionopd.config_schema.geometry import BATCH_KEYS, adapted_batches, geometry
from diffusionopd.config_schema.resume import EXPERIMENT, FREE, SavedRun
from diffusionopd.config_schema.values import NO_EFFECT, unused_keys
from diffusionopd.training import RunError, checkpoint, train
from diffusionopd.training.resume import find_checkpoint, weight_digests
from diffusionopd.training.state import versions

from .conftest import ROOT
from .test_trainer import assert_bitwise, launch, metrics, student

KEYS = sorted(flatten(base_config()))


# --- which keys may change -------------------------------------------------------------------------------------------


def test_every_key_is_classified_once():
    classes = (FREE, EXPERIMENT, set(BATCH_KEYS))
    unclassified = [key for key in KEYS if sum(key in one for one in classes) != 1]
    assert unclassified == [], "say in config_schema/resume.py whether a resumed run may change it"
    assert set().union(*classes) == set(KEYS)


@pytest.mark.parametrize(
    ("row", "keys"), [("refused", EXPERIMENT), ("printed", FREE - NO_EFFECT), ("as a round", set(BATCH_KEYS))]
)
def test_the_table_says_the_same(row, keys):
    lines = (ROOT / "docs" / "resume.md").read_text(encoding="utf-8").splitlines()
    named = [key for line in lines if line.startswith(f"| {row} |") for key in re.findall(r"`([\w.]+)`", line)]
    assert sorted(named) == sorted(keys)


def values_of(algorithm):
    """A whole configuration that uses what the algorithm can use."""
    values = flatten(load_config(f"{ROOT}/config/tiny.py:mopd", [("train.algorithm", algorithm)]))
    return values | {"train.teachers": copy.deepcopy(values["train.teachers"]), "reward_options": {}}


def other(value):
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict):
        return {"ocr": {"engine": "paddleocr"}}
    if isinstance(value, list | tuple):
        return [*value, {"name": "more"}]
    return f"{value}x"


@pytest.mark.parametrize("algorithm", ["opd", "nft", "grpo_guard"])
@pytest.mark.parametrize("key", [key for key in KEYS if key not in BATCH_KEYS])
def test_a_changed_key_is_refused_or_reported(key, algorithm):
    before, now = values_of(algorithm), values_of(algorithm)
    before["train.task_order"] = now["train.task_order"] = "together"
    now[key] = other(now[key])
    if key == "train.algorithm":
        now[key] = "sft"
    refused, free = changes_since(SavedRun(Path("x"), before, 1), now, 1)
    # Every task has its own guidance; options are those of a reward that no task is trained on.
    elsewhere = {"sample.teacher_guidance_scale", "reward_options"}
    experiment = key in EXPERIMENT - unused_keys(algorithm) - elsewhere
    if key == "sample.teacher_guidance_scale":
        assert refused == free == []
    else:
        assert bool(refused) == experiment, (refused, free)
        assert bool(free) != experiment or key == "train.teachers", "of which some fields may change"
    if key not in ("train.teachers", "reward_options", "sample.teacher_guidance_scale"):
        assert [*refused, *free][0].startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("algorithm", "field", "value", "is_refused"),
    [
        ("opd", "name", "other", True),
        ("opd", "dataset", "elsewhere", True),
        ("opd", "lora_path", "elsewhere", True),
        ("opd", "guidance_scale", 3.0, True),
        ("opd", "prompt_fn", "other", True),
        ("opd", "proxy_reward", {"ocr": 1.0}, False),
        ("opd", "eval_num_steps", 3, False),
        ("nft", "lora_path", "elsewhere", False),
        ("nft", "guidance_scale", 3.0, False),
        ("nft", "proxy_reward", {"ocr": 1.0}, True),
    ],
)
def test_a_field_of_a_task(algorithm, field, value, is_refused):
    before, now = values_of(algorithm), values_of(algorithm)
    now["train.teachers"][1][field] = value
    refused, free = changes_since(SavedRun(Path("x"), before, 1), now, 1)
    (change,) = refused if is_refused else free
    assert change.startswith(f"train.teachers[1].{field}: {before['train.teachers'][1].get(field, '')!r} -> {value!r}")


def test_guidance_that_is_written_down_is_no_change():
    before, now = values_of("opd"), values_of("opd")
    del before["train.teachers"][0]["guidance_scale"]
    now["train.teachers"][0]["guidance_scale"] = before["sample.teacher_guidance_scale"]
    now["sample.teacher_guidance_scale"] += 1
    assert changes_since(SavedRun(Path("x"), before, 1), now, 1) == ([], [])


def test_options_of_a_reward_that_is_trained_on():
    before, now = values_of("nft"), values_of("nft")
    now["reward_options"] = {"tiny_ocr": {"engine": "other", "device": "cpu"}}
    refused, free = changes_since(SavedRun(Path("x"), before, 1), now, 1)
    assert refused == ["reward_options.tiny_ocr.engine: '' -> 'other'"]
    assert free == ["reward_options.tiny_ocr.device: '' -> 'cpu'"]


def test_a_cascade_is_not_made_longer_by_the_way():
    before, now = values_of("nft"), values_of("nft")
    now["num_epochs"] += 1
    assert changes_since(SavedRun(Path("x"), before, 1), now, 1)[0] == []
    before["train.task_order"] = now["train.task_order"] = "cascade"
    assert changes_since(SavedRun(Path("x"), before, 1), now, 1)[0] == ["num_epochs: 120 -> 121"]


def test_keys_younger_than_the_checkpoint_had_their_defaults(saved_run):
    """Also tuples, which JSON gives back as lists."""
    folder, config = saved_run(written_for=1)
    written = json.loads((folder / "config.json").read_text())
    del written["text_encoder_device"], written["train"]["beta"]
    (folder / "config.json").write_text(json.dumps(written))
    assert resumed(config, 1).notes == ()
    config.train.beta = 0.5
    with pytest.raises(ResumeError, match=r"train\.beta: 0\.0 -> 0\.5"):
        resumed(config, 1)


# --- another number of processes -------------------------------------------------------------------------------------


def batch_values(tasks, size, per_task, part, steps, order="together"):
    batches = per_task * (tasks if order == "together" else 1)
    values = dict(zip(BATCH_KEYS, (size, batches, part, batches * size // part // steps), strict=True))
    return values | {"train.teachers": [{}] * tasks, "train.task_order": order}


def test_every_adaptation_makes_the_same_round():
    """All small cases against the definition: a solution keeps the round, and none is missed."""
    cases = itertools.product((1, 3), (1, 2, 4), (1, 2, 3), (1, 2), (1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 6, 8))
    found = impossible = 0
    for tasks, size, per_task, part, steps, before, now in cases:
        if size % part or tasks * per_task * size // part % steps:
            continue
        values = batch_values(tasks, size, per_task, part, steps)
        pictures = per_task * size * before
        try:
            new = adapted_batches(values, before, now)
        except ValueError as error:
            impossible += 1
            assert not any(
                possible(tasks, pictures, steps, n, b, p)
                for n in [now]
                for b in range(1, size + 1)
                for p in range(1, part + 1)
            )
            assert str(now) not in re.findall(r"\d+", str(error).split("Use")[1])
            continue
        found += 1
        new_values = values | new
        assert geometry(new_values, now) == geometry(values, before)
        assert (
            new["sample.num_batches_per_epoch"] % tasks == 0
            and new["sample.train_batch_size"] % new["train.batch_size"] == 0
        )
        assert new["sample.train_batch_size"] <= size and new["train.batch_size"] <= part
        if pictures % (size * now) == 0 and steps == 1:
            assert new["sample.train_batch_size"] == size and new["train.batch_size"] == part, (
                "memory is used as before"
            )
    assert found > 500 and impossible > 100


def possible(tasks, pictures, steps, now, size, part):
    if size % part or pictures % (size * now):
        return False
    return (tasks * pictures // now // part) % steps == 0


def test_a_step_every_few_rounds_stays_that():
    values = batch_values(2, 2, 1, 2, 1) | {"train.gradient_accumulation_steps": 6}  # three rounds of two
    assert geometry(values, 4)["optimizer steps in a round"] == Fraction(1, 3)
    new = adapted_batches(values, 4, 2)
    assert new["train.gradient_accumulation_steps"] == 12


def test_one_task_a_round_keeps_its_batches():
    values = batch_values(3, 2, 2, 2, 1, order="alternate")
    assert adapted_batches(values, 2, 1) == dict(zip(BATCH_KEYS, (2, 4, 2, 4), strict=True))


@pytest.fixture
def saved_run(tiny_config, tmp_path):
    """`saved_run(written_for, ...)`: the JSON of a checkpoint of `tiny_config`, and what to resume it with."""

    def make(written_for, **changes):
        folder = tmp_path / "logs" / "run" / "checkpoints" / "checkpoint-4"
        (folder / "state").mkdir(parents=True)
        config = tiny_config(**changes)
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        scalars = {"round": 4, "num_processes": 1, "written_for": written_for}
        (folder / "state" / "scalars.json").write_text(json.dumps(scalars))
        config.resume_from = "auto"
        return folder, config

    return make


def test_the_same_keys_are_adapted_and_other_ones_are_not(saved_run):
    _, config = saved_run(written_for=4)
    start = resumed(config, 2)
    assert start.notes == (
        "processes 4 -> 2, so that a round stays the same: sample.num_batches_per_epoch 2 -> 4, "
        "train.gradient_accumulation_steps 2 -> 4",
    )
    assert (start.given, start.written_for) == (config, 4), "the next resume starts from what was given"
    assert check(start.config, 2).images_per_round == check(config, 4).images_per_round
    assert resumed(config, 4).config is config
    config.sample.num_batches_per_epoch = config.train.gradient_accumulation_steps = 4
    assert resumed(config, 2).written_for == 2, "adapted by hand"
    with pytest.raises(ResumeError, match="pictures of a task in a round: 8 -> 16"):
        resumed(config, 4)
    assert resumed(config, 4, allow_change=True).config is config


def test_a_number_of_processes_that_cannot_share_the_round(saved_run):
    _, config = saved_run(written_for=2)
    with pytest.raises(ResumeError, match=r"with 3 processes: the 4 pictures of a task .* Use 1, 2 or 4 processes"):
        resumed(config, 3)


def test_pictures_of_a_prompt_may_lie_in_several_batches(saved_run):
    _, config = saved_run(4, train__algorithm="nft", sample__num_image_per_prompt=8)
    assert check(resumed(config, 1).config, 1).groups_per_task == check(config, 4).groups_per_task == 1


def write_config(path, config):
    values = json.loads(json.dumps(config.to_dict()))
    path.write_text(f"def run():\n    return {values!r}\n")
    return f"{path}:run"


def test_the_launchers_question_is_answered_alike(saved_run, tmp_path, capsys):
    """Accepted with what a resume adapts, refused at once with what it refuses."""
    _, config = saved_run(4, train__algorithm="nft", sample__num_image_per_prompt=8)
    source = write_config(tmp_path / "mine.py", config)
    assert main(["--num_processes", "1", "--config", source]) == 0
    assert main(["--num_processes", "1", "--config", source, "--config.resume_from=None"]) == 2
    assert "Choose a divisor of 2" in capsys.readouterr().err
    changed = ["--num_processes", "1", "--config", source, "--config.seed=7", "--config.train.nft_beta=0.5"]
    assert main(changed) == 2
    message = capsys.readouterr().err
    assert "checkpoint-4" in message and "\n  - seed: 42 -> 7\n  - train.nft_beta: 1.0 -> 0.5\n" in message
    assert "--allow_config_change" in message
    assert main([*changed, "--allow_config_change"]) == 0


def test_a_configuration_that_is_wrong_in_itself_is_left_to_its_own_check(saved_run):
    _, config = saved_run(written_for=4)
    config.sample.train_batch_size = "two"
    assert resumed(config, 2).config is config


@pytest.mark.parametrize("content", ["", "{", "[]", '{"round": 1}', '{"num_processes": null}'])
def test_unreadable_json_is_left_to_the_verification(saved_run, content):
    folder, config = saved_run(written_for=4)
    (folder / "state" / "scalars.json").write_text(content)
    assert resumed(config, 2).config is config


def assert_same_run(a, b, rel):
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert {"round", "loss", "grad_norm", "evaluations"} <= one.keys()
        for key in one.keys() - {"seconds"}:
            assert one[key] == pytest.approx(two[key], rel=rel, abs=1e-9), (one["round"], key)


def write_script(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    script = tmp_path / "run.py"
    script.write_text(
        "import json\nfrom ml_collections import ConfigDict\nfrom diffusionopd.training import train\n"
        f"train(ConfigDict(json.load(open({str(tmp_path / 'config.json')!r}))))\n"
    )
    return script


@pytest.mark.slow
def test_two_processes_then_one_equal_one(tiny_config, tmp_path, capsys):
    """The same command all along; the undisturbed run is one process with the batches of two."""
    common = {"sample__noise_level": 0.7, "train__ema": True, "save_freq": 1}
    doubled = {"sample__num_batches_per_epoch": 4, "train__gradient_accumulation_steps": 4}
    whole = train(tiny_config(run_name="whole", num_epochs=3, **common, **doubled))
    launch(write_script(tiny_config(num_epochs=2, resume_from="auto", **common), tmp_path))
    capsys.readouterr()
    resumed_run = train(tiny_config(num_epochs=3, resume_from="auto", **common))
    note = "processes 2 -> 1, so that a round stays the same: sample.num_batches_per_epoch 2 -> 4"
    assert note in capsys.readouterr().out
    assert processes_of(tmp_path) == [2, 2, 1]
    assert_same_run(metrics(tmp_path / "logs" / "whole"), metrics(tmp_path / "logs" / "run"), rel=2e-4)
    for name, tensor in student(whole).items():
        torch.testing.assert_close(tensor, student(resumed_run)[name], rtol=1e-3, atol=5e-5)


@pytest.mark.slow
def test_one_process_then_two_then_one_from_rewards(tiny_config, tmp_path):
    """A batch of four becomes two of two and four again; groups of a prompt are spread over both processes."""
    settings = {"train__algorithm": "nft", "sample__num_image_per_prompt": 4, "save_freq": 1}
    settings |= {"sample__train_batch_size": 4, "train__batch_size": 4, "resume_from": "auto"}
    whole, run = (tiny_config(run_name=name, **settings) for name in ("whole", "run"))
    for task in (*whole.train.teachers, *run.train.teachers):
        task["proxy_reward"] = {"tiny_scene": 1.0}  # smooth in the pixels, as a file's size is not
    train(whole)
    for run.num_epochs, processes in ((1, 1), (2, 2), (3, 1)):
        if processes == 1:
            train(run)
        else:
            launch(write_script(run, tmp_path), processes)
    assert processes_of(tmp_path) == [1, 2, 1]
    assert_same_run(metrics(tmp_path / "logs" / "whole"), metrics(tmp_path / "logs" / "run"), rel=2e-3)


def processes_of(tmp_path):
    root = tmp_path / "logs" / "run" / "checkpoints"
    return [checkpoint.load_scalars(root / f"checkpoint-{n}" / "state")["num_processes"] for n in (1, 2, 3)]


# --- what lies behind the names --------------------------------------------------------------------------------------


def test_another_experiment_is_refused_before_weights_load(tiny_config, tmp_path, capsys, monkeypatch):
    first = train(tiny_config(num_epochs=1))
    run = tmp_path / "logs" / "run"
    before = (run / "metrics.jsonl").read_bytes(), (run / "config.json").read_bytes()
    changed = {"num_epochs": 2, "resume_from": "auto", "train__target": "x0", "train__learning_rate": 1e-4}
    with monkeypatch.context() as patch:
        patch.setattr("diffusionopd.training.setup.load_backbone", lambda *a, **k: pytest.fail("weights were loaded"))
        for dry_run in (True, False):
            with pytest.raises(ResumeError, match=r"checkpoint-1 .*\n  - train\.target: 'velocity' -> 'x0'\n") as error:
                train(tiny_config(**changed), dry_run=dry_run)
            assert "learning_rate" not in str(error.value)
    assert ((run / "metrics.jsonl").read_bytes(), (run / "config.json").read_bytes()) == before
    capsys.readouterr()
    assert train(tiny_config(**changed), allow_config_change=True).name == "checkpoint-2"
    printed = capsys.readouterr().out
    assert f"resuming after round 1 from {first}" in printed
    for change in ("num_epochs: 1 -> 2", "train.learning_rate: 0.001 -> 0.0001", "train.target: 'velocity' -> 'x0'"):
        assert change in printed


def test_another_algorithm_is_refused_and_can_be_allowed(tiny_config):
    """NFT's old policy then starts from the student, as in a run that begins with a LoRA."""
    train(tiny_config(num_epochs=1))
    changed = {"num_epochs": 2, "resume_from": "auto", "train__algorithm": "nft", "sample__num_image_per_prompt": 2}
    with pytest.raises(ResumeError, match="train.algorithm: 'opd' -> 'nft'"):
        train(tiny_config(**changed))
    tensors, _ = checkpoint.load_state(train(tiny_config(**changed), allow_config_change=True) / "state")
    assert any(name.startswith("old.") for name in tensors)
    with pytest.raises(ResumeError, match="train.algorithm: 'nft' -> 'opd'"):
        train(tiny_config(num_epochs=3, resume_from="auto", sample__num_image_per_prompt=2))


def test_changed_files_under_the_same_names_are_noticed(tiny_config, make_lora, tmp_path, capsys):
    config = tiny_config(num_epochs=1)
    teacher = tmp_path / "teacher"
    shutil.copytree(config.train.teachers[0]["lora_path"], teacher)
    config.train.teachers[0]["lora_path"] = str(teacher)
    train(config)
    metrics_before = (tmp_path / "logs" / "run" / "metrics.jsonl").read_bytes()
    config.num_epochs, config.resume_from = 2, "auto"
    shutil.rmtree(teacher)
    shutil.copytree(make_lora(99), teacher)
    with pytest.raises(RunError, match=r"the teacher of first: not what .*checkpoint-1 was trained with.*same places"):
        train(config)
    prompts = Path(config.train.teachers[1]["dataset"]) / "train.txt"
    prompts.write_text(prompts.read_text() + "one more\n")
    with pytest.raises(RunError, match="the prompts of second: not what"):
        train(config)
    assert (tmp_path / "logs" / "run" / "metrics.jsonl").read_bytes() == metrics_before
    capsys.readouterr()
    assert train(config, allow_config_change=True).name == "checkpoint-2"
    assert "the teacher of first: not what" in capsys.readouterr().out
    config.num_epochs = 3
    assert train(config).name == "checkpoint-3", "from here on they are what the run is trained with"


def test_the_base_models_digest_sees_its_weights_and_not_its_adapters(backbone, adapters, tiny_config):
    config = tiny_config()
    for i, task in enumerate(config.train.teachers):
        task["name"] = "ab"[i]
    plan = check(config, 1)
    before = weight_digests(plan, backbone, adapters)
    assert list(before) == ["the base model (torch.float32)", "the teacher of a", "the teacher of b"]
    with torch.no_grad():
        adapters.parameters("student")[0].add_(1)
        assert weight_digests(plan, backbone, adapters) == before
        adapters.parameters("teacher_a")[3].view(-1)[5] += 1e-6
        backbone.transformer.transformer_blocks[2].ff.net[0].proj.bias[0] += 1e-6
    now = weight_digests(plan, backbone, adapters)
    assert [name for name in before if now[name] != before[name]] == list(before)[:2]


# --- damage ----------------------------------------------------------------------------------------------------------


def damage_all(root):
    for i, folder in enumerate(checkpoint.folders(root)):
        if i % 2:
            (folder / "manifest.json").unlink()
        else:
            (folder / "state" / "tensors.safetensors").write_bytes(b"")


@pytest.fixture
def checkpoints(tmp_path):
    """Three minimal checkpoints of a run."""
    for n in (1, 2, 3):
        checkpoint.save(
            tmp_path / "run" / "checkpoints",
            f"checkpoint-{n}",
            lambda folder, n=n: checkpoint.save_state(folder / "state", {"w": torch.ones(2)}, {"round": n}),
        )
    return tmp_path / "run" / "checkpoints"


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(checkpoints):
    damage_all(checkpoints)
    kept = sorted(path.name for path in checkpoints.iterdir())
    with pytest.warns(UserWarning, match="damaged and skipped"), pytest.raises(RunError, match="all .* are damaged"):
        find_checkpoint("auto", checkpoints.parent)
    with pytest.raises(RunError, match="already holds a run"):
        find_checkpoint(None, checkpoints.parent)
    assert sorted(path.name for path in checkpoints.iterdir()) == kept


@pytest.mark.parametrize("content", ["checkpoint-9\n", "checkpoint-1\n", "", "../..\n"])
def test_latest_may_point_anywhere(checkpoints, content):
    (checkpoints / "latest").write_text(content)
    assert find_checkpoint("auto", checkpoints.parent) == checkpoints / "checkpoint-3"


def test_no_checkpoint_yet_is_a_fresh_start(tmp_path):
    (tmp_path / "run" / "checkpoints" / ".partial-checkpoint-1.1.host.00000000").mkdir(parents=True)
    for wanted in (None, "", "auto"):
        assert find_checkpoint(wanted, tmp_path / "run") is None


def test_a_checkpoint_of_another_run_does_not_go_on_in_this_runs_folder(checkpoints, tmp_path):
    shutil.copytree(checkpoints.parent, tmp_path / "other")
    source = tmp_path / "other" / "checkpoints" / "checkpoint-2"
    with pytest.raises(RunError, match=r"already holds a run with checkpoint-3, which going on from .*other"):
        find_checkpoint(str(source), checkpoints.parent)
    assert find_checkpoint(str(source), tmp_path / "third") == source
    assert find_checkpoint(str(checkpoints / "checkpoint-1"), checkpoints.parent) == checkpoints / "checkpoint-1"


def test_a_checkpoint_of_a_later_version_is_neither_skipped_nor_called_damaged(checkpoints, monkeypatch):
    newest = checkpoints / "checkpoint-3"
    shutil.rmtree(newest)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 2)
        checkpoint.save(checkpoints, newest.name, lambda folder: (folder / "new").write_text("new"))
    for wanted in ("auto", str(newest)):
        with pytest.raises(checkpoint.CheckpointError, match="checkpoint-3 has format 2, this program reads 1: update"):
            find_checkpoint(wanted, checkpoints.parent)


def test_other_versions_are_said_in_one_line(tiny_config, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("diffusionopd.training.state.versions", lambda: versions() | {"torch": "2.12.0", "peft": "0.1"})
        train(tiny_config(num_epochs=1))
    capsys.readouterr()
    train(tiny_config(num_epochs=1, resume_from="auto"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("saved with"))
    assert line == f"saved with other versions: peft 0.1 -> {versions()['peft']}, torch 2.12.0 -> {versions()['torch']}"


def test_the_checkpoint_that_was_resumed_is_kept(tiny_config, tmp_path):
    train(tiny_config(num_epochs=2, save_freq=1))
    root = tmp_path / "logs" / "run" / "checkpoints"
    before = student(root / "checkpoint-1")
    settings = {"num_epochs": 4, "save_freq": 1, "num_checkpoint_limit": 1}
    train(tiny_config(resume_from=str(root / "checkpoint-1"), **settings))
    assert sorted(folder.name for folder in checkpoint.folders(root)) == ["checkpoint-1", "checkpoint-4"]
    assert_bitwise(student(root / "checkpoint-1"), before)
