"""Keys and checks on their values: types, ranges, paths, arithmetic; all mistakes together, each with key and value."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline

from diffusionopd.config_schema import ConfigError, Key, flatten, keys_of
from diffusionopd.training import agreement, base_config, check, load_config, train
from diffusionopd.training.keys import SCHEMA, ema_repeats, is_used, with_paths
from diffusionopd.training.resume import find_start
from diffusionopd.training.settings import tracker_names

from .conftest import ROOT

OPD = f"{ROOT}/config/opd.py"


pytestmark = pytest.mark.usefixtures("prompt_files")  # the current folder has those that config/opd.py names


def _set(config, name, value):
    section, _, leaf = name.rpartition(".")
    (config[section] if section else config)[leaf] = value


def problems_of(config, num_processes=8) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        check(config, num_processes)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def problem_of(config, *facts, num_processes=8) -> None:
    """There is one problem, which begins with the first fact, its key, and holds the others."""
    (problem,) = problems_of(config, num_processes)
    assert problem.startswith(f"{facts[0]} ") and all(fact in problem for fact in facts), (problem, facts)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_every_number_has_a_range_and_every_default_passes_its_own_check():
    for name, declared in SCHEMA.keys.items():
        number = isinstance(declared.default, int | float) and not isinstance(declared.default, bool)
        assert bool(declared.interval) == (number and declared.used), name
        assert declared.problem(declared.default) is None, name
        assert (declared.name, type(declared)) == (name, Key)
    assert flatten(base_config()) == SCHEMA.defaults()


def test_a_shared_key_is_declared_once():
    """The same name in several groups is one declaration, which they inherit."""
    declared: dict[str, Key] = {}
    for group in {declared.group for declared in SCHEMA.keys.values()}:
        for each in keys_of(group).values():
            first = declared.setdefault(each.name, each)
            assert (first.default, first.interval, first.resume) == (each.default, each.interval, each.resume)


def test_the_documentation_is_what_the_keys_render_to():
    configuration = pytest.importorskip("tools.configuration")
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == configuration.render()


# --- names, types, ranges ---------------------------------------------------------------------------------------------


def test_unknown_keys_name_the_nearest():
    for name, near in (
        ("train.learning_rte", "train.learning_rate"),
        ("sample.num_step", "sample.num_steps"),
        ("resolutoin", "resolution"),
        ("sample.learning_rate", "train.learning_rate"),
    ):
        problem_of(load_config(f"{OPD}:mopd", [(name, "1")]), name, near)
    config = load_config(f"{OPD}:mopd")
    del config.train.learning_rate
    assert problems_of(config)[0].startswith("train.learning_rate ")


def test_a_bad_value_is_one_problem_that_names_key_and_value():
    original = load_config(f"{OPD}:mopd")
    for name, value in (
        ("seed", 1.5),
        ("seed", True),
        ("seed", -1),
        ("num_epochs", 0),
        ("num_epochs", "many"),
        ("allow_tf32", 1),
        ("use_lora", False),
        ("mixed_precision", "fp61"),
        ("run_name", 3),
        ("resolution", 3),
        ("pretrained.model", 5),
        ("sample.guidance_scale", 0.0),
        ("sample.guidance_scale", float("nan")),
        ("sample.eval_guidance_scale", None),
        ("sample.solver", "euler"),
        ("sample.noise_level", -0.1),
        ("train.learning_rate", "1e-4"),
        ("train.learning_rate", 0),
        ("train.learning_rate", float("inf")),
        ("train.adam_beta2", 1.0),
        ("train.timestep_fraction", 1.1),
        ("train.timestep_fraction", 0.05),
        ("train.teachers", None),
        ("train.teachers", []),
        ("train.ema_decay", 1.0),
        ("train.lora_target_modules", "attn.to_q"),
        ("train.loss", "mse"),
        ("train.steps_per_rollout", 10),
        ("log_with", "comet"),
        ("cache_dir", ""),
        ("vae_device", "gpu0"),
        ("text_encoder_device", 3),
        ("reward_options", {"ocr": 1}),
        ("eval_variants", {"a/b": {"num_steps": 4}}),
        ("eval_variants", {"fast": {}}),
        ("eval_variants", {"fast": {"steps": 4}}),
        ("eval_variants", {"fast": {"num_steps": 4.5}}),
        ("eval_variants", {"fast": {"guidance_scale": 0.5}}),
        ("train.lr_scheduler", "exponential"),
        ("train.lr_warmup_steps", 10),
    ):
        config = copy.deepcopy(original)
        _set(config, name, value)
        problem_of(config, name, "empty" if value == [] else repr(value))


def test_what_needs_teachers_is_checked_where_there_are_none():
    for value in (None, 3):
        for changes in ({"train.algorithm": "sft"}, {"train.conditional_weight": 0.5}):
            config = load_config(f"{OPD}:mopd")
            for name, given in {**changes, "train.teachers": value}.items():
                _set(config, name, given)
            problem_of(config, "train.teachers", repr(value))
    config = load_config(f"{OPD}:mopd", [("train.algorithm", "nft"), ("train.old_policy_decay", "(0, 0.001, 7)")])
    assert any(problem.startswith("train.old_policy_decay ") for problem in problems_of(config))


def test_what_depends_on_the_model_and_the_rewards_is_reported_with_all_else(tiny_config):
    found = problems_of(tiny_config(resolution=60, reward_options={"jpeg_compressibility": {"qualty": 3}}, seed=-1), 1)
    assert len(found) == 3
    for key, *facts in (("resolution", "60", "8"), ("reward_options", "jpeg_c", "qualty"), ("seed", "-1")):
        (problem,) = [problem for problem in found if problem.startswith(f"{key} ")]
        assert all(fact in problem for fact in facts)


def test_integers_are_accepted_for_floats_and_a_task_falls_back_to_the_common_guidance():
    keys = ("train.learning_rate", "sample.guidance_scale", "sample.teacher_guidance_scale")
    config = load_config(f"{OPD}:mopd", [(name, "4") for name in keys])
    del config.train.teachers[0]["guidance_scale"]
    plan = check(config, 8)
    assert (plan.sampler.guidance, plan.tasks[0].guidance_scale) == (4.0, 4.0)


def test_all_problems_are_reported_together():
    wrong = {
        "train.learning_rte": "1",
        "sample.num_steps": "ten",
        "resolution": "5",
        "pretrained.model": "path/to/sd3",
        "train.teachers[1].lora_path": "path/to/ocr",
        "train.gradient_accumulation_steps": "4",
    }
    problems = problems_of(load_config(f"{OPD}:mopd", list(wrong.items())))
    assert sorted(problem.split(" ")[0] for problem in problems) == sorted(wrong)
    for name, value in wrong.items():
        assert name == "train.learning_rte" or any(p.startswith(name) and value in p for p in problems)


def test_no_processes_is_a_programming_error():
    with pytest.raises(ValueError, match="num_processes"):
        check(load_config(f"{OPD}:mopd"), 0)


# --- what must go together --------------------------------------------------------------------------------------------


def test_solver_becomes_a_kernel():
    for solver, noise, deterministic, expected in (
        ("flow", 0.7, False, ("flow_sde", False)),
        ("dance", 0.3, False, ("dance_sde", False)),
        ("cps", 1, False, ("cps", False)),
        ("ddim", 0.5, False, ("ddim", False)),
        ("flow", 0.7, True, ("ode", False)),
        ("dance", 0.0, False, ("ode", False)),
        ("dpm1", 0.7, False, ("ode", False)),
        ("dpm2", 0.0, False, ("ode", True)),
    ):
        config = load_config(f"{OPD}:mopd")
        config.sample.update({"solver": solver, "noise_level": noise, "deterministic": deterministic})
        plan = check(config, 8)
        assert (plan.sampler.kernel, plan.sampler.multistep) == expected
        ignored = any("sample.noise_level" in note for note in plan.notes)
        assert ignored == (noise > 0 and plan.sampler.kernel == "ode")


def test_keys_to_which_the_others_leave_nothing_are_named(tmp_path):
    shutil.copytree(ROOT / "assets/tiny/teachers/ocr/lora", tmp_path / "run" / "lora")
    config = load_config(f"{OPD}:mopd", [("train.ema", "False"), ("train.ema_decay", "0.5")])
    config.train.student_init_scale = 0.6
    config.train.lora_path, config.train.lora_target_modules = str(tmp_path / "run" / "lora"), ["attn.to_q"]
    (note,) = [note for note in check(config, 8).notes if "without effect" in note]
    for name in ("ema_decay", "student_init_scale", "lora_target_modules"):
        assert f"train.{name}" in note
    config = load_config(f"{OPD}:mopd", [("train.lora_target_modules", "['attn.to_q']")])
    assert not any("without effect" in note for note in check(config, 8).notes)
    for rounds in (2, 3):
        config = load_config(f"{OPD}:mopd", [("train.task_order", "cascade"), ("num_epochs", str(rounds))])
        config.sample.num_batches_per_epoch = config.train.gradient_accumulation_steps = 1
        assert any("cascade" in note for note in check(config, 8).notes) == (rounds < 3)


def test_samplers_and_losses_must_suit_the_noise():
    config = load_config(f"{OPD}:mopd", [("train.loss", "policy_gradient"), ("train.target", "x0")])
    problem_of(config, "train.loss", "'policy_gradient'", "noise")
    config.sample.noise_level = 0.7
    assert any("train.target" in note for note in check(config, 8).notes)
    for solver in ("cps", "ddim"):
        config = load_config(f"{OPD}:mopd", [("sample.solver", solver), ("sample.noise_level", "1.1")])
        problem_of(config, "sample.noise_level", "1.1", repr(solver), "1.")
        for name, value in (("loss", "policy_gradient"), ("algorithm", "grpo"), ("algorithm", "grpo_guard")):
            config = load_config(f"{OPD}:mopd", [("sample.solver", solver), (f"train.{name}", value)])
            config.sample.update({"noise_level": 0.7, "num_image_per_prompt": 3})
            check(config, 8)
            config.train.timestep_fraction = 1.0  # the last step ends without noise
            problem_of(config, "train.timestep_fraction", "0.99", repr(value))
            config.sample.solver = "flow"
            check(config, 8)


def test_batch_arithmetic_says_what_would_be_right():
    for overrides, name, facts in (
        ({"sample.num_batches_per_epoch": "4", "train.gradient_accumulation_steps": "4"}, 0, ("4", "3", "6")),
        ({"sample.num_image_per_prompt": "5"}, 0, ("5", "24")),
        ({"train.batch_size": "2"}, 0, ("2", "3")),
        ({"train.gradient_accumulation_steps": "4"}, 0, ("4", "3 (3 batches x 3 images / 3)", "multiple")),
        ({"train.batch_size": "1"}, "train.gradient_accumulation_steps", ("3", "9 (3 batches x 3 images / 1)")),
    ):
        config = load_config(f"{OPD}:mopd", list(overrides.items()))
        problem_of(config, name or next(iter(overrides)), *facts)
    shape = check(load_config(f"{OPD}:mopd", [("sample.num_image_per_prompt", "8")]), 8).shape
    assert (shape.images_per_task, shape.groups_per_task) == (24, 3)


def test_processes_wait_longer_for_each_other_than_for_a_reward():
    guard = f"{ROOT}/config/teacher.py:guard_ocr"
    waits = [("reward_timeout", "1800"), ("sample.train_batch_size", "9")]
    problem_of(load_config(guard, waits), "reward_timeout", "1800", "collective_timeout")
    check(load_config(guard, [*waits, ("collective_timeout", "2000")]), 8)
    check(load_config(guard, [*waits, ("sample.num_batches_per_epoch", "128")]), 1)  # nobody waits
    check(load_config(f"{OPD}:mopd", waits[:1]), 8)  # it is only monitored


# --- paths ------------------------------------------------------------------------------------------------------------


def test_models_are_hub_ids_or_pipeline_folders():
    config = load_config(f"{OPD}:mopd")
    for model in ("", None, "path/to/model", "<model>", "None"):
        config.pretrained.model = model
        problem_of(config, "pretrained.model", "placeholder" if model in ("path/to/model", "<model>") else "not set")
    for model in ("owner/in-your-style", "owner/xpath-tools"):  # words that may be in a name
        config.pretrained.model = model
        check(config, 8)
    for model in ("nowhere", "./a/b", "/nowhere/at/all", "owner/name/sub", "dataset/missing", "dataset"):
        config.pretrained.model = model
        problem_of(config, "pretrained.model", model)


def test_teacher_sources(tmp_path):
    config = load_config(f"{OPD}:sopd_ocr")
    task = config.train.teachers[0]
    for source in (
        *(None, "path/to/lora", "./nowhere", "somewhere.safetensors", "owner/x.safetensors", "dataset/lora", "dataset"),
        *("dataset/ocr/train.txt", 7),
    ):
        task["lora_path"] = source
        problem_of(config, "train.teachers[0].lora_path", "not set" if source is None else str(source))
    shutil.copytree(ROOT / "assets/tiny/teachers/ocr/lora", tmp_path / "run" / "lora")
    hub = ("owner/name", "owner/name/a/b", "owner/name/a b (1).safetensors", "owner/name/a@v1", "owner/name@refs/pr/1")
    shutil.copytree(tmp_path / "run" / "lora", tmp_path / "your-own" / "lora")
    for source in ("run", "run/lora", "run/lora/adapter_model.safetensors", "your-own/lora", *hub):
        task["lora_path"] = source
        assert check(config, 8).tasks[0].lora_path == source
    config.train.lora_path = "dataset"
    problem_of(config, "train.lora_path", "dataset")


def test_paths_of_every_key_and_task(tmp_path, monkeypatch):
    """``~`` is a home, a run stands for its checkpoint, and the project's own files are found from elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    paths = [name for name, declared in SCHEMA.keys.items() if declared.path]
    assert {name.rpartition(".")[2] for name in paths} >= {"logdir", "save_dir", "cache_dir", "model", "lora_path"}
    original = load_config(f"{OPD}:sopd_ocr")
    for name in paths:
        config = copy.deepcopy(original)
        _set(config, name, "~/x")
        assert flatten(with_paths(config))[name] == f"{tmp_path}/home/x", name
        _set(config, name, "~nobody-of-that-name/x")
        if is_used(name, "opd"):
            assert any(text.startswith(f"{name} ") for text in problems_of(config)), name
    config = copy.deepcopy(original)
    checkpoint = tmp_path / "home" / "run" / "checkpoints" / "checkpoint-2"
    shutil.copytree(ROOT / "assets" / "tiny" / "teachers" / "ocr" / "lora", checkpoint / "lora")
    (checkpoint.parent / "latest").write_text("checkpoint-2\n")
    task = config.train.teachers[0]
    task["lora_path"] = task["reference"] = config.train.lora_path = "~/run"
    task["strength"] = 1.5
    task["dataset"] = "~/ocr"
    assert all(f"{tmp_path}/home/ocr" in text for text in problems_of(config))
    (tmp_path / "dataset" / "ocr").rename(tmp_path / "home" / "ocr")
    plan = check(config, 8)
    assert {plan.tasks[0].lora_path, plan.tasks[0].reference, plan.values["train.lora_path"]} == {str(checkpoint)}
    checkpoint.rename(checkpoint.with_name("moved"))
    (checkpoint.parent / "latest").unlink()
    task["lora_path"] = task["reference"] = config.train.lora_path = "~/run/checkpoints/latest"
    wrong = {"train.lora_path", "train.teachers[0].lora_path", "train.teachers[0].reference"}
    assert {text.split(" ")[0] for text in problems_of(config)} == wrong

    tiny = check(load_config("config/tiny.py:mopd"), 1)
    assert Path(tiny.values["pretrained.model"]) == ROOT / "assets" / "tiny" / "model"
    assert {Path(task.dataset).parent for task in tiny.tasks} == {ROOT / "assets" / "tiny" / "dataset"}
    assert tiny.run.run_dir == tmp_path / "logs" / "tiny-mopd"
    missing = load_config("config/tiny.py:mopd", [("pretrained.model", "assets/x")])
    problem_of(missing, "pretrained.model", str(tmp_path))


