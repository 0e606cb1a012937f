"""The claims report: verdicts in both directions from runs made up for the purpose, and the variance's formula."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from diffusionopd.transitions import transition
from experiments.claims import variance
from experiments.claims.curves import (
    ClaimsError,
    Point,
    area,
    at_evaluations,
    read_results,
    rounds_to,
)
from experiments.claims.experiments import LABELS, TASKS
from experiments.claims.report import markdown, missing, table, write
from experiments.claims.verdicts import (
    FAILS,
    HOLDS,
    UNMEASURED,
    averages,
    beside_teachers,
    claims,
    lead_over_the_best,
    normalised_average,
)

from .conftest import ROOT

TEACHER_COST, COST = 300.0, 100.0
LEVEL = {"base": 0.2, "multitask_nft": 0.7, "multitask_guard": 0.6, "cascade_nft": 0.75, "sft": 0.7, "opd": 0.89}
LEVEL |= {"opd_noise00": 0.89, "opd_noise03": 0.85, "opd_noise07": 0.84, "ppo_noise03": 0.6, "ppo_noise07": 0.5}
LEVEL |= {"multitask_nft_2e3": 0.55, "multitask_guard_1e3": 0.4, "cascade_nft_2e3": 0.3, "opd_5e4": 0.8, "opd_2e3": 0.9}
FIRST_ROUND = {
    "opd": 0.85,
    "opd_noise00": 0.85,
    "opd_noise07": 0.5,
}  # scores at round 10 of 40; others are halfway up there


def final_scores(experiment: str) -> dict[str, float]:
    """Teachers have 0.9 on their own task and 0.2 elsewhere; others the same on all three."""
    kind, _, task = experiment.partition("_")
    if kind in ("teacher", "shipped", "guard"):
        return {each: 0.9 if each == task else 0.2 for each in TASKS}
    return dict.fromkeys(TASKS, LEVEL[experiment])


def run(experiment: str, seed: int = 1, curve: list[dict] | None = None, **changes: float) -> dict:
    """A result file's content; ``changes`` are tasks' final scores."""
    scores = final_scores(experiment) | changes
    trained = experiment != "base" and not experiment.startswith("shipped")
    distilled = experiment == "sft" or experiment.startswith(("opd", "ppo"))
    cost = COST if distilled else TEACHER_COST + COST
    if curve is None and trained:
        own = [experiment.partition("_")[2]] if experiment.startswith(("teacher", "guard")) else TASKS
        early = {t: FIRST_ROUND.get(experiment, (0.2 + scores[t]) / 2) for t in own}
        late = {t: scores[t] for t in own}
        curve = [
            {"round": 10, "evaluations": cost / 4, "scores": early},
            {"round": 40, "evaluations": cost, "scores": late},
        ]
    return {
        "experiment": experiment, "label": LABELS[experiment], "seed": seed, "rounds": 40 if trained else 0,
        "form": "full", "seconds": 1.0, "evaluations": cost if trained else 0, "curve": curve or [],
        "teacher_evaluations": TEACHER_COST if distilled else 0,
        "final": {t: {"mean": s, "standard_error": 0.01, "count": 128} for t, s in scores.items()},
        "machine": "none", "date": "2026-01-01",
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """``results(contents, without=..., seeds=...)``: a folder of all experiments, the given contents in their place."""

    def make(*contents: dict, without: tuple[str, ...] = (), seeds: tuple[int, ...] = (1,)):
        files = {(name, seed): run(name, seed) for name in LABELS if name not in without for seed in seeds}
        files |= {(content["experiment"], content["seed"]): content for content in contents}
        for (name, seed), content in files.items():
            (tmp_path / f"{name}-seed{seed}.json").write_text(json.dumps(content))
        return tmp_path

    return make


def judged(folder) -> dict[int, str]:
    """Claim number -> verdict."""
    return {i: claim.verdict for i, claim in enumerate(claims(read_results(folder), None), 1)}


def parts(folder, number: int) -> dict:
    return {part.name: part for part in claims(read_results(folder), None)[number - 1].parts}


ALL_HOLD = {1: HOLDS, 2: HOLDS, 3: HOLDS, 4: HOLDS, 5: HOLDS, 6: UNMEASURED}


def test_good_runs_hold(results):
    assert judged(results(seeds=(1, 2, 3))) == ALL_HOLD


@pytest.mark.parametrize(
    ("number", "content"),
    [
        (1, run("teacher_ocr", ocr=0.54)),  # 0.34 of 0.7
        (1, run("guard_scene", scene=0.5)),
        (2, run("opd", scene=0.87)),  # 0.967
        (3, run("cascade_nft", compose=1.0, ocr=1.0, scene=1.0)),
        (4, run("ppo_noise07", compose=1.0, ocr=1.0, scene=1.0)),
        (4, run("opd_noise03", compose=0.6, ocr=0.6, scene=0.6)),  # a tie is no win
        (4, run("opd_noise03", curve=run("ppo_noise03")["curve"])),  # nor is it along the curve
        (5, run("opd_noise07", curve=run("opd_noise00")["curve"])),
    ],
    ids=lambda value: value["experiment"] if isinstance(value, dict) else str(value),
)
def test_each_claim_can_fail(results, number, content):
    assert judged(results(content)) == ALL_HOLD | {number: FAILS}


@pytest.mark.parametrize(("shift", "verdict"), [(0.001, HOLDS), (-0.001, FAILS)])
def test_half_of_the_gap_is_the_limit(results, shift, verdict):
    folder = results(run("teacher_compose", compose=0.55 + shift), run("guard_scene", scene=0.55 + shift))
    found = parts(folder, 1)
    assert found["compose, NFT"].verdict == found["scene, GRPO-Guard"].verdict == verdict
    assert found["compose, NFT"].mean == pytest.approx(0.5 + shift / 0.7)
    assert found["ocr, NFT"].verdict == HOLDS


def test_the_mean_over_seeds_decides_and_the_seeds_are_counted(results):
    folder = results(run("opd", 3, ocr=0.86), seeds=(1, 2, 3))
    part = parts(folder, 2)["ocr"]
    assert part.verdict == HOLDS and part.seeds_that_hold == 2
    assert part.mean == pytest.approx((2 * 0.89 + 0.86) / 0.9 / 3)
    error = 0.03 / 0.9 / 3  # one of three seeds is 0.03 / 0.9 lower: std 0.03 / 0.9 / sqrt(3), by sqrt(3)
    assert part.standard_error == pytest.approx(error)
    assert part.is_close == (part.mean - 0.97 < error)
    assert not parts(folder, 2)["scene"].is_close  # all seeds alike


def test_a_mean_within_its_standard_error_of_the_limit_is_said_to_be(results):
    folder = results(run("opd", 2, ocr=0.80), run("opd", 3, ocr=0.96), seeds=(1, 2, 3))  # 0.88 / 0.9 on average
    part = parts(folder, 2)["ocr"]
    assert part.verdict == HOLDS and part.is_close
    runs = read_results(folder)
    text = markdown(runs, claims(runs, None), None, [])
    assert "| ocr | 0.981 ± 0.051 | ≥ 0.97 | 2 of 3: 0.989, 0.889, 1.067 | holds, but by less than the stan" in text


def test_equal_cost_reads_the_other_curve_at_the_students_cost(results):
    """Cascade: base 0.2 at 0, 0.2 at 100 (OPD alone), then 1.0 at 400 (OPD and its teachers)."""
    curve = [
        {"round": 10, "evaluations": COST, "scores": dict.fromkeys(TASKS, 0.2)},
        {"round": 40, "evaluations": COST + TEACHER_COST, "scores": dict.fromkeys(TASKS, 1.0)},
    ]
    found = parts(results(run("cascade_nft", curve=curve)), 3)
    assert found["cascade_nft, without the teachers' cost"].mean == pytest.approx((0.89 - 0.2) / 0.7)


def test_where_both_are_finished_all_test_prompts_decide(results):
    """The cascade has 0.75 on all prompts, whatever its curve on the monitored ones ends with; the student 0.89."""
    high = [{"round": 40, "evaluations": COST + TEACHER_COST, "scores": dict.fromkeys(TASKS, 1.0)}]
    longer = [{**high[0], "evaluations": 2 * (COST + TEACHER_COST)}]
    name = "cascade_nft, with the teachers' cost"
    assert parts(results(run("cascade_nft", curve=high)), 3)[name].mean == pytest.approx((0.89 - 0.75) / 0.7)
    unfinished = run("cascade_nft", curve=longer) | {"evaluations": longer[0]["evaluations"]}
    assert parts(results(unfinished), 3)[name].mean == pytest.approx((0.89 - 0.6) / 0.7)  # halfway from 0.2 to 1.0


def test_curves_begin_with_the_base_on_the_same_prompts(results):
    """The base has 0.2 on all prompts, 0.1 on the monitored ones: the ODE is at 0.81 later than from 0.2."""
    curve = [{"round": 0, "evaluations": 0.0, "scores": dict.fromkeys(TASKS, 0.1)}]
    found = parts(results(run("base", curve=curve)), 5)["ocr, 90%"]
    assert found.mean == pytest.approx((10 + 30 * 0.31 / 0.34) / (10 * 0.71 / 0.75))


def test_whether_tasks_fight_is_read_at_the_cost_of_all_teachers(results):
    """Each made-up teacher costs 400 and ends at 0.9; the other has 0.5 at 1000 and 0.9 at 1400, so 0.7 at 1200."""
    scores = [(10, 1000.0, 0.5), (40, 1400.0, 0.9)]
    curve = [{"round": n, "evaluations": e, "scores": dict.fromkeys(TASKS, s)} for n, e, s in scores]
    runs = read_results(results(run("multitask_nft", curve=curve)))
    assert beside_teachers(runs, "multitask_nft") == {task: {1: pytest.approx(-0.2)} for task in TASKS}
    text = markdown(runs, claims(runs, None), None, [])
    assert "| multi-task NFT | -0.200 (-0.200) |" in text and "multi-task GRPO-Guard | -0.300" in text


def test_the_best_of_the_others_counts_until_the_students_cost(results):
    """0.8 at 300 of 400 evaluations; what comes after the student's cost, teachers' included, does not count."""
    scores = [(10, 200.0, 0.5), (20, 300.0, 0.8), (30, 400.0, 0.3), (40, 500.0, 1.0)]
    curve = [{"round": n, "evaluations": e, "scores": dict.fromkeys(TASKS, s)} for n, e, s in scores]
    runs = read_results(results(run("cascade_nft", curve=curve)))
    assert lead_over_the_best(runs, "cascade_nft") == {1: pytest.approx((0.89 - 0.8) / 0.7)}
    assert "| cascade NFT | +0.129 | +0.129 |" in markdown(runs, claims(runs, None), None, [])


def test_runs_of_unequal_length_are_compared_where_the_shorter_ends(results):
    """The closed form goes on to 0.9 at 100 rounds; at the surrogate's end it has 0.6."""
    scores = [(40, COST, 0.6), (100, 2.5 * COST, 0.9)]
    curve = [{"round": n, "evaluations": e, "scores": dict.fromkeys(TASKS, s)} for n, e, s in scores]
    longer = run("opd_noise07", curve=curve) | {"rounds": 100, "evaluations": 2.5 * COST}
    found = parts(results(longer), 4)
    assert found["noise 0.7, final"].mean == pytest.approx((0.6 - LEVEL["ppo_noise07"]) / 0.7)
    assert found["noise 0.7, area"].mean == pytest.approx(((0.2 + 0.6) / 2 - area_of("ppo_noise07")) / 0.7)


