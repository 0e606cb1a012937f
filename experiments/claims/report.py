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
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

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
    """The report as Markdown, by the template beside this file."""
    finals = [summary for by_seed in runs.values() for result in by_seed.values() for summary in result.final.values()]
    # Whether the tasks fight decides how much there is to win by distilling
    fights = {name: beside_teachers(runs, name) for name in ("multitask_nft", "multitask_guard")}
    leads = {name: lead_over_the_best(runs, name) for name in BASELINES}  # of claim 3, by luckier baselines
    rates = [(name, rate, averages(runs, run)) for name, by_rate in RATES.items() for rate, run in by_rate.items()]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"part_cells": _part_cells, "state_cells": _state_cells}
    return environment.get_template("claims.md.j2").render(
        short={result.form for by_seed in runs.values() for result in by_seed.values()} == {"short"},
        claims=found,
        tasks=TASKS,
        scores=map(_score_cells, table(runs)),
        counts=sorted({summary.count for summary in finals}),
        variance=variance,
        conflicts=[
            [LABELS[name], *(f"{fmean(v.values()):+.3f} ({_each(v, '+')})" for v in by_task.values())]
            for name, by_task in fights.items()
            if all(by_task.values())
        ],
        leads=[[LABELS[n], f"{fmean(v.values()):+.3f}", _each(v, "+")] for n, v in leads.items() if v],
        rates=[
            [LABELS[name], rate, _with_spread(fmean(v.values()), standard_error([*v.values()])), _each(v)]
            for name, rate, v in rates
            if v
        ],
        plots={name: CAPTIONS[name] for name in plots},
        runs=runs,
        missing=missing(runs),
    )


def _score_cells(row: Mapping[str, Any]) -> list[object]:
    scores = [_with_spread(row["means"][task], row["spreads"][task]) for task in TASKS]
    average = "–" if row["average"] is None else f"{row['average']:.3f}"
    costs = [row[key] for key in ("rounds", "evaluations", "with_teachers", "backwards")]
    return [row["label"], len(row["seeds"]), *scores, average, *(f"{cost:,.0f}" if cost else "–" for cost in costs)]


def _part_cells(part: Part) -> list[str]:
    wanted = f"{part.relation} {part.limit:g}"
    if part.mean is None:
        return [part.name, "–", wanted, "–", f"{part.verdict}: {part.why_none}"]
    seeds = f"{part.seeds_that_hold} of {len(part.values)}: {_each(part.values)}"
    if part.undefined:
        seeds += f"; undefined in seed {', '.join(map(str, part.undefined))}"
    verdict = part.verdict + (", but by less than the standard error" if part.is_close else "")
    return [part.name, _with_spread(part.mean, part.standard_error), wanted, seeds, verdict]


def _state_cells(s: Mapping[str, Any]) -> list[object]:
    noise, predicted = s["variance"], s["predicted"]
    ratios = (noise / s["closed_squared"], noise / predicted, s["score_function"] / predicted)
    return [s["noise"], s["step"], *(f"{v:.3g}" for v in (s["kl"], *ratios, 1 + noise / s["between_pictures"]))]


def _with_spread(mean: float, spread: float | None) -> str:
    return f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _each(values: Mapping[int, float], sign: str = "") -> str:
    return ", ".join(f"{value:{sign}.3f}" for value in values.values())


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
