"""A comparison as a page: the table, the same prompts' pictures of all models side by side, how they were made."""

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from diffusionopd.evaluation.results import Record
from diffusionopd.rewards import NOT_APPLICABLE
from tools.report.comparison import Averages, Comparison
from tools.report.comparison_columns import SCALES, Column
from tools.report.comparison_data import Evaluation, Model
from tools.report.comparison_text import average_remark, average_text, order, rows_of
from tools.report.document import THUMBNAIL, data_uri, document, facts, section


def render_comparison(comparison: Comparison, title: str, num_pictures: int = 12) -> str:
    """The page as one HTML document that refers to nothing outside itself.

    Args:
        num_pictures: prompts to show of each data set, the first ones that all its models have.
    """
    data_sets = dict.fromkeys(name for model in comparison.models for name in model.evaluations)
    galleries = {name: _gallery(comparison, name, num_pictures) for name in data_sets}
    sections = [
        section("Scores", _table(comparison, comparison.main) + _notes(comparison)),
        *([section("Further scores", _table(comparison, comparison.details))] if comparison.details else []),
        *(section(f"Pictures: {name}", gallery) for name, gallery in galleries.items() if gallery),
        section("How they were evaluated", facts(list(_facts(comparison.models)))),
    ]
    return document(title, "".join(sections), STYLE)


def _table(comparison: Comparison, columns: Sequence[Column]) -> str:
    shown = order(comparison, columns)
    head = "".join(
        f'<th scope="col">{html.escape(each.title)}<small>{html.escape(_below_title(each))}</small></th>'
        for each in shown
    )
    body = "".join(_row(comparison, shown, i) for i in rows_of(comparison, columns))
    return (
        f'<div class="scroll"><table class="comparison">\n<thead><tr><th scope="col">model</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def _below_title(column: Column | Averages) -> str:
    return column.data_set if isinstance(column, Column) else f"{len(column.columns)} columns"


def _row(comparison: Comparison, shown: Sequence[Column | Averages], i: int) -> str:
    model = comparison.models[i]
    cells = []
    for each in shown:
        if isinstance(each, Averages):
            text, below, best = average_text(each, i), average_remark(each, model), each.is_best(i)
        else:
            summary = each.of(model)
            text, best = each.text(model), comparison.is_best(each, model)
            below = f"± {summary.standard_error:.{each.digits}f}" if summary and summary.count else ""
        css = f"{'average ' if isinstance(each, Averages) else ''}{'own' if best else ''}".strip()
        mark = ' <span aria-label="best">★</span>' if best else ""
        cells.append(f'<td class="{css}">{html.escape(text)}{mark}<small>{html.escape(below)}</small></td>')
    name = html.escape(model.name) + ("<small>published</small>" if model.source else "")
    return f'<tr class="{"published" if model.source else ""}"><th scope="row">{name}</th>{"".join(cells)}</tr>\n'


def _notes(comparison: Comparison) -> str:
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in comparison.warnings)
    boxed = f'<div class="warning"><b>Not evaluated alike</b><ul>{warnings}</ul></div>\n' if warnings else ""
    legend = "★ is the best of its column; ± is the standard error of the mean over prompts."
    return boxed + "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in (legend, *comparison.notes))


def _gallery(comparison: Comparison, data_set: str, count: int) -> str:
    """The first prompts of a data set, as drawn by all models that have pictures of it; empty if none has."""
    drawn = {
        model.name: model.evaluations[data_set]
        for model in comparison.models
        if data_set in model.evaluations and _has_pictures(model.evaluations[data_set])
    }
    shown = {column.score: column for column in comparison.main if column.data_set == data_set}
    for evaluation in drawn.values():  # also what a figure of the whole data set is made of
        for score in evaluation.settings.get("rewards", ()):
            shown.setdefault(score, Column(score, score, data_set))
    undrawn = [m.name for m in comparison.models if not m.source and data_set in m.evaluations and m.name not in drawn]
    figures = [_figure(pictures, list(shown.values())) for pictures in _common_pictures(drawn, count)]
    if not figures:
        return ""
    return (
        f'<p class="note">The first {len(figures)} prompts that every model drew, not selected; under each picture '
        f"its own scores.{_without_pictures(undrawn)}</p>\n"
        f'<div class="side-by-side" style="--models: {len(drawn)}">{"".join(figures)}</div>\n'
    )


def _without_pictures(names: Sequence[str]) -> str:
    listed = html.escape(", ".join(names))
    return f" Evaluated without --save_images: {listed}." if names else ""


def _has_pictures(evaluation: Evaluation) -> bool:
    return any(evaluation.image(record) for record in evaluation.records)


