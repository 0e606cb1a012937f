"""A comparison as shown: text, CSV, and a page with the images side by side."""

import csv
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusionopd.evaluation.results import Record
from diffusionopd.rewards import NOT_APPLICABLE
from tools.report import benchmarks, published
from tools.report.comparison import Averages, Column, Comparison, highest
from tools.report.evaluated import Model
from tools.report.pages import aligned, image_of, render_page

BEST = "*"


class Cell(NamedTuple):
    """A value as text, and what stands below it."""

    text: str
    below: str
    best: bool
    average: bool = False


class Table(NamedTuple):
    """Titles of the columns with what stands below them; of each line the name, whether it is published, the cells."""

    heads: list[tuple[str, str]]
    rows: list[tuple[str, bool, list[Cell]]]


def table_of(comparison: Comparison, columns: Sequence[Column]) -> Table:
    """Some columns as shown, averages after the columns that they are made of; published rows that have any of them."""
    averaged = [column for averages in comparison.averages[:1] for column in averages.columns]
    before = [column for column in columns if column.paper or column in averaged]
    after = [column for column in columns if column not in before]
    averages, models = comparison.averages if before else [], comparison.models
    heads = [(column.title, column.data_set) for column in (*before, *after)]
    heads[len(before) : len(before)] = [(each.title, f"{len(each.columns)} columns") for each in averages]
    shown = [_cells(column, models) for column in before]
    shown += [_average_cells(each, models) for each in averages]
    shown += [_cells(column, models) for column in after]
    rows = [
        (model.name, bool(model.source), [cells[i] for cells in shown])
        for i, model in enumerate(models)
        if not model.source or any(column.of(model) for column in columns)
    ]
    return Table(heads, rows)


def _cells(column: Column, models: Sequence[Model]) -> list[Cell]:
    """Values with their standard errors."""
    found = [column.of(model) for model in models]
    errors = [f"± {each.standard_error:.{column.digits}f}" if each and each.count else "" for each in found]
    quality = benchmarks.is_quality(column.score)
    best = highest([each.mean if each and quality else None for each in found])
    return list(map(Cell, map(column.text, models), errors, best))


def _average_cells(averages: Averages, models: Sequence[Model]) -> list[Cell]:
    """Averages, with the number of columns if these are not all; what a published row's source gives for it."""
    cells = []
    for i, model in enumerate(models):
        value, count = averages.values[i], f" ({averages.counts[i]}/{len(averages.columns)})"
        text = "–" if value is None else f"{value:.3f}{'' if averages.complete[i] else count}"
        remark = f"[{published.AVERAGES[model.name]}]" if model.source and averages.title == "Average" else ""
        cells.append(Cell(text, remark, averages.best[i], average=True))
    return cells


def text_comparison(comparison: Comparison) -> str:
    """The table, under each value its standard error, then further scores, warnings and notes."""
    parts = [_text(table_of(comparison, comparison.main))]
    if comparison.details:
        parts.append("Further scores\n" + _text(table_of(comparison, comparison.details)))
    warnings = [f"warning: {warning}" for warning in comparison.warnings]
    return "\n\n".join([*parts, "\n".join([*warnings, *comparison.notes, f"{BEST} best of a column."])])


def _text(table: Table) -> str:
    rows = [["model", *(title for title, _ in table.heads)], ["", *(below for _, below in table.heads)]]
    for name, is_published, cells in table.rows:
        rows.append([name, *(cell.text + BEST * cell.best for cell in cells)])
        rows.append(["  published" if is_published else "", *(cell.below for cell in cells)])
    return aligned([row for row in rows if any(row)])