def test_values_that_cannot_be_saved():
    """A problem of a key that counts; left out, with a note, where it does not."""
    for value in (len, {1, 2}, {"a": [{"b": len}]}, {("a", "b"): 1}, {"a": float("nan")}, Path("x"), b"x", 1 + 2j):
        config = load_config(f"{OPD}:mopd")
        config.reward_options = {"ocr": {"engine": value}}
        problem_of(config, "reward_options", "ocr.engine")
        config = load_config(f"{OPD}:mopd")
        config.prompt_fn_kwargs = {"f": value}
        assert any("prompt_fn_kwargs.f" in note for note in check(config, 8).notes)
        saved = find_start(config, 8).given.to_dict()
        assert json.loads(json.dumps(saved)).keys() == saved.keys() and saved["prompt_fn_kwargs"] == {}
        assert agreement.setup_facts(config.to_dict()) == agreement.setup_facts(copy.deepcopy(config).to_dict())


def test_prompt_files_must_be_there(tmp_path):
    config, name = load_config(f"{OPD}:sopd_ocr"), "train.teachers[0].dataset"
    (tmp_path / "dataset/ocr/test.txt").unlink()
    problem_of(config, name, "dataset/ocr/test.txt")
    config.eval_freq = 0  # without evaluations the test prompts are not needed
    check(config, 8)
    (tmp_path / "dataset/ocr/train.txt").write_text("\n \n")
    problem_of(config, name, "dataset/ocr/train.txt")
    (tmp_path / "dataset/ocr/train.txt").unlink()
    problem_of(config, name, "dataset/ocr/train.txt")
    plan = check(config, 8, sources=False)  # for counting only
    assert (plan.num_prompts, plan.shape.images_per_round) == ((0,), 72)


