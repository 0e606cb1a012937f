"""The claims report: decisions from runs made up for the purpose, and the variance's formula."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy import stats

from diffusionopd.transitions import transition
from experiments.claims import variance
from experiments.claims.arms import HALF
from experiments.claims.config import arms_of
from experiments.claims.report import rows, write
from experiments.claims.results import ClaimsError, Result, read_results, rounds_to
from experiments.claims.verdicts import (
    FAILS,
    HOLDS,
    UNDECIDED,
    UNMEASURED,
    claims,
    contrast,
    fights,
    lead,
    sixth,
    speed,
)
from experiments.claims.worlds import TINY

from .conftest import ROOT

TASKS = TINY.names
LEVEL = {"base": 0.2, "sft": 0.7, "opd": 0.89, "paper": 0.89, "multitask": 0.7, "cascade": 0.6, "closed": 0.89}
LEVEL |= {"plain": 0.4, "centred": 0.6, "merge": 0.5, "strength": 0.85, "steps": 0.8, "mixed": 0.8}
LEVEL |= {"folded": 0.8, "unfolded": 0.8, "fresh": 0.8, "summed": 0.85}
PROMPTS = 8


def result(name: str, seed: int = 1, level: float | None = None, **more) -> Result:
    """A finished stage; teachers have 0.9 on their own task and 0.2 elsewhere, others the same on all three."""
    arm, _, stage = name.rpartition(".")  # rates have dots too
    arm, stage = (arm, stage) if stage in ("early", "alone", "teachers", "80") else (name, "")
    kind, _, task = arm.partition("_")
    teaches = kind in ("teacher", "shipped", "guard")
    levels = {t: level or ((0.9 if t == task else 0.2) if teaches else LEVEL[kind]) for t in TASKS}
    wave = [0.05 * (-1) ** i for i in range(PROMPTS)]
    test = {t: [v + 0.001 * seed + w for w in wave] for t, v in levels.items()}
    end = [(0, dict.fromkeys(TASKS, 0.2)), (40, dict.fromkeys(TASKS, 0.21)), (80, levels)]
    costs = {"forwards": 100.0, "backwards": 50.0, "teacher_forwards": 300.0, "teacher_backwards": 100.0}
    facts = {"world": "tiny", "quick": False, "digest": TINY.digest(), "rounds": 80, "seconds": 1.0}
    facts |= {"machine": "none", "date": "2026-01-01", "curve": end, "test": test}
    return Result(**{"arm": arm, "stage": stage, "seed": seed, **costs, **facts, **more})


@pytest.fixture
def results(tmp_path):
    """``results(changed..., seeds=...)``: a folder with every stage of every arm, the given ones in their place."""

    def make(*changed: Result, seeds: tuple[int, ...] = (1, 2, 3), without: tuple[str, ...] = ()):
        folder = tmp_path / "tiny"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        names = [
            f"{arm.name}.{stage}" if stage else arm.name
            for arm in arms_of(TINY).values()
            for stage in arm.rounds or ("",)
            if arm.kind != "same" and arm.name not in without
        ]
        for each in [*(result(name, seed) for name in names for seed in seeds), *changed]:
            (folder / f"{each.name}-seed{each.seed}.json").write_text(json.dumps(asdict(each)))
        return tmp_path

    return make


def judged(folder) -> list[str]:
    return [claim.verdict for claim in claims(read_results(folder, TINY)[0], TINY)]


def test_a_difference_has_the_paired_clustered_error_and_the_seeds():
    """Against a slow loop over prompts and seeds; the three prompts differ by much, the pairs hardly."""
    own = {1: [0.1, 0.5, 0.9], 2: [0.2, 0.6, 0.8]}
    other = {1: [0.0, 0.45, 0.9], 2: [0.15, 0.5, 0.7]}
    runs = {
        name: {seed: result("opd", seed, test={"ocr": scores}) for seed, scores in by_seed.items()}
        for name, by_seed in {"own": own, "other": other}.items()
    }
    part = contrast(runs, "", [(1.0, "own", "ocr"), (-1.0, "other", "ocr")])
    pairs = [[a - b for a, b in zip(own[s], other[s], strict=True)] for s in (1, 2)]
    by_prompt = [sum(each) / 2 for each in zip(*pairs, strict=True)]
    by_seed = [sum(each) / 3 for each in pairs]
    assert part.mean == pytest.approx(sum(by_seed) / 2)
    assert part.prompt_error == pytest.approx(np.std(by_prompt, ddof=1) / math.sqrt(3))
    assert part.seed_error == pytest.approx(np.std(by_seed, ddof=1) / math.sqrt(2))
    bound = math.hypot(stats.t.ppf(0.975, 1) * part.seed_error, stats.t.ppf(0.975, 2) * part.prompt_error)
    assert part.bound == pytest.approx(bound)
    assert part.verdict == UNDECIDED, "seeds .067 and .067 apart from 0, but two are too few"


def test_prompts_of_one_combination_are_one_cluster_and_more_seeds_bring_no_prompts():
    """Against a slow loop over the captions' objects."""
    captions = next(task for task in TINY.tasks if task.name == "compose").captions("test")
    scores = np.random.default_rng(0).random(len(captions))
    runs = {"own": {seed: result("opd", seed, test={"compose": list(scores + 1e-3 * seed)}) for seed in (1, 2, 3)}}
    part = contrast(runs, "", [(1.0, "own", "compose")])
    sums: dict[str, float] = {}
    for caption, score in zip(captions, scores, strict=True):
        things = caption.metadata["include"]
        objects = sorted(f"{thing['count']} {thing['color']} {thing['class']}" for thing in things)
        key = str(objects) + str(caption.metadata["tag"] == "counting") * (len(things) == 1)
        sums[key] = sums.get(key, 0.0) + score - scores.mean()
    assert 1 < len(sums) < len(captions) and part.clusters == len(sums)
    variance = sum(each**2 for each in sums.values()) / len(captions) ** 2 * len(sums) / (len(sums) - 1)
    assert part.prompt_error == pytest.approx(math.sqrt(variance))
    few = replace(part, values={1: 0.060, 2: 0.061, 3: 0.059}, prompt_error=0.05, clusters=13)
    assert few.verdict == UNDECIDED and few.seeds_needed is None
    assert replace(few, prompt_error=0.0, values={1: 0.06, 2: 0.09, 3: 0.03}).seeds_needed == 4, "3.18 x .03 / 2"