def csv_table(comparison: Comparison) -> str:
    """One line per model with all digits: of every column the value, its standard error and the number of samples."""
    lines = []
    for i, model in enumerate(comparison.models):
        line: dict[str, object] = {"model": model.name, "source": model.source or "measured"}
        for column in comparison.columns:
            name, found = f"{column.title} ({column.data_set})", column.of(model)
            # A count of 0 is "not known": published rows, files of the upstream release
            error, count = (found.standard_error, found.count) if found and found.count else (None, None)
            line |= {name: found and found.mean, f"{name} standard error": error, f"{name} count": count}
        for each in comparison.averages:
            line |= {each.title: each.values[i], f"{each.title} number of columns": each.counts[i]}
        lines.append(line)
    writer = csv.DictWriter(buffer := io.StringIO(), list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


# ---- The page --------------------------------------------------------------------------------------------------------


def render_comparison(comparison: Comparison, title: str, num_images: int = 12) -> str:
    """The page as one HTML document that refers to nothing outside itself.

    Args:
        num_images: prompts to show of each data set, the first ones that all its models have.
    """
    measured = [model for model in comparison.models if not model.source]
    data_sets = dict.fromkeys(name for model in measured for name in model.evaluations)
    galleries = [_gallery(comparison, measured, name, num_images) for name in data_sets]
    return render_page(
        "comparison.html.j2",
        title=title,
        main=table_of(comparison, comparison.main),
        details=table_of(comparison, comparison.details),
        warnings=comparison.warnings,
        notes=comparison.notes,
        galleries=[gallery for gallery in galleries if gallery["prompts"]],
        facts=[(model.name, _described(model)) for model in measured],
        image=image_of,
    )


def _gallery(comparison: Comparison, models: Sequence[Model], data_set: str, count: int) -> dict[str, Any]:
    """The first prompts of a data set, as drawn by all models that have images of it, with each image's scores."""
    evaluated = {model.name: model.evaluations[data_set] for model in models if data_set in model.evaluations}
    drawn = {name: each for name, each in evaluated.items() if any(map(each.image, each.records))}
    columns = {column.score: column for column in comparison.main if column.data_set == data_set}
    for evaluation in drawn.values():  # also what a figure of the whole data set is made of
        for score in evaluation.settings.get("rewards", ()):
            columns.setdefault(score, Column(score, score, data_set))
    first = [evaluation.first_images() for evaluation in drawn.values()]
    prompts = []
    for index in sorted(set.intersection(*map(set, first))) if first else ():
        records = {name: images[index] for name, images in zip(drawn, first, strict=True)}
        files = {name: drawn[name].image(record) for name, record in records.items()}
        texts = {record.prompt for record in records.values()}
        if len(texts) == 1 and all(files.values()):
            shown = [(name, files[name], _scores(record, columns.values())) for name, record in records.items()]
            prompts.append((*texts, shown))
    undrawn = [name for name in evaluated if name not in drawn]
    return {"data_set": data_set, "models": len(drawn), "undrawn": undrawn, "prompts": prompts[:count]}


def _scores(record: Record, columns: Any) -> list[tuple[str, str]]:
    """An image's own scores; not those that do not apply."""
    found = [(column, record.scores.get(column.score, NOT_APPLICABLE)) for column in columns]
    return [(c.title, f"{c.scale * value:.{c.digits}f}") for c, value in found if value != NOT_APPLICABLE]


def _described(model: Model) -> str:
    """What is known of a model's evaluations; data sets evaluated alike share a part."""
    parts: dict[str, list[str]] = {}
    names = {"guidance_scale": "guidance", "num_inference_steps": "steps", "resolution": "pixels", "seed": "seed"}
    for data_set, evaluation in model.evaluations.items():
        s = evaluation.settings
        what = [f"{s.get('model', 'model not recorded')}", f"LoRA {s.get('lora') or 'none'}"]
        what += [f"{name} {s[key]}" for key, name in names.items() if key in s]
        count = f" ({len(evaluation.prompts)} prompts)" if evaluation.records else ""
        parts.setdefault(", ".join(what) if s else "settings not recorded", []).append(data_set + count)
    return "; ".join(f"{', '.join(data_sets)}: {text}" for text, data_sets in parts.items())
