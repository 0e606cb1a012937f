"""Resuming: another experiment is refused, another number of processes makes the same round, damage is said."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from fractions import Fraction

import pytest
import torch

from diffusionopd.algorithms.opd import Opd
from diffusionopd.config_schema import FREE, REFUSE, REWARDS, ROUND, TEACHERS, flatten
from diffusionopd.data.tasks import FIELDS
from diffusionopd.models.policies import STUDENT, Policies
from diffusionopd.training import check, checkpoint, load_config, loading, resume, setup, train
from diffusionopd.training.changes import adapted_batches, changes_since
from diffusionopd.training.digests import versions, weight_digests
from diffusionopd.training.keys import SCHEMA, ema_repeats, is_used
from diffusionopd.training.resume import (
    ResumeError,
    RunError,
    find_checkpoint,
    find_start,
)

from .conftest import ROOT
from .helpers import assert_bitwise, assert_equal_rounds, files_of, metrics, state, student, train_forked

BATCH_KEYS = [name for name, key in SCHEMA.keys.items() if key.resume == ROUND]


# --- which keys may change --------------------------------------------------------------------------------------------


def values_of(algorithm):
    """A complete configuration that uses what the algorithm can use."""
    values = flatten(load_config(f"{ROOT}/config/tiny.py:mopd", [("train.algorithm", algorithm)]))
    return copy.deepcopy(values | {"train.task_order": "together"})


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


def is_refused(rule, algorithm):
    return rule == REFUSE or rule == (TEACHERS if algorithm in ("opd", "sft") else REWARDS)


def test_every_rule_is_one_of_those():
    rules = {name: key.resume for keys in (SCHEMA.keys, FIELDS) for name, key in keys.items()}
    assert {name for name, rule in rules.items() if rule not in (REFUSE, FREE, ROUND, TEACHERS, REWARDS)} == set()
    known = {"seed": REFUSE, "train.target": REFUSE, "num_epochs": FREE, "train.learning_rate": FREE, "debug": FREE}
    known |= {"sample.train_batch_size": ROUND, "lora_path": TEACHERS, "proxy_reward": REWARDS, "resolution": REFUSE}
    assert {name: rules[name] for name in known} == known


@pytest.mark.parametrize("algorithm", ["opd", "nft", "grpo_guard"])
def test_a_changed_key_is_refused_or_reported(algorithm):
    """Every key by its rule; one that the algorithm does not read is reported only."""
    # Every task has its own guidance, fields of tasks have rules of their own, as have options of rewards.
    elsewhere = {"sample.teacher_guidance_scale", "train.teachers", "reward_options", *BATCH_KEYS}
    for name in SCHEMA.keys.keys() - elsewhere:
        before, now = values_of(algorithm), values_of(algorithm)
        now[name] = "sft" if name == "train.algorithm" else other(now[name])
        refused, free = changes_since(before, 1, now, 1)
        expected = is_refused(SCHEMA.keys[name].resume, algorithm) and is_used(name, algorithm)
        assert (bool(refused), bool(free)) == (expected, not expected), (name, refused, free)
        assert all(part in [*refused, *free][0] for part in (name, repr(now[name]), "->"))
    for name in ("sample.teacher_guidance_scale", "train.teachers"):
        before, now = values_of(algorithm), values_of(algorithm)
        now[name] = other(now[name])
        refused, _ = changes_since(before, 1, now, 1)
        assert bool(refused) == (name == "train.teachers"), name
    for name in BATCH_KEYS:
        before, now = values_of(algorithm), values_of(algorithm)
        now[name] *= 2
        assert changes_since(before, 1, now, 1)[0], name


@pytest.mark.parametrize("algorithm", ["opd", "nft"])
def test_a_changed_field_of_a_task_is_refused_or_reported(algorithm):
    for (name, key), weight in itertools.product(FIELDS.items(), (0.0, 0.5)):
        before, now = values_of(algorithm), values_of(algorithm)
        before["train.distill_weight"] = now["train.distill_weight"] = weight
        now["train.teachers"][1][name] = value = {"ocr": 1.0} if name == "proxy_reward" else other(key.default)
        refused, free = changes_since(before, 1, now, 1)
        both = weight and algorithm == "nft" and key.resume == TEACHERS
        (change,) = refused if is_refused(key.resume, algorithm) or both else free
        assert change.startswith(f"train.teachers[1].{name}: ") and change.endswith(f" -> {value!r}")


def test_what_is_the_default_may_be_written_down():
    before, now = values_of("opd"), values_of("opd")
    now["train.teachers"][1] |= {"strength": 1.0, "weight": 1.0, "reference": ""}
    now["train.teachers"][0] |= {"strength": None}
    del before["train.teachers"][0]["guidance_scale"]
    now["train.teachers"][0]["guidance_scale"] = before["sample.teacher_guidance_scale"]
    now["sample.teacher_guidance_scale"] += 1
    assert changes_since(before, 1, now, 1) == ([], [])


def test_options_of_a_reward_that_is_trained_on():
    before, now = values_of("nft"), values_of("nft")
    now["reward_options"] = {"tiny_ocr": {"engine": "other", "device": "cpu"}, "untrained": {"engine": "other"}}
    refused, free = changes_since(before, 1, now, 1)
    assert [change.split(":")[0] for change in refused] == ["reward_options.tiny_ocr.engine"]
    assert [change.split(":")[0] for change in free] == [
        "reward_options.tiny_ocr.device",
        "reward_options.untrained.engine",
    ]


def test_a_cascade_is_not_made_longer_by_the_way():
    before, now = values_of("nft"), values_of("nft")
    now["num_epochs"] += 1
    assert changes_since(before, 1, now, 1)[0] == []
    before["train.task_order"] = now["train.task_order"] = "cascade"
    assert changes_since(before, 1, now, 1)[0] == [f"num_epochs: {before['num_epochs']} -> {now['num_epochs']}"]


@pytest.fixture
def saved_run(tiny_config, tmp_path):
    """`saved_run(written_for, ...)`: a checkpoint of `tiny_config` without weights, and what to resume it with."""

    def make(written_for, **changes):
        config = tiny_config(**changes)

        def write(folder):
            scalars = {"round": 4, "written_for": written_for, "tasks_per_pass": 1}
            scalars |= {"digests": {}, "versions": versions(), "diversity": {}}
            checkpoint.save_state(folder / "state", {}, scalars)
            written = config.to_dict()
            # Keys that are younger than the checkpoint had their defaults, also tuples, which are lists in JSON.
            del written["text_encoder_device"], written["train"]["beta"], written["train"]["old_policy_decay"]
            (folder / "config.json").write_text(json.dumps(written))

        folder = checkpoint.save(tmp_path / "logs" / "run" / "checkpoints", "checkpoint-4", write)
        config.resume_from = "auto"
        return folder, config

    return make


def test_keys_younger_than_the_checkpoint_had_their_defaults(saved_run):
    _, config = saved_run(written_for=1)
    (note,) = find_start(config, 1).notes
    assert "resume_from" in note and "beta" not in note
    config.train.beta = 0.5
    with pytest.raises(ResumeError) as caught:
        find_start(config, 1)
    assert "train.beta: 0.0 -> 0.5" in str(caught.value)


# --- another number of processes --------------------------------------------------------------------------------------


def batch_values(tasks, size, per_task, part, steps, order="together"):
    batches = per_task * (tasks if order == "together" else 1)
    values = dict(zip(BATCH_ORDER, (size, batches, part, batches * size // part // steps), strict=True))
    return values | {"train.teachers": [{}] * tasks, "train.task_order": order}


BATCH_ORDER = (
    "sample.train_batch_size",
    "sample.num_batches_per_epoch",
    "train.batch_size",
    "train.gradient_accumulation_steps",
)


def geometry(values, processes):
    """Images per task and round, optimizer steps per round."""
    size, batches, part, accumulation = (values[name] for name in BATCH_ORDER)
    tasks = len(values["train.teachers"]) if values["train.task_order"] == "together" else 1
    return Fraction(batches * size * processes, tasks), Fraction(batches * size, part * accumulation)


def test_every_adaptation_makes_the_same_round():
    """All small cases against the definition: a solution keeps the round, and none is missed."""
    assert set(BATCH_ORDER) == set(BATCH_KEYS)
    cases = itertools.product((1, 3), (1, 2, 4), (1, 2, 3), (1, 2), (1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 6, 8))
    found = impossible = 0
    for tasks, size, per_task, part, steps, before, now in cases:
        if size % part or tasks * per_task * size // part % steps:
            continue
        values = batch_values(tasks, size, per_task, part, steps)
        images = per_task * size * before
        try:
            new = adapted_batches(values, before, now)
        except ValueError as error:
            impossible += 1
            sizes = itertools.product(range(1, size + 1), range(1, part + 1))
            assert not any(possible(tasks, images, steps, now, b, p) for b, p in sizes)
            assert str(now) not in re.findall(r"\d+", str(error).split("Use")[1])
            continue
        found += 1
        assert geometry(values | new, now) == geometry(values, before)
        new_size, batches, new_part, _ = (new[name] for name in BATCH_ORDER)
        assert batches % tasks == 0 and new_size % new_part == 0
        assert new_size <= size and new_part <= part
        if images % (size * now) == 0 and steps == 1:
            assert (new_size, new_part) == (size, part), "memory is used as before"
    assert found > 500 and impossible > 100


def possible(tasks, images, steps, now, size, part):
    if size % part or images % (size * now):
        return False
    return (tasks * images // now // part) % steps == 0


def test_a_step_every_few_rounds_stays_that():
    values = batch_values(2, 2, 1, 2, 1) | {"train.gradient_accumulation_steps": 6}  # three rounds of two
    assert adapted_batches(values, 4, 2)["train.gradient_accumulation_steps"] == 12


def test_one_task_per_round_keeps_its_batches():
    values = batch_values(3, 2, 2, 2, 1, order="alternate")
    assert adapted_batches(values, 2, 1) == dict(zip(BATCH_ORDER, (2, 4, 2, 4), strict=True))


def test_the_same_keys_are_adapted_and_other_ones_are_not(saved_run):
    _, config = saved_run(written_for=4)
    start = find_start(config, 2)
    adapted = start.config.sample.num_batches_per_epoch, start.config.train.gradient_accumulation_steps
    assert adapted == (4, 4)
    assert "4 -> 2" in start.notes[0] and "sample.num_batches_per_epoch 2 -> 4" in start.notes[0]
    assert (start.given, start.written_for) == (config, 4), "the next resume starts from what was given"
    assert check(start.config, 2).shape.images_per_round == check(config, 4).shape.images_per_round
    assert find_start(config, 4).config is config
    config.train.ema_repeats = 0
    assert ema_repeats(flatten(config)) == ema_repeats(flatten(find_start(config, 2).config)) == 2
    config.sample.num_batches_per_epoch = config.train.gradient_accumulation_steps = 4
    assert find_start(config, 2).written_for == 2, "adapted by hand"
    with pytest.raises(ResumeError) as caught:
        find_start(config, 4)
    assert "8 -> 16" in str(caught.value)
    assert find_start(config, 4, allow_change=True).config is config


def test_a_number_of_processes_that_cannot_share_the_round(saved_run):
    folder, config = saved_run(written_for=2)
    with pytest.raises(ResumeError) as caught:
        find_start(config, 3)
    assert str(folder) in str(caught.value) and "1, 2 or 4" in str(caught.value)


def test_images_of_a_prompt_may_lie_in_several_batches(saved_run):
    _, config = saved_run(4, train__algorithm="nft", sample__num_image_per_prompt=8)
    plans = check(find_start(config, 1).config, 1), check(config, 4)
    assert [plan.shape.groups_per_task for plan in plans] == [2, 2]


def test_a_configuration_that_is_wrong_in_itself_is_left_to_its_own_check(saved_run):
    _, config = saved_run(written_for=4)
    config.sample.train_batch_size = "two"
    assert find_start(config, 2).config is config


def processes_of(root):
    return [checkpoint.load_scalars(root / f"checkpoint-{n}" / "state")["num_processes"] for n in (1, 2, 3)]


def test_two_processes_then_one_equal_one(tiny_config, tmp_path):
    """The same command all along; the undisturbed run is one process with the batches of two."""
    common = {"sample__noise_level": 0.7, "train__ema": True, "save_freq": 1}
    doubled = {"sample__num_batches_per_epoch": 4, "train__gradient_accumulation_steps": 4}
    complete = train(tiny_config(run_name="complete", num_epochs=3, **common, **doubled))
    train_forked(tiny_config(num_epochs=2, resume_from="auto", **common))
    resumed = train(tiny_config(num_epochs=3, resume_from="auto", **common))
    assert processes_of(resumed.parent) == [2, 2, 1]
    assert_equal_rounds(*(metrics(tmp_path / "logs" / name) for name in ("complete", "run")))
    for name, tensor in student(complete).items():
        torch.testing.assert_close(tensor, student(resumed)[name], rtol=1e-3, atol=5e-5)


@pytest.mark.slow
def test_one_process_then_two_then_one_from_rewards(tiny_config, tmp_path):
    """A batch of four becomes two of two and four again; groups of a prompt are spread over both processes."""
    settings = {"train__algorithm": "nft", "sample__num_image_per_prompt": 4, "save_freq": 1, "resume_from": "auto"}
    settings |= {"sample__train_batch_size": 4, "train__batch_size": 4, "sample__num_batches_per_epoch": 2}
    complete, run = (tiny_config(run_name=name, **settings) for name in ("complete", "run"))
    for task in (*complete.train.teachers, *run.train.teachers):
        task["proxy_reward"] = {"tiny_scene": 1.0}  # smooth in the pixels, as a file's size is not
    train(complete)
    for run.num_epochs, start in ((1, train), (2, train_forked), (3, train)):
        start(run)
    assert processes_of(tmp_path / "logs" / "run" / "checkpoints") == [1, 2, 1]
    assert_equal_rounds(*(metrics(tmp_path / "logs" / name) for name in ("complete", "run")), rel=2e-3)


# --- what lies behind the names ---------------------------------------------------------------------------------------


def test_another_experiment_is_refused_before_weights_load(finished, capsys, monkeypatch):
    folder, config = finished("opd", num_epochs=4, train__target="x0", train__learning_rate=1e-4)
    before = files_of(folder)
    for dry_run in (True, False):
        with pytest.raises(ResumeError) as caught, monkeypatch.context() as patch:
            patch.setattr(loading, "load_backbone", lambda *a, **k: pytest.fail("weights were loaded"))
            train(config, dry_run=dry_run)
        assert all(fact in str(caught.value) for fact in ("checkpoint-3", "train.target: 'velocity' -> 'x0'"))
        assert "learning_rate" not in str(caught.value)
    assert files_of(folder) == before
    capsys.readouterr()
    assert train(config, allow_config_change=True).name == "checkpoint-4"
    printed = capsys.readouterr().out
    for fact in ("checkpoint-3", "num_epochs: 3 -> 4", "train.learning_rate: 0.001 -> 0.0001", "train.target: 'velo"):
        assert fact in printed


def test_another_algorithm_is_refused_and_can_be_allowed(finished, monkeypatch):
    """NFT's old policy and the average then start from the student, as in a run that begins with a LoRA."""
    folder, config = finished("opd", num_epochs=4)
    last = folder / "checkpoints" / "checkpoint-3"
    tensors, scalars = checkpoint.load_state(last / "state")
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("ema.")}

    def write(new):
        shutil.copytree(last, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(checkpoint.MANIFEST))
        checkpoint.save_state(new / "state", without, scalars)

    checkpoint.save(last.parent, last.name, write)
    changed = config.copy_and_resolve_references()
    changed.train.algorithm, changed.sample.num_image_per_prompt = "nft", 2
    with pytest.raises(ResumeError, match="train.algorithm: 'opd' -> 'nft'"):
        train(changed)
    restore, starts = setup.restore, []

    def restored(resume, optimizer, ema, algorithm):
        restore(resume, optimizer, ema, algorithm)
        before = [tensor.clone() for tensor in algorithm.state().values()]
        starts.extend(zip(optimizer.parameters, [t.clone() for t in ema.shadow], before, strict=True))
        for i, (own, average, old) in enumerate(starts):
            assert torch.equal(own, tensors[f"student.{i}"])
            assert torch.equal(own, average) and torch.equal(own, old)

    monkeypatch.setattr(setup, "restore", restored)
    assert any(name.startswith("old.") for name in state(train(changed, allow_config_change=True)))
    assert starts
    with pytest.raises(ResumeError, match="train.algorithm: 'nft' -> 'opd'"):
        train(config)


