"""The page people look at: one HTML file that needs nothing else. Data in, text out."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diffusionopd.report import plots
from diffusionopd.report.data import BASE, STUDENT, Picture, Report, Task, duration, label, percent
from diffusionopd.results import Summary

THUMBNAIL = 256  # pixels: larger pictures are shrunk to this


def render(report: Report) -> str:
    """The page as one HTML document that refers to nothing outside itself."""
    sections = [
        _headline(report),
        _section("Scores", _table(report)),
        _section("During training", _curves(report)),
        *(_section(f"Pictures: {task.name}", _gallery(task)) for task in report.tasks if task.pictures),
        _section("About this run", _facts(report.facts)),
    ]
    title = html.escape(report.title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{title}</h1></header>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{content}</section>\n"


def _headline(report: Report) -> str:
    shares = [task.gap_closed for task in report.tasks if task.gap_closed is not None]
    mean = percent(sum(shares) / len(shares) if shares else None)
    cards = "".join(_card(task) for task in report.tasks)
    return (
        f'<p class="lead">One student, distilled from {len(report.tasks)} teachers in {report.rounds} rounds '
        f"({html.escape(duration(report.seconds))}), covers on average <strong>{mean}</strong> of the way "
        f'from the base model to each task\'s own teacher.</p>\n<div class="cards">{cards}</div>\n'
    )


def _card(task: Task) -> str:
    base, teacher, student = (task.scores[model].mean for model in (BASE, task.teacher, STUDENT))
    share = task.gap_closed
    width = 100 * min(max(share or 0.0, 0.0), 1.0)
    return (
        f'<div class="card"><h3>{html.escape(task.name)}</h3><p class="big">{percent(share)}</p>'
        f'<div class="bar" role="img" aria-label="{percent(share)} of the gap closed">'
        f'<span style="width:{width:.1f}%"></span></div>'
        f'<p class="ends"><span>base {base:.3f}</span><span>student <b>{student:.3f}</b></span>'
        f"<span>teacher {teacher:.3f}</span></p></div>"
    )


def _table(report: Report) -> str:
    head = "".join(
        f'<th scope="col">{html.escape(task.name)}<small>{html.escape(task.reward)}</small></th>'
        for task in report.tasks
    )
    body = "".join(
        f'<tr class="{"student" if model == STUDENT else ""}"><th scope="row">{html.escape(label(model))}</th>'
        + "".join(_cell(task.scores[model], own=task.teacher == model) for task in report.tasks)
        + "</tr>\n"
        for model in report.models
    )
    gaps = "".join(f"<td>{percent(task.gap_closed)}</td>" for task in report.tasks)
    return (
        f'<div class="scroll"><table>\n<thead><tr><th scope="col">model</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n"
        f'<tfoot><tr><th scope="row">gap closed</th>{gaps}</tr></tfoot>\n</table></div>\n'
        '<p class="note">Mean over test prompts, with its standard error; the same prompts and the same '
        "initial noise for every model. ★ is a teacher on its own task. The gap closed is "
        "(student − base) / (own teacher − base).</p>\n"
    )


def _cell(score: Summary, own: bool) -> str:
    mark, css = (' <span aria-label="own task">★</span>', ' class="own"') if own else ("", "")
    return f"<td{css}>{score.mean:.3f}{mark}<small>± {score.standard_error:.3f}</small></td>"


def _curves(report: Report) -> str:
    figures = []
    for task in report.tasks:
        base, teacher, student = (task.scores[model] for model in (BASE, task.teacher, STUDENT))
        final = (report.rounds, student.mean, student.standard_error)
        svg = plots.score_curve(task.monitored, task.evaluated, base.mean, teacher.mean, final)
        text = (
            f"{task.reward} of the student over {report.rounds} rounds, ending at {student.mean:.3f}, "
            f"between the base model's {base.mean:.3f} and the teacher's {teacher.mean:.3f}"
        )
        figures.append(_plot(svg, task.name, text))
    losses = {task.name: task.loss for task in report.tasks if task.loss}
    if losses:
        ends = ", ".join(f"{name} from {p[0][1]:.2g} to {p[-1][1]:.2g}" for name, p in losses.items())
        figures.append(_plot(plots.loss_curves(losses), "distillation loss", f"Loss over rounds: {ends}"))
    note = (
        '<p class="note">Dots are the mean score of the few pictures that the student made for training in that round, '
        "so they scatter; the star is the finished student on the test prompts.</p>\n"
    )
    return f'<div class="plots">{"".join(figures)}</div>\n{note}'


def _plot(svg: str, title: str, text: str) -> str:
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><img alt="{html.escape(text)}" '
        f'src="{_data_uri("image/svg+xml", svg.encode())}"></figure>\n'
    )


def _gallery(task: Task) -> str:
    cards = "".join(_trio(task, picture) for picture in task.pictures)
    return (
        f'<p class="note">The first {len(task.pictures)} test prompts, not selected; under each picture its '
        f'{html.escape(task.reward)}.</p>\n<div class="gallery">{cards}</div>\n'
    )


def _trio(task: Task, picture: Picture) -> str:
    cells = []
    for model, name in ((BASE, "base"), (task.teacher, "teacher"), (STUDENT, "student")):
        score = picture.scores[model]
        alt = html.escape(f"{name} for “{picture.caption}”, score {score:.2f}")
        source = _data_uri("image/png", thumbnail(picture.files[model]))
        cells.append(f'<div><span>{name}</span><img alt="{alt}" src="{source}"><small>{score:.2f}</small></div>')
    caption = html.escape(picture.caption)
    return f'<figure><div class="trio">{"".join(cells)}</div><figcaption>{caption}</figcaption></figure>\n'


def thumbnail(file: Path) -> bytes:
    """The picture as PNG bytes, at most `THUMBNAIL` pixels a side."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>\n" for name, value in facts)
    return f"<dl>\n{rows}</dl>\n"


STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #5b6472; --line: #e2e5ea; --blue: #0b62a8; --tint: #fff4e5; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 0 0 .9rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0; color: var(--soft); }
.lead { font-size: 1.1rem; max-width: 46rem; margin: .4rem 0 1.3rem; }
.note { color: var(--soft); font-size: .88rem; margin: .7rem 0 0; max-width: 52rem; }
.gallery { margin-top: .9rem; }
section, .card { background: #fff; border: 1px solid var(--line); border-radius: 12px; }
section { padding: 1.3rem 1.4rem; margin-top: 1.25rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 1rem; }
.card { padding: 1rem 1.2rem; }
.big { font-size: 2.1rem; font-weight: 700; line-height: 1.2; margin: .1rem 0 .5rem; color: var(--blue); }
.bar { height: 10px; border-radius: 5px; background: #e6eaf0; overflow: hidden; }
.bar span { display: block; height: 100%; border-radius: 5px; background: var(--blue); }
.ends { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .8rem; font-size: .85rem;
  color: var(--soft); margin: .5rem 0 0; }
.ends b { color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; }
thead th { font-size: .9rem; vertical-align: bottom; }
tbody th { font-weight: 500; }
th small, td small { display: block; font-weight: 400; font-size: .78rem; color: var(--soft); }
td.own { background: var(--tint); font-weight: 700; }
tr.student th, tr.student td, tfoot th, tfoot td { font-weight: 700; }
tfoot th, tfoot td { border-bottom: 0; border-top: 2px solid var(--ink); color: var(--blue); }
figure { margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1.2rem; }
.plots figcaption { font-weight: 600; margin-bottom: .2rem; }
.plots img { width: 100%; height: auto; display: block; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1.1rem 1.4rem; }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem; text-align: center; font-size: .8rem; }
.trio span, .trio small { display: block; color: var(--soft); }
.trio img { width: 100%; aspect-ratio: 1; border-radius: 6px; display: block; image-rendering: pixelated; }
.gallery figcaption { font-size: .88rem; margin-top: .2rem; }
dl { margin: 0; display: grid; gap: .45rem; }
dl div { display: grid; grid-template-columns: 9rem 1fr; gap: .8rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 520px) {
  main { padding: 1.2rem .75rem 2rem; }
  section { padding: 1rem .9rem; }
  h1 { font-size: 1.4rem; }
  table { font-size: .86rem; }
  th, td { padding: .4rem .3rem; }
  th:first-child { white-space: normal; }
  dl div { grid-template-columns: 1fr; gap: 0; }
}
"""