def area_of(experiment: str) -> float:
    """Area under the made-up curve: 0.2 at round 0, halfway at 10, its level at 40."""
    level = LEVEL[experiment]
    middle = (0.2 + level) / 2
    return ((0.2 + middle) / 2 * 10 + (middle + level) / 2 * 30) / 40


def test_speed_is_measured_against_the_teacher_on_the_monitored_prompts(results):
    """A teacher that has 0.9 on all prompts and 0.6 on these: the level is 0.54."""
    curve = [{"round": 40, "evaluations": TEACHER_COST, "scores": {"ocr": 0.6}}]
    found = parts(results(run("teacher_ocr", curve=curve)), 5)["ocr, 90%"]
    assert found.mean == pytest.approx((10 + 30 * 0.04 / 0.34) / (10 * 0.34 / 0.65))


def test_speed_is_the_ratio_of_interpolated_rounds(results):
    """90% of 0.9 is 0.81: the ODE on its way from 0.2 to 0.85 at round 10, noise 0.7 from 0.5 there to 0.84."""
    ode, noisy = 10 * 0.61 / 0.65, 10 + 30 * 0.31 / 0.34
    assert parts(results(), 5)["ocr, 90%"].mean == pytest.approx(noisy / ode)


def test_speed_to_half_of_the_gap(results):
    """Halfway from 0.2 to 0.9 is 0.55: on the ODE's first stretch, on noise 0.7's second."""
    ode, noisy = 10 * 0.35 / 0.65, 10 + 30 * 0.05 / 0.34
    assert parts(results(), 5)["ocr, half of the gap"].mean == pytest.approx(noisy / ode)