def test_changed_files_under_the_same_names_are_noticed(tiny_config, make_lora, tmp_path):
    config = tiny_config(num_epochs=1)
    first, second = config.train.teachers
    first["lora_path"] = str(shutil.copytree(first["lora_path"], tmp_path / "teacher"))
    second["dataset"] = str(shutil.copytree(second["dataset"], tmp_path / "prompts"))
    train(config)
    before = (tmp_path / "logs" / "run" / "metrics.jsonl").read_bytes()
    config.num_epochs, config.resume_from = 2, "auto"
    shutil.rmtree(tmp_path / "teacher")
    shutil.copytree(make_lora(99), tmp_path / "teacher")
    with pytest.raises(RunError) as caught:
        train(config)
    assert "the teacher of first" in str(caught.value) and "checkpoint-1" in str(caught.value)
    prompts = tmp_path / "prompts" / "train.txt"
    prompts.write_text(prompts.read_text() + "one more\n")
    with pytest.raises(RunError, match="the prompts of second"):
        train(config)
    assert (tmp_path / "logs" / "run" / "metrics.jsonl").read_bytes() == before
    assert train(config, allow_config_change=True).name == "checkpoint-2"
    config.num_epochs = 3
    assert train(config).name == "checkpoint-3", "from here on they are what the run is trained with"


