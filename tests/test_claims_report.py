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
from experiments.claims.curves import ClaimsError, Point, area, at_evaluations, read_results, rounds_to
from experiments.claims.experiments import LABELS, TASKS
from experiments.claims.report import markdown, missing, table
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

CLAIMS = ROOT / "experiments" / "claims"
TEACHER_COST, COST = 300.0, 100.0
LEVEL = {"base": 0.2, "multitask_nft": 0.7, "multitask_guard": 0.6, "cascade_nft": 0.75, "sft": 0.7, "opd": 0.89}
LEVEL |= {"opd_noise00": 0.89, "opd_noise03": 0.85, "opd_noise07": 0.84, "ppo_noise03": 0.6, "ppo_noise07": 0.5}
LEVEL |= {"multitask_nft_2e3": 0.55, "multitask_guard_1e3": 0.4, "cascade_nft_2e3": 0.3, "opd_5e4": 0.8, "opd_2e3": 0.9}
FIRST_ROUND = {"opd": 0.85, "opd_noise00": 0.85, "opd_noise07": 0.5}
"""Scores at round 10 of 40; others are halfway up there."""


def curve_of(*points: tuple[int, float, float], tasks=TASKS) -> list[dict]:
    """Of (round, evaluations, score of every task)."""
    return [{"round": n, "evaluations": e, "scores": dict.fromkeys(tasks, s)} for n, e, s in points]


NEVER = curve_of((40, COST, 0.5))


def run(experiment: str, seed: int = 1, curve: list[dict] | None = None, **changes: float) -> dict:
    """A result file's content; ``changes`` are tasks' final scores.

    Teachers have 0.9 on their own task and 0.2 elsewhere; others the same on all three.
    """
    kind, _, task = experiment.partition("_")
    teaches = kind in ("teacher", "shipped", "guard")
    scores = {t: (0.9 if t == task else 0.2) if teaches else LEVEL[experiment] for t in TASKS} | changes
    trained, distilled = kind not in ("base", "shipped"), kind in ("sft", "opd", "ppo")
    cost = COST if distilled else TEACHER_COST + COST
    if curve is None and trained:
        early = {t: FIRST_ROUND.get(experiment, (0.2 + scores[t]) / 2) for t in ([task] if teaches else TASKS)}
        curve = [
            {"round": 10, "evaluations": cost / 4, "scores": early},
            {"round": 40, "evaluations": cost, "scores": {t: scores[t] for t in early}},
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


@pytest.fixture
def part(results):
    """``part(number, name, contents, ...)``: that part of a claim."""

    def find(number: int, name: str, *contents: dict, **options):
        found = claims(read_results(results(*contents, **options)), None)[number - 1].parts
        return {part.name: part for part in found}[name]

    return find


def lines_of(folder) -> list[str]:
    runs = read_results(folder)
    return markdown(runs, claims(runs, None), None, []).splitlines()


ALL_HOLD = {1: HOLDS, 2: HOLDS, 3: HOLDS, 4: HOLDS, 5: HOLDS, 6: UNMEASURED}


@pytest.mark.parametrize(
    ("number", "content"),
    [
        (None, run("opd")),
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
def test_good_runs_hold_and_each_claim_can_fail(results, number, content):
    assert judged(results(content)) == ALL_HOLD | ({number: FAILS} if number else {})


@pytest.mark.parametrize(("shift", "verdict"), [(0.001, HOLDS), (-0.001, FAILS)])
def test_half_of_the_gap_is_the_limit(part, shift, verdict):
    contents = run("teacher_compose", compose=0.55 + shift), run("guard_scene", scene=0.55 + shift)
    for name in ("compose, NFT", "scene, GRPO-Guard"):
        found = part(1, name, *contents)
        assert (found.verdict, found.mean) == (verdict, pytest.approx(0.5 + shift / 0.7))
    assert part(1, "ocr, NFT", *contents).verdict == HOLDS


def test_the_mean_over_seeds_decides_and_the_seeds_are_counted(part, results):
    contents = run("opd", 3, ocr=0.86)
    found = part(2, "ocr", contents, seeds=(1, 2, 3))
    assert found.verdict == HOLDS and found.seeds_that_hold == 2
    assert found.mean == pytest.approx((2 * 0.89 + 0.86) / 0.9 / 3)
    error = 0.03 / 0.9 / 3  # one of three seeds is 0.03 / 0.9 lower: std 0.03 / 0.9 / sqrt(3), by sqrt(3)
    assert found.standard_error == pytest.approx(error)
    assert found.is_close == (found.mean - 0.97 < error)
    assert not part(2, "scene", contents, seeds=(1, 2, 3)).is_close  # all seeds alike
    close = run("opd", 2, ocr=0.80), run("opd", 3, ocr=0.96)  # 0.88 / 0.9 on average
    found = part(2, "ocr", *close, seeds=(1, 2, 3))
    assert found.verdict == HOLDS and found.is_close
    line = "| ocr | 0.981 ± 0.051 | ≥ 0.97 | 2 of 3: 0.989, 0.889, 1.067 | holds, but"
    assert any(each.startswith(line) for each in lines_of(results(*close, seeds=(1, 2, 3))))


ALL = COST + TEACHER_COST
ODE, NOISY = "opd_noise00", "opd_noise07"


@pytest.mark.parametrize(
    ("number", "name", "contents", "expected"),
    [
        # Cascade: base 0.2 at 0, 0.2 at 100 (OPD alone), then 1.0 at 400 (OPD and its teachers)
        (3, "cascade_nft, without the teachers' cost",
         [run("cascade_nft", curve=curve_of((10, COST, 0.2), (40, ALL, 1.0)))], (0.89 - 0.2) / 0.7),
        # Both finished: the cascade has 0.75 on all test prompts, whatever its curve on the monitored ones ends with
        (3, "cascade_nft, with the teachers' cost",
         [run("cascade_nft", curve=curve_of((40, ALL, 1.0)))], (0.89 - 0.75) / 0.7),
        (3, "cascade_nft, with the teachers' cost",  # not finished: halfway from 0.2 to 1.0
         [run("cascade_nft", curve=curve_of((40, 2 * ALL, 1.0))) | {"evaluations": 2 * ALL}], (0.89 - 0.6) / 0.7),
        # The base has 0.2 on all prompts, 0.1 on the monitored ones: the ODE is at 0.81 later than from 0.2
        (5, "ocr, 90%", [run("base", curve=curve_of((0, 0.0, 0.1)))], (10 + 30 * 0.31 / 0.34) / (10 * 0.71 / 0.75)),
        # A teacher that has 0.9 on all prompts and 0.6 on these: the level is 0.54
        (5, "ocr, 90%", [run("teacher_ocr", curve=curve_of((40, TEACHER_COST, 0.6), tasks=["ocr"]))],
         (10 + 30 * 0.04 / 0.34) / (10 * 0.34 / 0.65)),
        # 90% of 0.9 is 0.81: the ODE on its way from 0.2 to 0.85 at round 10, noise 0.7 from 0.5 there to 0.84
        (5, "ocr, 90%", [], (10 + 30 * 0.31 / 0.34) / (10 * 0.61 / 0.65)),
        # Halfway from 0.2 to 0.9 is 0.55: on the ODE's first stretch, on noise 0.7's second
        (5, "ocr, half of the gap", [], (10 + 30 * 0.05 / 0.34) / (10 * 0.35 / 0.65)),
        (5, "ocr, 90%", [run(NOISY, curve=NEVER)], 40 / (10 * 0.61 / 0.65)),
        (5, "ocr, 90%", [run(ODE, curve=NEVER)], 0.0),
        (5, "ocr, 90%", [run(ODE, curve=NEVER), run(NOISY, curve=NEVER)], None),
    ],
)  # fmt: skip
def test_values_from_curves(part, number, name, contents, expected):
    found = part(number, name, *contents)
    assert found.mean == (expected if expected is None else pytest.approx(expected))
    assert found.verdict == (UNMEASURED if expected is None else HOLDS if expected > found.limit else FAILS)


def test_runs_of_unequal_length_are_compared_where_the_shorter_ends(part):
    """The closed form goes on to 0.9 at 100 rounds; at the surrogate's end it has 0.6."""
    longer = run(NOISY, curve=curve_of((40, COST, 0.6), (100, 2.5 * COST, 0.9)))
    longer |= {"rounds": 100, "evaluations": 2.5 * COST}
    level = LEVEL["ppo_noise07"]
    middle = (0.2 + level) / 2  # at round 10
    other = ((0.2 + middle) / 2 * 10 + (middle + level) / 2 * 30) / 40
    assert part(4, "noise 0.7, final", longer).mean == pytest.approx((0.6 - level) / 0.7)
    assert part(4, "noise 0.7, area", longer).mean == pytest.approx(((0.2 + 0.6) / 2 - other) / 0.7)


def test_what_stands_beside_the_claims(results):
    """Each made-up teacher costs 400 and ends at 0.9; the other has 0.5 at 1000 and 0.9 at 1400, so 0.7 at 1200."""
    folder = results(
        run("multitask_nft", curve=curve_of((10, 1000.0, 0.5), (40, 1400.0, 0.9))),
        # what comes after the student's cost, teachers' included, does not count among the best
        run("cascade_nft", curve=curve_of((10, 200.0, 0.5), (20, 300.0, 0.8), (30, 400.0, 0.3), (40, 500.0, 1.0))),
        run("opd_2e3", ocr=0.83),
        without=("opd_5e4",),
    )
    runs, lines = read_results(folder), lines_of(folder)
    assert beside_teachers(runs, "multitask_nft") == {task: {1: pytest.approx(-0.2)} for task in TASKS}
    assert any(line.startswith("| multi-task NFT | -0.200 (-0.200) |") for line in lines)
    assert lead_over_the_best(runs, "cascade_nft") == {1: pytest.approx((0.89 - 0.8) / 0.7)}
    assert "| cascade NFT | +0.129 | +0.129 |" in lines
    assert averages(runs, "multitask_nft_2e3") == {1: pytest.approx(0.5)} and averages(runs, "opd_5e4") == {}
    assert averages(runs, "opd_2e3") == {1: pytest.approx((1 + 1 + 0.9) / 3)}
    assert "| DiffusionOPD | 2e-3 | 0.967 | 0.967 |" in lines


def test_what_is_missing_or_undefined_is_named(results, part):
    slow = (run(ODE, 2, curve=NEVER), run(NOISY, 2, curve=NEVER))
    found = part(5, "ocr, 90%", *slow, seeds=(1, 2, 3))
    assert (list(found.values), found.undefined, found.verdict) == ([1, 3], (2,), HOLDS)
    line = next(line for line in lines_of(results(*slow, seeds=(1, 2, 3))) if "ocr, 90%" in line)
    assert "| 2 of 2: 3.980, 3.980; undefined in seed 2 | holds |" in line


def test_missing_runs_are_named_and_seeds_not_mixed(results):
    folder = results(run("opd", 2), run("teacher_ocr", ocr=0.3), without=("opd", "guard_scene"))
    assert judged(folder) == ALL_HOLD | {1: FAILS, 2: UNMEASURED, 3: UNMEASURED}, "a part that fails decides"
    runs = read_results(folder)
    assert {"guard_scene-seed1", "guard_scene-seed2", "opd-seed1"} <= set(missing(runs))
    assert "opd-seed2" not in missing(runs)
    ocr = next(part for part in claims(runs, None)[1].parts if part.name == "ocr")
    assert (ocr.verdict, ocr.why_none) == (UNMEASURED, "no seed has all of opd, teacher_ocr")


def test_no_gap_is_no_division_by_zero(results):
    zero = dict.fromkeys(TASKS, 0.0)
    folder = results(*(run(name, **zero) for name in LABELS))
    runs = read_results(folder)
    assert set(judged(folder).values()) == {UNMEASURED}
    assert math.isnan(normalised_average({name: by_seed[1] for name, by_seed in runs.items()}, zero))
    assert [row["average"] for row in table(runs)] == [None] * len(LABELS)


def test_table_has_means_spreads_and_the_average_over_rows(results):
    folder = results(run("opd", 2, ocr=0.99), without=tuple(set(LABELS) - {"base", "opd", "sft"}), seeds=(1, 2))
    base, sft, opd = table(read_results(folder))
    assert [row["experiment"] for row in (base, sft, opd)] == ["base", "sft", "opd"]
    assert opd["means"]["ocr"] == pytest.approx(0.94) and opd["spreads"]["ocr"] == pytest.approx(0.1 / math.sqrt(2))
    assert (base["average"], opd["average"]) == (0.0, 1.0)
    assert sft["average"] == pytest.approx((2 * 0.5 / 0.69 + 0.5 / 0.74) / 3)
    assert (opd["evaluations"], opd["with_teachers"]) == (COST, COST + TEACHER_COST)


def test_interpolation_on_curves():
    curve = [Point(0, 0.0, {"ocr": 0.2}), Point(10, 50.0, {"ocr": 0.4}), Point(20, 100.0, {"ocr": 0.3})]
    assert [at_evaluations(curve, n)["ocr"] for n in (75.0, 1000.0)] == pytest.approx([0.35, 0.3])
    assert [rounds_to(curve, "ocr", level) for level in (0.3, 0.2, 0.41)] == [pytest.approx(5.0), 0.0, None]
    assert area([(0, 0.0), (10, 1.0), (20, 1.0)], 15) == pytest.approx((5 + 5) / 15)


def test_files_that_are_no_results_or_of_another_form_are_named(results, tmp_path):
    with pytest.raises(ClaimsError, match="nothing"):
        read_results(tmp_path / "nothing")
    with pytest.raises(ClaimsError, match="full, short"):
        read_results(results(run("opd") | {"form": "short"}))
    for text in ("{", '{"experiment": "opd"}', "[]"):
        (tmp_path / "opd-seed9.json").write_text(text)
        with pytest.raises(ClaimsError, match=r"opd-seed9\.json"):
            read_results(tmp_path)


STATE = {"noise": 0.3, "step": 0, "sigma": 1.0, "kl": 2.0, "closed_squared": 1.0, "between_pictures": 1.0}
STATE |= {"variance": 8.0, "predicted": 8.0, "score_function": 6.0, "error": 8.0, "cosine": {"64": 0.9}}
MEASURED = {"settings": {"seed": 1, "levels": [0.3]}, "states": [STATE]}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({}, HOLDS), ({"predicted": 4.0}, FAILS), ({"error": 16.0}, FAILS), ({"between_pictures": 9.0}, FAILS)],
)
def test_verdict_on_the_estimators(results, changes, verdict):
    assert claims(read_results(results()), MEASURED | {"states": [STATE | changes]})[5].verdict == verdict


def start(script: str, *options: str, cwd) -> str:
    """What is printed, from another folder and without PYTHONPATH."""
    command = [sys.executable, str(CLAIMS / script), *options]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_report_that_is_kept_is_that_of_the_results_that_are_kept(tmp_path):
    kept, printed = CLAIMS / "results", start("report.py", "--output", str(tmp_path), cwd=tmp_path)
    files = {"claims.md", "claims.json", "methods.png", "noise.png", "estimators.png", "teachers.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    text = (tmp_path / "claims.md").read_text("utf-8")
    assert text == (kept / "claims.md").read_text("utf-8"), "write it again: python experiments/claims/report.py"
    for name in files - {"claims.md", "claims.json"}:
        assert f"({name})" in text and (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    content = json.loads((tmp_path / "claims.json").read_text())
    assert all(claim["verdict"] in printed and claim["statement"] in text for claim in content["claims"])


# ---- the variance of the estimators ----------------------------------------------------------------------------------


def test_prediction_is_the_formula_with_the_exact_jacobian_and_the_surrogate_has_it():
    """A student ``v = x W`` with 12 values a latent, over many draws, in float64. The gradient of a cotangent ``c`` is
    the outer product of x and c: ``|J|_F^2 = 12 |x|^2``."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    step = transition("flow_sde", 0.8, 0.7, 0.7)
    x, weight = normal(3, 12), (normal(12, 12) / 4).requires_grad_()
    v_teacher = (x @ weight).detach() + 0.5 * step.std / abs(step.b) * normal(3, 12)
    found = variance.measure(
        step, x, x @ weight, v_teacher, [weight], lambda purpose, k: normal(3, 12), draws=4000, probes=400
    )
    d = step.b * (x @ weight.detach() - v_teacher) / step.std
    squared, kl = d.square().sum(1), 0.5 * d.square().sum(1)
    factor = (step.b / (step.std * 12 * 3)) ** 2 * x.square().sum(1)
    assert found["kl"] == pytest.approx(kl.mean().item())
    assert found["predicted"] == pytest.approx((factor * (12 * (kl**2 + squared) + squared)).sum().item(), rel=0.05)
    assert found["score_function"] == pytest.approx((factor * 12 * kl**2).sum().item(), rel=0.05)
    gradient = step.b / (step.std * 12 * 3) * x.T @ d
    assert found["closed_squared"] == pytest.approx(gradient.square().sum().item())

    assert found["variance"] == pytest.approx(found["predicted"], rel=0.08)
    assert 0.3 < found["error"] / found["variance"] < 2
    cosine = found["cosine"]
    assert list(cosine)[:4] == [1, 2, 4, 8] and max(cosine) == 4000
    unbiased = 1 / math.sqrt(1 + found["predicted"] / (4000 * found["closed_squared"]))
    assert cosine[4000] == pytest.approx(unbiased, abs=0.02) and cosine[4000] > 0.9 > cosine[1]


@pytest.mark.slow
def test_variance_script_writes_its_figures(tmp_path):
    file = tmp_path / "variance.json"
    options = "--draws 2 --probes 1 --pictures 2 --rounds 0 --steps 1 --levels 0.7".split()
    start("variance.py", *options, "--output", str(file), cwd=tmp_path)
    content = json.loads(file.read_text())
    assert content["command"].startswith("python experiments/claims/variance.py --draws 2 --probes 1")
    assert str(ROOT) not in file.read_text()
    (state,) = content["states"]
    assert (state["noise"], state["step"]) == (0.7, 1)
    assert all(state[key] > 0 for key in ("kl", "variance", "predicted", "closed_squared", "between_pictures"))