def test_verdicts_in_every_direction(results):
    assert judged(results()) == [HOLDS, HOLDS, HOLDS, HOLDS, UNDECIDED], "equal speed is not less"
    assert judged(results(seeds=(1,)))[:4] == [UNDECIDED] * 4, "one seed decides nothing"
    rates = [name for name in arms_of(TINY) if name.startswith("opd_")]
    worse = [result(f"{rate}.80", seed, 0.5) for rate in rates for seed in (1, 2, 3)]
    assert judged(results(*worse))[1:3] == [FAILS, FAILS], "a part that fails decides"
    spread = [result(f"{rate}.80", seed, 0.5 + 0.2 * seed) for rate in rates for seed in (1, 2, 3)]
    assert judged(results(*spread))[1] == UNDECIDED, "0.7 to 1.1, by the seed"
    assert judged(results(without=("base",)))[0] == UNMEASURED


def test_a_claim_is_judged_for_each_loss_too(results):
    rates = [name for name in arms_of(TINY) if name.startswith("paper_")]
    poor = [result(f"{rate}.80", seed, 0.5) for rate in rates for seed in (1, 2, 3)]
    found = claims(read_results(results(*poor), TINY)[0], TINY)
    ours, theirs, longer = "our loss", "the paper's loss", ", twice the rounds"
    assert {student: claim.verdict for student, claim in found[1].by_student.items()} == {
        **{ours: HOLDS, theirs: FAILS},
        **{ours + longer: HOLDS, theirs + longer: HOLDS},
    }
    assert {student: claim.verdict for student, claim in found[2].by_student.items()} == {ours: HOLDS, theirs: FAILS}
    assert found[1].verdict == FAILS and not found[0].by_student


def test_what_is_missing_is_named(results):
    runs, _ = read_results(results(without=("sft", "centred_0.3", "teacher_ocr")), TINY)
    parts = {part.name: part for claim in claims(runs, TINY) for part in claim.parts}
    assert "teacher_ocr" in parts["our loss, ocr"].why_none and parts["our loss, scene"].verdict == HOLDS
    assert parts["noise 0.3, centred surrogate"].verdict == UNMEASURED


def test_what_is_chosen_is_chosen_on_validation(results):
    """The middle rate is worst on test and best on validation."""
    best = {"curve": [(0, dict.fromkeys(TASKS, 0.2)), (80, dict.fromkeys(TASKS, 0.95))]}
    runs, chosen = read_results(results(*(result("opd_0.001.80", seed, 0.3, **best) for seed in (1, 2, 3))), TINY)
    assert chosen["opd", ""] == chosen["opd", "80"] == "opd_0.001" and runs["opd.80"][1].score("ocr") == pytest.approx(
        0.301
    )
    assert lead(runs, TINY, "", "opd.80", "multitask_nft").verdict == FAILS
    assert {part.verdict for part in fights(runs, TINY)} == {FAILS}
    sooner = [result("multitask_nft_0.002.alone", seed, 0.3, **best) for seed in (1, 2, 3)]
    runs, chosen = read_results(results(*sooner), TINY)  # a shorter stage has a choice of its own
    assert chosen["multitask_nft", "alone"] == runs["multitask_nft.alone"][1].arm == "multitask_nft_0.002"
    assert chosen["multitask_nft", "teachers"] == chosen["multitask_nft", ""] != "multitask_nft_0.002"


