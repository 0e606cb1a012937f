"""What a configuration leaves to the base model, and what a base model cannot be asked."""

from __future__ import annotations

import json

import pytest
from ml_collections import ConfigDict

from diffusionopd.config_schema import ConfigError
from diffusionopd.evaluation.testsets import find_benchmark
from diffusionopd.models.loading import BackboneError
from diffusionopd.training import check, load_config, train
from diffusionopd.training.keys import SCHEMA, with_model_values

from .conftest import ROOT
from .families import flux1
from .families.common import write_lora
from .helpers import metrics

LEFT = [name for name, key in SCHEMA.keys.items() if key.from_model]


def left_open(config: ConfigDict) -> ConfigDict:
    config.update_from_flattened_dict(dict.fromkeys(LEFT))
    return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """FLUX.1: with guidance as an input, and without any."""
    found = {}
    for name, embeds in (("dev", True), ("schnell", False)):
        found[name] = tmp_path_factory.mktemp(name) / "model"
        flux1.build(found[name], embeds)
    return found


def test_none_is_the_familys_value_and_is_saved_as_such(tiny_config, folders, tmp_path):
    config = left_open(tiny_config())
    with pytest.raises(ConfigError, match=r"resolution is 1024"):
        check(config, 1)  # what the family's published models draw, not this one
    config.resolution = 64
    plan = check(config, 1)
    own, others = plan.model.defaults, [name for name in LEFT if name != "resolution"]
    assert [plan.values[name] for name in others] == [getattr(own, SCHEMA.keys[name].from_model) for name in others]
    config.resolution = None
    assert {task.guidance_scale for task in plan.tasks} == {1.0, 2.0}, "a task's own stays"
    config.pretrained.model = "nobody/not-here"
    with pytest.raises(ConfigError) as caught:
        check(config, 1)
    (problem,) = caught.value.problems
    assert all(name in problem for name in LEFT)
    with pytest.raises(BackboneError, match=r"nobody/not-here.*cannot be loaded"):  # a run asks the hub, and says why
        with_model_values(config)
    config.pretrained.model = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError) as caught:
        check(config, 1)
    assert [problem.split()[0] for problem in caught.value.problems] == ["pretrained.model"]

    values = {"max_sequence_length": 28, "mixed_precision": "no", "resolution": 32, "num_epochs": 1}
    config = tiny_config(pretrained__model=str(folders["dev"]), cache_dir=str(tmp_path / "cache"), **values)
    config.sample.guidance_scale = config.sample.teacher_guidance_scale = config.sample.num_steps = None
    for i, task in enumerate(config.train.teachers):
        del task["guidance_scale"]
        task["lora_path"] = write_lora(folders["dev"], tmp_path / f"teacher{i}", seed=i)
    config.train.cfg = True
    nfe = check(config, 1).nfe_per_round
    saved = json.loads((train(config) / "config.json").read_text())
    assert (saved["sample"]["num_steps"], saved["sample"]["guidance_scale"]) == (28, 3.5)
    (row,) = metrics(tmp_path / "logs" / "run")
    assert row["evaluations"] == nfe.student + nfe.teacher == 2 * 27 * 4, "guidance costs no second forward"


def test_guidance_that_a_base_does_not_have_is_refused(tiny_config, folders):
    def problems(folder: str, **values: object) -> set[str]:
        base = {"pretrained__model": str(folders[folder]), "max_sequence_length": 28, "resolution": 32, "eval_freq": 1}
        config = tiny_config(**base, **values)
        for task in config.train.teachers:
            task["lora_path"] = "nobody/not-here"
        with pytest.raises(ConfigError) as caught:
            check(config, 1)
        return {problem.split()[0] for problem in caught.value.problems}

    second = {"train.teachers[1].guidance_scale"}
    evaluated = {f"train.teachers[{i}].eval_guidance_scale" for i in range(2)}
    assert problems("dev", train__cfg=False) == {"train.cfg"}
    unguided = {"train__cfg": False, "sample__eval_guidance_scale": 1.0}
    assert problems("schnell", **unguided) == second
    guided = {"train__cfg": True, "sample__guidance_scale": 3.5, "sample__eval_guidance_scale": 3.5}
    assert problems("schnell", **guided) == second | evaluated | {"sample.guidance_scale"}
    variants = {"guided": {"guidance_scale": 4.5}, "short": {"num_steps": 2}}
    assert problems("schnell", **unguided, eval_variants=variants) == second | {"eval_variants"}


def test_the_evaluator_takes_the_models_own_values_at_last(folders, monkeypatch):
    monkeypatch.chdir(ROOT)
    own = check(load_config("config/tiny.py:mopd"), 1).model.defaults
    found = find_benchmark(
        "assets/tiny/dataset/ocr", {"sample": {"eval_num_steps": None}}, limit=1, defaults=lambda: own
    )
    assert (found.num_steps, found.guidance_scale) == (own.num_steps, own.guidance_scale)
    given = find_benchmark("assets/tiny/dataset/ocr", {"sample": {"eval_num_steps": 7}}, limit=1, guidance_scale=2.0)
    assert (given.num_steps, given.guidance_scale) == (7, 2.0)
