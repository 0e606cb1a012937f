"""The comparisons' driver: worlds whose prompts are apart, what is run in which order, and runs from end to end."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from diffusionopd.data.prompts import load_prompts
from diffusionopd.files import write_atomically
from diffusionopd.tiny.grammar import captions
from diffusionopd.training import check, load_config
from experiments.claims import run as driver
from experiments.claims.arms import OPD_ROUNDS, RATES, TEACHER_ROUNDS
from experiments.claims.config import arms_of
from experiments.claims.results import ClaimsError, Result
from experiments.claims.run import forecast, run_all
from experiments.claims.runs import Run, Runner, plan
from experiments.claims.worlds import SPLITS, TINY, WORLDS, split_captions

from .conftest import ROOT


def test_prompts_of_the_splits_are_apart_and_the_bases_own_are_not_for_test():
    for grammar in ("compose", "ocr", "scene"):
        splits = {split: {caption.text for caption in found} for split, found in split_captions(grammar).items()}
        everything = [text for texts in splits.values() for text in texts]
        known = {caption.text for split in ("train", "test") for caption in captions(grammar, split)}
        assert len(everything) == len(set(everything)) == len(known) and set(everything) == known
        assert {caption.text for caption in captions(grammar, "test")} <= splits["test"], "the base has not seen these"

    def pairs(split: str) -> set[frozenset]:
        include = [caption.metadata["include"] for caption in split_captions("compose")[split]]
        return {frozenset((t["color"], t["class"]) for t in things) for things in include if len(things) == 2}

    assert not pairs("train") & pairs("test") and not pairs("train") & pairs("validation")
    counts = TINY.counts()
    assert all(counts[task]["test"] >= least for task, least in {"compose": 200, "ocr": 400, "scene": 30}.items())


def test_files_are_read_as_the_splits(tmp_path):
    for world in WORLDS.values():
        world.write_prompts(tmp_path)
        for task in world.tasks:
            for split in SPLITS:
                name = "train" if split == "train" else "test"
                found = load_prompts(tmp_path / world.folder(task, split), task.prompt_fn, name)
                assert list(dict.fromkeys(prompt.text for prompt in found)) == [c.text for c in task.captions(split)]


def test_what_others_need_comes_before_them_and_once():
    names = [run.name for run in plan("tiny", ["opd_0.001", "strength_opd_24_2"], [1, 2])]
    tasks = ("compose", "ocr", "scene")
    first = [f"teacher_{task}{stage}-seed1" for task in tasks for stage in (".early", "")]
    first += ["opd_0.001.80-seed1", "opd_0.001-seed1", "strength_opd_24_2-seed1"]
    assert names == first + [name.replace("seed1", "seed2") for name in first]
    assert [each.name for each in Run("tiny", "paper_0.001", "", 1).needs][-1] == "paper_0.001.80-seed1"
    early = Run("tiny", "strength_opd_24_2", "", 3).teachers
    assert [each.name for each in early] == [f"teacher_{task}.early-seed3" for task in tasks]
    names = [run.name for run in plan("tiny", ["strength_opd_60_1", "folded_opd_at2"], [1])]
    assert names[-2:] == ["folded_opd-seed1", "folded_opd_at2-seed1"]
    assert names[-3] == f"opd_{RATES['opd'][-1]:g}-seed1", "strength 1 is what validation chooses of the rates"


@pytest.mark.slow
def test_every_arm_is_a_sound_configuration_and_baselines_cost_the_same(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("tiny", "opposed"):
        world = WORLDS[name]
        world.write_prompts(ROOT)
        arms = arms_of(world)
        costs = {}
        for arm in arms.values():
            if arm.trained:
                nfe = check(load_config(f"experiments/claims/config.py:{name}/{arm.name}"), 1).nfe_per_round
                costs[arm.name] = 3 * nfe.student + nfe.teacher + nfe.sampling + nfe.base
        teachers = sum(TEACHER_ROUNDS * costs[f"teacher_{task}"] for task in world.names)
        student = OPD_ROUNDS * costs["opd_0.001"]
        for baseline in ("multitask_nft_0.001", "multitask_guard_0.001"):
            stages = arms[baseline].stages(len(world.names))
            wanted = {"alone": student, "teachers": teachers, "": teachers + student}
            assert {stage: rounds * costs[baseline] for stage, rounds in stages.items()} == pytest.approx(wanted)


def result(run: Run, rounds: int, score: float = 0.5) -> Result:
    scores = dict.fromkeys(WORLDS[run.world].names, score)
    test = {task: [0.5, 0.6] for task in scores}
    facts = run.world, run.arm, run.stage, run.seed, True, TINY.digest(), rounds, 1.0, 1.0, 1.0, 0.0, 0.0
    return Result(*facts, [(0, scores)], test, "none", "2026-01-01")


def finish(runner: Runner, run: Run, score: float = 0.5) -> None:
    """Leave what a finished run leaves."""
    if run.rounds:
        runner.lora(run).mkdir(parents=True, exist_ok=True)
    rounds = runner.rounds(run) if run.rounds else 0
    write_atomically(runner.file(run), json.dumps(asdict(result(run, rounds, score))))


@pytest.fixture
def driven(tmp_path, monkeypatch):
    """A runner that leaves what runs leave, except for those that are to fail; and what was done."""
    done, failing = [], set()

    def do(self, run):
        if run.arm in failing:
            raise RuntimeError("out of luck")
        done.append(run.name.removesuffix("-seed1"))
        finish(self, run)

    monkeypatch.setattr(Runner, "do", do)
    return Runner(tmp_path / "logs", tmp_path / "results", quick=True), done, failing


def test_a_failure_is_told_and_the_others_go_on(driven):
    runner, done, failing = driven
    failing.add("teacher_ocr")
    failures = run_all(plan("tiny", ["opd_0.001", "guard_scene"], [1]), runner, jobs=2)
    assert "guard_scene" in done and "teacher_scene" in done and "opd_0.001" not in done
    assert [line.split(": ")[0] for line in failures] == [
        "tiny teacher_ocr.early-seed1",
        "tiny teacher_ocr-seed1",
        "tiny opd_0.001.80-seed1",
        "tiny opd_0.001-seed1",
    ]


def test_no_worker_waits_for_a_stage_while_another_arm_could_begin(driven):
    runner, done, _ = driven
    assert run_all(plan("tiny", ["opd_0.001", "paper_0.001"], [1]), runner, jobs=1) == []
    assert done.index("paper_0.001.80") < done.index("opd_0.001") and done.index("teacher_scene.early") < 3


def test_what_is_done_is_not_repeated_and_a_teacher_that_is_gone_is_made_again(driven):
    runner, done, _ = driven
    runs = plan("tiny", ["opd_0.001"], [1])
    assert run_all(runs, runner, jobs=1) == [] and len(done) == 8
    ocr = next(run for run in runs if run.name == "teacher_ocr-seed1")
    runner.lora(ocr).rmdir()
    assert run_all(runs, runner, jobs=1) == [] and len(done) == 8, "nobody needs it"
    runner.file(runs[-1]).unlink()
    runner.lora(runs[-1]).rmdir()
    assert run_all(runs, runner, jobs=1) == [] and done[8:] == ["teacher_ocr", "opd_0.001"]
    write_atomically(runner.file(runs[-1]), json.dumps(asdict(result(runs[-1], 40))))
    assert not runner.is_done(runs[-1]), "of another length"
    runner.file(runs[-1]).write_text("{")
    with pytest.raises(ClaimsError, match=r"opd_0\.001-seed1\.json"):
        runner.is_done(runs[-1])


def test_what_is_left_is_said_for_the_chosen_arm(driven, monkeypatch):
    monkeypatch.setattr(Runner, "cost", lambda self, run: 3600.0)
    runner, *_ = driven
    runs = plan("tiny", ["opd_0.001", "opd_0.002"], [1, 2])
    teachers = [run for run in runs if run.arm.startswith("teacher")]
    ends = [run for run in runs if run.arm == "opd_0.002" and run.stage == ""]
    others = [run for run in runs if (run.arm, run.stage, run.seed) in (("opd_0.001", "80", 1), ("opd_0.002", "80", 2))]
    first = next(run for run in runs if (run.arm, run.stage, run.seed) == ("opd_0.002", "80", 1))
    whole = forecast(runs, runner)
    assert "17 runs,   17 to do     17.0 core-hours" in whole, "the first rate stands for the chosen one"
    for run in (*teachers, *others):
        finish(runner, run)
    finish(runner, first, score=0.6)
    assert "17 runs,    2 to do      2.0 core-hours" in forecast(runs, runner)
    for run in ends:
        finish(runner, run)
    runner.lora(ends[0]).rmdir()
    assert "17 runs,    0 to do      0.0 core-hours" in forecast(runs, runner), "nobody builds on what is gone"


def test_of_several_candidates_the_chosen_one_is_tested():
    names = ("base", "opd_0.001", "opd_0.002", "multitask_nft_0.001", "multitask_nft_0.002")
    runs = [Run("tiny", name, "", 1) for name in names]
    runner = Runner(ROOT, ROOT, chosen=frozenset({("tiny", "multitask_nft_0.002", ""), ("crossed", "opd_0.002", "")}))
    assert [run.arm for run in runs if runner.tests(run)] == ["base", "multitask_nft_0.002"]
    assert not any(Runner(ROOT, ROOT, test=False, chosen=runner.chosen).tests(run) for run in runs)
    stages = [Run("tiny", name, stage, 1) for name in names[3:] for stage in ("alone", "teachers", "")]
    assert [run.name for run in stages if runner.waits(run)] == ["multitask_nft_0.001-seed1"]
    assert [run.arm for run in runs if runner.waits(run)] == ["opd_0.001", "opd_0.002", "multitask_nft_0.001"]
    shorter = replace(runner, chosen=runner.chosen | {("tiny", "multitask_nft_0.001", "alone")})
    tested = ["multitask_nft_0.001.alone-seed1", "multitask_nft_0.002-seed1"]
    assert [run.name for run in stages if shorter.tests(run)] == tested
    waiting = [run.name for run in stages if shorter.waits(replace(run, seed=2))]
    assert waiting == ["multitask_nft_0.001.teachers-seed1", "multitask_nft_0.001-seed1"]
    other_seed = [Run("tiny", name, "alone" if "multi" in name else "", 2) for name in names]
    assert [run.arm for run in other_seed if runner.waits(run)] == ["opd_0.001", "opd_0.002", "multitask_nft_0.001"]
    assert not any(Runner(ROOT, ROOT, test=False).waits(run) for run in other_seed[3:]), "a screen has all seeds"
    asked = [run.name for run in plan("tiny", ["base", "merge_rewarded_sum_1"], [2]) if "teacher" not in run.name]
    assert asked == ["merge_rewarded_sum_1-seed1", "base-seed2", "merge_rewarded_sum_1-seed2"]
    early = Run("tiny", "teacher_ocr", "early", 1)
    assert runner.tests(early) and not Runner(ROOT, ROOT, early=False).tests(early)


def test_the_screen_distils_nothing_and_asks_no_test_prompt():
    runs = driver.chosen_runs(driver.parse(["screen", "--worlds", "opposed", "--seeds", "1"]))
    assert {run.what.kind for run in runs} == {"base", "nft", "merge"}
    assert {run.stage for run in runs if run.arm.startswith("multitask")} == {"alone", "teachers"}
    with pytest.raises(ClaimsError, match="nonesuch"):
        driver.chosen_runs(driver.parse(["--arms", "nonesuch"]))


@pytest.mark.slow
def test_the_quick_form_from_rewards_to_the_report(tmp_path):
    """Three teachers from rewards, their student, a merge; said beforehand, done, shown, and not repeated."""
    arms = ["base", "opd_0.001", "merge_rewarded_sum_1", "folded_opd_at2"]
    script = [sys.executable, str(ROOT / "experiments" / "claims" / "run.py")]
    command = [*script, "--worlds", "tiny", "--quick", "--jobs", "1", "--logs", str(tmp_path), "--arms", *arms]
    said = subprocess.run([*command, "--dry_run"], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert "core-hours" in said.stdout and not list(tmp_path.iterdir()), said.stderr
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "quick" / "results" / "tiny"
    found = {path.name.removesuffix("-seed1.json"): json.loads(path.read_text()) for path in results.iterdir()}
    teachers = {f"teacher_{task}{stage}" for task in TINY.names for stage in ("", ".early")}
    assert found.keys() == {*arms, *teachers, "folded_opd", "opd_0.001.80"}
    teacher, student = found["teacher_scene"], found["opd_0.001.80"]
    assert (teacher["rounds"], teacher["forwards"], teacher["backwards"]) == (4, 4 * 192, 4 * 48)
    assert [number for number, _ in teacher["curve"]] == [0, 2, 4] and list(teacher["curve"][0][1]) == ["scene"]
    assert (student["forwards"], student["backwards"]) == (2 * 216, 2 * 108)
    assert (student["teacher_forwards"], student["teacher_backwards"]) == (3 * 4 * 192, 3 * 4 * 48)
    assert {len(scores) for scores in student["test"].values()} <= {1, 2, 4}
    assert found["folded_opd_at2"]["test"] != found["folded_opd"]["test"]
    used = json.loads((tmp_path / "quick" / "tiny" / "opd_0.001-seed1" / "config.json").read_text())["train"][
        "teachers"
    ]
    own = [
        tmp_path / "quick" / "tiny" / f"teacher_{t}-seed1" / "checkpoints" / "checkpoint-4" / "lora" for t in TINY.names
    ]
    assert [teacher["lora_path"] for teacher in used] == list(map(str, own))
    text = (tmp_path / "quick" / "results" / "claims.md").read_text()
    assert "Quick form" in text and "One student reaches each of its teachers" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert again.returncode == 0 and "0.0 core-hours (estimated)" in again.stdout