def test_speed_of_runs_that_never_arrive(results):
    never = [{"round": 40, "evaluations": COST, "scores": dict.fromkeys(TASKS, 0.5)}]
    assert parts(results(run("opd_noise07", curve=never)), 5)["ocr, 90%"].mean == pytest.approx(40 / (10 * 0.61 / 0.65))
    alone = parts(results(run("opd_noise00", curve=never), run("opd_noise07")), 5)["ocr, 90%"]
    assert (alone.mean, alone.verdict) == (0.0, FAILS)
    neither = parts(results(run("opd_noise00", curve=never), run("opd_noise07", curve=never)), 5)["ocr, 90%"]
    assert neither.verdict == UNMEASURED and "a level never reached" in neither.why_none


def test_learning_rates_are_compared_on_the_scale_from_base_to_teachers(results):
    folder = results(run("opd_2e3", 2, ocr=0.83), without=("opd_5e4",), seeds=(1, 2))
    runs = read_results(folder)
    assert averages(runs, "multitask_nft_2e3") == {1: pytest.approx(0.5), 2: pytest.approx(0.5)}
    assert averages(runs, "opd_2e3") == {1: pytest.approx(1.0), 2: pytest.approx((1 + 1 + 0.9) / 3)}
    assert averages(runs, "opd_5e4") == {}
    lines = markdown(runs, claims(runs, None), None, []).splitlines()
    assert "| DiffusionOPD | 2e-3 | 0.983 ± 0.017 | 1.000, 0.967 |" in lines
    assert not any(line.startswith("| DiffusionOPD | 5e-4") for line in lines)


