"""The shipped configurations and the checks on them: values, types, paths, arithmetic, and what each error says."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from diffusionopd.config_schema import ConfigError, base_config, check, load_config
from diffusionopd.config_schema.values import CHOICES, INTERVALS, NO_EFFECT, flatten

ROOT = Path(__file__).resolve().parent.parent
OPD = ROOT / "config" / "opd.py"
TINY = ROOT / "config" / "tiny.py"
REWARDS = ("pickscore", "ocr", "geneval", "tiny_compose", "tiny_ocr", "tiny_scene")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the prompt files that config/opd.py names."""
    monkeypatch.chdir(tmp_path)
    for name in ("pickscore", "ocr"):
        for split, lines in (("train", 30), ("test", 4)):
            _write(tmp_path / "dataset" / name / f"{split}.txt", "a sign\n" * lines + "\n")
    for split in ("train", "test"):
        _write(tmp_path / "dataset" / "geneval" / f"{split}_metadata.jsonl", '{"prompt": "a dog"}\n' * 20)
    return tmp_path


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _problems(config, num_processes=8, reward_names=REWARDS) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        check(config, num_processes, reward_names)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


# ---- The shipped configurations --------------------------------------------------------------------------------------


def test_mopd_has_the_published_plan(folder):
    plan = check(load_config(f"{OPD}:mopd"), 8, REWARDS)
    assert [teacher.name for teacher in plan.teachers] == ["pickscore", "ocr", "geneval"]
    assert [teacher.guidance_scale for teacher in plan.teachers] == [4.5, 4.5, 1.0]
    assert plan.teachers[1].lora_path == "quanhaol/DiffusionOPD/OCRTeacher/lora"
    assert (plan.batch_size, plan.batches_per_task) == (3, 1)
    assert (plan.images_per_task, plan.images_per_round, plan.groups_per_task) == (24, 72, 24)
    assert (plan.num_steps, plan.trained_steps) == (10, 9)
    assert (plan.kernel, plan.noise_level, plan.multistep) == ("ode", 0.0, False)
    assert plan.student_guidance == 4.5
    assert plan.run_dir == Path("logs/mopd")
    assert plan.num_prompts == (30, 30, 20)


def test_evaluations_count_guidance_and_trained_steps(folder):
    plan = check(load_config(f"{OPD}:mopd"), 8, REWARDS)
    assert plan.student_evaluations == 72 * 9 * 2
    assert plan.teacher_evaluations == 24 * 9 * (2 + 2 + 1)
    config = load_config(f"{OPD}:mopd", [("train.cfg", "false"), ("train.num_inner_epochs", "2")])
    assert check(config, 8).student_evaluations == 72 * 9 * 2
    assert check(config, 8).student_guidance == 1.0
    assert check(config, 8).base_evaluations == 0
    config.train.beta = 0.1
    assert check(config, 8).base_evaluations == 72 * 9 * 2
    assert "1296 of the transformer a round, for train.beta" in check(config, 8).describe()


@pytest.mark.parametrize("name", ["sopd_pickscore", "sopd_ocr", "sopd_geneval"])
def test_single_teacher_configurations(folder, name):
    plan = check(load_config(f"{OPD}:{name}"), 8, REWARDS)
    assert [f"sopd_{teacher.name}" for teacher in plan.teachers] == [name]
    assert (plan.images_per_round, plan.batches_per_task, plan.run_dir) == (72, 3, Path("logs", name))


@pytest.mark.parametrize("name", ["mopd", "sopd_compose", "sopd_ocr", "sopd_scene"])
def test_tiny_configurations(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "assets/tiny/model/model_index.json", "{}")
    for task in ("compose", "ocr", "scene"):
        _write(tmp_path / f"assets/tiny/teachers/{task}/lora/adapter_model.safetensors", "")
        _write(tmp_path / f"assets/tiny/dataset/{task}/train.txt", "a\n")
        _write(tmp_path / f"assets/tiny/dataset/{task}/train_metadata.jsonl", "{}\n")
    plan = check(load_config(f"{TINY}:{name}"), 2, REWARDS)
    assert plan.images_per_round == 24
    assert plan.student_guidance == 1.0
    assert all(list(teacher.proxy_reward) == [f"tiny_{teacher.name}"] for teacher in plan.teachers)


