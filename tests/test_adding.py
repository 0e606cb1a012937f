"""What is added takes one place: a configuration key its declaration, an algorithm a file and an entry."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location

import pytest

from diffusionopd import config_schema
from diffusionopd.algorithms import ALGORITHMS
from diffusionopd.config_schema import FREE, REFUSE, ConfigError, Problems, Schema, flatten, key, keys_of, read
from diffusionopd.training import check, train
from diffusionopd.training.keys import COMMON, SCHEMA
from diffusionopd.training.resume import ResumeError

from .helpers import assert_bitwise, metrics, state


@dataclass(frozen=True)
class Added:
    """A new group."""

    strength: float = key("train.added_strength", 0.5, "(0, 2]", resume=FREE)
    """How strongly."""
    kind: str = key("added_kind", "soft", choices=("soft", "hard"))
    """Which one."""


def test_adding_a_key_takes_its_declaration_alone(tmp_path):
    """It is checked, set on the command line, explained, has a resume rule, and is read back."""
    schema = Schema(*COMMON, Added)
    file = tmp_path / "mine.py"
    file.write_text("def mine():\n    return {'added_kind': 'hard'}\n")
    config = config_schema.load_config(schema, f"{file}:mine", [("train.added_strength", "1.5")])
    values = flatten(config)
    assert read(Added, values) == Added(1.5, "hard")
    assert (config.train.learning_rate, flatten(schema.config())["train.added_strength"]) == (3e-4, 0.5)
    problems = Problems()
    schema.check(values | {"train.added_strength": 2.5, "added_kind": "sof"}, lambda name: True, problems)
    first, second = sorted(problems.found)
    assert all(fact in first for fact in ("added_kind", "'sof'", "'soft', 'hard'"))
    assert all(fact in second for fact in ("train.added_strength", "2.5", "(0, 2]"))
    declared = schema.keys["train.added_strength"]
    assert (declared.resume, schema.keys["added_kind"].resume, declared.group) == (FREE, REFUSE, Added)
    with pytest.raises(ConfigError, match="train.added_strength"):
        config_schema.load_config(schema, f"{file}:mine", [("train.added_strenth.x", "1")])


PULL = """
from dataclasses import dataclass

from diffusionopd.algorithms.base import Algorithm
from diffusionopd.algorithms.results import Result
from diffusionopd.algorithms.settings import Nfe, TeacherSettings
from diffusionopd.config_schema import key
from diffusionopd.transitions import per_sample_mean


@dataclass(frozen=True)
class PullSettings:
    '''Pulling.'''

    strength: float = key("train.pull_strength", 2.0, "(0, inf)")
    '''How strongly.'''


class Pull(Algorithm):
    '''The student is pulled to its teachers on pure noise.'''

    name = "pull"
    groups = (PullSettings, TeacherSettings)
    has_teachers = True

    def round(self, batches, step=True):
        losses = self.losses(batches)
        for batch in batches:
            for n in batch.steps:
                sigma = self.transitions[n].sigma
                target = self.teacher(batch)(batch.noise, sigma)
                difference = self.student(batch)(batch.noise, sigma) - target
                loss = self.settings.strength * per_sample_mean(difference.square())
                self.optimizer.backward(losses.add(batch, n, loss))
        return Result(losses=losses, grad_norm=self.update(losses, step))

    @classmethod
    def count(cls, plan):
        visits = plan.shape.images_per_round * plan.sampler.trained_steps
        teachers = sum(plan.nfe(task.guidance_scale) for task in plan.tasks) / len(plan.tasks)
        return Nfe(student=visits * plan.nfe(plan.sampler.guidance), teacher=round(visits * teachers))
"""


@pytest.fixture
def pull(tmp_path, monkeypatch):
    """The file, the entry in the registry, and what an import with that entry makes of it: the schema's keys."""
    file = tmp_path / "pull.py"
    file.write_text(PULL)
    spec = spec_from_file_location("pull", file)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pull", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(ALGORITHMS, "pull", module.Pull)
    declared = SCHEMA.keys["train.algorithm"]
    monkeypatch.setitem(SCHEMA.keys, declared.name, dataclasses.replace(declared, choices=tuple(ALGORITHMS)))
    for each in keys_of(module.PullSettings).values():
        monkeypatch.setitem(SCHEMA.keys, each.name, each)


def test_adding_an_algorithm_takes_a_file_and_an_entry(pull, tiny_config, tmp_path):
    """It is checked, counted, trained, saved and resumed."""
    options = {"train__algorithm": "pull", "save_freq": 2}
    config = tiny_config(num_epochs=4, **options)
    last = train(config)
    rows = metrics(tmp_path / "logs" / "run")
    assert len(rows) == 4 and rows[-1]["loss"] < rows[0]["loss"]
    nfe = check(config, 1).nfe_per_round
    assert [row["evaluations"] for row in rows] == [nfe.student + nfe.teacher] * 4
    resumed = tiny_config(num_epochs=4, run_name="resumed", resume_from=str(last.parent / "checkpoint-2"), **options)
    assert_bitwise(state(train(resumed)), state(last))
    for value, error in ((0, ConfigError), (3.0, ResumeError)):
        resumed.run_name, resumed.train.pull_strength = "changed", value
        with pytest.raises(error, match=r"train\.pull_strength"):
            train(resumed)