Pictures = Mapping[str, tuple[Record, Path]]
"""One prompt's sample and picture by model."""


def _common_pictures(drawn: Mapping[str, Evaluation], count: int) -> list[Pictures]:
    """The first `count` prompts with a picture of every model."""
    by_model = {name: evaluation.first_images() for name, evaluation in drawn.items()}
    found: list[Pictures] = []
    for index in sorted(set.intersection(*(set(records) for records in by_model.values())) if by_model else ()):
        if len(found) == count:
            break
        records = {name: records[index] for name, records in by_model.items()}
        files = {name: drawn[name].image(record) for name, record in records.items()}
        alike = len({record.prompt for record in records.values()}) == 1
        whole = {name: (records[name], file) for name, file in files.items() if file}
        if alike and len(whole) == len(drawn):
            found.append(whole)
    return found


def _figure(pictures: Pictures, shown: Sequence[Column]) -> str:
    prompt = next(record.prompt for record, _ in pictures.values())
    cells = []
    for name, (record, file) in pictures.items():
        scores = "".join(_score(column, record) for column in shown)
        alt = html.escape(f"{name} for “{prompt}”")
        cells.append(f'<div><span>{html.escape(name)}</span><img alt="{alt}" {_source(file)}>{scores}</div>')
    caption = html.escape(prompt)
    return f'<figure><figcaption>{caption}</figcaption><div class="models">{"".join(cells)}</div></figure>\n'


def _score(column: Column, record: Record) -> str:
    """A picture's own score; nothing where it does not apply."""
    value = record.scores.get(column.score, NOT_APPLICABLE)
    if value == NOT_APPLICABLE:
        return ""
    text = f"{SCALES.get(column.score, 1.0) * value:.{column.digits}f}"
    return f"<small>{html.escape(column.title)} <b>{text}</b></small>"


def _source(file: Path) -> str:
    """The picture's attributes: a small one as it is, with its pixels visible, a large one shrunk."""
    with Image.open(file) as opened:
        if max(opened.size) <= THUMBNAIL // 2:
            return f'class="pixels" src="{data_uri("image/jpeg", file.read_bytes())}"'
        image = opened.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return f'src="{data_uri("image/jpeg", buffer.getvalue())}"'


def _facts(models: Sequence[Model]) -> Iterator[tuple[str, str]]:
    """What is known of each measured model's evaluations; data sets evaluated alike share a line."""
    for model in models:
        if model.source:
            continue
        lines: dict[str, list[str]] = {}
        for data_set, evaluation in model.evaluations.items():
            count = f"{data_set} ({len(evaluation.prompts)} prompts)" if evaluation.records else data_set
            lines.setdefault(_described(evaluation), []).append(count)
        yield model.name, "; ".join(f"{', '.join(data_sets)}: {text}" for text, data_sets in lines.items())


def _described(evaluation: Evaluation) -> str:
    s = evaluation.settings
    if not s:
        return "settings not recorded"
    names = {"guidance_scale": "guidance", "num_inference_steps": "steps", "resolution": "pixels", "seed": "seed"}
    known = [f"{name} {s[key]}" for key, name in names.items() if key in s]
    return ", ".join([f"{s.get('model', 'model not recorded')}", f"LoRA {s.get('lora') or 'none'}", *known])


STYLE = """
main { max-width: 1320px; }
.note { max-width: 64rem; margin-top: .35rem; }
table.comparison { font-size: .92rem; }
table.comparison th, table.comparison td { padding: .4rem .55rem; vertical-align: top; }
table.comparison small { min-height: 1.1em; }
tr.published th, tr.published td { color: var(--soft); }
tr.published td.own { color: var(--ink); }
td.average { border-left: 1px solid var(--line); }
.warning { background: var(--tint); border: 1px solid #f3d19c; border-radius: 8px; margin: .9rem 0 0;
  padding: .6rem .9rem; font-size: .9rem; }
.warning ul { margin: .2rem 0 0; padding-left: 1.1rem; }
.side-by-side { display: grid; gap: 1.2rem 1.6rem; margin-top: .9rem; align-items: end;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--models) * 118px)), 1fr)); }
.side-by-side figcaption { font-size: .88rem; margin-bottom: .3rem; }
.models { display: grid; grid-template-columns: repeat(var(--models), minmax(0, 200px)); gap: .4rem; text-align: center;
  font-size: .8rem; }
.models span, .models small { display: block; color: var(--soft); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.models img { width: 100%; aspect-ratio: 1; border-radius: 6px; display: block; }
.models img.pixels { image-rendering: pixelated; }
@media (max-width: 520px) { .models { grid-template-columns: repeat(2, 1fr); } }
"""
