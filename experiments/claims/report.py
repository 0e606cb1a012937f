"""The runs as the paper's Table 1, as plots, and as verdicts on its claims.

    python experiments/claims/report.py [--results DIR] [--output DIR]

Writes claims.md, claims.json and the plots. Runs that are not there yet are named, not needed.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

from experiments.claims.curves import ClaimsError, Runs, read_results
from experiments.claims.experiments import BASELINES, LABELS, RATES, TASKS
from experiments.claims.figures import figures
from experiments.claims.verdicts import (
    Claim,
    Part,
    averages,
    beside_teachers,
    claims,
    lead_over_the_best,
    standard_error,
)

RESULTS = Path(__file__).with_name("results")
SHORT = "**Short form: these runs show that everything works; their figures say nothing about the claims.**"
CURVES = "On the monitored test prompts, the first ones of all, at the dots; so are the dashed and dotted levels."
CAPTIONS = {
    "methods.png": "Distillation beside RL on all rewards, by rounds and by evaluations; bands from the lowest to the "
    "highest seed.",
    "noise.png": "Noise of the student's rollouts, with the paper's loss.",
    "estimators.png": "Closed form (solid) and PPO-style surrogate (dashed) at equal noise.",
    "teachers.png": "Teachers from rewards.",
}


def table(runs: Runs) -> list[dict[str, Any]]:
    """A row per experiment, in the order of their list: means over its seeds.

    ``spreads`` are standard deviations of the seeds' means; ``average`` is that of the min-max normalised means, over
    the columns in which rows differ. None for what is not defined.
    """
    order = [*(name for name in LABELS if name in runs), *sorted(runs.keys() - LABELS.keys())]
    means = {name: {task: fmean(r.final[task].mean for r in runs[name].values()) for task in TASKS} for name in order}
    columns = {task: [row[task] for row in means.values()] for task in TASKS}
    ranges = {task: (min(column), max(column)) for task, column in columns.items() if min(column) < max(column)}
    rows = []
    for name in order:
        results = list(runs[name].values())
        normalised = [(means[name][task] - low) / (high - low) for task, (low, high) in ranges.items()]
        counted = [result.backwards for result in results if result.backwards is not None]
        row = {"experiment": name, "label": results[0].label, "seeds": sorted(runs[name]), "means": means[name]}
        row["spreads"] = {t: stdev(r.final[t].mean for r in results) if len(results) > 1 else None for t in TASKS}
        row["average"] = sum(normalised) / len(normalised) if normalised else None
        for cost in ("rounds", "evaluations", "with_teachers"):
            row[cost] = fmean(getattr(result, cost) for result in results)
        rows.append(row | {"backwards": fmean(counted) if counted else None})
    return rows


def missing(runs: Runs) -> list[str]:
    """Known experiments without a run of a seed that others have."""
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    return [f"{name}-seed{seed}" for name in LABELS for seed in seeds if seed not in runs.get(name, {})]


def markdown(runs: Runs, found: Sequence[Claim], variance: Mapping[str, Any] | None, plots: Sequence[str]) -> str:
    """The report as Markdown."""
    forms = {result.form for by_seed in runs.values() for result in by_seed.values()}
    absent = missing(runs)
    names = (f"{name} (seeds {', '.join(map(str, sorted(by_seed)))})" for name, by_seed in runs.items())
    sections = [
        "# The paper's claims in the tiny world",
        SHORT if forms == {"short"} else "",
        _lines("| claim | verdict", [[i, c.statement, f"**{c.verdict}**"] for i, c in enumerate(found, 1)]),
        "## Scores",
        _table_text(runs),
        "## Claims, one by one",
        "Values: mean over the seeds ± its standard error.",
        *(_claim_text(number, claim) for number, claim in enumerate(found, 1)),
        _variance_text(variance) if variance else "",
        _conflict_text(runs),
        _best_text(runs),
        _rates_text(runs),
        f"## Curves\n\n{CURVES}" if plots else "",
        *(f"![{CAPTIONS[name]}]({name})\n\n{CAPTIONS[name]}" for name in plots),
        f"## Runs\n\nThere: {', '.join(names)}.",
        f"Not measured yet: {', '.join(absent)}." if absent else "",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _lines(head: str, rows: Iterable[Sequence[object]], title: str = "", note: str = "") -> str:
    """A Markdown table under a title, with a note; nothing without rows. A head that ends in ":" is of numbers."""
    rule = " | ".join("---:" if cell.rstrip().endswith(":") else "---" for cell in head.split("|"))
    body = ["| " + " | ".join(map(str, cells)) + " |" for cells in rows]
    parts = [title, "\n".join([f"| {head.replace(':', '')} |", f"| {rule} |", *body]), note]
    return "\n\n".join(filter(None, parts)) if body else ""


def _table_text(runs: Runs) -> str:
    counts = sorted({summary.count for by in runs.values() for r in by.values() for summary in r.final.values()})
    cells = []
    for row in table(runs):
        scores = [_with_spread(row["means"][task], row["spreads"][task]) for task in TASKS]
        average = "–" if row["average"] is None else f"{row['average']:.3f}"
        costs = [row[key] for key in ("rounds", "evaluations", "with_teachers", "backwards")]
        costs = [f"{value:,.0f}" if value else "–" for value in costs]
        cells.append([row["label"], len(row["seeds"]), *scores, average, *costs])
    return _lines(
        f"model | seeds: | {': | '.join(TASKS)}: | Average: | rounds: | evaluations: | with teachers': | "
        "backward passes:",
        cells,
        note=f"Mean over seeds ± standard deviation of the seeds' means, {' or '.join(map(str, counts))} test prompts "
        "a task. Average: mean of the scores min-max normalised over these rows, so it changes with the rows. "
        "Evaluations: forward passes of the transformer by single pictures in the whole training (rollouts and "
        "teachers' passes included, scoring left out); backward passes are those of the pictures among them that were "
        "also backpropagated.",
    )


def _with_spread(mean: float, spread: float | None) -> str:
    return f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _claim_text(number: int, claim: Claim) -> str:
    title = f"### {number}. {claim.statement}\n\n**{claim.verdict}.** Rule: {claim.rule}"
    return _lines("| value: | wanted | seeds | verdict", map(_part_cells, claim.parts), title)


def _part_cells(part: Part) -> list[str]:
    wanted = f"{part.relation} {part.limit:g}"
    if part.mean is None:
        return [part.name, "–", wanted, "–", f"{part.verdict}: {part.why_none}"]
    seeds = f"{part.seeds_that_hold} of {len(part.values)}: {_each(part.values)}"
    if part.undefined:
        seeds += f"; undefined in seed {', '.join(map(str, part.undefined))}"
    verdict = part.verdict + (", but by less than the standard error" if part.is_close else "")
    return [part.name, _with_spread(part.mean, part.standard_error), wanted, seeds, verdict]


def _each(values: Mapping[int, float], sign: str = "") -> str:
    return ", ".join(f"{value:{sign}.3f}" for value in values.values())


def _conflict_text(runs: Runs) -> str:
    """Whether the tasks fight here: what decides how much there is to win by distilling."""
    found = {name: beside_teachers(runs, name) for name in ("multitask_nft", "multitask_guard")}
    return _lines(
        f"| {': | '.join(TASKS)}:",
        [
            [LABELS[name], *(f"{fmean(v.values()):+.3f} ({_each(v, '+')})" for v in by_task.values())]
            for name, by_task in found.items()
            if all(by_task.values())
        ],
        "### Do the tasks fight?",
        "Score of one model trained on all tasks in turn minus that of the task's NFT teacher, when it has cost as "
        "many evaluations as the three teachers together; monitored test prompts, mean (each seed). About 0: the tasks "
        "learn side by side as well as alone. Below 0: they fight.",
    )


def _best_text(runs: Runs) -> str:
    """Claim 3 once more, against baselines that somebody stopped at the right moment."""
    leads = {name: lead_over_the_best(runs, name) for name in BASELINES}
    return _lines(
        "against | mean: | each seed",
        [[LABELS[name], f"{fmean(lead.values()):+.3f}", _each(lead, "+")] for name, lead in leads.items() if lead],
        "### Had the others been stopped at their best",
        "Average of DiffusionOPD's student minus that of the other at the best point of its curve, teachers' cost "
        "counted in; monitored test prompts. The best of many noisy points flatters the other, as the end of a "
        "training that collapsed flatters the student.",
    )


def _rates_text(runs: Runs) -> str:
    """How much a method's result depends on the learning rate that somebody has to choose."""
    rows = []
    for method, rates in RATES.items():
        for rate, experiment in rates.items():
            if found := averages(runs, experiment):
                values = list(found.values())
                rows.append([LABELS[method], rate, _with_spread(fmean(values), standard_error(values)), _each(found)])
    return _lines(
        "method | learning rate: | average: | each seed",
        rows,
        "### Learning rates",
        "Average of the finished model on a scale on which the base is 0 and the teachers are 1; all test prompts, "
        "mean ± standard error, and each seed. A method costs the same at every rate.",
    )


def _variance_text(variance: Mapping[str, Any]) -> str:
    """The measured states behind the claim on the estimators."""
    rows = []
    for s in variance["states"]:
        noise, predicted = s["variance"], s["predicted"]
        ratios = [noise / s["closed_squared"], noise / predicted, s["score_function"] / predicted]
        ratios.append(1 + noise / s["between_pictures"])
        rows.append([s["noise"], s["step"], *(f"{value:.3g}" for value in (s["kl"], *ratios))])
    return _lines(
        "noise: | step: | KL: | noise / signal: | measured / predicted: | score-function part: | total / closed form:",
        rows,
        note=f"`{variance['command']}`, {variance['date']}, {variance['machine']}. KL: of one picture, summed over "
        "dimensions. Noise: variance of the surrogate's gradient over draws of the step's noise; signal: squared norm "
        "of the closed form's gradient; both for the mean over the pictures. Score-function part: share of the "
        "predicted noise that is the paper's KL · eps/s · dmu. Total / closed form: that noise and the closed form's "
        "own variance over pictures together, by the latter.",
    )


def as_json(runs: Runs, found: Sequence[Claim]) -> dict[str, Any]:
    """The same as plain values."""
    judged = [asdict(claim) | {"verdict": claim.verdict, "parts": list(map(_values, claim.parts))} for claim in found]
    return {"table": table(runs), "claims": judged, "missing": missing(runs)}


def _values(part: Part) -> dict[str, Any]:
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