def test_a_seed_without_a_value_is_named(results):
    never = [{"round": 40, "evaluations": COST, "scores": dict.fromkeys(TASKS, 0.5)}]
    slow = (run("opd_noise00", 2, curve=never), run("opd_noise07", 2, curve=never))
    folder = results(*slow, seeds=(1, 2, 3))
    part = parts(folder, 5)["ocr, 90%"]
    assert (list(part.values), part.undefined, part.verdict) == ([1, 3], (2,), HOLDS)
    runs = read_results(folder)
    line = next(line for line in markdown(runs, claims(runs, None), None, []).splitlines() if "ocr, 90%" in line)
    assert "| 2 of 2: 3.980, 3.980; undefined in seed 2 | holds |" in line


def test_what_is_missing_is_named(results):
    folder = results(without=("opd", "guard_scene"), seeds=(1, 2))
    assert judged(folder) == {1: UNMEASURED, 2: UNMEASURED, 3: UNMEASURED, 4: HOLDS, 5: HOLDS, 6: UNMEASURED}
    runs = read_results(folder)
    assert missing(runs) == ["guard_scene-seed1", "guard_scene-seed2", "opd-seed1", "opd-seed2"]
    text = markdown(runs, claims(runs, None), None, [])
    assert "no run of opd" in text and "opd-seed2" in text


def test_a_failing_part_decides_before_a_missing_one(results):
    assert judged(results(run("teacher_ocr", ocr=0.3), without=("guard_scene",)))[1] == FAILS


