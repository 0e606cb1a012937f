"""The comparisons' driver: what is run in which order, and one experiment from end to end in its short form."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from diffusionopd.evaluation.results import Summary
from diffusionopd.files import write_atomically
from diffusionopd.training import check, load_config
from experiments.claims.curves import ClaimsError, Result
from experiments.claims.experiments import BASELINES, LABELS, RATES, TASKS
from experiments.claims.run import Run, Runner, plan, run_all

from .conftest import ROOT


def test_teachers_come_before_their_students_and_once():
    names = [run.name for run in plan(["opd", "teacher_ocr", "sft"], [1, 2])]
    first = ["teacher_compose-seed1", "teacher_ocr-seed1", "teacher_scene-seed1", "opd-seed1", "sft-seed1"]
    assert names == first + [name.replace("seed1", "seed2") for name in first]


@pytest.mark.slow
def test_every_experiment_is_a_sound_configuration(monkeypatch):
    monkeypatch.chdir(ROOT)
    trained = [name for name in LABELS if Run(name, 1).trained]
    assert len(trained) == 19
    plans = {name: check(load_config(f"experiments/claims/config.py:{name}"), 1) for name in trained}

    def forwards(name: str) -> int:
        nfe, rounds = plans[name].nfe_per_round, plans[name].shape.num_rounds
        return (nfe.student + nfe.teacher + nfe.sampling + nfe.base) * rounds

    teachers = sum(forwards(f"teacher_{task}") for task in TASKS)
    for baseline in BASELINES:
        assert forwards(baseline) == pytest.approx(teachers + forwards("opd"), rel=0.02)
    for rates in RATES.values():
        configs = {rate: load_config(f"experiments/claims/config.py:{name}") for rate, name in rates.items()}
        assert [config.train.learning_rate for config in configs.values()] == [float(rate) for rate in rates]
        assert len({config.num_epochs for config in configs.values()}) == 1


def result(run: Run, rounds: int) -> Result:
    final = dict.fromkeys(TASKS, Summary(0.5, 0.0, 6))
    return Result(run.experiment, "", run.seed, "short", rounds, 1.0, 1.0, 0.0, [], final, "none", "2026-01-01")


def finish(runner: Runner, run: Run, rounds: int = 3) -> None:
    """Leave what a finished run leaves, in the driver's order and as atomically: it is read while others still run."""
    write_atomically(runner.folder(run) / "checkpoints" / "latest", "checkpoint-3")
    write_atomically(runner.result_file(run), json.dumps(asdict(result(run, rounds))))


@pytest.fixture
def driven(tmp_path, monkeypatch):
    """A runner that leaves what runs leave, except for those that are to fail; and what was done."""
    done, failing = [], set()

    def do(self, run):
        if run.experiment in failing:
            raise RuntimeError("out of luck")
        done.append(run.experiment)
        finish(self, run)

    monkeypatch.setattr(Runner, "do", do)
    return Runner(tmp_path, tmp_path, short=True), done, failing


def test_a_failure_is_told_and_the_others_go_on(driven):
    runner, done, failing = driven
    failing.add("teacher_ocr")
    failures = run_all(plan(["opd", "guard_scene"], [1]), runner, jobs=2)
    assert sorted(done) == ["guard_scene", "teacher_compose", "teacher_scene"]
    assert failures == ["teacher_ocr-seed1: out of luck", "opd-seed1: its teachers are missing"]


def test_a_teacher_without_its_folder_is_trained_again(driven):
    runner, done, _ = driven
    runs = plan(["opd"], [1])
    assert run_all(runs, runner, jobs=1) == []
    assert done == ["teacher_compose", "teacher_ocr", "teacher_scene", "opd"]
    (runner.folder(runs[1]) / "checkpoints" / "latest").write_text("checkpoint-0")  # cut short
    assert run_all(runs, runner, jobs=1) == [] and len(done) == 4  # nobody needs it
    runner.result_file(runs[3]).unlink()
    assert run_all(runs, runner, jobs=1) == [] and done[4:] == ["teacher_ocr", "opd"]


def test_a_kept_result_is_not_measured_again(tmp_path, monkeypatch):
    calls = []
    for name in ("_train", "_evaluate"):
        monkeypatch.setattr(Runner, name, lambda self, run, name=name: calls.append(name))
    monkeypatch.setattr(Runner, "_result", lambda self, run: result(run, 60))
    runner, run = Runner(tmp_path, tmp_path, short=False), Run("teacher_ocr", 1)
    for expected in (["_train", "_evaluate"], ["_train", "_evaluate", "_train"]):
        runner.do(run)
        assert calls == expected


def test_a_result_of_another_length_is_none(tmp_path):
    runner, run = Runner(tmp_path, tmp_path, short=False), Run("opd", 1)
    for rounds in (40, 80):
        finish(runner, run, rounds)
        assert runner.is_done(run) == (rounds == 80)
    runner.result_file(run).write_text("{")
    with pytest.raises(ClaimsError, match=r"opd-seed1\.json"):
        runner.is_done(run)


@pytest.mark.slow
def test_the_short_form_from_rewards_to_the_report(tmp_path):
    """Three teachers from rewards, their student, all evaluated; then what is shown of them."""
    script = str(ROOT / "experiments" / "claims" / "run.py")
    command = [sys.executable, script, "base", "opd", "--short", "--jobs", "1", "--logs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "short" / "results"
    teacher = json.loads((results / "teacher_scene-seed1.json").read_text())
    assert (teacher["rounds"], teacher["evaluations"], teacher["backwards"]) == (3, 3 * 192, 3 * 48)
    assert teacher["final"]["compose"]["count"] == 6
    assert teacher["curve"][0]["round"] == 3 and 0 <= teacher["curve"][0]["scores"]["scene"] <= 1
    base = json.loads((results / "base-seed1.json").read_text())
    (start,) = base["curve"]
    assert start["round"] == 0 and start["scores"].keys() == set(TASKS)
    lines = (tmp_path / "short" / "base-seed1" / "evaluation-0" / "scene" / "evaluation_results.jsonl").read_text()
    scores = [json.loads(line)["scores"]["tiny_scene"] for line in lines.splitlines()]
    assert start["scores"]["scene"] == pytest.approx(sum(scores[:4]) / 4) and len(scores) == 6
    student = json.loads((results / "opd-seed1.json").read_text())
    assert (student["evaluations"], student["teacher_evaluations"]) == (3 * 216, 3 * 3 * 192)
    used = json.loads((tmp_path / "short" / "opd-seed1" / "config.json").read_text())["train"]["teachers"]
    own = [tmp_path / "short" / f"teacher_{task}-seed1" / "checkpoints" / "checkpoint-3" / "lora" for task in TASKS]
    assert [teacher["lora_path"] for teacher in used] == list(map(str, own))
    text = (results / "claims.md").read_text()
    assert "Short form" in text and "| DiffusionOPD | 1 |" in text and "no run of multitask_nft" in text
    assert (results / "methods.png").is_file() and "One student reaches each of its teachers" in done.stdout
