"""LoRAs to merge, as people keep them: a small table, of which tasks are made."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusionopd.config_schema import ConfigError, Problems, nearest
from diffusionopd.config_schema.paths import check_adapter
from diffusionopd.data.prompts import PromptError, load_prompts, with_trigger
from diffusionopd.data.tasks import FIELDS
from diffusionopd.files import located, looked_in

COLUMNS = {
    "name": "name",
    "lora": "lora_path",
    "scale": "scale",
    "trigger": "trigger",
    "prompts": "dataset",
    "guidance_scale": "guidance_scale",
}
"""Column of a table -> field of the task that is made of its row."""
NEEDED = ("name", "lora")
NUMBERS = ("scale", "guidance_scale")
PROMPTS = "dataset/merge/prompts.txt"
"""Captions of many subjects, for LoRAs that bring none."""

_FORMAT = "general_ocr"

_Rows = list[tuple[Callable[[str], str], dict[str, Any]]]  # of each: the place of a column, the cells that are filled


def read_loras(source: str | Sequence[Any]) -> list[dict[str, Any]]:
    """The entries of ``train.teachers`` that ``loras``, a table or a list of dicts, stands for.

    A path in a table is first looked for beside it. ``prompts`` is a text file or a folder, as a task's ``dataset``; or
    a template, a text with ``{prompt}``, which goes around the shipped captions. Raises ConfigError with all that is
    wrong with the rows, by file and line. Warns of LoRAs that nothing in their prompts tells apart.
    """
    problems = Problems()
    folder, rows = (
        (Path(located(source)).parent, _read_table(source, problems))
        if isinstance(source, str)
        else (Path(), _read_list(source, problems))
    )
    tasks = [_task(place, cells, folder, problems) for place, cells in rows]
    for name, count in Counter(cells.get("name") for _, cells in rows).items():
        if name and count > 1:
            last = next(place for place, cells in reversed(rows) if cells.get("name") == name)
            problems.add(last("name"), f"is {name!r}, as on another of {count} rows", "Names must differ.")
    if not rows and not problems.found:
        problems.add("loras" if not isinstance(source, str) else source, "holds no LoRA", "Give one a row.")
    if problems.found:
        raise ConfigError(problems.found)
    _warn_of_same_prompts(tasks)
    return tasks


def _read_table(source: str, problems: Problems) -> _Rows:
    path = located(source)
    header = f"Its first line names the columns: {','.join(COLUMNS)}; only {' and '.join(NEEDED)} must be there."
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = f"is {source}, which does not exist{looked_in(source)}" if not os.path.exists(path) else str(error)
        problems.add("loras", what, "Give the path of a table (CSV, UTF-8), or a list of dicts.")
        return []
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=first.count)  # spreadsheets of many countries write ;
    reader = csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows: _Rows = []
    names: list[str] | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return rows
        except csv.Error as error:  # without strict=True, a quote left open takes in the rows after it
            remedy = "Close every double quote before the end of its cell, and double those inside."
            problems.add(f"{path}, up to line {reader.line_num}", f"cannot be read as a table: {error}", remedy)
            return []
        cells, line = [cell.strip() for cell in row], reader.line_num
        if not any(cells):
            continue
        if names is None:
            names = [cell.lower() for cell in cells]
            for name in names:
                if name not in COLUMNS:
                    remedy = nearest(name, COLUMNS).strip() or header
                    problems.add(f"{path}, line {line}", f"has the unknown column {name!r}", remedy)
            if missing := [name for name in NEEDED if name not in names]:
                problems.add(f"{path}, line {line}", f"lacks the column {' and '.join(missing)}", header)
            if problems.found:
                return []
        elif len(cells) > len(names):
            remedy = "Put a text with the separator in it into double quotes."
            problems.add(f"{path}, line {line}", f"has {len(cells)} cells for {len(names)} columns", remedy)
        else:
            filled = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
            rows.append((f"{path}, line {line}, {{}}".format, filled))


def _read_list(source: Sequence[Any], problems: Problems) -> _Rows:
    rows: _Rows = []
    for index, entry in enumerate(source):
        if not isinstance(entry, Mapping):
            problems.add(f"loras[{index}]", f"is {entry!r}", f"It must be a dict with {', '.join(COLUMNS)}.")
            continue
        for name in entry.keys() - COLUMNS.keys():
            remedy = nearest(str(name), COLUMNS).strip() or f"Fields are {', '.join(COLUMNS)}."
            problems.add(f"loras[{index}].{name}", "is not a field of a LoRA", remedy)
        rows.append((f"loras[{index}].{{}}".format, {n: v for n, v in entry.items() if v is not None and n in COLUMNS}))
    return rows


def _task(place: Callable[[str], str], cells: Mapping[str, Any], folder: Path, problems: Problems) -> dict[str, Any]:
    """The task of a row."""
    fields = {COLUMNS[column]: _number(value) if column in NUMBERS else value for column, value in cells.items()}
    for column, field in COLUMNS.items():
        if (column in cells or column in NEEDED) and (problem := FIELDS[field].problem(fields.get(field, ""))):
            problems.add(place(column), *problem)
    if problems.good(place("lora")):
        fields["lora_path"] = _beside(folder, fields.get("lora_path", ""))
        check_adapter(place("lora"), located(fields["lora_path"]), problems)
    if problems.good(place("prompts"), place("trigger")):
        try:
            fields |= _prompts(fields.get("dataset", ""), fields.get("trigger", ""), folder)
        except PromptError as error:
            problems.add(place("prompts"), f"cannot be used: {error}", "")
    return {"prompt_fn": _FORMAT} | fields


def _prompts(given: str, trigger: str, folder: Path) -> dict[str, str]:
    """The fields of a task's prompts. Raises PromptError for what is none."""
    found = _beside(folder, given) if given else PROMPTS
    if "{prompt}" in given and not os.path.exists(located(found)):  # which takes a text of any length
        if "{trigger}" in given and not trigger:
            raise PromptError(f"{given!r} has {{trigger}}, but there is no trigger")
        if "{trigger}" not in given and trigger:
            given = f"{trigger}, {given}"
        found, trigger = PROMPTS, given.replace("{trigger}", trigger)
    if not os.path.exists(located(found)):
        raise PromptError(f"{given!r} is no file here, and no template: that has {{prompt}}, where a caption goes")
    with_trigger(load_prompts(located(found), _FORMAT, "train"), trigger)
    return {"dataset": found, "trigger": trigger}


def _number(value: Any) -> Any:
    """A cell's number; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _beside(folder: Path, path: str) -> str:
    """A path as it leads from the table's folder, where there is such a thing."""
    own = os.path.join(folder, path)
    return own if path and os.path.exists(own) else path


def _warn_of_same_prompts(tasks: Sequence[Mapping[str, Any]]) -> None:
    """The student cannot know which of two LoRAs is meant by one prompt."""
    alike: dict[tuple[str, str], list[str]] = {}
    for task in tasks:
        alike.setdefault((task["dataset"], task["trigger"]), []).append(task["name"])
    for (_, trigger), names in alike.items():
        if len(names) > 1:
            by = f"the trigger {trigger!r}" if trigger else "no trigger"
            listed = ", ".join(names)
            warnings.warn(f"{listed} have the same prompts and {by}: the student learns their mean", stacklevel=3)
