"""What a run tells about itself: `metrics.jsonl` and trackers. Nothing here can change the training."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusionopd.files import force_to_disk, write_atomically
from diffusionopd.training.trackers import evaluation_table, init_kwargs, names_for, show_grid, show_table


class MetricsWriter:
    """Writes one JSON object per round, and its numbers to the trackers of an `accelerate.Accelerator`.

    Trackers that fail are reported once and dropped, or only their pictures if it is these that fail: the file is the
    record, trackers are a convenience. Lines that cannot be written are kept, and written when they can be.
    """

    def __init__(self, path: str | Path | None, log_with: Sequence[str] = (), accelerator: Any = None) -> None:
        """`path` None writes no file (processes other than the first); `log_with` names the trackers in use."""
        self._path = None if path is None else Path(path)
        self._log_with, self._accelerator = log_with, accelerator
        self._tracking = {"numbers": bool(log_with), "pictures": bool(log_with)}  # until a tracker fails
        self._unwritten: list[str] = []
        self._failing = False  # and so said
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def start_trackers(self, project: str, run_name: str, config: dict[str, Any]) -> None:
        """`accelerator.init_trackers`, called by every process; a tracker that cannot start is reported and dropped."""
        own = init_kwargs(self._log_with, run_name)
        self._try(lambda: self._accelerator.init_trackers(project, config=config, init_kwargs=own))

    def write(self, row: dict[str, Any], grid: Path | None = None) -> None:
        """Write a round's row, which has its number as `round`; a value that is not finite becomes null.

        ``grid``: the file of the round's sample images, which trackers are shown if it is there, as they are the table
        of an evaluation that is in the row.
        """
        strict = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        self._unwritten.append(json.dumps(strict) + "\n")
        self._flush()
        numbers = {name: float(v) for name, v in row.items() if name != "round" and isinstance(v, int | float)}
        self._try(lambda: self._each(lambda tracker: tracker.log(names_for(tracker, numbers), step=row["round"])))
        if self._path is None:
            return  # what follows is the first process's alone
        if table := evaluation_table(strict):
            self._try(lambda: self._each(lambda tracker: show_table(tracker, table, row["round"])), "pictures")
        if grid is not None and grid.is_file():
            self._try(lambda: self._each(lambda tracker: show_grid(tracker, grid, row["round"])), "pictures")

    def sync(self) -> None:
        """Force the file to the disk; called at a checkpoint, so that a checkpoint never outlives its metrics."""
        self._flush(fsync=True)

    def close(self) -> None:
        """Write what is left and end the trackers; nothing of this can fail the run."""
        self._flush()
        if self._unwritten:
            warnings.warn(f"the metrics of {len(self._unwritten)} rounds are missing in {self._path}", stacklevel=2)
        if self._log_with:
            trackers, self._accelerator.trackers = self._accelerator.trackers, []  # `end_training` would end them again
            for tracker in trackers:
                self._try(tracker.finish, always=True)

    def truncate_after(self, round_index: int) -> None:
        """Drop the lines of later rounds, and a line that a crash cut short; called when resuming after that round."""
        if self._path is not None and self._path.exists():
            lines = self._path.read_text("utf-8", "replace").splitlines(keepends=True)
            write_atomically(self._path, "".join(x for x in lines if _round_of(x) <= round_index), fsync=True)

    def _flush(self, fsync: bool = False) -> None:
        """Write the lines that are due, or keep them; said once until it is possible again."""
        if self._path is None:
            self._unwritten.clear()
            return
        try:
            if self._unwritten:
                _append("".join(self._unwritten), self._path)
                self._unwritten.clear()
            if fsync and self._path.exists():
                force_to_disk(self._path)
        except OSError as error:
            if not self._failing:
                kept = "its metrics are kept in memory until this is possible again"
                warnings.warn(f"cannot write to {self._path}, training goes on and {kept}: {error}", stacklevel=3)
            self._failing = True
            return
        if self._failing:
            warnings.warn(f"{self._path} is written again, no round is missing", stacklevel=3)
        self._failing = False

    def _each(self, call: Callable[[Any], object]) -> None:
        for tracker in self._accelerator.trackers:
            call(tracker)

    def _try(self, call: Callable[[], object], what: str = "numbers", always: bool = False) -> None:
        """Call unless trackers, or their pictures, have failed; ``always``: then too, and silently if it fails."""
        tracking = self._tracking[what] and self._tracking["numbers"]
        if not (tracking or always):
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001 - trackers raise whatever their client library raises
            if tracking:
                named = f"tracker {', '.join(self._log_with)}"
                off = f"{named} failed and is off" if what == "numbers" else f"{named} failed: its pictures are off"
                warnings.warn(f"{off} from here on: {error!r}; metrics.jsonl goes on", stacklevel=3)
            self._tracking[what] = False


def _append(lines: str, path: Path) -> None:
    """Add lines to a file; OSError leaves it as it was."""
    end = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError:
        with suppress(OSError):
            os.truncate(path, end)
        raise


def _round_of(line: str) -> float:
    """The round of a line of metrics.jsonl; infinity if the line is no such object."""
    try:
        return json.loads(line)["round"] if line.endswith("\n") else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf
