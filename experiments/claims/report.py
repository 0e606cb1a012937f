"""The runs as the paper's Table 1, as plots, and as verdicts on its claims.

    python experiments/claims/report.py [--results DIR] [--output DIR]

Writes claims.md, claims.json and the plots. Runs that are not there yet are named, not needed.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

import numpy as np

from experiments.claims.curves import ClaimsError, Result, Runs, read_results
from experiments.claims.experiments import LABELS, RATES, TASKS
from experiments.claims.figures import figures
from experiments.claims.verdicts import (
    RIVALS,
    Claim,
    Part,
    averages,
    beside_teachers,
    claims,
    lead_over_the_best,
    standard_error,
)
from tools.report.comparison import min_max

RESULTS = Path(__file__).with_name("results")
CURVES = "On the monitored test prompts, the first ones of all, at the dots; so are the dashed and dotted levels."
CAPTIONS = {
    "methods.png": "Distillation beside RL on all rewards, by rounds and by evaluations; bands from the lowest to the "
    "highest seed.",
    "noise.png": "Noise of the student's rollouts, with the paper's loss.",
    "estimators.png": "Closed form (solid) and PPO-style surrogate (dashed) at equal noise.",
    "teachers.png": "Teachers from rewards.",
}


@dataclass(frozen=True)
class Row:
    """One experiment: means over its seeds."""

    experiment: str
    label: str
    seeds: Sequence[int]
    means: Mapping[str, float]  # by task
    spreads: Mapping[str, float | None]  # standard deviation of the seeds' means; None for one seed
    average: float | None  # of the min-max normalised means; None where no column differs between rows
    rounds: float
    evaluations: float
    with_teachers: float
    backwards: float | None


def table(runs: Runs) -> list[Row]:
    """The rows in the order of the experiments' list; the average is over the columns in which rows differ."""
    order = [*(name for name in LABELS if name in runs), *sorted(runs.keys() - LABELS.keys())]
    by_row = [list(runs[name].values()) for name in order]
    means = [{task: fmean(result.means()[task] for result in results) for task in TASKS} for results in by_row]
    normalised = min_max(np.array([[row[task] for task in TASKS] for row in means]))
    usable = normalised[:, ~np.isnan(normalised).any(axis=0)]
    averages = usable.mean(axis=1).tolist() if usable.size else [None] * len(order)
    return [_row(*columns) for columns in zip(by_row, means, averages, strict=True)]


def _row(results: Sequence[Result], means: Mapping[str, float], average: float | None) -> Row:
    spreads = {t: stdev(result.means()[t] for result in results) if len(results) > 1 else None for t in TASKS}
    counted = [result.backwards for result in results if result.backwards is not None]
    return Row(
        experiment=results[0].experiment,
        label=results[0].label,
        seeds=sorted(result.seed for result in results),
        means=means,
        spreads=spreads,
        average=average,
        rounds=fmean(result.rounds for result in results),
        evaluations=fmean(result.evaluations for result in results),
        with_teachers=fmean(result.with_teachers for result in results),
        backwards=fmean(counted) if counted else None,
    )


def missing(runs: Runs) -> list[str]:
    """Known experiments without a run of a seed that others have."""
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    return [f"{name}-seed{seed}" for name in LABELS for seed in seeds if seed not in runs.get(name, {})]


def markdown(runs: Runs, found: Sequence[Claim], variance: Mapping[str, Any] | None, plots: Sequence[str]) -> str:
    """The report as Markdown."""
    sections = [
        "# The paper's claims in the tiny world",
        *_preface(runs),
        _overview(found),
        "## Scores",
        _table_text(table(runs)),
        _table_notes(runs),
        "## Claims, one by one",
        "Values: mean over the seeds ± its standard error.",
        *(_claim_text(number, claim) for number, claim in enumerate(found, 1)),
        *([_variance_text(variance)] if variance else []),
        *_conflict_text(runs),
        *_best_text(runs),
        *_rates_text(runs),
        *(["## Curves", CURVES] if plots else []),
        *(f"![{CAPTIONS[name]}]({name})\n\n{CAPTIONS[name]}" for name in plots),
        "## Runs",
        _runs_text(runs),
    ]
    return "\n\n".join(sections) + "\n"


def _preface(runs: Runs) -> list[str]:
    forms = {result.form for by_seed in runs.values() for result in by_seed.values()}
    if forms == {"short"}:
        return ["**Short form: these runs show that everything works; their figures say nothing about the claims.**"]
    return []


def _overview(found: Sequence[Claim]) -> str:
    lines = ["| | claim | verdict |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {i} | {c.statement} | **{c.verdict}** |" for i, c in enumerate(found, 1))])


def _table_text(rows: Sequence[Row]) -> str:
    lines = [
        f"| model | seeds | {' | '.join(TASKS)} | Average | rounds | evaluations | with teachers' | backward passes |",
        "| --- |" + " ---: |" * (len(TASKS) + 6),
    ]
    for row in rows:
        scores = [_with_spread(row.means[task], row.spreads[task]) for task in TASKS]
        average = "–" if row.average is None else f"{row.average:.3f}"
        costs = [_count(value) for value in (row.rounds, row.evaluations, row.with_teachers, row.backwards)]
        lines.append(f"| {' | '.join([row.label, str(len(row.seeds)), *scores, average, *costs])} |")
    return "\n".join(lines)


def _with_spread(mean: float, spread: float | None) -> str:
    return f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _count(value: float | None) -> str:
    return "–" if not value else f"{value:,.0f}"


def _table_notes(runs: Runs) -> str:
    counts = sorted({summary.count for by in runs.values() for r in by.values() for summary in r.final.values()})
    return (
        f"Mean over seeds ± standard deviation of the seeds' means, {' or '.join(map(str, counts))} test prompts a "
        "task. Average: mean of the scores min-max normalised over these rows, so it changes with the rows. "
        "Evaluations: forward passes of the transformer by single pictures in the whole training (rollouts and "
        "teachers' passes included, scoring left out); backward passes are those of the pictures among them that were "
        "also backpropagated."
    )


def _claim_text(number: int, claim: Claim) -> str:
    lines = [
        "| | value | wanted | seeds | verdict |",
        "| --- | ---: | --- | --- | --- |",
        *map(_part_text, claim.parts),
    ]
    head = f"### {number}. {claim.statement}\n\n**{claim.verdict}.** Rule: {claim.rule}"
    return head + "\n\n" + "\n".join(lines)


def _part_text(part: Part) -> str:
    wanted = f"{part.relation} {part.limit:g}"
    if part.mean is None:
        return f"| {part.name} | – | {wanted} | – | {part.verdict}: {part.why_none} |"
    each = ", ".join(f"{value:.3f}" for value in part.values.values())
    seeds = f"{part.seeds_that_hold} of {len(part.values)}: {each}"
    if part.undefined:
        seeds += f"; undefined in seed {', '.join(map(str, part.undefined))}"
    value = _with_spread(part.mean, part.standard_error)
    verdict = part.verdict + (", but by less than the standard error" if part.is_close else "")
    return f"| {part.name} | {value} | {wanted} | {seeds} | {verdict} |"


def _conflict_text(runs: Runs) -> list[str]:
    """Whether the tasks fight here: what decides how much there is to win by distilling."""
    lines = []
    for rival in ("multitask_nft", "multitask_guard"):
        found = beside_teachers(runs, rival)
        if all(found.values()):
            cells = [f"{fmean(v.values()):+.3f} ({', '.join(f'{x:+.3f}' for x in v.values())})" for v in found.values()]
            lines.append(f"| {LABELS[rival]} | {' | '.join(cells)} |")
    if not lines:
        return []
    head = [f"| | {' | '.join(TASKS)} |", "| --- |" + " ---: |" * len(TASKS)]
    note = (
        "Score of one model trained on all tasks in turn minus that of the task's NFT teacher, when it has cost as "
        "many evaluations as the three teachers together; monitored test prompts, mean (each seed). About 0: the tasks "
        "learn side by side as well as alone. Below 0: they fight."
    )
    return ["### Do the tasks fight?", "\n".join([*head, *lines]), note]


def _best_text(runs: Runs) -> list[str]:
    """Claim 3 once more, against rivals that somebody stopped at the right moment."""
    leads = {rival: lead_over_the_best(runs, rival) for rival in RIVALS}
    lines = [
        f"| {LABELS[rival]} | {fmean(found.values()):+.3f} | {', '.join(f'{x:+.3f}' for x in found.values())} |"
        for rival, found in leads.items()
        if found
    ]
    if not lines:
        return []
    note = (
        "Average of DiffusionOPD's student minus that of the other at the best point of its curve, teachers' cost "
        "counted in; monitored test prompts. The best of many noisy points flatters the other, as the end of a "
        "training that collapsed flatters the student."
    )
    head = ["| against | mean | each seed |", "| --- | ---: | --- |"]
    return ["### Had the others been stopped at their best", "\n".join([*head, *lines]), note]


def _rates_text(runs: Runs) -> list[str]:
    """How much a method's result depends on the learning rate that somebody has to choose."""
    lines = []
    for method, rates in RATES.items():
        for rate, experiment in rates.items():
            if found := averages(runs, experiment):
                values = list(found.values())
                mean, each = _with_spread(fmean(values), standard_error(values)), ", ".join(f"{x:.3f}" for x in values)
                lines.append(f"| {LABELS[method]} | {rate} | {mean} | {each} |")
    if not lines:
        return []
    note = (
        "Average of the finished model on a scale on which the base is 0 and the teachers are 1; all test prompts, "
        "mean ± standard error, and each seed. A method costs the same at every rate."
    )
    head = ["| method | learning rate | average | each seed |", "| --- | ---: | ---: | --- |"]
    return ["### Learning rates", "\n".join([*head, *lines]), note]


def _variance_text(variance: Mapping[str, Any]) -> str:
    """The measured states behind the claim on the estimators."""
    lines = [
        "| noise | step | KL | noise / signal | measured / predicted | score-function part | total / closed form |",
        "|" + " ---: |" * 7,
    ]
    for s in variance["states"]:
        ratios = (
            s["variance"] / s["closed_squared"],
            s["variance"] / s["predicted"],
            s["score_function"] / s["predicted"],
            1 + s["variance"] / s["between_pictures"],
        )
        lines.append(f"| {s['noise']} | {s['step']} | {s['kl']:.3g} | {' | '.join(f'{r:.3g}' for r in ratios)} |")
    note = (
        f"`{variance['command']}`, {variance['date']}, {variance['machine']}. KL: of one picture, summed over "
        "dimensions. Noise: variance of the surrogate's gradient over draws of the step's noise; signal: squared norm "
        "of the closed form's gradient; both for the mean over the pictures. Score-function part: share of the "
        "predicted noise that is the paper's KL · eps/s · dmu. Total / closed form: that noise and the closed form's "
        "own variance over pictures together, by the latter."
    )
    return "\n".join(lines) + f"\n\n{note}"


def _runs_text(runs: Runs) -> str:
    absent = missing(runs)
    text = ", ".join(f"{name} (seeds {', '.join(map(str, sorted(by_seed)))})" for name, by_seed in runs.items())
    return f"There: {text}." + (f"\n\nNot measured yet: {', '.join(absent)}." if absent else "")


def as_json(runs: Runs, found: Sequence[Claim]) -> dict[str, Any]:
    """The same as plain values."""
    judged = [
        {**asdict(claim), "verdict": claim.verdict, "parts": [_part_values(part) for part in claim.parts]}
        for claim in found
    ]
    return {"table": [asdict(row) for row in table(runs)], "claims": judged, "missing": missing(runs)}


def _part_values(part: Part) -> dict[str, Any]:
    return {**asdict(part), "mean": part.mean, "standard_error": part.standard_error, "verdict": part.verdict}


def read_variance(file: Path) -> dict[str, Any] | None:
    """The content of a ``variance.json``; None if there is none. Raises ClaimsError for a file that is no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ClaimsError(
            f"{file} cannot be read ({error}); make it again: python experiments/claims/variance.py"
        ) from None


def write(results: Path, output: Path) -> list[str]:
    """Read a folder of results, write claims.md, claims.json and the plots; returns the verdicts and where they are.

    Raises ClaimsError for results that cannot be read or put side by side.
    """
    runs, variance = read_results(results), read_variance(results / "variance.json")
    output.mkdir(parents=True, exist_ok=True)
    found, drawn = claims(runs, variance), figures(runs)
    for name, figure in drawn.items():
        figure.savefig(output / name, dpi=110, metadata={"Software": None})
    (output / "claims.md").write_text(markdown(runs, found, variance, list(drawn)), encoding="utf-8")
    (output / "claims.json").write_text(json.dumps(as_json(runs, found), indent=1) + "\n", encoding="utf-8")
    verdicts = [f"{number}. {claim.verdict:17s} {claim.statement}" for number, claim in enumerate(found, 1)]
    return [*verdicts, f"wrote {output / 'claims.md'}, claims.json and {len(drawn)} plots"]


def main() -> None:
    """Flags to files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs' files and variance.json")
    parser.add_argument("--output", type=Path, help="default: the folder of the results")
    flags = parser.parse_args()
    try:
        print("\n".join(write(flags.results, flags.output or flags.results)))
    except ClaimsError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