def test_a_task_may_have_several_folders():
    config = load_config(f"{OPD}:sopd_ocr")
    task, name = config.train.teachers[0], "train.teachers[0].datasets"
    task["dataset"], task["datasets"] = None, ["dataset/ocr", "dataset/pickscore"]
    plan = check(config, 8)
    assert (plan.num_prompts, plan.tasks[0].folders) == ((96 + 96,), ("dataset/ocr", "dataset/pickscore"))
    for wrong, fact in (("dataset/nowhere", "nowhere"), ("other/ocr", "'ocr'"), ("path/to/data", "path/to/data")):
        task["datasets"] = ["dataset/ocr", wrong]
        assert any(problem.startswith(name) and fact in problem for problem in problems_of(config))


def test_the_average_is_taken_as_often_as_published():
    for source, repeats in (
        ("opd.py:mopd", 3), ("opd.py:sopd_ocr", 3), ("teacher.py:guard_ocr", 8), ("teacher.py:nft_geneval", 1)
    ):  # fmt: skip
        config = load_config(f"{ROOT}/config/{source}", [("collective_timeout", "3600")])
        assert ema_repeats(check(config, 8).values) == repeats
        config.train.ema_repeats = 2
        assert ema_repeats(check(config, 8).values) == 2


def test_fields_of_tasks():
    original = load_config(f"{OPD}:mopd")
    for field, value, *facts in (
        ("name", "a/b", "'a/b'"),
        ("name", None),
        ("prompt_fn", "genval", "'genval'", "geneval"),
        ("guidance_scale", 0.5, "0.5"),
        ("guidance_scale", "high", "'high'"),
        ("eval_num_steps", 1.5, "1.5"),
        ("proxy_reward", {"pikscore": 1.0}, "'pikscore'", "pickscore"),
        ("proxy_reward", {"ocr": "high"}, "ocr", "'high'"),
        ("proxy_reward", "ocr", "'ocr'"),
        ("proxy_reward", {"ocr": -1.0}, "ocr", "-1.0"),
        ("proxy_reward", {"ocr": 0}, "above 0"),
        ("dataset", "path/to/data", "'path/to/data'"),
        ("datasets", ["dataset/ocr"], "'dataset/ocr'"),  # beside dataset
        ("datasets", [3], "[3]"),
        ("weight", 0.0, "0.0"),
        ("loar_path", "x", "lora_path"),
    ):
        config = copy.deepcopy(original)
        config.train.teachers[1][field] = value
        problem_of(config, f"train.teachers[1].{field}", *facts)
    original.train.teachers[1]["name"] = "pickscore"
    problem_of(original, "train.teachers[].name", "'pickscore'")
    original.train.teachers = ["ocr"]
    assert problems_of(original)[0].startswith("train.teachers[0] ")