def test_the_base_models_digest_sees_its_weights_and_not_its_adapters(backbone, adapters, tiny_config):
    config = tiny_config()
    for i, task in enumerate(config.train.teachers):
        task["name"] = "ab"[i]
    tasks = check(config, 1).tasks
    policies = Policies(backbone, adapters)
    before = weight_digests(tasks, policies)
    assert list(before) == ["the base model (torch.float32)", "the teacher of a", "the teacher of b"]
    with torch.no_grad():
        adapters.parameters(STUDENT)[0].add_(1)
        assert weight_digests(tasks, policies) == before
        adapters.parameters("teacher_a")[3].view(-1)[5] += 1e-6
        backbone.transformer.transformer_blocks[2].ff.net[0].proj.bias[0] += 1e-6
    now = weight_digests(tasks, policies)
    assert [name for name in before if now[name] != before[name]] == list(before)[:2]
    adapters.configs["teacher_a"].alpha_pattern = {"^x": 2.0}
    assert weight_digests(tasks, policies)["the teacher of a"] != now["the teacher of a"]


# --- damage -----------------------------------------------------------------------------------------------------------


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
    with pytest.warns(UserWarning, match="checkpoint-3"), pytest.raises(RunError) as caught:
        find_checkpoint("auto", checkpoints.parent)
    assert str(checkpoints) in str(caught.value)
    with pytest.raises(RunError):
        find_checkpoint(None, checkpoints.parent)
    assert sorted(path.name for path in checkpoints.iterdir()) == kept


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"architectures": ["Mine"]}'),
        ("config.json", '{"train": {}}'),
        ("config.json", "[1]"),
        ("config.json", ""),
        ("metrics.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n'),
        ("metrics.jsonl", '{"step": 1}'),
        ("metrics.jsonl", "step,loss"),
        ("metrics.jsonl", '{"round": 1}\n{"epoch": 2}\n'),
    ],
)
def test_files_of_other_programs_are_not_replaced(name, content, tiny_config, tmp_path):
    run = tmp_path / "logs" / "run"
    run.mkdir(parents=True)
    (run / name).write_text(content)
    for resume_from in (None, "auto"):
        for dry_run in (False, True):
            with pytest.raises(RunError) as refused:
                train(tiny_config(resume_from=resume_from), dry_run=dry_run)
            assert str(run / name) in str(refused.value)
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [(name, content)]


def test_no_checkpoint_yet_is_a_fresh_start(tmp_path):
    """Whatever a crash left of a run's own files: they are no other program's."""
    (tmp_path / "checkpoints" / ".partial-checkpoint-1.1.host.00000000").mkdir(parents=True)
    for rest in (None, "", '{"round": 2, "lo', '{"ro', "\0" * 100, '{"round": 2\n'):
        if rest is not None:
            (tmp_path / "metrics.jsonl").write_text('{"round": 1, "loss": 1.0}\n' + rest)
        for wanted in (None, "", "auto"):
            assert find_checkpoint(wanted, tmp_path) is None


def test_a_checkpoint_of_another_run_does_not_go_on_in_this_runs_folder(checkpoints, tmp_path):
    shutil.copytree(checkpoints.parent, tmp_path / "other")
    source = tmp_path / "other" / "checkpoints" / "checkpoint-2"
    with pytest.raises(RunError) as caught:
        find_checkpoint(str(source), checkpoints.parent)
    assert str(source) in str(caught.value) and "checkpoint-3" in str(caught.value)
    assert find_checkpoint(str(source), tmp_path / "third") == source
    assert find_checkpoint(str(checkpoints / "checkpoint-1"), checkpoints.parent) == checkpoints / "checkpoint-1"


