"""Write the tables of docs/configuration.md from the declarations of the keys.

python -m tools.configuration            # rewrites docs/configuration.md below its marker
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import pkgutil
import textwrap
from pathlib import Path

from diffusionopd.algorithms import ALGORITHMS
from diffusionopd.config_schema import Key, Schema, keys_of
from diffusionopd.config_schema.upstream import UpstreamSettings
from diffusionopd.data.tasks import Task
from diffusionopd.models.backbone import Defaults
from diffusionopd.models.loading import FAMILIES
from diffusionopd.training.keys import COMMON

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
_HEADER = "| key | default | values | on resume | |\n| --- | --- | --- | --- | --- |"
MARKER = "<!-- written by python -m tools.configuration from here on -->"


def explanations(group: type) -> dict[str, str]:
    """Field -> the text under it, of a group and what it derives from."""
    found: dict[str, str] = {}
    for cls in reversed(group.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def render() -> str:
    """The whole page: what is written by hand up to the marker, then the tables."""
    head = PAGE.read_text(encoding="utf-8").partition(MARKER)[0]
    shown: set[str] = set()
    sections = []
    own = [group for cls in ALGORITHMS.values() for group in cls.groups]
    every = (base for group in [*COMMON, *own, UpstreamSettings] for base in reversed(group.__mro__[:-1]))
    for group in dict.fromkeys(every):  # what several share comes first
        if dataclasses.is_dataclass(group) and (rows := _rows(group, shown)):
            sections.append(f"## {(inspect.getdoc(group) or '').splitlines()[0].rstrip('.')}\n\n{_HEADER}\n{rows}")
    fields = "\n".join(
        f"| `{name}` | {declared.resume} | {explanations(Task)[name]} |" for name, declared in keys_of(Task).items()
    )
    tasks = f"## The fields of a task\n\n| field | on resume | |\n| --- | --- | --- |\n{fields}"
    return head + MARKER + "\n\n" + "\n\n".join([*sections, tasks, _families()]) + "\n"


def _families() -> str:
    """What None stands for, by the pipeline that a folder's model_index.json names."""
    names = [field.name for field in dataclasses.fields(Defaults)]
    rows = [
        f"| | {' | '.join(f'`{name}`' for name in names)} | `lora_target_modules` |",
        "| --- " * (len(names) + 2) + "|",
    ]
    for pipeline, place in FAMILIES.items():
        family = pkgutil.resolve_name(place)
        own = " | ".join(str(getattr(family.DEFAULTS, name)) for name in names)
        rows.append(f"| {pipeline} | {own} | {', '.join(f'`{name}`' for name in family.LORA_TARGETS)} |")
    others = "Distilled variants have others (docs/families.md), SANA its transformer's resolution"
    note = f"{others}; `--dry_run` prints what a run takes."
    return "## What None stands for, by model family\n\n" + "\n".join(rows) + f"\n\n{note}"


def _rows(group: type, shown: set[str]) -> str:
    rows, texts = [], explanations(group)
    for field, declared in keys_of(group).items():
        if declared.name not in shown:
            shown.add(declared.name)
            users = [name for name, cls in ALGORITHMS.items() if declared.name in Schema(*cls.groups).keys]
            only = " None: the base model's own." if declared.from_model else ""
            only += f" Read by {', '.join(users)}." if users else ""
            cells = (f"`{declared.name}`", f"`{declared.default!r}`", _values(declared), declared.resume)
            rows.append(f"| {' | '.join(cells)} | {texts[field]}{only} |")
    return "\n".join(rows)


def _values(declared: Key) -> str:
    if declared.choices:
        return ", ".join(f"`{choice}`" for choice in declared.choices if choice != "") or "`True`"
    if declared.form:
        return declared.form[0]
    if declared.interval:
        return f"`{declared.interval}`"
    return {bool: "", int: "an integer"}.get(type(declared.default), "")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")