def test_the_run_folder(tmp_path):
    (tmp_path / "taken").touch()
    config = load_config(f"{OPD}:mopd", [("save_dir", "taken/run"), ("cache_dir", "taken/cache")])
    assert sorted(problem.split(" ")[0] for problem in problems_of(config)) == ["cache_dir", "save_dir"]
    assert check(load_config(f"{OPD}:mopd", [("save_dir", "here/run")]), 8).run.run_dir == tmp_path / "here/run"
    assert not (tmp_path / "here").exists()
    config = load_config(f"{OPD}:mopd")
    config.run_name = ""
    problem_of(config, "run_name", "save_dir")


def test_resume_from(tmp_path):
    config = load_config(f"{OPD}:mopd")
    for source in (None, "", "auto"):
        config.resume_from = source
        check(config, 8)
    config.resume_from = "checkpoint-10"
    problem_of(config, "resume_from", "checkpoint-10")
    (tmp_path / "checkpoint-10").mkdir()
    problem_of(config, "resume_from", "checkpoint-10", "state")
    (tmp_path / "checkpoint-10" / "state").mkdir()
    check(config, 8)


def test_trackers(monkeypatch):
    """Named as people write them, and installed."""
    wanted = ["wandb", "tensorboard"]
    for value, names in ((None, []), ("", []), ("None", []), ("none, ", []), ("wandb, tensorboard", wanted)):
        assert tracker_names(value) == names
    config = load_config(f"{OPD}:mopd", [("log_with", "wandb,tensorboard")])
    monkeypatch.setattr("diffusionopd.training.settings.find_spec", lambda name: None)
    problem_of(config, "log_with", "[wandb,tensorboard]")
    monkeypatch.setattr("diffusionopd.training.settings.find_spec", lambda name: name)
    check(config, 8)