def test_describe_names_every_count_and_origin(folder):
    text = check(load_config(f"{OPD}:mopd"), 8).describe()
    for part in (
        "stabilityai/stable-diffusion-3.5-medium (hub)",
        "logs/mopd",
        "72 pictures",
        "24 pictures of 24 prompts",
        "9 of 10 trained, kernel ode",
        "1296 of the transformer",
        "1080 of the transformer",
        "30 prompts, all seen every 1.25 rounds",
        "quanhaol/DiffusionOPD/GenEvalTeacher/lora (hub), guidance none (1.0)",
    ):
        assert part in text
    assert "note:" not in text


def test_loading_twice_gives_independent_configurations():
    first = load_config(f"{OPD}:mopd")
    first.train.teachers[0]["proxy_reward"]["ocr"] = 2.0
    first.train.teachers[0]["name"] = "changed"
    assert load_config(f"{OPD}:mopd").train.teachers[0]["name"] == "pickscore"


# ---- The tables of the schema ----------------------------------------------------------------------------------------


def test_the_tables_name_existing_keys_and_cover_every_number():
    defaults = flatten(base_config())
    assert set(CHOICES) | set(INTERVALS) | NO_EFFECT <= set(defaults)
    numbers = {key for key, value in defaults.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    assert numbers - NO_EFFECT == set(INTERVALS)


def test_the_documentation_has_every_key_with_its_default():
    text = (ROOT / "docs" / "configuration.md").read_text()
    documented = dict(re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \|", text, re.MULTILINE))
    defaults = {key: repr(value) for key, value in flatten(base_config()).items()}
    defaults["train.lora_target_modules"] = "(see the file)"
    assert documented == defaults


# ---- Solvers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver, noise, deterministic, expected",
    [
        ("flow", 0.7, False, ("flow_sde", 0.7, False)),
        ("dance", 0.3, False, ("dance_sde", 0.3, False)),
        ("cps", 1, False, ("cps", 1.0, False)),
        ("ddim", 0.5, False, ("ddim", 0.5, False)),
        ("flow", 0.7, True, ("ode", 0.0, False)),
        ("dance", 0.0, False, ("ode", 0.0, False)),
        ("dpm1", 0.7, False, ("ode", 0.0, False)),
        ("dpm2", 0.0, False, ("ode", 0.0, True)),
    ],
)
def test_solver_becomes_a_kernel(folder, solver, noise, deterministic, expected):
    config = load_config(f"{OPD}:mopd")
    config.sample.update({"solver": solver, "noise_level": noise, "deterministic": deterministic})
    plan = check(config, 8)
    assert (plan.kernel, plan.noise_level, plan.multistep) == expected
    ignored = noise > 0 and plan.kernel == "ode"
    assert ("sample.noise_level 0.7 is ignored" in plan.describe()) == ignored


def test_policy_gradient_needs_noise(folder):
    config = load_config(f"{OPD}:mopd", [("train.loss", "policy_gradient")])
    assert "needs a sampler with noise" in _problems(config)[0]
    config.sample.noise_level = 0.7
    config.train.target = "x0"
    assert "train.target is ignored" in check(config, 8).describe()


@pytest.mark.parametrize("solver", ["cps", "ddim"])
def test_noise_above_one_is_refused_where_it_has_no_meaning(folder, solver):
    config = load_config(f"{OPD}:mopd", [("sample.solver", solver), ("sample.noise_level", "1.1")])
    assert _problems(config) == (f"sample.noise_level is 1.1. Solver {solver!r} takes at most 1.",)


# ---- Names, types, ranges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, near",
    [
        ("train.learning_rte", "train.learning_rate"),
        ("sample.num_step", "sample.num_steps"),
        ("resolutoin", "resolution"),
        ("sample.learning_rate", "train.learning_rate"),
    ],
)
def test_unknown_keys_name_the_nearest(folder, key, near):
    config = load_config(f"{OPD}:mopd", [(key, "1")])
    assert _problems(config) == (f"{key} is not a configuration key. Did you mean {near}?",)


