"""Configuration files, upstream's among them, and the command line."""

from __future__ import annotations

import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent

import pytest

from diffusionopd.config_schema import ConfigError, split_arguments
from diffusionopd.training import check, load_config
from diffusionopd.training.command import parse, plain_errors

from .conftest import ROOT

OPD = ROOT / "config" / "opd.py"

# A base file as upstream users have one: fewer keys than ours, some that distillation does not use, other defaults.
UPSTREAM_BASE = """
    from ml_collections import ConfigDict

    def get_config():
        config = ConfigDict()
        for key, value in dict(
            run_name="", debug=False, seed=7, logdir="logs", num_epochs=100000, save_freq=20, eval_freq=20,
            num_checkpoint_limit=5, mixed_precision="fp16", allow_tf32=True, resume_from=None, use_lora=True,
            dataset="", resolution=768, activation_checkpointing=False, fsdp_optimizer_offload=False, save_dir="",
            save_eval_dir="", run_project="opd", prompt_fn="general_ocr", prompt_fn_kwargs={},
            per_prompt_stat_tracking=True, reward_fn=ConfigDict(), proxy_reward_fn=ConfigDict(),
        ).items():
            config[key] = value
        config.pretrained = ConfigDict(dict(model="", revision=""))
        config.sample = ConfigDict(dict(
            num_steps=40, eval_num_steps=40, guidance_scale=4.5, batch_size=1, train_batch_size=1, test_batch_size=1,
            num_image_per_prompt=1, num_batches_per_epoch=2, global_std=True, noise_level=0.7, same_latent=False,
            sde_window_size=0, sde_window_range=(0, 5),
        ))
        config.train = ConfigDict(dict(
            batch_size=1, use_8bit_adam=False, learning_rate=3e-4, gradient_accumulation_steps=1, num_inner_epochs=1,
            cfg=True, adv_clip_max=5, clip_range=1e-4, clip_range_lt=1e-4, clip_range_gt=1e-4, timestep_fraction=1.0,
            timestep_shift=3.0, beta=0.0, lora_path=None, ema=False,
        ))
        return config
"""

UPSTREAM_OPD = """
    LOAD

    def get_config(name):
        return globals()[name]()

    def teacher(name, guidance, prompt_fn="general_ocr"):
        return dict(
            name=name,
            dataset=os.path.join(os.getcwd(), "dataset", name),
            lora_path=os.path.join(os.getcwd(), "loras", name),
            proxy_reward={name: 1.0},
            prompt_fn=prompt_fn,
            guidance_scale=guidance,
        )

    def mine():
        config = base.get_config()
        config.run_name = "mine"
        config.save_dir = "logs/opd/mine"
        config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
        config.resolution = 512
        config.save_freq = 30
        config.sample.num_steps = 10
        config.sample.solver = "flow"
        config.sample.deterministic = False
        config.sample.noise_level = 0.0
        config.sample.eval_guidance_scale = 4.5
        config.sample.teacher_guidance_scale = 4.5
        config.sample.train_batch_size = 3
        config.sample.test_batch_size = 16
        config.sample.num_batches_per_epoch = 2
        config.train.batch_size = config.sample.train_batch_size
        config.train.gradient_accumulation_steps = config.sample.num_batches_per_epoch
        config.train.timestep_fraction = 0.99
        config.train.ema = True
        config.train.teachers = [teacher("ocr", 4.5), teacher("geneval", 1.0, "geneval")]
        config.reward_fn = {"ocr": 1.0}
        config.prompt_fn = "geneval"
        return config
"""

WITH_IMP = """import imp
    import os
    base = imp.load_source("base", os.path.join(os.path.dirname(__file__), "base.py"))"""
WITH_IMPORTLIB = """import importlib.util
    import os
    spec = importlib.util.spec_from_file_location("base", os.path.join(os.path.dirname(__file__), "base.py"))
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)"""


@pytest.fixture
def upstream(prompt_files):
    """The opd.py of a checkout with upstream-style configuration files, prompts and LoRAs, which is where we are."""
    (prompt_files / "config").mkdir()
    (prompt_files / "config" / "base.py").write_text(dedent(UPSTREAM_BASE))
    file = prompt_files / "config" / "opd.py"
    file.write_text(dedent(UPSTREAM_OPD.replace("LOAD", WITH_IMP)))
    for name in ("ocr", "geneval"):
        shutil.copytree(ROOT / "assets" / "tiny" / "teachers" / "ocr" / "lora", prompt_files / "loras" / name)
    return file