def test_rewards_that_cannot_be_had_are_named(tiny_config):
    config = tiny_config(reward_options={"imagereward": {"checkpoint": "reward_ckpts/none.pt"}})
    config.train.teachers[0]["proxy_reward"] = {"imagereward": 1.0, "jpeg_compressibility": 1.0}
    for watched in (1, 0):
        config.monitor_freq = config.eval_freq = watched
        assert [("imagereward" in n, "reward_ckpts/none.pt" in n) for n in check(config, 1).notes] == [
            (True, True)
        ] * watched


def test_a_run_from_rewards_that_cannot_be_had_is_no_consistent_one(tiny_config, capsys):
    missing = {"imagereward": {"checkpoint": "reward_ckpts/none.pt"}}
    config = tiny_config(train__algorithm="nft", reward_options=missing, sample__num_image_per_prompt=2)
    for task in config.train.teachers:
        task["proxy_reward"] = {"imagereward": 1.0}
    with pytest.raises(ConfigError, match=r"cannot start here: .*reward_ckpts/none\.pt"):
        train(config, dry_run=True)
    assert "rounds" in capsys.readouterr().out, "the plan is there all the same"


def test_a_task_that_nothing_scores_needs_no_test_prompts_and_is_not_counted(tiny_config, tmp_path):
    config = tiny_config(eval_freq=1)
    task = config.train.teachers[0]
    train_prompts = shutil.copytree(task["dataset"], tmp_path / "prompts", ignore=shutil.ignore_patterns("test*"))
    task |= {"proxy_reward": {}, "dataset": str(train_prompts)}
    plan = check(config, 1)
    assert plan.num_evaluated[0] == 0 < plan.num_evaluated[1]
    assert [f"scores them: {plan.tasks[0].name}" in note for note in plan.notes].count(True) == 1


@pytest.mark.parametrize(("tokens", "fits"), [(512, True), (513, False)])
def test_prompts_have_no_more_tokens_than_the_stock_pipeline_takes(tiny_config, pipeline_folder, tokens, fits):
    config = tiny_config(max_sequence_length=tokens)
    stock = StableDiffusion3Pipeline.from_pretrained(pipeline_folder)
    refused = nullcontext() if fits else pytest.raises(ValueError, match="512")
    with refused:
        stock.check_inputs("a", None, None, 64, 64, max_sequence_length=tokens)
    if fits:
        check(config, 1)
    else:
        problem_of(config, "max_sequence_length", "at most 512")


def test_settings_without_effect_are_named_once():
    unused = ("debug", "reward_fn", "sample.sde_window_size", "train.timestep_shift")
    config = load_config(
        f"{OPD}:mopd", [("train.timestep_shift", "3"), ("sample.sde_window_size", "2"), ("debug", "true")]
    )
    config.sample.sde_window_range = [0, 0]  # a list where the default is a tuple: the same setting
    config.reward_fn = {"ocr": 1.0}
    config.monitor_freq = config.eval_freq = 0
    (note,) = check(config, 8).notes
    assert all(name in note for name in unused) and "sde_window_range" not in note