def test_a_missing_key_is_named(folder):
    config = load_config(f"{OPD}:mopd")
    del config.train.learning_rate
    assert _problems(config)[0].startswith("train.learning_rate is missing.")


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 1.5),
        ("seed", True),
        ("seed", -1),
        ("num_epochs", 0),
        ("num_epochs", "many"),
        ("allow_tf32", 1),
        ("use_lora", False),
        ("mixed_precision", "fp61"),
        ("run_name", 3),
        ("resolution", 520),
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
        ("log_with", "mlflow"),
        ("cache_dir", ""),
        ("vae_device", "gpu0"),
        ("text_encoder_device", 3),
    ],
)
def test_a_bad_value_is_one_problem_that_names_key_and_value(folder, key, value):
    config = load_config(f"{OPD}:mopd")
    section, _, leaf = key.rpartition(".")
    (config[section] if section else config)[leaf] = value
    problems = _problems(config)
    assert len(problems) == 1
    assert problems[0].startswith(f"{key} ")


def test_integers_are_accepted_for_floats(folder):
    config = load_config(f"{OPD}:mopd", [("train.learning_rate", "1"), ("sample.guidance_scale", "4")])
    assert check(config, 8).student_guidance == 4.0


def test_all_problems_are_reported_together(folder):
    config = load_config(
        f"{OPD}:mopd",
        [
            ("train.learning_rte", "1"),
            ("sample.num_steps", "ten"),
            ("resolution", "500"),
            ("pretrained.model", "path/to/sd3"),
            ("train.teachers[1].lora_path", "path/to/ocr"),
            ("train.gradient_accumulation_steps", "4"),
        ],
    )
    problems = _problems(config)
    keys = [problem.split(" ")[0] for problem in problems]
    assert sorted(keys) == [
        "pretrained.model",
        "resolution",
        "sample.num_steps",
        "train.gradient_accumulation_steps",
        "train.learning_rte",
        "train.teachers[1].lora_path",
    ]


# ---- Batch arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([("sample.num_batches_per_epoch", "4"), ("train.gradient_accumulation_steps", "4")], "Set it to 6"),
        ([("sample.num_image_per_prompt", "5")], "Choose a divisor of 24"),
        ([("train.batch_size", "2")], "Choose a divisor of 3"),
        ([("train.gradient_accumulation_steps", "4")], "Set it to 3 (3 batches x 3 pictures / 3), or a multiple"),
        ([("train.batch_size", "1")], "Set it to 9 (3 batches x 3 pictures / 1)"),
    ],
)
def test_batch_arithmetic_says_what_would_be_right(folder, overrides, message):
    problems = _problems(load_config(f"{OPD}:mopd", overrides))
    assert len(problems) == 1
    assert message in problems[0]


def test_processes_wait_longer_for_each_other_than_for_a_reward(folder):
    teacher = ROOT / "config" / "teacher.py"
    waits = [("reward_timeout", "1800"), ("sample.train_batch_size", "9")]
    (problem,) = _problems(load_config(f"{teacher}:guard_ocr", waits), reward_names=None)
    assert problem.startswith("reward_timeout is 1800 seconds, not below the 1800 of collective_timeout")
    check(load_config(f"{teacher}:guard_ocr", [*waits, ("collective_timeout", "2000")]), 8)
    check(load_config(f"{teacher}:guard_ocr", [*waits, ("sample.num_batches_per_epoch", "128")]), 1)  # nobody waits
    check(load_config(f"{OPD}:mopd", waits[:1]), 8)  # it is only watched


