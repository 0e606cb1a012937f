"""The page people look at: one HTML file that needs nothing else. Data in, text out."""

import html

from diffusionopd.evaluation.results import Summary
from tools.report import plots
from tools.report.data import BASE, STUDENT, Picture, Report, Task, duration, label, percent
from tools.report.document import data_uri, document, facts, section, thumbnail


def render(report: Report) -> str:
    """The page as one HTML document that refers to nothing outside itself."""
    sections = [
        _headline(report),
        section("Scores", _table(report)),
        section("During training", _curves(report)),
        *(section(f"Pictures: {task.name}", _gallery(task)) for task in report.tasks if task.pictures),
        section("About this run", facts(report.facts)),
    ]
    return document(report.title, "".join(sections))


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
        f'src="{data_uri("image/svg+xml", svg.encode())}"></figure>\n'
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
        source = data_uri("image/png", thumbnail(picture.files[model]))
        cells.append(f'<div><span>{name}</span><img alt="{alt}" src="{source}"><small>{score:.2f}</small></div>')
    caption = html.escape(picture.caption)
    return f'<figure><div class="trio">{"".join(cells)}</div><figcaption>{caption}</figcaption></figure>\n'
