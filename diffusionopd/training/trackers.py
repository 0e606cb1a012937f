"""What trackers are shown beside numbers, each in its own form: sample grids, and the table of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TRACKERS = ("tensorboard", "wandb", "swanlab", "mlflow")
"""Those of accelerate's that are tested here."""

_PLAIN_NAMES = ("swanlab", "mlflow")
_RUN_NAME = {"wandb": "name", "swanlab": "experiment_name", "mlflow": "run_name"}  # TensorBoard has the run's folder
GRID, TABLE = "samples", "evaluation"
Table = tuple[list[str], list[list[Any]]]
"""The names of columns, and rows."""


def init_kwargs(trackers: Sequence[str], run_name: str) -> dict[str, dict[str, str]]:
    """What accelerate's ``init_trackers`` passes on, by tracker: each calls the name of a run something else."""
    return {tracker: {_RUN_NAME[tracker]: run_name} for tracker in trackers if tracker in _RUN_NAME}


def names_for(tracker: Any, values: Mapping[str, float]) -> dict[str, float]:
    """The values under names that the tracker takes: some take no "@", of which evaluations' variants have one."""
    if tracker.name not in _PLAIN_NAMES:
        return dict(values)
    return {re.sub(r"[^\w ./-]", "_", name): value for name, value in values.items()}


def evaluation_table(row: Mapping[str, Any]) -> Table | None:
    """The scores `eval/<task>/<score>` of a round, a row for each task, a column for each score; None without any."""
    cells: dict[str, dict[str, float]] = {}
    for name, value in row.items():
        if name.startswith("eval/") and isinstance(value, int | float):
            task, score = name.removeprefix("eval/").split("/", 1)
            cells.setdefault(task, {})[score] = float(value)
    scores = list(dict.fromkeys(score for own in cells.values() for score in own))
    rows: list[list[Any]] = [[task, *(own.get(score) for score in scores)] for task, own in cells.items()]
    return (["task", *scores], rows) if cells else None


def as_markdown(table: Table) -> str:
    """The table as text."""
    columns, rows = table
    shown = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell or "") for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_grid(tracker: Any, path: Path, step: int) -> None:
    """Give a tracker the grid of a round, a PNG file."""
    if tracker.name == "mlflow":
        tracker.log_artifact(str(path), artifact_path=GRID)
        return
    with Image.open(path) as file:
        image = file.convert("RGB")
    if tracker.name == "tensorboard":
        tracker.log_images({GRID: np.asarray(image)[None]}, step=step, dataformats="NHWC")
    else:
        tracker.log_images({GRID: [image]}, step=step)


def show_table(tracker: Any, table: Table, step: int) -> None:
    """Give a tracker the table of an evaluation."""
    text = as_markdown(table)
    if tracker.name == "wandb":
        tracker.log_table(TABLE, columns=table[0], data=table[1], step=step)
    elif tracker.name == "mlflow":
        import mlflow

        mlflow.log_text(text, f"{TABLE}/round-{step:06d}.md")
    elif tracker.name == "swanlab":
        import swanlab

        tracker.log({TABLE: swanlab.Text(text)}, step=step)
    else:
        tracker.log({TABLE: text}, step=step)