def test_runs_of_different_seeds_are_not_compared(results):
    folder = results(run("opd", 2), without=("opd",))
    part = parts(folder, 2)["ocr"]
    assert part.verdict == UNMEASURED and part.why_none == "no seed has all of opd, teacher_ocr"


def test_no_gap_is_no_division_by_zero(results):
    zero = dict.fromkeys(TASKS, 0.0)
    contents = [run(name, **zero) for name in LABELS]
    verdicts = judged(results(*contents))
    assert set(verdicts.values()) == {UNMEASURED}
    runs = read_results(results(*contents))
    assert math.isnan(normalised_average({name: by_seed[1] for name, by_seed in runs.items()}, zero))
    assert [row["average"] for row in table(runs)] == [None] * len(LABELS)


def test_table_has_means_spreads_and_the_average_over_rows(results):
    folder = results(run("opd", 2, ocr=0.99), without=tuple(set(LABELS) - {"base", "opd", "sft"}), seeds=(1, 2))
    rows = {row["experiment"]: row for row in table(read_results(folder))}
    assert list(rows) == ["base", "sft", "opd"]
    opd = rows["opd"]
    assert opd["means"]["ocr"] == pytest.approx(0.94)
    assert opd["spreads"]["ocr"] == pytest.approx(0.1 / math.sqrt(2))
    assert (rows["base"]["average"], opd["average"]) == (0.0, 1.0)
    assert rows["sft"]["average"] == pytest.approx((2 * 0.5 / 0.69 + 0.5 / 0.74) / 3)
    assert (opd["evaluations"], opd["with_teachers"]) == (COST, COST + TEACHER_COST)


def test_interpolation_on_curves():
    curve = [Point(0, 0.0, {"ocr": 0.2}), Point(10, 50.0, {"ocr": 0.4}), Point(20, 100.0, {"ocr": 0.3})]
    assert at_evaluations(curve, 75.0) == {"ocr": pytest.approx(0.35)}
    assert at_evaluations(curve, 1000.0) == {"ocr": 0.3}
    assert rounds_to(curve, "ocr", 0.3) == pytest.approx(5.0)
    assert rounds_to(curve, "ocr", 0.2) == 0.0
    assert rounds_to(curve, "ocr", 0.41) is None
    assert area([(0, 0.0), (10, 1.0), (20, 1.0)], 15) == pytest.approx((5 + 5) / 15)


@pytest.mark.parametrize("text", ["{", '{"experiment": "opd"}', "[]"])
def test_a_file_that_is_no_result_is_named(results, text):
    folder = results()
    (folder / "opd-seed9.json").write_text(text)
    with pytest.raises(ClaimsError, match=r"opd-seed9\.json is no result"):
        read_results(folder)


def test_forms_are_not_mixed_and_nothing_is_said_so(results, tmp_path):
    with pytest.raises(ClaimsError, match="holds no results; make some with python experiments"):
        read_results(tmp_path / "nothing")
    with pytest.raises(ClaimsError, match="full, short"):
        read_results(results(run("opd") | {"form": "short"}))


STATE = {"noise": 0.3, "step": 0, "sigma": 1.0, "kl": 2.0, "closed_squared": 1.0, "between_pictures": 1.0}
STATE |= {"variance": 8.0, "predicted": 8.0, "score_function": 6.0, "error": 8.0, "cosine": {"64": 0.9}}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({}, HOLDS), ({"predicted": 4.0}, FAILS), ({"error": 16.0}, FAILS), ({"between_pictures": 9.0}, FAILS)],
)
def test_verdict_on_the_estimators(results, changes, verdict):
    figures = {"settings": {"seed": 1, "levels": [0.3]}, "states": [STATE | changes]}
    assert claims(read_results(results()), figures)[5].verdict == verdict


