"""A comparison as plain text for the terminal, and as CSV for everything else."""

import csv
import io
from collections.abc import Sequence

from tools.report import published
from tools.report.comparison import Averages, Comparison
from tools.report.comparison_columns import Column
from tools.report.comparison_data import Model

BEST = "*"


def text_comparison(comparison: Comparison) -> str:
    """The table, under each value its standard error, then further scores, warnings and notes."""
    parts = [_align(_rows(comparison, comparison.main))]
    if comparison.details:
        parts.append("Further scores\n" + _align(_rows(comparison, comparison.details)))
    notes = [f"warning: {warning}" for warning in comparison.warnings] + [
        *comparison.notes,
        f"{BEST} best of a column.",
    ]
    parts.append("\n".join(notes))
    return "\n\n".join(parts)


def order(comparison: Comparison, columns: Sequence[Column]) -> list[Column | Averages]:
    """The columns of a table as shown: averages stand after the columns that they are made of."""
    averaged = [column for averages in comparison.averages[:1] for column in averages.columns]
    before = [column for column in columns if column.paper or column in averaged]
    averages = comparison.averages if before else []
    return [*before, *averages, *(column for column in columns if column not in before)]


def rows_of(comparison: Comparison, columns: Sequence[Column]) -> list[int]:
    """The rows of a table of these columns: measured models, and published ones that have something in it."""
    rows = enumerate(comparison.models)
    return [i for i, model in rows if not model.source or any(column.of(model) for column in columns)]


def average_text(averages: Averages, row: int) -> str:
    """An average, with the number of its columns if these are not all."""
    average = averages.rows[row]
    if average.value is None:
        return "–"
    return f"{average.value:.3f}" + ("" if averages.is_complete(row) else f" ({average.count}/{len(averages.columns)})")


def average_remark(averages: Averages, model: Model) -> str:
    """What the source of a published row gives as its average."""
    return f"[{published.AVERAGES[model.name]}]" if model.source and averages.title == "Average" else ""


def _rows(comparison: Comparison, columns: Sequence[Column]) -> list[list[str]]:
    """Two lines of cells for the head and for each model; lines with nothing in them are left out."""
    shown = order(comparison, columns)
    rows = [
        ["model", *(each.title for each in shown)],
        ["", *(each.data_set if isinstance(each, Column) else "" for each in shown)],
    ]
    for i in rows_of(comparison, columns):
        model = comparison.models[i]
        cells = [
            _cell(comparison, each, model) if isinstance(each, Column) else _average_cell(each, i, model)
            for each in shown
        ]
        rows.append([model.name, *(value for value, _ in cells)])
        rows.append(["  published" if model.source else "", *(below for _, below in cells)])
    return [row for row in rows if any(row)]


def _cell(comparison: Comparison, column: Column, model: Model) -> tuple[str, str]:
    """A value and its standard error."""
    summary = column.of(model)
    mark = BEST if comparison.is_best(column, model) else ""
    error = f"±{summary.standard_error:.{column.digits}f}" if summary and summary.count else ""
    return column.text(model) + mark, error


def _average_cell(averages: Averages, row: int, model: Model) -> tuple[str, str]:
    mark = BEST if averages.is_best(row) else ""
    return average_text(averages, row) + mark, average_remark(averages, model)


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def csv_table(comparison: Comparison) -> str:
    """One line a model with all digits: of every column the value, its standard error and the number of samples."""
    head = ["model", "source"]
    for column in comparison.columns:
        name = f"{column.title} ({column.data_set})"
        head += [name, f"{name} standard error", f"{name} count"]
    head += [name for each in comparison.averages for name in (each.title, f"{each.title} number of columns")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for i, model in enumerate(comparison.models):
        line: list[object] = [model.name, model.source or "measured"]
        for column in comparison.columns:
            summary = column.of(model)
            line += ["" if summary is None else summary.mean]
            # A count of 0 is "not known": published rows, and files of the upstream release.
            line += [summary.standard_error, summary.count] if summary and summary.count else ["", ""]
        for averages in comparison.averages:
            average = averages.rows[i]
            line += ["" if average.value is None else average.value, average.count]
        writer.writerow(line)
    return buffer.getvalue()