def test_a_checkpoint_of_a_later_version_is_neither_skipped_nor_called_damaged(checkpoints, monkeypatch):
    newest = checkpoints / "checkpoint-3"
    shutil.rmtree(newest)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 2)
        checkpoint.save(checkpoints, newest.name, lambda folder: (folder / "new").write_text("new"))
    for wanted in ("auto", str(newest)):
        with pytest.raises(checkpoint.NewerFormatError, match="checkpoint-3"):
            find_checkpoint(wanted, checkpoints.parent)


def test_other_versions_are_said_in_one_line(saved_run, monkeypatch):
    _, config = saved_run(written_for=1)
    now = versions()
    before = now | {"torch": "2.12.0", "peft": "0.1"}
    load = checkpoint.load_scalars
    monkeypatch.setattr(resume.checkpoint, "load_scalars", lambda folder: load(folder) | {"versions": before})
    note = find_start(config, 1).notes[-1]
    assert f"peft 0.1 -> {now['peft']}" in note and f"torch 2.12.0 -> {now['torch']}" in note
    assert "python" not in note


def test_the_checkpoint_that_was_resumed_is_gone_on_from_and_kept(finished, monkeypatch):
    folder, config = finished("opd", rounds=2, num_epochs=4, num_checkpoint_limit=1)
    root = folder / "checkpoints"
    before, config.resume_from = student(root / "checkpoint-1"), str(root / "checkpoint-1")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Opd, "round", lambda *_, **__: 1 / 0)
        train(config)
    config.resume_from = "auto"  # not the later one, whose metrics are gone
    train(config)
    assert [row["round"] for row in metrics(folder)] == [1, 2, 3, 4]
    assert sorted(path.name for path in checkpoint.folders(root)) == ["checkpoint-1", "checkpoint-4"]
    assert_bitwise(student(root / "checkpoint-1"), before)


def test_what_a_start_without_a_checkpoint_left_is_kept(tiny_config, tmp_path):
    """Its metrics are the only trace of why it ended."""
    run = tmp_path / "logs" / "run"
    run.mkdir(parents=True)
    left = {"metrics.jsonl": '{"round": 1, "loss": 7.0}\n', "config.json": '{"sample": {}, "train": {}}'}
    for name, content in left.items():
        (run / name).write_text(content)
        (run / f"{name}.1").write_text("of an earlier one")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl\.2"):
        train(tiny_config(num_epochs=1, resume_from="auto"))
    assert {name: (run / f"{name}.2").read_text() for name in left} == left
    assert [row["round"] for row in metrics(run)] == [1] and metrics(run)[0]["loss"] != 7.0