def test_a_speed_is_only_decided_where_it_is_seen(results):
    def curve(*points: tuple[int, float]):
        return {"curve": [(number, dict.fromkeys(TASKS, score)) for number, score in points]}

    fast, slow = curve((0, 0.2), (10, 0.3), (20, 0.9)), curve((0, 0.2), (40, 0.3), (80, 0.9))
    runs, _ = read_results(results(), TINY)
    for one, other, verdict, value in (
        (fast, slow, HOLDS, math.log(4)),
        (slow, fast, FAILS, -math.log(4)),
        (fast, curve((0, 0.2), (80, 0.3)), UNDECIDED, None),  # never there
        (curve((0, 0.2), (10, 0.9)), slow, UNDECIDED, None),  # before the first evaluation
        (fast, curve((0, 0.2), (40, 0.3), (80, 0.9), (90, 0.3)), UNDECIDED, math.log(4)),  # not there at the end
        (curve((0, 0.2), (10, 0.3), (20, 0.9), (60, 0.3), (90, 0.9)), slow, UNDECIDED, math.log(4)),  # slower to stay
    ):
        runs["closed_0"] = {seed: result("closed_0", seed, **one) for seed in (1, 2, 3)}
        runs["closed_0.7"] = {seed: result("closed_0.7", seed, **other) for seed in (1, 2, 3)}
        part = speed(runs, "", "closed_0.7", "closed_0", "ocr", 0.9)
        assert part.verdict == verdict and part.mean == (value and pytest.approx(value, abs=0.02))
    points = [(0, {"ocr": 0.2}), (10, {"ocr": 0.4}), (20, {"ocr": 0.3})]
    found = [rounds_to(points, "ocr", level) for level in (0.3, 0.2, 0.41)]
    assert found == [[pytest.approx(5.0)], [0.0], []]
    assert rounds_to([*points, (30, {"ocr": 0.5})], "ocr", 0.35) == [pytest.approx(7.5), pytest.approx(22.5)]


def test_files_that_are_no_results_or_of_others_are_named(results, tmp_path):
    for changes, text in (({"quick": True}, "quick"), ({"digest": "other"}, "sft-seed1")):
        with pytest.raises(ClaimsError, match=text):
            read_results(results(result("sft", **changes), seeds=(1,)), TINY)
    (tmp_path / "tiny" / "sft-seed1.json").write_text("{")
    with pytest.raises(ClaimsError, match=r"sft-seed1\.json"):
        read_results(tmp_path, TINY)
    with pytest.raises(ClaimsError, match="nowhere"):
        write(tmp_path / "nowhere", tmp_path)


def test_the_page_has_every_arm_and_claim(results, tmp_path):
    folder = results(seeds=(1, 2))
    (folder / "variance-seed1.json").write_text(json.dumps(MEASURED))
    for seed in (1, 2):
        (folder / f"beyond-seed{seed}.json").write_text(json.dumps(drawn_by(seed)))
    printed = write(folder, tmp_path / "out")
    text = (tmp_path / "out" / "claims.md").read_text()
    assert all(arm.label in text for arm in arms_of(TINY).values() if arm.group != "claims" or arm.kind != "same")
    content = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert all(claim["statement"] in text for world in content for claim in world["claims"]) and len(printed) == 13
    assert "| | of our loss, twice the rounds | **holds** |" in text
    assert "  of our loss, twice the rounds: holds" in printed
    assert content[0]["claims"][1]["by_student"]["our loss, twice the rounds"] == HOLDS
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    for row in rows(*read_results(folder, TINY)[:1], TINY, "start", {}):
        assert (row["lead"] is None) == (row["name"] in ("fresh_rewarded_opd", "fresh_shipped_opd"))
    assert "| 24 | 1.5 | its target | 0.350; 0.200; 0.500 | 0.350; 0.200; 0.500 | 0.350; 0.200; 0.500 |" in text
    assert "mean of 2 seeds" in text
    for name in ("methods", "noise", "estimators", "strengths"):
        assert (tmp_path / "out" / f"tiny-{name}.png").read_bytes()[:4] == b"\x89PNG" and f"(tiny-{name}.png)" in text


def test_strengths_are_held_against_the_teachers_that_they_had(results):
    """Those of 24 rounds have .6 on their own tasks, those of 60 .9."""
    early = [
        result(f"teacher_{task}.early", seed, test={t: [0.6] * PROMPTS for t in TASKS})
        for task in TASKS
        for seed in (1, 2)
    ]
    runs, chosen = read_results(results(*early, seeds=(1, 2)), TINY)
    found = {row["name"]: row for row in rows(runs, TINY, "strength", chosen)}
    for name, row in found.items():
        gap = 0.85 - 0.6 if "_24_" in name else (0.85 if "strength" in name and not name.endswith("_1") else 0.89) - 0.9
        assert [part.mean for part in row["beyond"].values()] == pytest.approx([gap] * 3, abs=2e-3)
        assert row["lead"].mean == pytest.approx(gap / 0.7, abs=5e-3), "of the way from the base's .2 to .9"


