"""Draw the method in one figure, with the library's own equations and the embedded tiny world's models.

    python -m tools.draw_method            # writes assets/method.png

Left: a student in the plane, with the one-step Gaussians of student and teacher at every state that it visits, before
and after one optimizer step. Right: the first round of ``config/tiny.py:mopd``, one prompt per task, with the images
that student and teacher predict at the same states.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Circle
from torch import Tensor

from diffusionopd.algorithms.opd import Opd
from diffusionopd.files import path_flag
from diffusionopd.losses import distillation_loss
from diffusionopd.rollout import Branches, Target, Velocity, Visit, rollout
from diffusionopd.training import load_config
from diffusionopd.training.setup import started
from diffusionopd.transitions import schedule

ROOT = Path(__file__).resolve().parent.parent
STUDENT, TEACHER, GREY = "#1f6fb4", "#d1661f", "#444444"
SAMPLES = {"compose": 2, "ocr": 3, "scene": 1}  # which image of the round is shown, per task
SEED = 8  # of the noise in the plane
STEPS = (0, 2, 4, 6, 8)  # at which of its ten sampler steps
TITLE = {"ha": "center", "va": "center", "fontsize": 14, "weight": "bold", "color": "#222222"}
NOTE = {"ha": "center", "va": "center", "color": GREY}


def draw(path: Path) -> None:
    """Write the figure."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 11, "mathtext.fontset": "dejavusans"})
    figure = plt.figure(figsize=(14, 7), dpi=100, facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    draw_plane(left)
    with TemporaryDirectory() as folder:
        draw_round(right, *visit_round(folder))
    figure.savefig(path)


def velocities(visit: Visit) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's."""
    assert visit.target is not None
    return visit.v.guided, visit.target.v_teacher


# --- one task in the plane --------------------------------------------------------------------------------------------


def gaussian(mean: Tensor, std: float = 0.3) -> Velocity:
    """The exact velocity of Gaussian data ``N(mean, std^2 I)``: what a model that has learnt it perfectly says."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        rest = (x - (1 - sigma) * mean) / ((1 - sigma) ** 2 * std**2 + sigma**2)
        return sigma * rest - (mean + (1 - sigma) * std**2 * rest)

    return velocity


def walk_plane(student: Tensor, teacher: Tensor) -> list[Visit]:
    """A trajectory of the student through four stochastic steps; the same noise at every call."""
    draws = torch.Generator().manual_seed(SEED)
    steps, start = schedule("flow_sde", [0.92, 0.72, 0.52, 0.32, 0.12], 0.45), torch.tensor([[-1.7, -0.2]])
    noise = lambda step: torch.randn(1, 2, generator=draws)  # noqa: E731
    ours, theirs = gaussian(student), gaussian(teacher)
    return list(
        rollout(
            start,
            steps,
            lambda x, sigma, rows: Branches(*[ours(x, sigma)] * 2),
            lambda x, sigma, rows: Target(Branches(*[theirs(x, sigma)] * 2), theirs(x, sigma)),
            trained=[range(4)],
            draw_noise=noise,
        )
    )


def draw_plane(figure: Any) -> None:
    """The visited states, the two Gaussians at each, and where the student goes after one optimizer step."""
    student, teacher = torch.tensor([[2.9, -1.5]], requires_grad=True), torch.tensor([[2.7, 2.1]])
    visits = walk_plane(student, teacher)
    torch.cat([distillation_loss(visit.transition, *velocities(visit)) for visit in visits]).sum().backward()
    assert student.grad is not None
    updated = (student - 0.5 * student.grad / student.grad.norm() * (student - teacher).norm()).detach()
    axes = figure.add_axes((0.03, 0.24, 0.94, 0.62))
    for walked, style in ((visits, "-"), (walk_plane(updated, teacher), ":")):
        states = torch.cat([walked[0].x, *(visit.x_next for visit in walked)]).detach()
        axes.plot(*states.T, style, marker="o", color=GREY, ms=5, lw=1.6, alpha=0.6 if style == ":" else 1, zorder=3)
    for visit in visits:
        means = [tuple(visit.transition.mean(visit.x, v).detach()[0].tolist()) for v in velocities(visit)]
        for mean, colour in zip(means, (STUDENT, TEACHER), strict=True):
            axes.add_patch(Circle((mean[0], mean[1]), visit.transition.std, color=colour, alpha=0.3, lw=0))
        axes.annotate("", means[1], means[0], arrowprops={"arrowstyle": "-|>", "lw": 1.8, "color": TEACHER}, zorder=4)
    axes.annotate("noise", visits[0].x[0], (-6, 14), textcoords="offset points", ha="center", color=GREY)
    axes.annotate("image", visits[-1].x_next[0].detach(), (0, -26), textcoords="offset points", ha="center", color=GREY)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.text(0.5, 0.93, "At every state that the student visits:\nKL of its next step to the teacher's", **TITLE)
    handles = [plt.Line2D([], [], color=GREY, marker="o", ls=style) for style in ("-", ":")]
    handles += [plt.Line2D([], [], color=colour, marker="o", ms=13, alpha=0.4, ls="") for colour in (STUDENT, TEACHER)]
    labels = ["the student's trajectory", "after one (large) optimizer step"]
    labels += [rf"{who}: $\mathcal{{N}}(ax + bv_{who[0].upper()},\ s^2 I)$" for who in ("student", "teacher")]
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.1), ncols=2, frameon=False)
    formula = r"$\mathrm{KL} = \frac{b^2}{2s^2}\,\Vert v_S - v_T\Vert^2$" + "      ODE step: "
    figure.text(0.5, 0.045, formula + r"$\frac{b^2}{2}\,\Vert v_S - v_T\Vert^2$", ha="center", fontsize=14)


# --- three tasks in the tiny world ------------------------------------------------------------------------------------


def visit_round(folder: str) -> tuple[list[float], list[tuple[str, str, Tensor]]]:
    """Sigmas of the steps, and of each task: its name, a prompt, and the images ``[2, steps, 3, H, W]`` that student
    (before its first update) and teacher predict there."""
    overrides = [
        ("num_epochs", "1"),
        ("eval_freq", "0"),
        ("train.tasks_per_pass", "1"),
        ("save_dir", folder),
        ("cache_dir", f"{folder}/text"),
    ]
    config = load_config(f"{ROOT / 'config' / 'tiny.py'}:mopd", overrides)
    found = []
    with started(config) as run:
        assert run is not None and isinstance(run.algorithm, Opd)
        transitions = run.algorithm.transitions
        for batch in run.batches.round(0):
            visits = [visit for _, visit in run.algorithm.rollout(batch)]
            row = SAMPLES[batch.rows[0].task]
            pairs = [[visits[n].x - transitions[n].sigma * v for v in velocities(visits[n])] for n in STEPS]
            predicted = [x0[row] for who in zip(*pairs, strict=True) for x0 in who]
            images = run.backbone.decode(torch.stack(predicted)).unflatten(0, (2, len(STEPS)))
            found.append((batch.rows[row].task, batch.rows[row].prompt.text, images))
    return [transitions[n].sigma for n in STEPS], found


def draw_round(figure: Any, sigmas: list[float], rows: list[tuple[str, str, Tensor]]) -> None:
    """For each task the student's and the teacher's images at the same states, one above the other."""
    figure.text(0.55, 0.93, "One round: every task with its own teacher,\nthen one optimizer step", **TITLE)
    figure.text(0.55, 0.865, "the image that each predicts at the same states of the student's trajectory", **NOTE)
    for column, sigma in enumerate(sigmas):
        figure.text(0.225 + column * 0.165, 0.83, rf"$\sigma = {sigma:.2f}$", **NOTE)
    size, top = (0.15, 0.114), 0.785
    for number, (task, prompt, images) in enumerate(rows):
        base = top - number * 0.266
        figure.text(0.165, base + 0.01, f"{task}:  “{prompt}”", color=GREY)
        for who, (name, colour) in enumerate((("student", STUDENT), ("teacher", TEACHER))):
            bottom = base - (who + 1) * size[1]
            figure.text(0.14, bottom + size[1] / 2, name, color=colour, ha="right", va="center", weight="bold")
            for column, image in enumerate(images[who]):
                axes = figure.add_axes((0.15 + column * 0.165, bottom, *size))
                axes.imshow(image.permute(1, 2, 0), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(color=colour, lw=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=path_flag, default=ROOT / "assets" / "method.png")
    draw(parser.parse_args().output)