def test_report_as_it_is_run(results, tmp_path):
    """From another folder and without PYTHONPATH, with the estimators' file."""
    folder = results(seeds=(1, 2, 3))
    figures = {"settings": {"seed": 1, "levels": [0.3]}, "states": [STATE]}
    figures |= {"command": "python experiments/claims/variance.py", "date": "2026-01-01", "machine": "none"}
    (folder / "variance.json").write_text(json.dumps(figures))
    output = tmp_path / "output"
    script = str(ROOT / "experiments" / "claims" / "report.py")
    command = [sys.executable, script, "--results", str(folder), "--output", str(output)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    plots = {"methods.png", "noise.png", "estimators.png", "teachers.png"}
    assert {path.name for path in output.iterdir()} == {"claims.md", "claims.json"} | plots
    assert all((output / name).read_bytes()[:4] == b"\x89PNG" for name in plots)
    text = (output / "claims.md").read_text()
    assert "DiffusionOPD | 3 | 0.890 ± 0.000" in text and all(f"({name})" in text for name in plots)
    content = json.loads((output / "claims.json").read_text())
    assert [claim["verdict"] for claim in content["claims"]] == [HOLDS] * 6
    assert content["missing"] == []


def test_the_report_that_is_kept_is_that_of_the_results_that_are_kept(tmp_path):
    kept = ROOT / "experiments" / "claims" / "results"
    write(kept, tmp_path)
    remedy = "write it again: python experiments/claims/report.py"
    assert (kept / "claims.md").read_text("utf-8") == (tmp_path / "claims.md").read_text("utf-8"), remedy


# ---- the variance of the estimators ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear():
    """A student ``v = x W`` with 12 values a latent, and its estimate over many draws, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    step = transition("flow_sde", 0.8, 0.7, 0.7)
    x, weight = normal(3, 12), (normal(12, 12) / 4).requires_grad_()
    v_teacher = (x @ weight).detach() + 0.5 * step.std / abs(step.b) * normal(3, 12)
    estimate = variance.measure(
        step, x, x @ weight, v_teacher, [weight], lambda purpose, k: normal(3, 12), draws=4000, probes=400
    )
    return step, x, weight.detach(), v_teacher, estimate


def test_prediction_is_the_formula_with_the_exact_jacobian(linear):
    """For ``v = x W`` the gradient of a cotangent ``c`` is the outer product of x and c: ``|J|_F^2 = 12 |x|^2``."""
    step, x, weight, v_teacher, estimate = linear
    d = step.b * (x @ weight - v_teacher) / step.std
    squared, kl = d.square().sum(1), 0.5 * d.square().sum(1)
    factor = (step.b / (step.std * 12 * 3)) ** 2 * x.square().sum(1)
    assert estimate["kl"] == pytest.approx(kl.mean().item())
    assert estimate["predicted"] == pytest.approx((factor * (12 * (kl**2 + squared) + squared)).sum().item(), rel=0.05)
    assert estimate["score_function"] == pytest.approx((factor * 12 * kl**2).sum().item(), rel=0.05)
    gradient = step.b / (step.std * 12 * 3) * x.T @ d
    assert estimate["closed_squared"] == pytest.approx(gradient.square().sum().item())


def test_surrogate_has_the_predicted_variance_and_the_closed_form_as_its_mean(linear):
    *_, estimate = linear
    assert estimate["variance"] == pytest.approx(estimate["predicted"], rel=0.08)
    assert 0.3 < estimate["error"] / estimate["variance"] < 2
    assert list(estimate["cosine"])[:4] == [1, 2, 4, 8] and max(estimate["cosine"]) == 4000
    assert estimate["cosine"][4000] == pytest.approx(variance.expected_cosine(estimate, 4000), abs=0.02)
    assert estimate["cosine"][4000] > 0.9 > estimate["cosine"][1]


@pytest.mark.slow
def test_variance_script_writes_its_figures(tmp_path):
    file = tmp_path / "variance.json"
    options = ["--draws", "2", "--probes", "1", "--pictures", "2", "--rounds", "0", "--steps", "1", "--levels", "0.7"]
    script = str(ROOT / "experiments" / "claims" / "variance.py")
    command = [sys.executable, script, *options, "--output", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(file.read_text())
    assert content["command"].startswith("python experiments/claims/variance.py --draws 2 --probes 1")
    assert str(ROOT) not in file.read_text()
    (state,) = content["states"]
    assert (state["noise"], state["step"]) == (0.7, 1)
    assert all(state[key] > 0 for key in ("kl", "variance", "predicted", "closed_squared", "between_pictures"))