def test_variants_are_held_against_the_method_with_their_own_loss(results):
    """Students with the paper's loss have .7 on the tasks, those with ours .85 to .9."""
    names = [f"paper_0.001.{HALF}", "fresh_rewarded_paper", "summed_rewarded_paper_48_0", "steps_paper_late"]
    poor = [result(name, seed, test={t: [0.7] * PROMPTS for t in TASKS}) for name in names for seed in (1, 2)]
    runs, _ = read_results(results(*poor, seeds=(1, 2)), TINY)
    chosen = {(loss, HALF): f"{loss}_0.001" for loss in ("opd", "paper")}
    found = {r["name"]: r["lead"] for g in ("start", "steps") for r in rows(runs, TINY, g, chosen)}
    assert all(found[name].mean == pytest.approx(0, abs=1e-3) for name in names[2:])
    assert found[names[0]].mean < -0.1 and found[names[1]].mean < -0.1
    assert found["steps_opd_late"].mean == pytest.approx((0.8 - 0.89) / 0.7, abs=5e-3)
    assert found[f"opd_0.001.{HALF}"] is None and found["fresh_rewarded_opd"] is None


def drawn_by(seed: int) -> dict:
    """A file of ``beyond.py``."""
    kinds = [(0, "base", 1.0), (24, "teacher", 1.0), (24, "target", 1.5), (24, "opd", 1.0), (24, "opd", 1.5)]
    fields = [{"rounds": rounds, "kind": kind, "strength": strength} for rounds, kind, strength in kinds]
    values = {"score": 0.2 + 0.1 * seed, "spread": 0.2, "from_base": 0.5}
    figures = [{**one, "task": task, **values} for one in fields for task in TASKS]
    return {"settings": {"seed": seed}, "figures": figures}


KIND = {"variance": 8.0, "predicted": 8.0, "error": 8.0, "cosine": {"64": 0.9}}
STATE = {"noise": 0.3, "step": 0, "sigma": 1.0, "kl": 2.0, "closed_squared": 1.0, "between_pictures": 1.0}
STATE |= {"score_function": 6.0, "plain": KIND, "centred": KIND}
MEASURED = {"settings": {"seed": 1, "levels": [0.3]}, "states": [STATE]}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({}, HOLDS), ({"predicted": 4.0}, FAILS), ({"error": 16.0}, FAILS), ({"variance": 0.5}, FAILS)],
)
def test_verdict_on_the_estimators(changes, verdict):
    """Two seeds that agree."""
    state = STATE | {"centred": KIND | changes}
    found = [MEASURED | {"settings": {"seed": seed, "levels": [0.3]}, "states": [state]} for seed in (1, 2)]
    assert sixth(found).verdict == verdict and sixth([]).verdict == UNMEASURED


def start(script: str, *options: str, cwd) -> str:
    """What is printed, from another folder and without PYTHONPATH."""
    command = [sys.executable, str(ROOT / "experiments" / "claims" / script), *options]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# ---- the variance of the estimators ----------------------------------------------------------------------------------


def test_prediction_is_the_formula_with_the_exact_jacobian_and_the_surrogates_have_it():
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
    assert found["score_function"] == pytest.approx((factor * 12 * kl**2).sum().item(), rel=0.05)
    gradient = step.b / (step.std * 12 * 3) * x.T @ d
    assert found["closed_squared"] == pytest.approx(gradient.square().sum().item())
    for kind, of_kl in (("plain", kl**2), ("centred", 0 * kl)):
        measured = found[kind]
        expected = (factor * (12 * (of_kl + squared) + squared)).sum().item()
        assert measured["predicted"] == pytest.approx(expected, rel=0.05)
        assert measured["variance"] == pytest.approx(measured["predicted"], rel=0.08)
        assert 0.3 < measured["error"] / measured["variance"] < 2
        cosine = measured["cosine"]
        assert list(cosine)[:4] == [1, 2, 4, 8] and max(cosine) == 4000
        unbiased = 1 / math.sqrt(1 + measured["predicted"] / (4000 * found["closed_squared"]))
        assert cosine[4000] == pytest.approx(unbiased, abs=0.02) and cosine[4000] > 0.9 > cosine[1]
    assert found["centred"]["variance"] < 0.7 * found["plain"]["variance"]


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
    assert all(state[kind][key] > 0 for kind in ("plain", "centred") for key in ("variance", "predicted"))