@pytest.fixture
def own(tmp_path):
    """`own(text)`: the path of a configuration file of the user's."""

    def write(text):
        (tmp_path / "own.py").write_text(text)
        return tmp_path / "own.py"

    return write


@pytest.mark.parametrize("load", [WITH_IMP, WITH_IMPORTLIB], ids=["imp", "importlib"])
def test_an_upstream_file_works_unchanged(upstream, load, monkeypatch):
    monkeypatch.setattr("diffusionopd.training.checks.lacking", lambda *of: "")  # all rewards are here
    upstream.write_text(dedent(UPSTREAM_OPD.replace("LOAD", load)))
    config = load_config(f"{upstream}:mine")
    assert config.seed == 7  # theirs
    assert config.train.lora_rank == 32  # ours, which theirs does not have
    plan = check(config, 8)
    assert [task.guidance_scale for task in plan.tasks] == [4.5, 1.0]
    assert (plan.shape.images_per_round, plan.sampler.trained_steps) == (48, 9)
    assert plan.run.run_dir == upstream.parent.parent / "logs/opd/mine"
    (note,) = plan.notes
    ignored = ("prompt_fn", "reward_fn", "sample.global_std", "sample.sde_window_range", "train.timestep_shift")
    assert note.endswith(", ".join(ignored))


def test_an_upstream_file_works_with_our_base(upstream, monkeypatch):
    """Dropped into our config/ folder, it assigns to our defaults; the stand-in for imp is gone afterwards."""
    (upstream.parent / "base.py").write_text((OPD.parent / "base.py").read_text())
    monkeypatch.delitem(sys.modules, "imp", raising=False)
    assert check(load_config(f"{upstream}:mine"), 8).shape.images_per_round == 48
    assert sys.modules.keys().isdisjoint({"imp", "base"})


def test_a_configuration_may_import_what_lies_beside_it(own, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "rewards_of_mine.py").write_text("SEED = 5\n")
    file = own("def mine():\n    import rewards_of_mine as mine\n    return {'seed': mine.SEED}\n")
    assert load_config(f"{file}:mine").seed == 5


def test_threads_may_load_files_at_once(own):
    file = own('import time\n\ndef slow():\n    time.sleep(0.05)\n    return {"seed": 3}\n')
    with ThreadPoolExecutor(3) as pool:
        assert [config.seed for config in pool.map(load_config, [f"{file}:slow"] * 3)] == [3, 3, 3]
    assert "imp" not in sys.modules


def test_a_file_may_have_functions_plain_dicts_and_config_dicts(own):
    file = own('def small():\n    return {"seed": 3, "sample": {"num_steps": 4}}\n')
    config = load_config(f"{file}:small")
    assert (config.seed, config.sample.num_steps, config.sample.guidance_scale) == (3, 4, 4.5)
    assert config.run_name == "small"
    with pytest.raises(ConfigError, match="small"):
        load_config(f"{file}:smal")
    config = load_config(str(own('def get_config():\n    return {"seed": 3}\n')))
    assert (config.run_name, config.seed) == ("own", 3), "with one configuration it needs no name"
    inner = "ConfigDict({'train': {'teachers': [ConfigDict({'name': 'a'})]}})"
    file = own(f"from ml_collections import ConfigDict\ndef mine():\n    return {inner}\n")
    config = load_config(f"{file}:mine", [("train.teachers[0].name", "b")])
    assert config.train.teachers == [{"name": "b"}]