def test_groups_share_prompts_across_processes(folder):
    plan = check(load_config(f"{OPD}:mopd", [("sample.num_image_per_prompt", "8")]), 8)
    assert (plan.images_per_task, plan.groups_per_task) == (24, 3)


def test_no_processes_is_a_programming_error(folder):
    with pytest.raises(ValueError, match="num_processes"):
        check(load_config(f"{OPD}:mopd"), 0)


# ---- Paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["", None, "path/to/model", "<model>", "None"])
def test_placeholder_models_are_named_as_such(folder, model):
    config = load_config(f"{OPD}:mopd")
    config.pretrained.model = model
    problem = "a placeholder" if model in ("path/to/model", "<model>") else "is not set"
    assert problem in _problems(config)[0]


@pytest.mark.parametrize("model", ["nowhere", "./a/b", "/nowhere/at/all", "owner/name/sub", "dataset/missing"])
def test_a_model_that_is_neither_here_nor_a_hub_id(folder, model):
    config = load_config(f"{OPD}:mopd", [("pretrained.model", model)])
    assert "does not exist here" in _problems(config)[0]


def test_a_local_model_must_be_a_pipeline_folder(folder):
    config = load_config(f"{OPD}:mopd", [("pretrained.model", "dataset")])
    assert "has no model_index.json" in _problems(config)[0]
    _write(folder / "dataset" / "model_index.json", "{}")
    assert check(config, 8).model == "dataset"


def test_teacher_sources(folder):
    config = load_config(f"{OPD}:sopd_ocr")
    for source, problem in [
        (None, "is not set"),
        ("path/to/lora", "a placeholder"),
        ("./nowhere", "does not exist here"),
        ("somewhere.safetensors", "does not exist here"),
        ("dataset/lora", "does not exist here"),
        ("dataset", "a folder without a .safetensors file"),
        ("dataset/ocr/train.txt", "not a .safetensors file"),
        (7, "not a string"),
    ]:
        config.train.teachers[0]["lora_path"] = source
        assert _problems(config)[0].startswith("train.teachers[0].lora_path is")
        assert problem in _problems(config)[0]
    _write(folder / "run" / "lora" / "adapter_model.safetensors", "")
    for source in ("run", "run/lora", "run/lora/adapter_model.safetensors", "owner/name", "owner/name/a/b"):
        config.train.teachers[0]["lora_path"] = source
        assert check(config, 8).teachers[0].lora_path == source
    config.train.lora_path = "dataset"
    assert _problems(config)[0].startswith("train.lora_path is dataset")


def test_prompt_files_must_be_there(folder):
    config = load_config(f"{OPD}:sopd_ocr")
    (folder / "dataset/ocr/test.txt").unlink()
    assert "lacks dataset/ocr/test.txt" in _problems(config)[0]
    config.eval_freq = 0  # without evaluations the test prompts are not needed
    check(config, 8)
    (folder / "dataset/ocr/train.txt").write_text("\n \n")
    assert "no prompt in dataset/ocr/train.txt" in _problems(config)[0]
    (folder / "dataset/ocr/train.txt").unlink()
    assert "lacks dataset/ocr/train.txt" in _problems(config)[0]


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("name", "pickscore", "is 'pickscore' for 2 teachers"),
        ("name", "a/b", "must be made of letters"),
        ("name", None, "must be made of letters"),
        ("prompt_fn", "genval", "Did you mean geneval?"),
        ("guidance_scale", 0.5, "at least 1"),
        ("guidance_scale", "high", "at least 1"),
        ("proxy_reward", {"pikscore": 1.0}, "Did you mean pickscore?"),
        ("proxy_reward", {"ocr": "high"}, "finite number"),
        ("proxy_reward", "ocr", "must be a dict"),
        ("dataset", "path/to/data", "a placeholder"),
        ("loar_path", "x", "Did you mean lora_path?"),
    ],
)
def test_teacher_fields(folder, field, value, message):
    config = load_config(f"{OPD}:mopd")
    config.train.teachers[1][field] = value
    problems = _problems(config)
    assert len(problems) == 1
    assert message in problems[0]


def test_a_teacher_that_is_no_dict(folder):
    config = load_config(f"{OPD}:sopd_ocr")
    config.train.teachers = ["ocr"]
    assert "must be a dict with name" in _problems(config)[0]


def test_teacher_guidance_falls_back_to_the_common_one(folder):
    config = load_config(f"{OPD}:sopd_ocr", [("sample.teacher_guidance_scale", "3")])
    del config.train.teachers[0]["guidance_scale"]
    assert check(config, 8).teachers[0].guidance_scale == 3


def test_a_run_folder_under_a_file_is_refused(folder):
    _write(folder / "taken", "")
    config = load_config(f"{OPD}:mopd", [("save_dir", "taken/run"), ("cache_dir", "taken/cache")])
    assert [problem.split(" ")[0] for problem in _problems(config)] == ["save_dir", "cache_dir"]


def test_save_dir_is_the_run_folder(folder):
    assert check(load_config(f"{OPD}:mopd", [("save_dir", "here/run")]), 8).run_dir == Path("here/run")
    assert not (folder / "here").exists()


def test_a_run_needs_a_name_or_a_folder(folder):
    config = load_config(f"{OPD}:mopd")
    config.run_name = ""
    assert _problems(config) == ("run_name is empty. Set run_name (and logdir), or save_dir.",)


def test_resume_from(folder):
    config = load_config(f"{OPD}:mopd")
    for source in (None, "", "auto"):
        config.resume_from = source
        check(config, 8)
    config.resume_from = "checkpoint-10"
    assert "does not exist" in _problems(config)[0]
    (folder / "checkpoint-10").mkdir()
    assert "no state/" in _problems(config)[0]
    (folder / "checkpoint-10" / "state").mkdir()
    check(config, 8)


def test_trackers(folder, monkeypatch):
    config = load_config(f"{OPD}:mopd", [("log_with", "wandb,tensorboard")])
    monkeypatch.setattr("diffusionopd.config_schema.sources.find_spec", lambda name: None)
    assert "pip install -e '.[wandb,tensorboard]'" in _problems(config)[0]
    monkeypatch.setattr("diffusionopd.config_schema.sources.find_spec", lambda name: name)
    check(config, 8)


def test_settings_without_effect_are_named_once(folder):
    config = load_config(
        f"{OPD}:mopd", [("train.timestep_shift", "3"), ("sample.sde_window_size", "2"), ("debug", "true")]
    )
    config.sample.sde_window_range = [0, 0]  # a list where the default is a tuple: the same setting
    config.reward_fn = {"ocr": 1.0}
    notes = check(config, 8).notes
    assert notes == ("without effect on distillation: debug, reward_fn, sample.sde_window_size, train.timestep_shift",)


def test_drawn_steps_change_the_counts_of_a_round(folder):
    config = load_config(f"{OPD}:mopd", [("train.steps_per_rollout", "2")])
    plan = check(config, 8)
    assert plan.student_evaluations == 72 * 2 * 2
    assert plan.teacher_evaluations == 24 * 2 * (2 + 2 + 1)
    pairs = list(itertools.combinations(range(9), 2))
    walked = sum(last - 1 for _, last in pairs) / len(pairs)  # steps before the last drawn one, without the first drawn
    assert plan.sampling_evaluations == round(72 * 2 * walked)
    assert "2 of them supervised in each rollout" in plan.describe()
    config.train.steps_per_rollout = 10
    assert "is 10, more than the 9 trained steps. Set it to at most 9" in _problems(config)[0]
    config.train.steps_per_rollout = 9
    plan = check(config, 8)
    assert (plan.student_evaluations, plan.sampling_evaluations) == (72 * 9 * 2, 0)
    config.train.algorithm = "sft"
    plan = check(config, 8)
    assert plan.steps_per_rollout == 0
    assert "without effect on sft: train.steps_per_rollout" in plan.describe()