def test_what_cannot_be_found_is_said():
    for source, *facts in (
        ("nowhere.py:mopd", "nowhere.py"),
        (f"{OPD}:mopdd", "'mopdd'", "mopd?"),
        (f"{OPD}:zzz", *(f"{OPD}:{name}" for name in ("mopd", "sopd_pickscore", "sopd_ocr", "sopd_geneval"))),
        (str(OPD), f"{OPD}:mopd"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(source)
        (problem,) = caught.value.problems
        assert [fact for fact in facts if fact not in problem] == []


def test_errors_of_the_file_itself_are_passed_on(own):
    for line, error, fact in (("return {}[1]", KeyError, "1"), ("raise TypeError('own')", TypeError, "own")):
        file = own(f"def get_config(name):\n    {line}\n")
        with pytest.raises(error, match=fact):
            load_config(f"{file}:any")


def test_overrides_take_the_form_that_the_key_has():
    config = load_config(
        f"{OPD}:mopd",
        [
            ("train.learning_rate", "1e-4"),
            ("run_name", "17"),
            ("log_with", "none"),
            ("train.cfg", "false"),
            ("train.ema", None),
            ("resume_from", "auto"),
            ("pretrained.revision", "None"),
            ("train.teachers[2].guidance_scale", "2.5"),
            ("train.teachers[0].lora_path", "a/b"),
            ("train.lora_target_modules", "('attn.to_q', 'attn.to_k')"),
            ("eval_variants.unguided.guidance_scale", "1.0"),
            ("reward_options.ocr.engine", "paddleocr"),
        ],
    )
    assert config.train.learning_rate == 1e-4
    assert (config.run_name, config.log_with, config.resume_from) == ("17", "none", "auto")
    assert (config.train.cfg, config.train.ema, config.pretrained.revision) == (False, True, None)
    assert config.train.teachers[2]["guidance_scale"] == 2.5
    assert config.train.teachers[0]["lora_path"] == "a/b"
    assert config.train.lora_target_modules == ("attn.to_q", "attn.to_k")
    assert config.eval_variants.to_dict() == {"unguided": {"guidance_scale": 1.0}}
    assert config.reward_options.to_dict() == {"ocr": {"engine": "paddleocr"}}


def test_overrides_that_have_no_place_are_reported_together():
    """And one of another form alone, with the form."""
    with pytest.raises(ConfigError) as caught:
        load_config(f"{OPD}:mopd", [("trian.learning_rate", "1"), ("train.teachers[5].name", "x"), ("", "1")])
    assert len(caught.value.problems) == 3
    assert "train.learning_rate" in caught.value.problems[0]
    for key in ("train.teachers.0.guidance_scale", "train..x", "train.teachers[x].name", "a b", "reward_options."):
        with pytest.raises(ConfigError) as caught:
            load_config(f"{OPD}:mopd", [(key, "1")])
        (problem,) = caught.value.problems
        assert key in problem and "train.teachers[0].guidance_scale" in problem and "Error" not in problem


def test_arguments_are_split():
    arguments = ["--config", "a.py:x", "--dry_run", "--config.seed=3", "--config.train.ema", "--config.run_name", "n"]
    source, overrides, rest = split_arguments([*arguments, "--other=1", "file", "--config=b.py:y"])
    assert source == "b.py:y"
    assert overrides == [("seed", "3"), ("train.ema", None), ("run_name", "n")]
    assert rest == ["--dry_run", "--other=1", "file"]
    assert split_arguments(["--configuration=1"]) == (None, [], ["--configuration=1"])
    with pytest.raises(ConfigError, match="--config"):
        split_arguments(["--config"])


def test_the_command_line_of_the_scripts(capsys, monkeypatch):
    parsed = parse(["--config.seed=3", "--dry_run"], "usage", default=f"{OPD}:mopd")
    assert (parsed["config"].seed, parsed["dry_run"], parsed["allow_config_change"]) == (3, True, False)
    with pytest.raises(SystemExit):
        parse(["--help"], "how it is used")
    assert capsys.readouterr().out == "how it is used\n"
    for arguments, fact in ((["--dryrun"], "--dryrun"), ([], "--config")):
        with pytest.raises(ConfigError, match=fact):
            parse(arguments, "usage")
    with plain_errors():
        for file, own in ((str(ROOT / "diffusionopd" / "files.py"), True), ("/other/library.py", False)):
            shown = warnings.formatwarning("said", UserWarning, file, 1, "")
            assert "said" in shown and (file not in shown and shown.count("\n") == 1) == own
    error = ValueError("wrong")
    error.add_note("in round 2")
    for rank, raised, status, said in (
        ("0", error, 1, "in round 2"),
        ("0", ConfigError(["x"]), 2, "x"),
        ("1", error, 1, ""),
    ):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended, plain_errors():
            raise raised
        printed = capsys.readouterr().err
        assert ended.value.code == status and said in printed and bool(printed) == bool(said)
